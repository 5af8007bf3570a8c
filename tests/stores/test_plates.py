"""Plates of other programs, and a plate of real cells, on a disk and in a real S3 server."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from skimage.measure import regionprops_table

from megaseg_dask.ngff.plate import Acquisition, Field, Plate, read_plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from tests.fixtures.images import write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import range_server
from tests.stores.test_runs import arrays, upload


@pytest.fixture
def options(tiny_bundle):
    return {"model": str(tiny_bundle), "threads": 1, "overlap": 0}


def deepen(plate: Path, n: int) -> None:
    """Repeat the single plane of each field of a plate, in place: the model needs more than one."""
    for field in read_plate(Location.of(plate)).fields:
        group = zarr.open_group(plate / field.path, mode="r+")
        for name, array in list(group.arrays()):
            values, v2 = array[...], group.metadata.zarr_format == 2
            layout = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if v2 else {}
            deep = np.repeat(values, n, axis=2)
            new = group.create_array(
                name,
                shape=deep.shape,
                dtype=deep.dtype,
                chunks=deep.shape,
                overwrite=True,
                **({**layout} if v2 else {"dimension_names": list("tczyx")}),
            )
            new[...] = deep


def test_plates_of_other_programs_in_both_versions(shared_data, tmp_path, options):
    import ome_zarr_models
    from ngio import open_ome_zarr_plate

    found = {}
    for version, name in (("0.4", "hcs_bf2raw_v04.zarr"), ("0.5", "hcs_resaved_v05.zarr")):
        plate = tmp_path / name
        shutil.copytree(shared_data / "omezarr/pixels" / name, plate)
        deepen(plate, 16)
        target = tmp_path / f"out-{version}.zarr"
        wanted = parse_settings(
            {**options, "channel": "0,2", "ome_zarr": version, "threshold": "otsu"}
        )
        result = segment_here(str(plate), str(target), wanted)
        assert result.status == "done", result.failures
        model = {"0.4": ome_zarr_models.v04.HCS, "0.5": ome_zarr_models.v05.HCS}[version]
        model.from_zarr(zarr.open_group(target, mode="r"))
        with warnings.catch_warnings():
            # Of how many fields ngio will read at a time.
            warnings.simplefilter("ignore")
            assert len(open_ome_zarr_plate(target).get_images()) == 8
        found[version] = arrays(str(target))
    assert found["0.4"].keys() == found["0.5"].keys()
    labels = [path for path in found["0.4"] if "labels" in path]
    assert len(labels) >= 16
    for path in labels:
        assert_array_equal(found["0.4"][path], found["0.5"][path], err_msg=path)


@pytest.fixture
def cells(shared_data) -> np.ndarray:
    """Real nuclei, ``(z, y, x)``."""
    import tifffile

    return tifffile.imread(shared_data / "cells3d_nuclei_labels/nuclei.tif")


@pytest.fixture
def screen(cells, tmp_path) -> Path:
    """2x3 wells, 2 fields, 3 timepoints, 2 channels of real crops."""
    fields = [Field(row, column, name, 0) for row in "AB" for column in "123" for name in "01"]
    folder = tmp_path / "screen.zarr"
    write_plate(
        Location.of(folder),
        Plate("0.5", "screen", ("A", "B"), ("1", "2", "3"), tuple(fields), (Acquisition(0),)),
        "0.5",
    )
    rng = np.random.default_rng(0)
    for field in fields:
        crops = []
        for _ in range(6):
            z, y, x = (
                int(rng.integers(0, n - m)) for n, m in zip(cells.shape, (24, 64, 72), strict=True)
            )
            crops.append(cells[z : z + 24, y : y + 64, x : x + 72])
        image = np.stack(crops).reshape(3, 2, 24, 64, 72)
        write_image(folder / field.path, image, axes="tczyx", channels=["nuclei", "again"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_plate_of_real_cells(where, screen, tmp_path, options, request):
    source, target = str(screen), str(tmp_path / "out.zarr")
    if where == "bucket":
        folder = request.getfixturevalue("s3") and request.getfixturevalue("folder")
        source, target = upload(screen, f"{folder}/screen.zarr"), f"{folder}/out.zarr"
    settings = parse_settings(
        {
            **options,
            "channel": "nuclei,again",
            "outputs": "labels,scores,measurements",
            "threshold": "otsu",
        }
    )
    # Workers of a bucket are started with its credentials in their environment.
    result = (
        segment_here(source, target, settings)
        if where == "disk"
        else segment(source, target, settings)
    )
    assert result.status == "done", result.failures
    assert segment_here(source, target, settings).already_done
    fields = read_plate(Location.of(target)).fields
    assert [f.path for f in fields] == [f"{r}/{c}/{n}" for r in "AB" for c in "123" for n in "01"]
    data = Location.of(f"{target}.measurements.parquet")
    local = tmp_path / "table.parquet"
    local.write_bytes(data.parent.get(data.basename))
    table = pq.read_table(local).to_pandas()
    # Two fields by themselves, and their rows.
    for field in (fields[0], fields[-1]):
        here, image = (
            arrays(f"{target}/{field.path}"),
            zarr.open_group(screen / field.path, mode="r")["0"][...],
        )
        for c, channel in enumerate(["nuclei", "again"]):
            alone = str(tmp_path / f"{field.path.replace('/', '-')}-{c}.zarr")
            single = parse_settings({**options, "channel": channel, "threshold": "otsu"})
            assert segment_here(str(screen / field.path), alone, single).status == "done"
            expected = arrays(alone)
            assert_array_equal(here[f"labels/megaseg_{channel}/0"], expected["labels/megaseg/0"])
            assert_array_equal(here["0"][:, c], expected["0"])
            for t in range(3):
                rows = table[
                    (table.well == field.well)
                    & (table.field == field.name)
                    & (table.timepoint == t)
                ]
                rows = rows[rows.channel == c]
                measured = regionprops_table(
                    here[f"labels/megaseg_{channel}/0"][t],
                    image[t, c],
                    properties=("label", "area", "intensity_mean"),
                )
                assert_array_equal(rows.label, measured["label"])
                assert_array_equal(rows.volume_voxels, measured["area"])
                assert_allclose(rows.intensity_mean, measured["intensity_mean"], rtol=1e-9)


def test_an_image_by_the_address_that_the_idr_gives(shared_data, tmp_path, options):
    """An OME-Zarr 0.4 image behind a web server that lists nothing."""
    served = tmp_path / "zarr/v0.4/idr0062A"
    shutil.copytree(shared_data / "omezarr/pixels/5d_dataset_v4.ome.zarr", served / "6001240.zarr")
    settings = parse_settings({**options, "channel": "1", "time": "1:3"})
    with range_server(tmp_path) as url:
        result = segment_here(
            f"{url}/zarr/v0.4/idr0062A/6001240.zarr",
            str(tmp_path / "out.zarr"),
            settings,
        )
    assert result.status == "done", result.failures
    local = segment_here(str(served / "6001240.zarr"), str(tmp_path / "local.zarr"), settings)
    assert local.status == "done"
    found, expected = arrays(str(tmp_path / "out.zarr")), arrays(str(tmp_path / "local.zarr"))
    assert found["0"].shape == (2, 16, 64, 64)
    for path, values in expected.items():
        assert_array_equal(found[path], values)
