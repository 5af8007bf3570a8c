"""Label images on a store, compared block by block, as whole arrays are."""

import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import zarr
from typer.testing import CliRunner

from megaseg_dask.algorithms import matching
from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import MegasegError, SettingsError, SourceError
from megaseg_dask.stores import Location
from megaseg_dask.tools import evaluate
from tests.fixtures.images import write_image


def labels(seed: int, shape=(20, 70, 90)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 9, tuple(-(-n // 10) for n in shape))
    return np.kron(coarse, np.ones((10,) * len(shape), int))[tuple(map(slice, shape))].astype(
        np.uint32
    )


@pytest.fixture
def pair(tmp_path):
    ours, truth = (
        labels(1),
        np.where(np.random.default_rng(0).random((20, 70, 90)) < 0.9, labels(1), 0),
    )
    return (
        write_image(tmp_path / "ours.zarr", ours),
        write_image(tmp_path / "truth.zarr", truth.astype(np.uint16)),
        matching.evaluate(ours, truth),
    )


def test_blocks_give_the_scores_of_the_whole(pair):
    ours, truth, expected = pair
    found = evaluate.evaluate_images(Location.of(ours), Location.of(truth), (7, 32, 41))
    assert found == expected


def test_an_object_is_known_by_timepoint_and_id(tmp_path):
    first, second = labels(1), labels(2)
    ours = write_image(tmp_path / "ours.zarr", np.stack([first, second]), axes="tzyx")
    truth = write_image(
        tmp_path / "truth.zarr", np.stack([first, second]).astype("u2"), axes="tzyx"
    )
    found = evaluate.evaluate_images(Location.of(ours), Location.of(truth))
    assert found.n_true == sum(len(np.unique(v)) - (0 in v) for v in (first, second))
    assert found.mean_average_precision == 1


def test_the_command_prints_a_table_json_or_csv(pair):
    ours, truth, expected = pair

    def run(*options):
        words = ["evaluate", str(ours), str(truth), *options]
        return CliRunner().invoke(build_app(), words)

    table = run("--unmarked")
    assert table.exit_code == 0
    assert f"{expected.dice:.4f}" in table.output
    found = json.loads(run("--unmarked", "--json").stdout)
    assert found["dice"] == expected.dice
    assert len(found["matchings"]) == 10
    csv = run("--unmarked", "--csv").stdout.splitlines()
    assert len(csv) == 11
    assert len({line.count(",") for line in csv}) == 1


def test_images_that_cannot_be_compared_are_refused(pair, tmp_path):
    ours, _, _ = pair
    other = write_image(tmp_path / "other.zarr", labels(1, (20, 70, 80)))
    floats = write_image(tmp_path / "floats.zarr", labels(1).astype("f4"))
    with pytest.raises(SourceError, match="shapes"):
        evaluate.evaluate_images(Location.of(ours), Location.of(other))
    with pytest.raises(SourceError, match="labels are integers"):
        evaluate.evaluate_images(Location.of(ours), Location.of(floats))
    with pytest.raises(SourceError, match="does not exist"):
        evaluate.find_labels(str(tmp_path / "nothing.zarr"))


def test_an_image_is_not_taken_for_labels(pair):
    import zarr

    ours, truth, _ = pair
    words = ["evaluate", str(ours), str(truth)]
    for labels_of, other in ((ours, truth), (truth, ours)):
        group = zarr.open_group(labels_of)
        plain = group.attrs["ome"]
        group.attrs["ome"] = {**plain, "image-label": {}}
        refused = CliRunner().invoke(build_app(), words)
        assert refused.exit_code == 2
        assert f"{other} is not marked as a label image" in refused.output
        assert "labels/NAME" in refused.output
        group.attrs["ome"] = plain


def test_a_label_image_is_found_in_its_image_or_asked_for(pair, tmp_path):
    import zarr

    ours, _, _ = pair
    assert evaluate.find_labels(str(ours)) == Location.of(ours)
    for name in ("cells", "nuclei"):
        write_image(ours / "labels" / name, labels(1))
    zarr.open_group(ours / "labels").attrs["ome"] = {
        "version": "0.5",
        "labels": ["cells", "nuclei"],
    }
    with pytest.raises(SettingsError, match="cells, nuclei; choose one with --label"):
        evaluate.find_labels(str(ours))
    assert evaluate.find_labels(str(ours), "nuclei") == Location.of(ours) / "labels/nuclei"
    with pytest.raises(SettingsError, match="no label image mito"):
        evaluate.find_labels(str(ours), "mito")


def test_scores_are_no_labels(pair):
    import zarr

    ours, truth, _ = pair
    zarr.open_group(ours).attrs["megaseg"] = {"unfinished": "0"}
    with pytest.raises(SourceError, match="holds scores; labels are integers"):
        evaluate.evaluate_images(Location.of(ours), Location.of(truth))


@pytest.mark.parametrize("labels_group", ['{"labels": 5}', "{", "[" * 100_000], ids=len)
def test_a_list_of_labels_that_is_none_never_ends_raw(labels_group, tmp_path):
    image = write_image(tmp_path / "image.zarr", labels(1))
    (image / "labels").mkdir()
    text = f'{{"zarr_format": 3, "node_type": "group", "attributes": {{"ome": {labels_group}}}}}'
    (image / "labels/zarr.json").write_text(text)
    with suppress(MegasegError):
        assert evaluate.find_labels(str(image)) == Location.of(image)


def test_a_tiff_of_labels_is_read_directly(tmp_path, pair):
    ours, truth, expected = pair
    path = tmp_path / "truth.tif"
    values = zarr.open_array(truth / "0", mode="r")[...]
    tifffile.imwrite(path, values, photometric="minisblack", metadata=None)
    words = ["evaluate", str(ours), str(path), "--json"]
    found = CliRunner().invoke(build_app(), [*words, "--unmarked"])
    assert found.exit_code == 0
    assert json.loads(found.stdout)["dice"] == expected.dice
    intensities = np.random.default_rng(0).integers(0, 3000, values.shape, "uint16")
    tifffile.imwrite(tmp_path / "image.tif", intensities, photometric="minisblack", metadata=None)
    words = ["evaluate", str(path), str(tmp_path / "image.tif")]
    found = CliRunner().invoke(build_app(), words)
    assert found.exit_code == 2
    assert "image.tif looks like intensities" in found.output
    assert CliRunner().invoke(build_app(), [*words, "--unmarked"]).exit_code == 0
    tifffile.imwrite(path, values.astype("float32"), photometric="minisblack", metadata=None)
    found = CliRunner().invoke(build_app(), ["evaluate", str(ours), str(path), "--unmarked"])
    assert found.exit_code == 2
    assert "labels are integers" in found.output


def evaluation_of(folder, ours, truth, axes="zyx", **options):
    predicted = write_image(folder / "predicted.zarr", ours, axes=axes)
    true = write_image(folder / "true.zarr", truth, axes=axes)
    return evaluate.evaluate_images(Location.of(predicted), Location.of(true), **options)


@pytest.mark.parametrize("how", ["negative", "named"])
def test_voxels_that_are_not_annotated_are_left_out(how, tmp_path):
    truth = labels(2).astype("i8")
    ours = labels(1)
    unknown = -1 if how == "negative" else 77
    truth[:, 30:50] = unknown
    ignored = () if how == "negative" else (unknown,)
    found = evaluation_of(tmp_path, ours, truth, block_shape=(7, 32, 41), ignored=ignored)
    is_known = truth != unknown
    expected = matching.evaluate(ours[is_known], truth[is_known])
    assert found.not_annotated_voxels == np.count_nonzero(~is_known)
    assert replace(found, not_annotated_voxels=0) == expected


def test_a_truth_without_annotation_and_a_prediction_below_zero_are_refused(tmp_path):
    with pytest.raises(SourceError, match="annotates no voxel"):
        evaluation_of(tmp_path / "a", labels(1), np.full((20, 70, 90), -1, "i2"))
    with pytest.raises(SourceError, match=r"predicted.zarr: labels must not be negative, found -3"):
        evaluation_of(tmp_path / "b", np.full((20, 70, 90), -3, "i2"), labels(1))


@pytest.mark.parametrize("offset", [2**40, 2**41 + 1, 2**63])
def test_ids_of_any_size_are_those_of_their_timepoint(offset, tmp_path):
    small = np.stack([labels(1), labels(2)]).astype("u8")
    large = np.where(small > 0, small + np.uint64(offset), 0).astype("u8")
    large[1] = small[1]
    assert evaluation_of(tmp_path / "a", large, small, "tzyx") == evaluation_of(
        tmp_path / "b", small, small, "tzyx"
    )


def test_label_images_of_several_channels_are_refused(tmp_path):
    several = np.stack([labels(1), labels(2)])
    with pytest.raises(SourceError, match="has 2 channels; expected a label image with one"):
        evaluation_of(tmp_path, several, several, "czyx")


def test_what_makes_a_comparison_doubtful_is_told(tmp_path):
    ids = labels(1)
    ours = write_image(tmp_path / "ours.zarr", ids)
    larger = write_image(tmp_path / "larger.zarr", ids, scale={"z": 2.0})
    moved = write_image(tmp_path / "moved.zarr", ids)
    group = zarr.open_group(moved)
    ome = group.attrs["ome"]
    place = {"type": "translation", "translation": [0.0, 7.0, 0.0]}
    ome["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(place)
    group.attrs["ome"] = ome

    def told_of(truth, **options):
        told = []
        found = evaluate.evaluate_images(
            Location.of(ours), Location.of(truth), tell=told.append, **options
        )
        assert found.dice == found.seg == found.det == 1
        return told

    assert told_of(ours, ignored=(0,)) == []
    [text] = told_of(larger)
    assert "other sizes: 1, 1, 1 and 2, 1, 1 µm" in text
    [text] = told_of(moved)
    assert "other places: 0, 0, 0 and 0, 7, 0 µm" in text
    [text] = told_of(ours, ignored=(2, 2**70))
    assert f"--ignore {2**70}" in text
    words = ["evaluate", str(ours), str(moved), "--unmarked", "--ignore", "77"]
    printed = CliRunner().invoke(build_app(), words)
    assert printed.exit_code == 0
    assert printed.stderr.count("megaseg: warning") == 2
