"""`--where`: inside a mask all is as without it, and nothing is computed for the rest."""

import json
import shutil

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import distance_transform_edt

from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import MegasegError, SettingsError, TargetError
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.pytorch import DeviceEngine, TorchEngine
from megaseg_dask.models import Step, load_bundle
from megaseg_dask.ngff.labels import add_label
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import relabel
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.write import write_report
from tests.fixtures.disk import read_tree
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

SHAPE = (24, 64, 96)
SPACING = {"z": 0.5, "y": 0.25, "x": 0.25}
BLOCKS = ("24,64,96", "24,32,48", "13,29,31")


def mask_of(shape=SHAPE):
    """Two objects that reach neither all blocks nor all patches."""
    mask = np.zeros(shape, "uint16")
    mask[3:9, 4:12, 5:20] = 7
    mask[15:20, 40:45, 60:63] = 300
    return mask


def add_labels(image, *levels, name="cells", scale=SPACING, axes="zyx"):
    """Write a label image of an image by zarr alone."""
    place = write_image(image / "labels" / name, *levels, scale=scale, axes=axes)
    group = zarr.open_group(place)
    ome = dict(group.attrs["ome"])
    group.attrs["ome"] = {**ome, "image-label": {"source": {"image": "../../"}}}
    listed = zarr.open_group(image / "labels", mode="a")
    names = [*dict(listed.attrs.get("ome", {})).get("labels", []), name]
    listed.attrs["ome"] = {"version": "0.5", "labels": names}
    return place


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    image = write_image(
        tmp_path_factory.mktemp("source") / "image.zarr", blobs(SHAPE), scale=SPACING
    )
    mask = mask_of()
    add_labels(image, mask, mask[::2, ::2, ::2])
    add_labels(image, np.zeros(SHAPE, "uint8"), name="nothing")
    add_labels(image, mask[:, :, :48], name="half")
    add_labels(image, mask, name="flat", scale={**SPACING, "z": 0.0})
    return image


def settings_of(bundle, **options):
    options = {"scores_dtype": "float32", "threads": 1, "block": BLOCKS[1], **options}
    return parse_settings({"model": str(bundle), **options})


def scores_of(target):
    return zarr.open_array(target / "0", mode="r")[...]


@pytest.fixture
def everywhere(source, tmp_path, tiny_bundle, cheap_engine):
    target = tmp_path / "everywhere.zarr"
    segment_here(str(source), str(target), settings_of(tiny_bundle))
    return scores_of(target)


CASES = {
    "the mask": ({"where": "cells"}, lambda mask: mask > 0),
    "a margin": (
        {"where": "cells", "where_margin": 1.5},
        lambda mask: distance_transform_edt(mask == 0, sampling=(0.5, 0.25, 0.25)) <= 1.5,
    ),
    "a coarse level": (
        {"where": "cells/1"},
        lambda mask: np.kron(mask[::2, ::2, ::2], np.ones((2, 2, 2))) > 0,
    ),
    "other voxels": ({"where": "cells", "voxel_size": (0.3, 0.4, 0.25)}, lambda mask: mask > 0),
}


@pytest.mark.parametrize("name", CASES)
def test_inside_is_as_everywhere_at_any_block_and_outside_is_background(
    name, source, tmp_path, tiny_bundle, cheap_engine
):
    options, wanted = CASES[name]
    inside = wanted(mask_of())
    target = tmp_path / "everywhere.zarr"
    same = {key: value for key, value in options.items() if not key.startswith("where")}
    segment_here(str(source), str(target), settings_of(tiny_bundle, **same))
    expected = np.where(inside, scores_of(target), 0)
    for block in BLOCKS:
        target = tmp_path / f"{block}.zarr"
        settings = settings_of(tiny_bundle, block=block, **options)
        result = segment_here(str(source), str(target), settings)
        assert result.status == "done"
        assert_array_equal(scores_of(target), expected)
    labels = zarr.open_array(target / "labels/megaseg/0", mode="r")[...]
    assert labels.any()
    assert not labels[~inside].any()


def test_a_path_is_a_mask_too_and_automatic_thresholds_are_of_what_is_predicted(
    source, tmp_path, tiny_bundle, everywhere
):
    mask = write_image(tmp_path / "mask.zarr", mask_of(), scale=SPACING)
    inside = mask_of() > 0
    expected = None
    for number, (where, block) in enumerate([(str(mask), BLOCKS[1]), ("cells", BLOCKS[0])]):
        target = tmp_path / f"{number}.zarr"
        options = {"where": where, "threshold": "otsu", "block": block}
        settings = settings_of(tiny_bundle, unmarked=where != "cells", **options)
        assert segment_here(str(source), str(target), settings).status == "done"
        assert_array_equal(scores_of(target), np.where(inside, everywhere, 0))
        labels = zarr.open_array(target / "labels/megaseg/0", mode="r")[...]
        assert labels.any()
        if expected is not None:
            assert_array_equal(labels, expected)
        expected = labels


@pytest.mark.parametrize("shards", [None, (24, 64, 64)])
def test_data_is_the_chunks_that_there_are(shards, tmp_path, tiny_bundle, cheap_engine):
    values = blobs(SHAPE)
    values[:, :32, 32:64] = values[:, 32:] = 0
    # Zarr writes no chunk of the fill value, in a shard or by itself.
    options = {"shards": shards} if shards else {}
    image = write_image(
        tmp_path / "image.zarr", values, chunks=(24, 32, 32), scale=SPACING, **options
    )
    segment_here(str(image), str(tmp_path / "all.zarr"), settings_of(tiny_bundle))
    inside = np.zeros(SHAPE, bool)
    inside[:, :32, :32] = inside[:, :32, 64:] = True
    for options in ({}, {"normalization": "900,300"}):
        target = tmp_path / f"{len(options)}.zarr"
        settings = settings_of(tiny_bundle, where="data", **options)
        result = segment_here(str(image), str(target), settings)
        assert result.status == "done"
        assert "of the source" in str(result.warnings)
        assert not scores_of(target)[~inside].any()
    expected = np.where(inside, scores_of(tmp_path / "all.zarr"), 0)
    assert_array_equal(scores_of(tmp_path / "0.zarr"), expected)


def test_each_timepoint_has_its_mask_and_an_empty_one_is_background(
    tmp_path, tiny_bundle, cheap_engine
):
    scale = {**SPACING, "t": 1.0}
    values = np.stack([blobs(SHAPE), blobs(SHAPE, 1)])
    image = write_image(tmp_path / "image.zarr", values, axes="tzyx", scale=scale)
    mask = np.stack([mask_of(), np.zeros_like(mask_of())])
    add_labels(image, mask, axes="tzyx", scale=scale)
    target = tmp_path / "out.zarr"
    settings = settings_of(tiny_bundle, where="cells", threshold="otsu")
    assert segment_here(str(image), str(target), settings).status == "done"
    scores = scores_of(target)
    assert scores[0][mask[0] > 0].all()
    assert not scores[1].any()
    assert not zarr.open_array(target / "labels/megaseg/0", mode="r")[1].any()


def test_what_a_mask_saves_is_told(source, tmp_path, tiny_bundle, cheap_engine):
    target = tmp_path / "out.zarr"
    settings = settings_of(tiny_bundle, where="cells")
    [(plan, _)] = plan_runs(str(source), str(target), settings)
    told = summarize(plan)["where"]
    assert told["blocks"] == 4
    assert 0 < told["blocks_left_out"] < 4
    assert told["predictions"] == plan.n_predicted < told["predictions_left_out"]
    segment_here(str(source), str(target), settings)
    attributes = json.loads((target / "zarr.json").read_text())["attributes"]
    provenance = attributes["megaseg"]
    assert provenance["settings"]["where"] == "cells"
    [row] = provenance["where"]
    assert row["patches"] + row["patches_left_out"] == len(plan.patch_grid)
    assert row["digest"] == plan.images[""].mask.digests[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "cell"}, "does not exist.*has label images cells, nothing, half, flat"),
        ({"where": "cells/7"}, "its levels are 0, 1"),
        ({"where": "nothing"}, "the mask is empty in the part"),
        ({"where": "flat"}, "the scale of the mask or of the image is 0"),
        ({"where": "half"}, "along x the image goes from voxel 0 to 96 of the mask, which has 48"),
        ({"where": "cells", "roi": "0:24,0:64,70:96"}, "the mask is empty in the part"),
        ({"where_margin": 1}, "give one with --where"),
        (
            {"where": "cells", "label_name": "cells", "outputs": "labels"},
            "this run would replace it; choose another --label-name",
        ),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(options, message, source, tmp_path, tiny_bundle):
    target = source if "label_name" in options else tmp_path / "out.zarr"
    with pytest.raises(SettingsError, match=message):
        plan_runs(str(source), str(target), settings_of(tiny_bundle, **options))
    assert not (tmp_path / "out.zarr.run").exists()


@pytest.mark.parametrize("option", ["where", "regions"])
def test_an_image_is_no_mask_and_no_regions_unless_something_says_so(
    option, source, tmp_path, tiny_bundle
):
    def plan_with(address, **options):
        options |= {"outputs": "labels,measurements", option: str(address)}
        return plan_runs(
            str(source), str(tmp_path / "out.zarr"), settings_of(tiny_bundle, **options)
        )

    other = write_image(tmp_path / "other.zarr", blobs(SHAPE, 1), scale=SPACING)
    with pytest.raises(MegasegError, match=r"not marked as a label image.*--unmarked") as refused:
        plan_with(other)
    assert refused.value.exit_code == 2
    # A person, the type of its voxels, or a list says so.
    assert plan_with(other, unmarked=True)
    assert plan_with(write_image(tmp_path / "bool.zarr", mask_of() > 0, scale=SPACING))
    listed = write_image(other / "labels/plain", mask_of(), scale=SPACING)
    with pytest.raises(MegasegError, match="not marked"):
        plan_with(listed)
    add_label(Location.of(other), "0.5", "plain")
    assert plan_with(listed)


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("where", "apart"),
        pytest.param("where", "in place", marks=pytest.mark.slow),
        pytest.param("regions", "apart", marks=pytest.mark.slow),
        ("regions", "in place"),
        # Labels made again have no mask of their own.
        ("regions", "relabel"),
    ],
)
def test_labels_that_are_read_are_not_replaced(
    option, place, source, tmp_path, tiny_bundle, cheap_engine
):
    image = shutil.copytree(source, tmp_path / "image.zarr")
    target = image if place == "in place" else tmp_path / "out.zarr"
    outputs = "labels,measurements" if place == "in place" else "labels,scores,measurements"
    first = settings_of(tiny_bundle, outputs=outputs, scores_dtype="float32")
    assert segment_here(str(image), str(target), first).status == "done"
    labels = target / "labels/megaseg"
    before = read_tree(target)

    def again():
        if place != "relabel":
            update = {option: str(labels), "overwrite": True}
            return segment_here(str(image), str(target), first.model_copy(update=update))
        options = {"workers": 0, "overwrite": True, "outputs": "labels,measurements"}
        new = parse_settings({**options, "label_name": "again"})
        assert relabel(str(target), new).status == "done"
        before.update(read_tree(target))
        update = {"regions": str(target / "labels/again")}
        return relabel(str(target), new.model_copy(update=update))

    with pytest.raises(SettingsError, match=f"--{option} .*this run would replace it"):
        again()
    assert read_tree(target) == before


@pytest.mark.parametrize("option", ["where", "regions"])
def test_the_image_itself_is_no_mask_and_no_regions(option, tmp_path, tiny_bundle):
    image = str(write_image(tmp_path / "image.zarr", blobs(SHAPE)))
    settings = settings_of(tiny_bundle, outputs="labels,measurements", **{option: image})
    with pytest.raises(SettingsError, match=f"--{option} .*this is the image that is segmented"):
        plan_runs(image, str(tmp_path / "out.zarr"), settings)


def test_a_margin_needs_to_know_the_size_of_voxels(tmp_path, tiny_bundle):
    image = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    add_labels(image, mask_of(), scale=None)
    group = zarr.open_group(image)
    ome = dict(group.attrs["ome"])
    for axis in ome["multiscales"][0]["axes"]:
        axis.pop("unit")
    group.attrs["ome"] = ome
    settings = settings_of(tiny_bundle, where="cells", where_margin=2)
    with pytest.raises(SettingsError, match="z has no unit"):
        plan_runs(str(image), str(tmp_path / "out.zarr"), settings)


@pytest.mark.parametrize(
    "options",
    [
        {"where": "cells"},
        {"where": "cells", "where_margin": 1.5},
        {"where": "cells", "roi": "0:24,0:50,0:96"},
        {"where": "data"},
    ],
)
def test_a_mask_that_is_left_out_is_another_run(
    options, source, tmp_path, tiny_bundle, cheap_engine
):
    target = tmp_path / "out.zarr"
    segment_here(str(source), str(target), settings_of(tiny_bundle, **options))
    left_out = {name: value for name, value in options.items() if name == "roi"}
    with pytest.raises(TargetError, match=rf"where: was {options['where']}, now None"):
        plan_runs(str(source), str(target), settings_of(tiny_bundle, **left_out))


def test_a_mask_that_changes_is_refused(source, tmp_path, tiny_bundle, cheap_engine):
    image = tmp_path / "image.zarr"
    shutil.copytree(source, image)
    target = str(tmp_path / "out.zarr")
    settings = settings_of(tiny_bundle, where="cells", outputs="scores")

    def change(event):
        if event.kind == "progress" and event.stage == "measure":
            zarr.open_array(image / "labels/cells/0")[18, 50, 80] = 1

    result = segment_here(str(image), target, settings, emit=change)
    assert "the mask of --where changed" in result.failures[0].error
    with pytest.raises(Exception, match="mask: was"):
        segment_here(str(image), target, settings)


FIELDS = {
    "A/1/0": FieldSpec(("dna",), (24, 40, 48)),
    "A/1/1": FieldSpec(("dna",), (24, 40, 48), seed=1),
    # Of larger voxels.
    "B/1/0": FieldSpec(("dna",), (24, 40, 48), seed=2, outer=(0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("options", [{"where": "cells"}, {"voxel_size": (0.4, 0.2, 0.3)}])
def test_each_field_of_a_plate_has_its_own_mask_and_its_own_voxels(
    options, tmp_path, tiny_bundle, cheap_engine
):
    plate = write_fields(tmp_path / "plate.zarr", "0.5", FIELDS)
    for number, place in enumerate(FIELDS):
        size = 2 if FIELDS[place].outer else 1
        mask = np.zeros((24, 40, 48), "uint8")
        mask[2:9, 10 * number : 10 * number + 8, 5:30] = 1
        if place != "A/1/1":
            add_labels(plate / place, mask, scale={k: v * size for k, v in SPACING.items()})
    target = tmp_path / "out.zarr"
    result = segment_here(str(plate), str(target), settings_of(tiny_bundle, **options))
    done = set(FIELDS)
    if "where" in options:
        done.remove("A/1/1")
        [failure] = result.failures
        assert "A/1/1" in str(failure)
        assert "no label image" in failure.error
    else:
        assert result.status == "done"
    for place in done:
        alone = tmp_path / f"{place.replace('/', '-')}.zarr"
        segment_here(str(plate / place), str(alone), settings_of(tiny_bundle, **options))
        assert scores_of(alone).any()
        assert_array_equal(scores_of(target / place), scores_of(alone))


def test_a_plate_takes_its_masks_from_a_plate_and_never_from_one_image(
    tmp_path, tiny_bundle, cheap_engine
):
    shape = (16, 32, 32)
    fields = {name: FieldSpec(("dna",), shape) for name in ("A/1/0", "A/1/1")}
    plate = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    masks = write_fields(tmp_path / "masks.zarr", "0.5", fields)
    strict = {}
    for number, place in enumerate(fields):
        strict[place] = np.zeros(shape, "uint8")
        strict[place][:, 16 * number : 16 * number + 8] = 1
        for name, mask in (("strict", strict[place]), ("loose", np.ones(shape, "uint8"))):
            add_labels(masks / place, mask, mask[:, ::2, ::2], name=name)
    target = tmp_path / "out.zarr"

    def segment_in(where, target=target, **options):
        options = {"where": str(where), "outputs": "scores", "block": "16,32,32", **options}
        return segment_here(str(plate), str(target), settings_of(tiny_bundle, **options))

    with pytest.raises(SettingsError, match=r"give the path of one, .*masks\.zarr/strict for"):
        segment_in(masks)
    one = masks / "A/1/0/labels/strict"
    for where in (one, one / "0", masks / "A/1/0"):
        with pytest.raises(
            SettingsError, match="is one image; a plate needs a plate of label images"
        ):
            segment_in(where)
    with pytest.raises(SettingsError, match="A/1/0 has no label image strick; it has strict, loo"):
        segment_in(masks / "strick")
    assert not target.exists()
    assert segment_in(masks / "strict").status == "done"
    for place, mask in strict.items():
        assert_array_equal(scores_of(target / place)[0] > 0, mask > 0)
    with pytest.raises(SettingsError, match="A/1/0 has no label image strick"):
        segment_in(masks / "strick/1", tmp_path / "level.zarr")
    with pytest.raises(SettingsError, match="strict/7"):
        segment_in(masks / "strict/7", tmp_path / "level.zarr")
    assert segment_in(masks / "strict/1", tmp_path / "level.zarr").status == "done"
    for place in strict:
        assert_array_equal(scores_of(tmp_path / "level.zarr" / place), scores_of(target / place))
    alone = tmp_path / "alone.zarr"
    assert segment_in(one, alone, fields="1").status == "done"
    assert_array_equal(scores_of(alone / "A/1/1")[0] > 0, strict["A/1/0"] > 0)


def test_a_device_predicts_what_a_mask_wants_on_another_grid(tiny_bundle):
    spec = EngineSpec("torch", "cpu", "fp32", 1, False)
    bundle = load_bundle(tiny_bundle)
    values = blobs(SHAPE)[None]
    grid = PatchGrid((40, 40, 96), (16, 32, 32), (0.5, 0.5, 0.5), SHAPE)
    core = Box((3, 0, 20), (20, 50, 96))
    block = Block(
        core,
        values[:, *grid.read_box(core).slices],
        Patches(grid),
        Preparation((Step("zscore"),), (Normalization(1000.0, 400.0),)),
        ~(mask_of() > 0)[core.slices],
        (mask_of() > 0)[core.slices],
    )
    [host] = TorchEngine(bundle, spec).predict_block(block)
    [device] = DeviceEngine(bundle, spec).predict_block(block)
    wanted = mask_of()[core.slices] > 0
    assert_allclose(device.logits()[wanted], host.logits()[wanted], atol=1e-5)
    assert np.isnan(device.logits()[~wanted]).all()
    assert_array_equal(device.mask(0.5), host.mask(0.5))


@pytest.mark.parametrize("threshold", ["otsu", "li", 0.6])
def test_relabelling_what_a_mask_left_is_as_a_new_run(
    threshold, source, tmp_path, tiny_bundle, cheap_engine
):
    kept, target = tmp_path / "kept.zarr", tmp_path / "new.zarr"
    options = {"where": "cells", "where_margin": 2, "voxel_size": (0.4, 0.3, 0.25)}
    settings = settings_of(tiny_bundle, keep_logits=True, **options)
    segment_here(str(source), str(kept), settings)
    segment_here(str(source), str(target), settings_of(tiny_bundle, threshold=threshold, **options))
    again = parse_settings({"threshold": threshold, "label_name": "again", "workers": 0})
    assert relabel(str(kept), again).status == "done"
    [old, new] = [
        zarr.open_array(place, mode="r")[...]
        for place in (kept / "labels/again/0", target / "labels/megaseg/0")
    ]
    assert new.any()
    assert_array_equal(old, new)
    page = write_report(str(kept), label_name="megaseg")
    assert "blocks left out:" in page.path.read_text()
