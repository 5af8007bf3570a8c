"""Resampled voxels are those of SciPy and of an exact mean, and the same bits in any part."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms.array_library import NUMPY, ArrayLibrary
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid
from megaseg_dask.algorithms.resampling import Resampling, resampled_shape
from tests.fixtures.grids import interpolated, resampled

TORCH = ArrayLibrary(torch.zeros, torch.isfinite, torch.from_numpy)
extents = st.integers(1, 40)
shapes = st.tuples(extents, extents, extents)


def volume_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


def brought_back(resampling, values):
    """The whole source, from the voxels of the grid that it is made of."""
    source = Box.of(resampling.source_shape).ranges
    needed = Box.between(resampling.grid_ranges(source))
    return resampling.onto_source(values[:, *needed.slices], source, NUMPY)


@given(shapes, shapes)
def test_a_volume_on_a_grid_and_back_is_that_of_scipy(source, grid):
    values = volume_of(source)
    resampling = Resampling(source, grid)
    there = resampling.onto_grid(values, Box.of(grid).ranges, NUMPY)
    assert_allclose(there[0], resampled(values[0], grid), atol=2e-6)
    back = brought_back(resampling, there)
    assert_allclose(back[0], interpolated(there[0], source), atol=2e-6)


@given(shapes, shapes, st.data())
def test_a_part_has_the_bits_of_the_whole_in_both_libraries(source, grid, data):
    values = volume_of(source)
    resampling = Resampling(source, grid)
    whole = resampling.onto_grid(values, Box.of(grid).ranges, NUMPY)
    back = brought_back(resampling, whole)
    for shape, ranges, make, there, result in (
        (grid, resampling.source_ranges, resampling.onto_grid, values, whole),
        (source, resampling.grid_ranges, resampling.onto_source, whole, back),
    ):
        start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
        part = Box(start, stop)
        needed = Box.between(ranges(part.ranges))
        assert needed in Box.of(there.shape[1:])
        read = there[:, *needed.slices]
        assert_array_equal(make(read, part.ranges, NUMPY), result[:, *part.slices])
        tensor = make(torch.from_numpy(read.copy()), part.ranges, TORCH)
        assert_array_equal(tensor.numpy(), result[:, *part.slices])


@given(shapes)
def test_the_same_grid_changes_nothing(shape):
    values = volume_of(shape)
    resampling = Resampling(shape, shape)
    assert resampling.is_identity
    assert resampling.onto_grid(values, Box.of(shape).ranges, NUMPY) is values


@given(shapes, shapes, st.tuples(*[st.integers(2, 9)] * 3), st.tuples(extents, extents, extents))
def test_counts_of_patches_and_voxels_are_those_of_the_blocks(source, grid, patch, block):
    patches = PatchGrid(grid, patch, (0.25, 0.25, 0.25), source)
    cores = list(BlockGrid(source, block))
    assert patches.count_predicted(block) == sum(map(patches.count_touching, cores))
    assert patches.count_read(block) == sum(patches.read_box(core).size for core in cores)
    for core in cores:
        assert patches.covered(core) in patches.seen_box(core)
        assert core in patches.read_box(core)


@pytest.mark.parametrize(
    ("spacing", "wanted", "expected"),
    [
        ((0.29, 0.1, 0.1), (0.29, 0.2, 0.2), (60, 50, 50)),
        ((0.29, 0.1, 0.1), (0.29, 0.1005, 0.1009), (60, 100, 100)),
        ((0.29, 0.1, 0.1), (0.29, 0.1005, 0.102), (60, 100, 98)),
        ((1, 1, 1), (0.5, 3, 1000), (120, 33, 1)),
    ],
)
def test_the_grid_has_the_wanted_size_and_the_extent_of_the_source(spacing, wanted, expected):
    assert resampled_shape((60, 100, 100), spacing, wanted) == expected
