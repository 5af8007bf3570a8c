"""Boxes and grids: every voxel once, every patch counted, nothing beyond the volume."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, cheapest_patch, steps
from megaseg_dask.errors import SettingsError

extents = st.integers(1, 30)
shapes = st.tuples(extents, extents, extents)
overlaps = st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.75])] * 3)


@given(shapes, shapes)
def test_cores_tile_the_volume(volume_shape, block_shape):
    count = np.zeros(volume_shape, int)
    grid = BlockGrid(volume_shape, block_shape)
    for core in grid:
        count[core.slices] += 1
    assert (count == 1).all()
    assert [grid[i] for i in range(len(grid))] == list(grid)
    assert all(grid.index(grid.position(i)) == i for i in range(len(grid)))


@given(shapes, shapes, st.data())
def test_overlapping_blocks_are_those_that_share_a_voxel(volume_shape, block_shape, data):
    start = tuple(data.draw(st.integers(0, n - 1)) for n in volume_shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, volume_shape, strict=True))
    grid, box = BlockGrid(volume_shape, block_shape), Box(start, stop)
    expected = [grid.position(i) for i in range(len(grid)) if (grid[i] & box).size]
    assert list(grid.iter_overlapping(box)) == expected


@given(shapes, shapes, overlaps, shapes)
def test_patches_of_blocks_are_counted_and_read_boxes_hold_them(
    volume_shape, patch_shape, overlap, block_shape
):
    grid = PatchGrid(volume_shape, patch_shape, overlap)
    volume, n = Box.of(volume_shape), 0
    for core in BlockGrid(volume_shape, block_shape):
        patches = list(grid.iter_touching(core))
        assert len(patches) == grid.count_touching(core)
        n += len(patches)
        read = grid.read_box(core)
        assert core in read
        assert read in volume
        assert all(patch & volume in read for patch in patches)
    assert n == grid.count_predicted(block_shape)
    assert grid.count_touching(volume) == len(grid)


@given(shapes, shapes, st.sampled_from([1, 2, 3]))
def test_each_pair_of_touching_blocks_comes_up_once(volume_shape, block_shape, connectivity):
    grid = BlockGrid(volume_shape, block_shape)
    pairs = [
        (i, j) for i in range(len(grid)) for j, _ in grid.iter_forward_neighbors(i, connectivity)
    ]
    assert len(pairs) == len(set(pairs))
    assert all(i < j for i, j in pairs)
    position = {i: np.array(grid.position(i)) for i in range(len(grid))}
    if len(grid) <= 64:
        expected = {
            (i, j)
            for i in position
            for j in position
            if i < j
            and np.abs(position[i] - position[j]).max() == 1
            and np.abs(position[i] - position[j]).sum() <= connectivity
        }
        assert set(pairs) == expected


@pytest.mark.parametrize(("connectivity", "n"), [(1, 6), (2, 18), (3, 26)])
def test_steps_of_a_connectivity(connectivity, n):
    assert len(steps(3, connectivity)) == n


@pytest.mark.parametrize("overlap", [(1.0, 0, 0), (-0.1, 0, 0)])
def test_an_impossible_overlap_is_refused(overlap):
    with pytest.raises(SettingsError, match="at least 0 and below 1"):
        PatchGrid((9, 9, 9), (3, 3, 3), overlap)


@given(shapes, shapes, overlaps, shapes)
def test_voxels_read_are_counted(volume_shape, patch_shape, overlap, block_shape):
    grid = PatchGrid(volume_shape, patch_shape, overlap)
    expected = sum(grid.read_box(core).size for core in BlockGrid(volume_shape, block_shape))
    assert grid.count_read(block_shape) == expected


@given(
    volume_shape=st.tuples(*3 * [st.integers(16, 900)]),
    patch_shape=st.tuples(*3 * [st.integers(2, 12).map(lambda n: 16 * n)]),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_the_cheapest_patch_is_near_and_sees_no_more_voxels(volume_shape, patch_shape, overlap):
    def voxels(patch) -> int:
        return len(PatchGrid(volume_shape, patch, 3 * (overlap,))) * math.prod(patch)

    found = cheapest_patch(volume_shape, patch_shape, 3 * (overlap,), (16, 16, 16))
    assert voxels(found) <= voxels(patch_shape)
    for extent, n, patch in zip(volume_shape, found, patch_shape, strict=True):
        assert n % 16 == 0
        assert 32 <= n <= patch * 1.25
        assert n >= patch * 0.75 or n >= extent
    assert found == cheapest_patch(volume_shape, patch_shape, 3 * (overlap,), (16, 16, 16))


def test_a_plane_too_many_no_longer_costs_a_layer_of_patches():
    published = (65, 624, 924)
    assert cheapest_patch(published, (64, 128, 128), 3 * (0.25,), (16, 16, 16)) == (80, 160, 112)


@given(shapes, shapes)
def test_a_centered_box_has_as_much_on_both_sides(shape, volume_shape):
    box = Box.centered(shape, volume_shape)
    assert box.shape == tuple(map(min, shape, volume_shape))
    assert box in Box.of(volume_shape)
    for start, stop, extent in zip(box.start, box.stop, volume_shape, strict=True):
        assert (extent - stop) - start in (0, 1)
