"""The tables of a run: exact at any block, equal to scikit-image's, read by pandas and ngio."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from skimage.measure import regionprops_table

from megaseg_dask.errors import TargetError
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
