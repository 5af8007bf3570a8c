"""The tables of a run: exact at any block, equal to scikit-image's, read by pandas and ngio."""

import json

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from skimage.measure import regionprops_table

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (24, 50, 70)
SCALE = {"z": 0.5, "y": 0.2, "x": 0.2}


@pytest.fixture
def run(tmp_path, tiny_bundle):
    def call(source, target, **options):
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "outputs": "labels,scores,measurements",
            "threshold": "otsu",
            **options,
        }
        result = segment_here(str(source), str(tmp_path / target), parse_settings(options))
        assert result.status == "done", result.failures
        if options.get("table") == "csv":
            return None
        return pq.read_table(tmp_path / f"{target}.measurements.parquet")

    return call


def expected_of(labels: np.ndarray, image: np.ndarray) -> dict:
    names = (
        "label",
        "area",
        "centroid",
        "bbox",
        "intensity_mean",
        "intensity_min",
        "intensity_max",
        "intensity_std",
    )
    return regionprops_table(labels, image, properties=names)


def test_the_table_is_scikit_images_at_any_block(run, tmp_path):
    image = blobs(SHAPE)
    source = write_image(tmp_path / "image.zarr", image, scale=SCALE)
    split = run(source, "split.zarr", block="13,17,29")
    whole = run(source, "whole.zarr", block="24,50,70")
    assert split.equals(whole)
    labels = zarr.open_group(tmp_path / "whole.zarr", mode="r")["labels/megaseg/0"][...]
    expected = expected_of(labels, image)
    assert len(expected["label"]) > 20
    found = {
        name: whole[name].to_numpy()
        for name in whole.column_names
        if name not in ("plate", "well", "field", "output")
    }
    assert_array_equal(found["label"], expected["label"])
    assert_array_equal(found["volume_voxels"], expected["area"])
    assert_allclose(found["volume_um3"], expected["area"] * 0.5 * 0.2 * 0.2)
    for i, axis in enumerate("zyx"):
        assert_allclose(found[f"centroid_{axis}"], expected[f"centroid-{i}"], rtol=1e-12)
        assert_allclose(
            found[f"centroid_{axis}_um"], expected[f"centroid-{i}"] * SCALE[axis], rtol=1e-12
        )
        assert_array_equal(found[f"bbox_{axis}_start"], expected[f"bbox-{i}"])
        assert_array_equal(found[f"bbox_{axis}_stop"], expected[f"bbox-{i + 3}"])
    for name in ("mean", "min", "max", "std"):
        assert_allclose(found[f"intensity_{name}"], expected[f"intensity_{name}"], rtol=1e-9)


def test_timepoints_channels_and_a_region(run, tmp_path):
    image = np.stack([[blobs(SHAPE, seed=10 * t + c) for c in range(2)] for t in range(2)])
    source = write_image(tmp_path / "image.zarr", image, axes="tczyx", channels=["dna", "actin"])
    table = run(source, "out.zarr", channel="dna,actin", roi="2:20,5:45,10:60").to_pandas()
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    n_rows = 0
    for t in range(2):
        for c, name in enumerate(["dna", "actin"]):
            labels = group[f"labels/megaseg_{name}/0"][t]
            expected = expected_of(labels, image[t, c, 2:20, 5:45, 10:60])
            rows = table[(table.timepoint == t) & (table.channel == c)]
            assert_array_equal(rows.label, expected["label"])
            assert_allclose(rows.intensity_mean, expected["intensity_mean"], rtol=1e-9)
            n_rows += len(rows)
    assert len(table) == n_rows


def test_all_channels_are_measured_at_any_block(run, tmp_path, cheap_engine):
    image = np.stack([[blobs(SHAPE, seed=10 * t + c) for c in range(3)] for t in range(2)])
    names = ["DNA", "RNA", "RNA"]
    source = write_image(tmp_path / "image.zarr", image, axes="tczyx", channels=names)
    options = {"channel": "DNA", "measure_channels": "all"}
    split = run(source, "split.zarr", block="13,17,29", **options)
    whole = run(source, "whole.zarr", block="24,50,70", **options)
    assert split.equals(whole)
    table = whole.to_pandas()
    assert set(table.channel_name) == {"DNA"}
    labels = zarr.open_group(tmp_path / "whole.zarr", mode="r")["labels/megaseg/0"][...]
    for t in range(2):
        rows = table[table.timepoint == t]
        assert len(rows) > 1
        for c, suffix in enumerate(["DNA", "1", "2"]):
            expected = expected_of(labels[t], image[t, c])
            for name in ("mean", "min", "max", "std"):
                found = rows[f"intensity_{name}_{suffix}"]
                assert_allclose(found, expected[f"intensity_{name}"], rtol=1e-9)
        for name in ("mean", "min", "max", "std", "sum"):
            assert_array_equal(rows[f"intensity_{name}"], rows[f"intensity_{name}_DNA"])


def test_a_timelapse_as_csv_has_rows_that_are_unique(run, tmp_path, cheap_engine):
    from ngio import open_ome_zarr_container

    image = np.stack([blobs(SHAPE, seed=t) for t in range(2)])
    source = write_image(tmp_path / "image.zarr", image, axes="tzyx", scale=SCALE)
    table = run(source, "out.zarr")
    run(source, "out.zarr", table="csv", overwrite=True)
    assert not (tmp_path / "out.zarr.measurements.parquet").exists()
    read = pandas.read_csv(tmp_path / "out.zarr.measurements.csv", float_precision="round_trip")
    for name in ("timepoint", "label", "volume_voxels", "surface_area_um2"):
        assert_array_equal(read[name], table[name].to_numpy())
    container = open_ome_zarr_container(tmp_path / "out.zarr")
    frame = container.get_table("megaseg").dataframe
    assert frame.index.is_unique
    assert len(frame) == len(read)
    assert_array_equal(frame["label"], read["label"])


@pytest.mark.parametrize(
    ("channels", "message"),
    [("DNA,GFP", "has no such channel"), ("0,DNA", "is given twice")],
)
def test_channels_that_are_not_there_are_a_wrong_request(run, tmp_path, channels, message):
    image = np.stack([blobs(SHAPE, seed=c) for c in range(2)])
    source = write_image(tmp_path / "image.zarr", image, axes="czyx", channels=["DNA", "RNA"])
    with pytest.raises(SettingsError, match=f"--measure-channels {channels[-3:]}|{message}"):
        run(source, "out.zarr", channel="DNA", measure_channels=channels)
    assert not (tmp_path / "out.zarr").exists()


def test_channels_are_measured_only_with_measurements(run, tmp_path):
    with pytest.raises(SettingsError, match="add measurements to --outputs"):
        run(tmp_path, "out.zarr", measure_channels="all", outputs="labels")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ngio_reads_the_table_of_an_image(version, run, tmp_path):
    from ngio import open_ome_zarr_container

    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), scale=SCALE)
    table = run(source, "out.zarr", ome_zarr=version).to_pandas()
    container = open_ome_zarr_container(tmp_path / "out.zarr")
    assert "megaseg" in container.list_tables()
    read = container.get_table("megaseg").dataframe.reset_index()
    assert_array_equal(read["label"], table["label"])
    assert_allclose(read["intensity_mean"], table["intensity_mean"])


def test_somebody_elses_table_is_left_alone(run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    run(source, "out.zarr")
    group = zarr.open_group(tmp_path / "out.zarr/tables/megaseg", mode="a")
    group.attrs.put({"type": "feature_table"})
    with pytest.raises(TargetError, match="did not write"):
        run(source, "out.zarr", overwrite=True)


def test_a_row_says_which_timepoint_of_the_source_it_is_of(run, tmp_path):
    frames = np.stack([blobs(SHAPE, seed=t) for t in range(3)])
    source = write_image(tmp_path / "image.zarr", frames, axes="tzyx", scale=SCALE)
    table = run(source, "out.zarr", time="1:3", roi="2:22,5:45,10:60")
    rows = table.to_pydict()
    # The target begins at the first timepoint that was segmented, and so do its labels.
    assert set(zip(rows["timepoint"], rows["source_timepoint"], strict=True)) == {(0, 1), (1, 2)}
    origin = {"t": 1, "z": 2, "y": 5, "x": 10}
    assert json.loads(table.schema.metadata[b"origin"]) == origin
    in_image = zarr.open_group(tmp_path / "out.zarr/tables/megaseg", mode="r")
    assert in_image.attrs["megaseg"]["origin"] == origin
