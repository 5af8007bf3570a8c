"""Regions of a run: both tables at any block, in ngio's form; wrong ones are refused."""

import numpy as np
import pandas
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.ngff.labels import add_label
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import relabel
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

SHAPE = (24, 50, 70)
SCALE = {"z": 0.5, "y": 0.2, "x": 0.2}


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    def call(target="out.zarr", **options):
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "outputs": "labels,scores,measurements",
            "threshold": "otsu",
            **options,
        }
        result = segment_here(
            str(tmp_path / "image.zarr"), str(tmp_path / target), parse_settings(options)
        )
        assert result.status == "done", result.failures
        read = [
            pandas.read_parquet(tmp_path / f"{target}.{kind}.parquet")
            for kind in ("measurements", "regions")
        ]
        return tuple(read)

    return call


@pytest.fixture
def cells():
    """Regions that cross blocks: slabs along x, with gaps."""
    regions = np.zeros(SHAPE, np.uint16)
    for number in range(4):
        regions[:, 4 * number :, 17 * number : 17 * number + 15] = 10 * (number + 1)
    return regions


@pytest.fixture
def source(tmp_path, cells):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), scale=SCALE)
    write_label(path / "labels/cells", cells)
    add_label(Location.of(path), "0.5", "cells")
    return path


def write_label(path, labels):
    write_image(path, labels, scale=SCALE)
    group = zarr.open_group(path, mode="r+")
    group.attrs["ome"] = {**group.attrs["ome"], "image-label": {}}
    return path


def test_both_tables_are_the_same_at_any_block(run, source, tmp_path, cells):
    split = run("split.zarr", regions="cells", block="13,17,29")
    whole = run("whole.zarr", regions="cells", block="24,50,70")
    for one, other in zip(split, whole, strict=True):
        pandas.testing.assert_frame_equal(one, other, check_exact=True)
    objects, regions = whole
    assert regions.label.tolist() == [10, 20, 30, 40]
    labels = zarr.open_array(tmp_path / "whole.zarr/labels/megaseg/0", mode="r")[...]
    assert regions.structure_voxels.tolist() == [
        ((cells == r) & (labels > 0)).sum() for r in regions.label
    ]
    assert regions.n_objects.tolist() == [(objects.region == r).sum() for r in regions.label]
    largest = objects.loc[objects.volume_voxels.idxmax()]
    counts = np.bincount(cells[labels == largest.label])
    assert largest.region == counts[1:].argmax() + 1
    assert largest.region_share == counts[1:].max() / largest.volume_voxels


def test_regions_of_another_store_with_a_region_of_interest(run, source, tmp_path, cells):
    other = write_label(tmp_path / "other.zarr", cells)
    by_name = run("named.zarr", regions="cells", roi="2:20,5:45,10:60")
    by_path = run("path.zarr", regions=str(other), roi="2:20,5:45,10:60", block="9,20,25")
    for one, another in zip(by_name, by_path, strict=True):
        pandas.testing.assert_frame_equal(one, another, check_exact=True)
    inside = cells[2:20, 5:45, 10:60]
    assert by_name[1].volume_voxels.tolist() == [(inside == r).sum() for r in by_name[1].label]


def test_labels_that_are_made_again_have_the_tables_of_a_new_run(run, source, tmp_path, cells):
    """In the regions of the run, or in others."""
    other = write_label(tmp_path / "squares.zarr", (cells // 10) ** 2)
    kept = {"scores_dtype": "float32", "threshold": 0.5, "block": "24,50,35"}
    run("out.zarr", regions="cells", **kept)
    again = {"workers": 0, "outputs": "labels,measurements", "threshold": 0.6}
    for name, regions in (("same", None), ("other", str(other))):
        given = {"regions": regions} if regions else {}
        settings = parse_settings({**again, "label_name": name, **given})
        result = relabel(str(tmp_path / "out.zarr"), settings)
        assert result.status == "done", result.failures
        new = run(f"{name}.zarr", regions=regions or "cells", **{**kept, "threshold": 0.6})
        for kind, expected in zip(("measurements", "regions"), new, strict=True):
            found = pandas.read_parquet(tmp_path / f"out.zarr.{name}.{kind}.parquet")
            pandas.testing.assert_frame_equal(found, expected, check_exact=True)
        assert expected.n_objects.sum() > 1
    tables = zarr.open_group(tmp_path / "out.zarr/tables", mode="r").attrs["tables"]
    assert set(tables) == {"megaseg", "same", "other"} | {
        f"{name}_regions" for name in ("megaseg", "same", "other")
    }
    # Other voxels of the regions, after the labels were made again: another run.
    zarr.open_array(other / "0", mode="r+")[0, :, :] = 7
    with pytest.raises(TargetError, match="digest of regions"):
        relabel(str(tmp_path / "out.zarr"), settings)


def test_ngio_reads_both_tables(run, source, tmp_path):
    from ngio import open_ome_zarr_container

    objects, regions = run("out.zarr", regions="cells")
    container = open_ome_zarr_container(tmp_path / "out.zarr")
    assert set(container.list_tables()) == {"megaseg", "megaseg_regions"}
    read = container.get_table("megaseg_regions").dataframe.reset_index()
    assert_array_equal(read["label"], regions["label"])
    assert_array_equal(read["structure_share"], regions["structure_share"])
    read = container.get_table("megaseg").dataframe
    assert_array_equal(read["region"], objects["region"])


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("nuclei", "does not exist.*label images cells"),
        ("small.zarr", r"it has \(12, 50, 70\) voxels .*the image has \(24, 50, 70\)"),
        ("float.zarr", "holds float32"),
    ],
)
def test_what_are_no_regions_is_a_wrong_request(
    run, source, tmp_path, cells, regions, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_label(tmp_path / "small.zarr", cells[:12])
    write_image(tmp_path / "float.zarr", cells.astype(np.float32))
    with pytest.raises(SettingsError, match=f"--regions {regions}: .*{message}"):
        run(regions=regions)
    assert not (tmp_path / "out.zarr").exists()


def test_other_regions_are_another_run(run, source, cells):
    run(regions="cells")
    zarr.open_array(source / "labels/cells/0", mode="r+")[0, :, :] = 7
    with pytest.raises(TargetError, match="digest of regions"):
        run(regions="cells")


def test_measurements_that_are_left_out_are_another_run(run, source):
    run(regions="cells", measure_channels="0")
    for outputs in ("labels,scores", "labels,scores,measurements"):
        with pytest.raises(TargetError, match="belongs to another run") as refused:
            run(outputs=outputs)
        assert "regions: was cells, now None" in str(refused.value)
        assert "measure_channels: was 0, now None" in str(refused.value)


def test_a_plate_has_the_regions_of_each_field_and_timepoint(tmp_path, tiny_bundle, cheap_engine):
    shape = (16, 40, 44)
    fields = tuple(Field("A", column, "0") for column in ("1", "2"))
    folder = tmp_path / "plate.zarr"
    write_plate(Location.of(folder), Plate("0.5", "screen", ("A",), ("1", "2"), fields), "0.5")
    regions = {}
    for number, field in enumerate(fields):
        images = [[blobs(shape, seed=number + 10 * t + c) for c in range(2)] for t in range(2)]
        path = write_image(
            folder / field.path,
            np.array(images),
            axes="tczyx",
            scale=SCALE,
            channels=["DNA", "RNA"],
        )
        split = 10 * (number + 1)
        ids = np.ones((2, *shape), np.uint16)
        ids[0, :, :, split:] = 2
        ids[1, :, split:, :] = 3
        regions[f"A/{number + 1}"] = ids
        write_image(path / "labels/cells", ids, axes="tzyx", scale=SCALE)
        group = zarr.open_group(path / "labels/cells", mode="r+")
        group.attrs["ome"] = {**group.attrs["ome"], "image-label": {}}
        add_label(Location.of(path), "0.5", "cells")
    settings = parse_settings(
        {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "outputs": "labels,scores,measurements",
            "channel": "RNA",
            "measure_channels": "all",
            "regions": "cells",
            "threshold": "otsu",
            "table": "csv",
        }
    )
    result = segment_here(str(folder), str(tmp_path / "out.zarr"), settings)
    assert result.status == "done", result.failures
    table = pandas.read_csv(tmp_path / "out.zarr.regions.csv", float_precision="round_trip")
    objects = pandas.read_csv(tmp_path / "out.zarr.measurements.csv", float_precision="round_trip")
    assert set(objects.columns) >= {"intensity_mean_DNA", "intensity_mean_RNA", "region"}
    for (well, t), rows in table.groupby(["well", "timepoint"]):
        ids = regions[well][t]
        assert rows.label.tolist() == [1, 2 + t]
        assert rows.volume_voxels.tolist() == [(ids == r).sum() for r in rows.label]
        labels = zarr.open_array(tmp_path / "out.zarr" / well / "0/labels/megaseg/0", mode="r")[t]
        assert rows.structure_voxels.tolist() == [
            ((ids == r) & (labels > 0)).sum() for r in rows.label
        ]
        of_volume = objects[(objects.well == well) & (objects.timepoint == t)]
        assert rows.n_objects.tolist() == [(of_volume.region == r).sum() for r in rows.label]
        image = zarr.open_array(folder / well / "0/0", mode="r")[t, 0]
        assert_array_equal(
            rows.intensity_sum_DNA, [image[ids == r].sum(dtype=np.int64) for r in rows.label]
        )


def test_a_plate_takes_its_regions_from_a_plate_and_never_from_one_image(
    tmp_path, tiny_bundle, cheap_engine
):
    shape = (16, 32, 32)
    fields = {name: FieldSpec(("dna",), shape) for name in ("A/1/0", "A/1/1")}
    plate = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    cells = write_fields(tmp_path / "cells.zarr", "0.5", fields)
    for number, place in enumerate(fields, 1):
        for name, region in (("all", number), ("other", 9)):
            write_label(cells / place / "labels" / name, np.full(shape, region, "uint16"))
            add_label(Location.of(cells / place), "0.5", name)
    target = tmp_path / "out.zarr"
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "outputs": "labels,scores,measurements",
        "table": "csv",
    }
    one = str(cells / "A/1/0/labels/all")
    with pytest.raises(SettingsError, match="is one image; a plate needs a plate of label images"):
        segment_here(str(plate), str(target), parse_settings({**options, "regions": one}))
    assert not target.exists()
    settings = parse_settings({**options, "regions": str(cells / "all")})
    assert segment_here(str(plate), str(target), settings).status == "done"
    table = pandas.read_csv(tmp_path / "out.zarr.regions.csv")
    assert table.label.tolist() == [1, 2]
    again = {"label_name": "again", "workers": 0, "outputs": "labels,measurements", "regions": one}
    with pytest.raises(SettingsError, match="is one image; a plate needs a plate of label images"):
        relabel(str(target), parse_settings(again))


def test_regions_with_ids_below_0_fail_by_name(source, cells, tmp_path, tiny_bundle, cheap_engine):
    write_label(source / "labels/odd", cells.astype(np.int32) - 1)
    add_label(Location.of(source), "0.5", "odd")
    options = {"model": str(tiny_bundle), "outputs": "labels,scores,measurements", "regions": "odd"}
    settings = parse_settings({"threads": 1, "overlap": 0, "retries": 0, **options})
    result = segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    [failure] = result.failures
    assert failure.error == "--regions odd: it has the id -1; expected ids of 0 and above"
