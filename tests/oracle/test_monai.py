"""MONAI decides where patches lie, how they are weighted, and how a volume is normalised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.inferers.utils import _get_scan_interval
from monai.transforms import NormalizeIntensity
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms.blending import sigmoid, window
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Normalization,
    measure,
    merge_statistics,
)
from megaseg_dask.inference.block import Block, Patches, Preparation, predict_block
from megaseg_dask.models import Step

extents = st.integers(1, 90)
overlaps = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.625])


@given(
    st.tuples(extents, extents, extents),
    st.tuples(*[st.integers(6, 40)] * 3),
    st.tuples(*[overlaps] * 3),
)
def test_patches_lie_where_monai_puts_them(volume_shape, patch_shape, overlap):
    grid = PatchGrid(volume_shape, patch_shape, overlap)
    padded = tuple(map(max, volume_shape, patch_shape))
    interval = _get_scan_interval(padded, patch_shape, 3, overlap)
    expected = dense_patch_slices(padded, patch_shape, interval)
    found = [
        patch.shifted(grid.padding).slices for patch in grid.iter_touching(Box.of(volume_shape))
    ]
    assert found == expected
    assert len(grid) == len(expected)


@given(st.tuples(*[st.integers(1, 48)] * 3))
def test_window_equals_monai(patch_shape):
    assert_allclose(
        window(patch_shape), compute_importance_map(patch_shape, mode="gaussian").numpy(), rtol=2e-6
    )
    assert_array_equal(
        window(patch_shape, "constant"),
        compute_importance_map(patch_shape, mode="constant").numpy(),
    )


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64", "float16"]
)
def test_normalisation_equals_monai(dtype):
    rng = np.random.default_rng(1)
    values = (rng.gamma(2.0, 12.0, (70, 90, 80)) + 5).astype(dtype)
    mine = Normalization.of(measure(values, Box.of(values.shape)))(values)
    theirs = NormalizeIntensity(channel_wise=True)(values[None].astype(np.float32))[0]
    assert_allclose(mine, np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_mean_and_std_equal_monai_to_a_millionth():
    rng = np.random.default_rng(2)
    volume = rng.normal(40000, 13, (130, 300, 270)).astype(np.float32)
    parts = BlockGrid(volume.shape, PARTITION_SHAPE)
    found = Normalization.of(merge_statistics(measure(volume[p.slices], p) for p in parts))
    exact = volume.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert found.std == pytest.approx(exact.std(), rel=1e-9)
    # MONAI sums in float32, so on an ordinary image rather than on a small spread over a large
    # offset.
    image = rng.gamma(3, 130, (64, 200, 256)).astype(np.float32)
    found = measure(image, Box.of(image.shape))
    assert found.mean == pytest.approx(NormalizeIntensity._mean(image), rel=1e-6)
    assert found.std == pytest.approx(NormalizeIntensity._std(image), rel=1e-6)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_volume_gives_zeros(value):
    values = np.full((8, 9, 10), value, np.uint16)
    assert not Normalization.of(measure(values, Box.of(values.shape)))(values).any()


class Blur:
    """A cheap stand-in for a network in grid laws.

    Depends on the whole patch, as instance norm does.
    """

    def __call__(self, patches):
        mean = patches.mean(axis=(2, 3, 4), keepdims=True)
        return (patches * np.float32(1.7) + np.roll(patches, 1, -1) - mean).astype(np.float32)


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(3, 40)] * 3),
    st.tuples(*[st.integers(1, 40)] * 3),
    st.tuples(*[overlaps] * 3),
    st.data(),
)
def test_any_block_shape_gives_monais_logits_and_the_same_bits(
    volume_shape, block_shape, overlap, data
):
    patch_shape = data.draw(st.tuples(*[st.sampled_from([4, 8, 16])] * 3))
    rng = np.random.default_rng(0)
    volume = rng.normal(10, 3, volume_shape).astype(np.float32)
    normalisation = Normalization.of(measure(volume, Box.of(volume_shape)))
    prepare = Preparation((Step("zscore"),), (normalisation,))
    grid = PatchGrid(volume_shape, patch_shape, overlap)
    patches = Patches(grid)
    engine = Blur()

    def predict(block_shape):
        logits = np.full(volume_shape, np.nan, np.float32)
        for core in BlockGrid(volume_shape, block_shape):
            values = volume[grid.read_box(core).slices]
            (output,) = predict_block(Block(core, values[None], patches, prepare), engine)
            logits[core.slices] = output.logits()
        return logits

    whole = predict(volume_shape)
    assert_array_equal(predict(block_shape), whole)
    theirs = sliding_window_inference(
        torch.from_numpy(normalisation(volume))[None, None],
        patch_shape,
        1,
        lambda x: torch.from_numpy(engine(x.numpy())),
        overlap=overlap,
        mode="gaussian",
    )
    assert_allclose(whole, theirs[0, 0].numpy(), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 400), st.integers(0, 400))
def test_sigmoid_of_a_voxel_does_not_depend_on_its_neighbours(n, i):
    logits = np.random.default_rng(n).normal(0, 30, n).astype(np.float32)
    one = logits[i % n : i % n + 1].copy()
    assert sigmoid(logits)[i % n] == sigmoid(one)[0]


def test_sigmoid_at_the_extremes():
    logits = np.array([-np.inf, -1e4, 0, 1e4, np.inf], np.float32)
    assert_array_equal(sigmoid(logits), np.array([0, 0, 0.5, 1, 1], np.float32))
