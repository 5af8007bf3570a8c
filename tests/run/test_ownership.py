"""Whose data stand at a target.

A run touches what it made, and knows it again; all else it refuses.
"""

import shutil

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.ngff.labels import list_labels
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

SHAPE = (20, 40, 50)


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))

    def call(target="out.zarr", source=source, **options):
        settings = parse_settings(
            {
                "model": str(tiny_bundle),
                "threads": 1,
                "overlap": 0,
                **options,
            }
        )
        result = segment_here(str(source), str(tmp_path / target), settings)
        assert result.status == "done", result.failures
        return result

    return call


def test_an_image_put_where_a_run_had_been_is_never_removed(run, tmp_path):
    run()
    shutil.move(tmp_path / "out.zarr", tmp_path / "kept.zarr")
    raw = blobs(SHAPE, seed=9)
    write_image(tmp_path / "out.zarr", raw)
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="did not write"):
            run(overwrite=overwrite)
    assert_array_equal(zarr.open_group(tmp_path / "out.zarr")["0"][...], raw)


def test_another_image_of_the_same_form_is_not_already_done(run, tmp_path):
    run()
    other = write_image(tmp_path / "other.zarr", blobs(SHAPE, seed=5))
    with pytest.raises(TargetError, match="is another image"):
        run(source=other)
    moved = shutil.copytree(tmp_path / "image.zarr", tmp_path / "moved.zarr")
    assert run(source=moved).already_done


@pytest.mark.parametrize(("before", "after"), [("0.4", "0.5"), ("0.5", "0.4")])
def test_another_version_overwrites(run, tmp_path, before, after):
    outputs = "labels,scores,mask,measurements"
    run(ome_zarr=before, outputs=outputs)
    expected = zarr.open_group(tmp_path / "out.zarr")["labels/megaseg/0"][...]
    run(ome_zarr=after, outputs=outputs, overwrite=True)
    assert_array_equal(zarr.open_group(tmp_path / "out.zarr")["labels/megaseg/0"][...], expected)
    assert (
        zarr.open_group(tmp_path / "out.zarr").metadata.zarr_format == {"0.4": 2, "0.5": 3}[after]
    )


def test_another_version_is_refused_before_anything_is_removed_where_other_labels_stay(
    run, tmp_path
):
    run(ome_zarr="0.4")
    (tmp_path / "out.zarr/tables/by-hand").mkdir(parents=True)
    (tmp_path / "out.zarr/tables/.zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(TargetError, match=r"tables is a Zarr v2"):
        run(ome_zarr="0.5", overwrite=True, outputs="labels,scores,measurements")
    shutil.copytree(tmp_path / "out.zarr/labels/megaseg", tmp_path / "out.zarr/labels/by-hand")
    with pytest.raises(TargetError, match=r"labels is a Zarr v2"):
        run(ome_zarr="0.5", overwrite=True)
    assert zarr.open_group(tmp_path / "out.zarr")["labels/megaseg/0"].shape == SHAPE


def test_an_image_apart_from_its_source_has_the_scores_of_one_run(run, tmp_path):
    run(label_name="a")
    with pytest.raises(TargetError, match="holds outputs of --label-name a,"):
        run(label_name="b", threshold=0.7)
    run(label_name="b", threshold=0.7, overwrite=True)
    target = str(tmp_path / "out.zarr")
    assert [(each.label_name, each.done) for each in status(target)] == [("b", True)]
    # The labels of the first stay.
    assert list_labels(Location.of(target)) == ["a", "b"]
    with pytest.raises(TargetError, match="holds outputs of --label-name b,"):
        run(label_name="a")
    shutil.rmtree(target)
    run(label_name="c")
    assert [(each.label_name, each.done) for each in status(target)] == [("c", True)]
    with pytest.raises(SettingsError, match="_mask"):
        run(label_name="a_mask")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_target_lies_in_no_image_or_plate_of_others(version, run, tmp_path):
    write_image(tmp_path / "other.zarr", blobs((16, 32, 32)), version=version)
    write_fields(tmp_path / "plate.zarr", version, {"A/1/0": FieldSpec(("dna",))})
    (tmp_path / "link").symlink_to("plate.zarr/A")
    zarr.open_group(tmp_path / "group.zarr", mode="w", attributes={"by": "hand"})
    run("ours.zarr")
    before = sorted(tmp_path.rglob("*"))
    for folder in (
        *("other.zarr", "other.zarr/labels", "other.zarr/labels/a", "other.zarr/0"),
        *("plate.zarr", "plate.zarr/A", "plate.zarr/A/1", "plate.zarr/A/1/0", "link/1"),
        *("ours.zarr/labels", "ours.zarr/labels/megaseg"),
    ):
        with pytest.raises(TargetError, match=r"lies inside /.*choose a folder outside"):
            run(f"{folder}/new")
    assert sorted(tmp_path.rglob("*")) == before
    run("group.zarr/new")
    field = tmp_path / "plate.zarr/A/1/0"
    run("plate.zarr/A/1/0", source=field, outputs="labels")


def test_labels_of_many_names_stand_in_a_source(run, tmp_path):
    for name in ("a", "b"):
        run("image.zarr", label_name=name, outputs="labels")
    runs = status(str(tmp_path / "image.zarr"))
    assert [(each.label_name, each.done) for each in runs] == [("a", True), ("b", True)]


def test_a_run_of_another_name_replaces_all_fields_of_a_plate_or_none(run, tmp_path):
    fields = {"A/1/0": FieldSpec(("dna",)), "A/2/0": FieldSpec(("dna",), seed=1)}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    run(source=source, label_name="a", wells="A/1")
    for wells in ("A/1", "A/2"):
        with pytest.raises(TargetError, match="holds outputs of --label-name a,"):
            run(source=source, label_name="b", wells=wells)
    with pytest.raises(TargetError, match="A/1/0 is not chosen"):
        run(source=source, label_name="b", wells="A/2", overwrite=True)
    run(source=source, label_name="b", overwrite=True)
    runs = status(str(tmp_path / "out.zarr"))
    assert [(each.label_name, each.done) for each in runs] == [("b", True)]


def test_labels_alone_are_a_target_of_their_own(run, tmp_path):
    run(outputs="labels")
    assert run(outputs="labels").already_done
    shutil.rmtree(tmp_path / "out.zarr.run")
    with pytest.raises(TargetError, match="no run of megaseg is recorded"):
        run(outputs="labels")
    run(outputs="labels", overwrite=True)


def test_labels_in_place_have_the_levels_of_the_image(run, tmp_path):
    image = write_image(tmp_path / "wide.zarr", blobs((16, 40, 600)))
    settings = {"outputs": "labels", "source": image}
    run("wide.zarr", **settings)
    group = zarr.open_group(image)
    assert sorted(group["labels/megaseg"].array_keys()) == ["0"]
    assert run("wide.zarr", **settings).already_done


@pytest.mark.parametrize("value", [1e200, 3e38])
def test_a_voxel_that_overflows_the_network_is_a_failure(tmp_path, tiny_bundle, value):
    image = blobs(SHAPE).astype(np.float64)
    image[3, 4, 5] = value
    source = write_image(tmp_path / "image.zarr", image)
    options = {"model": str(tiny_bundle), "threads": 1, "overlap": 0}
    result = segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    if value > 1e100:
        assert result.status == "failed"
        assert "rescale" in result.failures[0].error
    else:
        assert result.status == "done"


@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:Object at")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_readers_of_consolidated_metadata_see_what_is_there(run, tmp_path, version):
    image = write_image(tmp_path / "cells.zarr", blobs(SHAPE), version=version)
    zarr.consolidate_metadata(image)
    run("cells.zarr", source=image, outputs="labels,measurements")
    zarr.consolidate_metadata(
        image
    )  # as another program does, which changes the order of the entries
    run("cells.zarr", source=image, outputs="labels,mask", label_name="b")
    found, stored = zarr.open_consolidated(image), zarr.open_group(image, use_consolidated=False)
    for path in ("0", "labels/megaseg/0", "labels/b/0", "labels/b_mask/0"):
        assert_array_equal(found[path][...], stored[path][...])
    for path in ("", "labels", "labels/megaseg", "labels/b", "tables/megaseg"):
        assert (found[path] if path else found).attrs.asdict() == (
            stored[path] if path else stored
        ).attrs.asdict()
    run("cells.zarr", source=image, outputs="labels", label_name="b", overwrite=True)
    assert "b_mask" in zarr.open_consolidated(image)["labels"], (
        "what the new run does not write is left alone"
    )


@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:Object at")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_tells_of_labels_in_one_of_its_fields(run, tmp_path, version):
    plate = Plate(version, "screen", ("A",), ("1",), (Field("A", "1", "0"),))
    write_plate(Location.of(tmp_path / "screen.zarr"), plate, version)
    image = write_image(tmp_path / "screen.zarr/A/1/0", blobs(SHAPE), version=version)
    zarr.consolidate_metadata(tmp_path / "screen.zarr")
    run("screen.zarr/A/1/0", source=image, outputs="labels")
    found = zarr.open_consolidated(tmp_path / "screen.zarr")["A/1/0"]
    assert_array_equal(
        found["labels/megaseg/0"][...], zarr.open_array(image / "labels/megaseg/0")[...]
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_what_was_measured_in_labels_goes_with_them(run, tmp_path, version):
    options = {"ome_zarr": version, "threshold": 0.4}
    run(outputs="labels,scores,measurements", **options)
    table, group = tmp_path / "out.zarr.measurements.parquet", tmp_path / "out.zarr/tables"
    assert table.exists()
    assert (group / "megaseg/table.parquet").exists()
    run(outputs="labels,scores", overwrite=True, **options)
    assert not table.exists()
    assert not group.exists()


def test_a_group_that_repeats_nothing_is_left_so(run, tmp_path):
    image = write_image(tmp_path / "cells.zarr", blobs(SHAPE))
    before = (image / "zarr.json").read_bytes()
    run("cells.zarr", source=image, outputs="labels")
    assert (image / "zarr.json").read_bytes() == before
