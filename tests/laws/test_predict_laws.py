"""Lazy scores are the run's scores: for any block, any chunks, any number of threads."""

import dask
import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity
from numpy.testing import assert_allclose, assert_array_equal

import megaseg_dask
from megaseg_dask.models import load_bundle
from megaseg_dask.models.build import build_network
from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.bundles import OVERLAP, PATCH_SHAPE, one_thread
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (24, 40, 70)
CASES = {
    "uint16": {"dtype": "uint16"},
    "float32": {"dtype": "float32"},
    "float64, big-endian in 0.4": {"dtype": ">f8", "version": "0.4"},
    "axes in another order": {"axes": "xzy"},
    "larger than the partition": {"shape": (70, 24, 40), "dtype": "float32"},
}


@pytest.fixture(scope="module")
def volume():
    return blobs(SHAPE, dtype="float32")


@pytest.fixture(scope="module")
def whole(volume, tiny_bundle):
    return lazily(volume, tiny_bundle, block=SHAPE).values


def lazily(values, bundle, dims="zyx", **options):
    return megaseg_dask.predict(
        xarray.DataArray(values, dims=list(dims)), str(bundle), threads=1, **options
    )


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_command(name, tmp_path, tiny_bundle):
    case = {"shape": SHAPE, "dtype": "uint16", "version": "0.5", "axes": "zyx", **CASES[name]}
    values = blobs(case["shape"], dtype=case["dtype"])
    values = values.transpose(["zyx".index(axis) for axis in case["axes"]])
    source = write_image(
        tmp_path / "image.zarr", values, axes=case["axes"], version=case["version"]
    )
    common = {"threads": 1, "block": (16, 32, 64), "overlap": 0.25}
    run = parse_settings({"model": str(tiny_bundle), "scores_dtype": "float32", **common})
    assert segment_here(str(source), str(tmp_path / "out.zarr"), run).status == "done"
    image = megaseg_dask.open_image(source)["0"]["image"]
    scores = megaseg_dask.predict(image, str(tiny_bundle), **{**common, "block": (24, 24, 70)})
    assert scores.dtype == np.float32
    assert scores.dims == tuple(case["axes"])
    assert_array_equal(scores.values, zarr.open_array(tmp_path / "out.zarr/0", mode="r")[...])


@settings(max_examples=5)
@given(data=st.data())
def test_neither_blocks_nor_chunks_nor_threads_change_a_bit(volume, whole, tiny_bundle, data):
    block = tuple(data.draw(st.integers(n // 3, n + 3)) for n in SHAPE)
    chunks = tuple(data.draw(st.integers(5, n)) for n in SHAPE)
    image = xarray.DataArray(volume, dims=["z", "y", "x"])
    if data.draw(st.booleans()):
        image = image.chunk(dict(zip("zyx", chunks, strict=True)))
    scores = megaseg_dask.predict(image, str(tiny_bundle), threads=1, block=block)
    with dask.config.set(scheduler="threads", num_workers=data.draw(st.integers(1, 4))):
        assert_array_equal(scores.values, whole)


def test_a_part_has_the_statistics_of_the_whole(volume, whole, tiny_bundle):
    part = lazily(volume, tiny_bundle, block=(24, 20, 35)).isel(y=slice(22, 30), x=slice(3))
    assert_array_equal(part.values, whole[:, 22:30, :3])


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tasks_at_once_share_one_engine(volume, tiny_bundle, threads):
    image = xarray.DataArray(volume, dims=["z", "y", "x"])
    scores = megaseg_dask.predict(
        image, str(tiny_bundle), threads=threads, overlap=0, block=(24, 20, 20)
    )
    with dask.config.set(scheduler="threads", num_workers=8):
        at_once = scores.values
    with dask.config.set(scheduler="synchronous"):
        assert_array_equal(scores.values, at_once)


def test_worker_processes_give_the_same_bits(volume, whole, tiny_bundle, client):
    image = xarray.DataArray(volume, dims=["z", "y", "x"]).chunk(16)
    scores = megaseg_dask.predict(image, str(tiny_bundle), threads=1, block=(24, 20, 35))
    assert_array_equal(client.compute(scores.data).result(), whole)


def test_scores_equal_monai(volume, whole, tiny_bundle):
    network = build_network(load_bundle(tiny_bundle))
    normalised = NormalizeIntensity(channel_wise=True)(volume[None])
    with one_thread(), torch.inference_mode():
        logits = sliding_window_inference(
            torch.as_tensor(normalised)[None],
            PATCH_SHAPE,
            1,
            network,
            overlap=OVERLAP,
            mode="gaussian",
        )
    assert_allclose(whole, torch.sigmoid(logits)[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("dims", ["tczyx", "czyxt", "TCZYX"])
def test_each_timepoint_and_channel_is_a_volume_of_its_own(dims, tiny_bundle):
    shape = {"t": 2, "c": 2, "z": 17, "y": 33, "x": 36}
    values = blobs(tuple(shape[d.lower()] for d in dims))
    scores = lazily(values, tiny_bundle, dims)
    assert scores.dims == tuple(dims)
    names = {d.lower(): d for d in dims}
    one = {names["t"]: 1, names["c"]: 0}
    volume = (
        xarray.DataArray(values, dims=list(dims)).isel(one).transpose(*[names[d] for d in "zyx"])
    )
    expected = megaseg_dask.predict(volume, str(tiny_bundle), threads=1)
    assert_array_equal(
        scores.isel(one).transpose(*[names[d] for d in "zyx"]).values, expected.values
    )
