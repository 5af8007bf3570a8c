"""Labels of blocks, joined, equal scikit-image's labels of the whole mask, id for id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from skimage.measure import label

from megaseg_dask import labelling
from megaseg_dask.geometry import BlockGrid, Box

extents = st.integers(1, 14)
shapes = st.tuples(extents, extents, extents)
connectivities = st.sampled_from([1, 2, 3])


def snake(shape, rng) -> np.ndarray:
    """A thin path that wanders through the volume and so crosses many blocks, also at edges and corners."""
    mask = np.zeros(shape, bool)
    place = np.array([rng.integers(n) for n in shape])
    for _ in range(3 * sum(shape)):
        mask[tuple(place)] = True
        place = np.clip(place + rng.integers(-1, 2, 3), 0, np.array(shape) - 1)
    return mask


@st.composite
def masks(draw) -> np.ndarray:
    # scikit-image reorders the axes of a volume with an extent of 1, and then does not number in raster order.
    shape = draw(st.tuples(*[st.integers(2, 14)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["sparse", "medium", "dense", "snake", "empty", "full"]))
    if kind == "snake":
        return snake(shape, rng)
    return rng.random(shape) < {"sparse": 0.05, "medium": 0.3, "dense": 0.7, "empty": 0.0, "full": 1.1}[kind]


def label_by_blocks(mask, block_shape, connectivity, min_size=0) -> np.ndarray:
    """The staged path without its files: label, seams, join, relabel."""
    grid = BlockGrid(mask.shape, block_shape)
    blocks = [labelling.label_block(mask[core.slices], connectivity) for core in grid]
    fragments = [labelling.list_fragments(b, core, mask.shape) for b, core in zip(blocks, grid, strict=True)]
    planes = [labelling.boundary_planes(b) for b in blocks]
    offsets = labelling.offsets_of([len(f) for f in fragments])
    pairs = [np.empty((0, 2), np.int64)]
    for i in range(len(grid)):
        for j, direction in grid.iter_forward_neighbours(i, connectivity):
            near, far = labelling.seam_keys(direction)
            found = labelling.pair_across_seam(
                planes[i][near], labelling.plane_box(grid[i], near),
                planes[j][far], labelling.plane_box(grid[j], far), connectivity,
            )  # fmt: skip
            pairs.append(found.astype(np.int64) + np.array([offsets[i], offsets[j]]) - 1)
    table = labelling.Fragments(
        np.concatenate([f.first for f in fragments]), np.concatenate([f.size for f in fragments])
    )
    final = labelling.join_fragments(table, np.concatenate(pairs), min_size=min_size)
    result = np.zeros(mask.shape, np.uint32)
    for i, core in enumerate(grid):
        part = final[offsets[i] : offsets[i + 1]]
        result[core.slices] = labelling.relabel(blocks[i], part, np.dtype(np.uint32))
    return result


def survivors(labels, min_size) -> np.ndarray:
    """Objects of at least ``min_size`` voxels, numbered 1..n in their old order."""
    sizes = np.bincount(labels.ravel())
    keep = (sizes >= min_size) & (np.arange(len(sizes)) > 0)
    return np.where(keep, np.cumsum(keep), 0)[labels]


@settings(max_examples=200)
@given(masks(), shapes, connectivities, st.sampled_from([0, 0, 1, 2, 5, 40]))
def test_any_blocks_give_skimages_labels(mask, block_shape, connectivity, min_size):
    expected = label(mask, connectivity=connectivity)
    found = label_by_blocks(mask, block_shape, connectivity, min_size)
    assert_array_equal(found, survivors(expected, min_size) if min_size else expected)


@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("density", [0.02, 0.2, 0.35, 0.6])
def test_a_larger_volume(connectivity, density):
    mask = np.random.default_rng(5).random((37, 61, 53)) < density
    found = label_by_blocks(mask, (13, 17, 19), connectivity)
    assert_array_equal(found, label(mask, connectivity=connectivity))


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 1), (9, 11, 13), (2, 3, 5)])
@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_a_block_of_as_many_objects_as_there_can_be(shape, connectivity):
    mask = np.zeros(shape, bool)
    mask[::2, ::2, ::2] = True
    labels = labelling.label_block(mask, connectivity)
    assert_array_equal(labels[mask], np.arange(1, mask.sum() + 1))


@pytest.mark.parametrize("connectivity", [2, 3])
def test_diagonal_contact_at_an_edge_and_a_corner(connectivity):
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 3] = mask[2, 2, 3] = True  # blocks that share an edge
    mask[1, 2, 1] = mask[2, 1, 2] = True  # blocks that share an edge, against the grain
    mask[3, 1, 1] = mask[3, 2, 2] = True
    found = label_by_blocks(mask, (2, 2, 2), connectivity)
    assert_array_equal(found, label(mask, connectivity=connectivity))


def test_ids_beyond_32_bits_in_the_raster_index():
    """A volume of 2^36 voxels: the first voxel's index must not wrap."""
    volume_shape = (2**12, 2**12, 2**12)
    labels = np.zeros((2, 2, 2), np.uint32)
    labels[1, 1, 1] = 1
    core = Box((2**12 - 2,) * 3, (2**12,) * 3)
    assert int(labelling.list_fragments(labels, core, volume_shape).first[0]) == 2**36 - 1
    assert labelling.label_dtype(volume_shape) == np.uint64
    assert labelling.label_dtype((2, 2**16, 2**16)) == np.uint64
    assert labelling.label_dtype((1, 2**16, 2**16)) == np.uint32
