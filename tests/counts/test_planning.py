"""Planning in proportion: what a field and a block of a plan cost, counted, without a clock."""

import random
import tracemalloc
from collections import Counter

import pytest
import zarr
from zarr.storage import LocalStore

from megaseg_dask.algorithms.chunking import iter_block_shapes
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.planner import make_plan
from megaseg_dask.plan.plate_parts import read_parts
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

SETTINGS = {"engine": "torch", "threads": 1}


def make_plans(source, target, **options) -> list[Plan]:
    settings = parse_settings({**SETTINGS, **options})
    parts = read_parts(Location.of(source), Location.of(target), settings, [])
    return [make_plan(str(source), str(target), settings, part) for part in parts]


@pytest.fixture
def counts(monkeypatch):
    """Requests by their names, checks of multiscales metadata, boxes, and projections of memory."""
    counter = Counter()

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*arguments, **named):
            counter[key] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    for name in ("get", "size", "probe", "head", "keys", "children", "exists"):
        count(Location, name, name)
    count(LocalStore, "get", "zarr")
    for version in VERSIONS.values():
        count(version.models.multiscales.Multiscale, "model_validate", "checks")
    count(Box, "__init__", "boxes")
    count(Plan, "project", "projections")
    return counter


def write_plate_of(folder, n_fields, version) -> Location:
    """Write fields of two levels in one well, with metadata that no other test has read."""
    fields = tuple(Field("A", "1", str(number)) for number in range(n_fields))
    plate = Location.of(folder / f"plate-{version}-{n_fields}.zarr")
    write_plate(plate, Plate(version, "screen", ("A",), ("1",), fields), version)
    step = random.SystemRandom().uniform(0.1, 0.2)
    levels = (blobs((16, 48, 48)), blobs((16, 24, 24)))
    for field in fields:
        path = (plate / field.path).path
        write_image(path, *levels, version=version, scale={"y": step, "x": step})
    return plate


# What a further field asks for: whether it is there, its group, and each of its two levels. Of a
# group of Zarr v2, zarr itself makes four requests.
PER_FIELD = {"0.5": {"probe": 1, "get": 2}, "0.4": {"probe": 1, "get": 4, "zarr": 4}}


@pytest.mark.parametrize("version", PER_FIELD)
def test_a_further_field_costs_few_requests_and_no_check(version, tmp_path, tiny_bundle, counts):
    counted = []
    for n_fields in (2, 7):
        plate = write_plate_of(tmp_path, n_fields, version)
        counts.clear()
        [plan] = make_plans(plate, tmp_path / "out.zarr", model=str(tiny_bundle))
        assert len(plan.volumes) == n_fields
        assert counts["checks"] == 1
        counted.append(counts.copy())
    few, more = counted
    expected = {name: 5 * n for name, n in PER_FIELD[version].items()}
    assert dict(more - few) == expected


@pytest.fixture
def large_source(tmp_path):
    """An image of 5000 x 5000 x 5000 voxels, all of its chunks absent."""
    source = write_image(tmp_path / "image.zarr", blobs((16, 48, 48)))
    zarr.create_array(
        source / "0", shape=(5000,) * 3, chunks=(64,) * 3, dtype="uint16", overwrite=True
    )
    return source


@pytest.mark.parametrize("options", [{}, {"roi": "0:3000,100:4000,0:5000"}])
def test_a_large_volume_is_planned_without_its_blocks_and_patches(
    options, large_source, tmp_path, tiny_bundle, counts
):
    options = {"model": str(tiny_bundle), "block": "64,128,128", **options}
    make_plans(large_source, tmp_path / "out.zarr", **options)
    counts.clear()
    tracemalloc.start()
    [plan] = make_plans(large_source, tmp_path / "out.zarr", **options)
    summary = summarize(plan)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary["blocks"] > 50_000
    assert summary["patches"] > 1_000_000
    # Blocks are products of axes: those of each axis are looked at, not their products.
    assert counts["boxes"] < 20 * sum(plan.block_grid().grid_shape)
    # A list of its blocks alone would take more.
    assert peak_bytes < summary["blocks"] * 64


def test_a_block_is_chosen_by_a_few_boxes_for_each_shape(
    large_source, tmp_path, tiny_bundle, counts
):
    [plan] = make_plans(large_source, tmp_path / "out.zarr", model=str(tiny_bundle), memory="2GB")
    n_shapes = len(list(iter_block_shapes(plan.volume_shape)))
    assert counts["projections"] <= n_shapes + 2
    assert counts["boxes"] < 40 * counts["projections"]
