import subprocess
import sys
from collections import Counter

import dask
import numpy as np
import pytest
import xarray
from numpy.testing import assert_allclose, assert_array_equal

import megaseg_dask
from megaseg_dask import lazy
from megaseg_dask.errors import BundleError, DataError, SettingsError, SourceError
from megaseg_dask.inference.engine import close_engine
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.ngff.volume import Volume
from tests.fixtures.images import blobs, write_image

SHAPE = (24, 40, 70)


@pytest.fixture(autouse=True)
def _in_this_process():
    """A client that another test left would be Dask's default."""
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture
def counted(monkeypatch):
    """Count what is read, measured and predicted in this process."""
    counts = Counter()

    def read(self, box, original=Volume.read):
        counts["read_voxels"] += box.size
        return original(self, box)

    def measure(values, at, original=lazy.measure):
        counts["measured_voxels"] += at.size
        return original(values, at)

    def merge(parts, original=lazy._merge):
        counts["merged"] += 1
        return original(parts)

    def forward(self, patches, original=TorchEngine.__call__):
        counts["forward"] += 1
        return original(self, patches)

    monkeypatch.setattr(Volume, "read", read)
    monkeypatch.setattr(lazy, "measure", measure)
    monkeypatch.setattr(lazy, "_merge", merge)
    monkeypatch.setattr(TorchEngine, "__call__", forward)
    close_engine()
    return counts


# -- open_image


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_image_has_levels_names_and_places(version, tmp_path):
    fine, coarse = blobs((2, 3, 16, 20, 24)), blobs((2, 3, 16, 10, 12))
    scale = {"t": 30.0, "z": 0.29, "y": 0.108, "x": 0.1}
    source = write_image(
        tmp_path / "cells.zarr",
        fine,
        coarse,
        axes="tczyx",
        version=version,
        scale=scale,
        channels=["DNA", "membrane"],
    )
    tree = megaseg_dask.open_image(source)
    assert tree.attrs == {"name": "image", "version": version, "axes": list("tczyx")}
    assert list(tree.children) == ["0", "1"]
    image = tree["0/image"]
    assert image.dims == tuple("tczyx")
    assert_array_equal(image.values, fine)
    assert_array_equal(tree["1/image"].values, coarse)
    assert_allclose(image.z, np.arange(16) * 0.29)
    assert_allclose(tree["1/image"].x, np.arange(12) * 0.2)
    assert_allclose(image.t, [0, 30])
    assert list(image.c.values) == ["DNA", "membrane", "2"]
    assert [image[name].attrs.get("units") for name in "tzyxc"] == [
        "second",
        "µm",
        "µm",
        "µm",
        None,
    ]


def test_units_and_origin_are_turned_into_micrometres(tmp_path):
    import zarr

    source = write_image(tmp_path / "image.zarr", blobs((16, 16, 16)))
    group = zarr.open_group(source, mode="r+")
    ome = group.attrs["ome"]
    entry = ome["multiscales"][0]
    entry["axes"][0]["unit"], entry["axes"][1]["unit"] = "nanometer", "pixel"
    entry["datasets"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [290, 0.1, 0.1]},
        {"type": "translation", "translation": [1000, 0, 5]},
    ]
    group.attrs["ome"] = ome
    image = megaseg_dask.open_image(source)["0/image"]
    assert_allclose(image.z[:3], [1, 1.29, 1.58])
    assert_allclose(image.x[:2], [5, 5.1])
    assert [image[name].attrs["units"] for name in "zyx"] == ["µm", "pixel", "µm"]


def test_nothing_is_read_before_it_is_needed(tmp_path, counted):
    source = write_image(
        tmp_path / "image.zarr", blobs((2, *SHAPE)), axes="czyx", chunks=(2, 8, 20, 35)
    )
    image = megaseg_dask.open_image(source)["0/image"]
    assert not counted
    assert image.data.chunks == ((1, 1), (8,) * 3, (20,) * 2, (35,) * 2)
    image.isel(c=1, z=3, y=slice(5), x=slice(5)).compute()
    assert counted["read_voxels"] == 8 * 20 * 35


def test_a_shard_is_a_chunk_unless_it_is_large(tmp_path, monkeypatch):
    source = write_image(
        tmp_path / "image.zarr", blobs((32, 32, 32)), chunks=(16, 16, 16), shards=(16, 32, 32)
    )
    assert megaseg_dask.open_image(source)["0/image"].data.chunksize == (16, 32, 32)
    monkeypatch.setattr(lazy, "_CHUNK_BYTES", 16**3 * 2)
    assert megaseg_dask.open_image(source)["0/image"].data.chunksize == (16, 16, 16)


def test_label_images_are_there_too(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 300)))
    out = tmp_path / "out.zarr"
    result = megaseg_dask.segment(
        source, out, model=str(tiny_bundle), workers=0, threads=1, label_name="cells"
    )
    tree = megaseg_dask.open_image(out)
    labels = tree["labels/cells"]
    assert list(labels.children) == ["0", "1"]
    assert labels["0/image"].dtype == np.uint32
    assert int(labels["0/image"].max()) == result.n_objects
    assert_array_equal(labels["1/image"].x, tree["1/image"].x)
    assert list(megaseg_dask.open_image(out, labels=False).children) == ["0", "1"]


def test_a_corrupt_chunk_is_an_error_and_no_background(tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 64)))
    (source / "0/c/0/0/1").write_bytes(b"torn")
    image = megaseg_dask.open_image(source)["0/image"]
    with pytest.raises(DataError, match="0/c/0/0/1 is corrupt"):
        image.compute()


def test_what_is_no_image_is_told(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        megaseg_dask.open_image(tmp_path / "nothing.zarr")


@pytest.mark.parametrize("name", ["4d_dataset_v5.ome.zarr", "3d_xyz_dataset_v4.ome.zarr"])
def test_images_of_others(name, shared_data):
    import zarr

    folder = shared_data / "omezarr/pixels" / name
    if not folder.exists():
        pytest.skip(f"{name} is not at {folder.parent}")
    tree = megaseg_dask.open_image(folder)
    for level in (node for key, node in tree.children.items() if key.isdecimal()):
        image = level["image"]
        assert_array_equal(
            image.values, zarr.open_array(folder / level.attrs["path"], mode="r")[...]
        )


# -- predict


def test_a_prediction_is_lazy_and_measures_once(tmp_path, tiny_bundle, counted):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    image = megaseg_dask.open_image(source)["0/image"]
    scores = megaseg_dask.predict(image, str(tiny_bundle), threads=1, block=(24, 20, 35))
    assert not counted
    assert scores.data.chunks == ((24,), (20, 20), (35, 35))
    scores.compute()
    # Once for the statistics, and once for all blocks.
    assert counted["read_voxels"] == 2 * np.prod(SHAPE)
    assert counted["measured_voxels"] == np.prod(SHAPE)
    assert counted["merged"] == 1


def test_a_volume_of_one_block_is_read_once(tmp_path, tiny_bundle, counted):
    source = write_image(tmp_path / "image.zarr", blobs((2, *SHAPE)), axes="tzyx")
    image = megaseg_dask.open_image(source)["0/image"]
    megaseg_dask.predict(image, str(tiny_bundle), threads=1).compute()
    assert counted["read_voxels"] == counted["measured_voxels"] == 2 * np.prod(SHAPE)
    assert counted["merged"] == 2


def test_a_part_predicts_only_its_blocks(tiny_bundle, counted):
    image = xarray.DataArray(blobs((16, 32, 96)), dims=["z", "y", "x"])
    scores = megaseg_dask.predict(
        image, str(tiny_bundle), engine="torch", threads=1, overlap=0, block=(16, 32, 32)
    )
    scores.isel(x=slice(40, 50)).compute()
    assert counted["forward"] == 1


def test_coordinates_are_kept(tmp_path, tiny_bundle):
    source = write_image(
        tmp_path / "image.zarr",
        blobs((2, 16, 32, 32)),
        axes="czyx",
        scale={"z": 0.5},
        channels=["DNA", "actin"],
    )
    image = megaseg_dask.open_image(source)["0/image"].assign_coords(well="B2")
    scores = megaseg_dask.predict(image, str(tiny_bundle), threads=1)
    xarray.testing.assert_identical(scores.coords.to_dataset(), image.coords.to_dataset())
    assert scores.name == "scores"
    assert scores.attrs["model"] == "tiny"
    assert scores.sel(c="actin", z=1.0).shape == (32, 32)


def test_voxels_of_a_numpy_array_are_in_no_task(tiny_bundle):
    image = xarray.DataArray(blobs((16, 64, 64)), dims=["z", "y", "x"])
    graph = megaseg_dask.predict(image, str(tiny_bundle), block=(16, 16, 16)).__dask_graph__()
    held = [
        value
        for value in dict(graph).values()
        if isinstance(value, np.ndarray) or hasattr(value, "value")
    ]
    assert len(held) == 1


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        ("yx", (32, 32), "no z"),
        ("szyx", (1, 16, 32, 32), r"\['s'\] is not one of"),
        ("zyx", (15, 32, 32), "too small"),
        ("tzyx", (0, 16, 32, 32), "empty"),
    ],
)
def test_what_cannot_be_predicted_is_told_at_once(dims, shape, message, tiny_bundle):
    with pytest.raises(SourceError, match=message):
        megaseg_dask.predict(xarray.DataArray(np.zeros(shape), dims=list(dims)), str(tiny_bundle))


def test_text_is_no_image(tiny_bundle):
    with pytest.raises(SourceError, match="expected integers or floats"):
        megaseg_dask.predict(
            xarray.DataArray(np.zeros((16, 16, 16), "S1"), dims=["z", "y", "x"]), str(tiny_bundle)
        )


@pytest.mark.parametrize(
    "options", [{"block": (0, 1, 1)}, {"patch": (3, 5, 7)}, {"overlap": 1.5}, {"batch": 0}]
)
def test_settings_are_those_of_the_command(options, tiny_bundle):
    image = xarray.DataArray(np.zeros((16, 16, 16)), dims=["z", "y", "x"])
    with pytest.raises((SettingsError, BundleError)):
        megaseg_dask.predict(image, str(tiny_bundle), **options)


def test_a_voxel_that_is_no_number_is_named_when_it_is_found(tiny_bundle):
    values = blobs((16, 32, 80), dtype="float32")
    values[3, 20, 70] = np.nan
    scores = megaseg_dask.predict(
        xarray.DataArray(values, dims=["z", "y", "x"]), str(tiny_bundle), block=(16, 16, 40)
    )
    with pytest.raises(DataError, match=r"\(3, 20, 70\) is nan"):
        scores.isel(x=slice(5)).compute()


def test_the_package_is_imported_without_what_it_may_not_need():
    code = (
        "import sys, megaseg_dask; "
        "print([m for m in ('xarray', 'dask', 'torch', 'zarr') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
