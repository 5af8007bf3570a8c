"""Labels of blocks, joined, equal scikit-image's labels of the whole mask, id for id."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from skimage.measure import label
from skimage.morphology import remove_small_holes

from megaseg_dask.algorithms import components
from megaseg_dask.algorithms.geometry import BlockGrid, Box

extents = st.integers(1, 14)
shapes = st.tuples(extents, extents, extents)
connectivities = st.sampled_from([1, 2, 3])


def snake(shape, rng) -> np.ndarray:
    """A thin path through the volume that crosses blocks at faces, edges and corners."""
    mask = np.zeros(shape, bool)
    place = np.array([rng.integers(n) for n in shape])
    for _ in range(3 * sum(shape)):
        mask[tuple(place)] = True
        place = np.clip(place + rng.integers(-1, 2, 3), 0, np.array(shape) - 1)
    return mask


@st.composite
def masks(draw) -> np.ndarray:
    # scikit-image reorders the axes of a volume with an extent of 1, and then does not number in
    # raster order.
    shape = draw(st.tuples(*[st.integers(2, 14)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["sparse", "medium", "dense", "snake", "empty", "full"]))
    if kind == "snake":
        return snake(shape, rng)
    return (
        rng.random(shape)
        < {"sparse": 0.05, "medium": 0.3, "dense": 0.7, "empty": 0.0, "full": 1.1}[kind]
    )


@dataclass
class Labelled:
    """What the stages ``label`` and ``seams`` leave.

    Provisional ids per block that is there, and the tables of all.
    """

    cores: dict[int, Box]
    blocks: dict[int, np.ndarray]
    offsets: np.ndarray
    fragments: components.Fragments
    pairs: list[np.ndarray]

    def write(self, table, dtype) -> np.ndarray:
        """The stage ``relabel``: blocks that are missing stay 0."""
        result = np.zeros(max(core.stop for core in self.cores.values()), dtype)
        for i, core in self.cores.items():
            if i in self.blocks:
                part = table[self.offsets[i] : self.offsets[i + 1]]
                result[core.slices] = components.relabel(self.blocks[i], part, np.dtype(dtype))
        return result


def label_blocks(mask, block_shape, connectivity, missing=frozenset()) -> Labelled:
    """The stages ``label`` and ``seams`` without their files.

    A missing block has no fragments and no seams.
    """
    grid = BlockGrid(mask.shape, block_shape)
    there = {i: core for i, core in enumerate(grid) if i not in missing}
    blocks = {
        i: components.label_block(mask[core.slices], connectivity) for i, core in there.items()
    }
    tables = {
        i: components.list_fragments(blocks[i], core, mask.shape) for i, core in there.items()
    }
    planes = {i: components.boundary_planes(block) for i, block in blocks.items()}
    offsets = components.offsets_of([len(tables.get(i, ())) for i in range(len(grid))])
    pairs = []
    for i, core in there.items():
        for j, direction in grid.iter_forward_neighbors(i, connectivity):
            if j in missing:
                continue
            near, far = components.seam_keys(direction)
            found = components.pair_across_seam(
                planes[i][near],
                components.plane_box(core, near),
                planes[j][far],
                components.plane_box(grid[j], far),
                connectivity,
            )
            pairs.append(found.astype(np.int64) + np.array([offsets[i], offsets[j]]) - 1)
    none = np.empty(0, np.uint64)
    fragments = components.Fragments(
        np.concatenate([none, *(table.first for table in tables.values())]),
        np.concatenate([none, *(table.size for table in tables.values())]),
    )
    return Labelled(dict(enumerate(grid)), blocks, offsets, fragments, pairs)


def label_by_blocks(mask, block_shape, connectivity, min_size=0, missing=frozenset()) -> np.ndarray:
    """The staged path without its files: label, seams, join, relabel."""
    found = label_blocks(mask, block_shape, connectivity, missing)
    return found.write(
        components.join_fragments(found.fragments, found.pairs, min_size=min_size), np.uint32
    )


@st.composite
def cuts(draw, mask_shape) -> tuple[tuple[int, ...], frozenset[int], np.ndarray]:
    """A block shape, the numbers of some blocks that went missing, and their voxels."""
    block_shape = draw(shapes)
    grid = BlockGrid(mask_shape, block_shape)
    numbers = draw(st.sets(st.integers(0, len(grid) - 1), max_size=max(len(grid) // 2, 1)))
    gone = np.zeros(mask_shape, bool)
    for number in numbers:
        gone[grid[number].slices] = True
    return block_shape, frozenset(numbers), gone


def survivors(labels, min_size) -> np.ndarray:
    """Objects of at least ``min_size`` voxels, numbered 1..n in their old order."""
    sizes = np.bincount(labels.ravel())
    keep = (sizes >= min_size) & (np.arange(len(sizes)) > 0)
    return np.where(keep, np.cumsum(keep), 0)[labels]


@settings(max_examples=100)
@given(masks(), shapes, connectivities, st.sampled_from([0, 0, 1, 2, 5, 40]))
def test_any_blocks_give_skimages_labels(mask, block_shape, connectivity, min_size):
    expected = label(mask, connectivity=connectivity)
    found = label_by_blocks(mask, block_shape, connectivity, min_size)
    assert_array_equal(found, survivors(expected, min_size) if min_size else expected)


@settings(max_examples=100)
@given(masks(), connectivities, st.sampled_from([0, 3]), st.data())
def test_missing_blocks_count_as_background(mask, connectivity, min_size, data):
    block_shape, missing, gone = data.draw(cuts(mask.shape))
    expected = label(mask & ~gone, connectivity=connectivity)
    found = label_by_blocks(mask, block_shape, connectivity, min_size, missing)
    assert_array_equal(found, survivors(expected, min_size) if min_size else expected)


@settings(max_examples=100)
@given(masks(), connectivities, st.integers(0, 60), st.data())
def test_holes_are_those_of_the_whole_mask(mask, connectivity, max_size, data):
    """Also with blocks missing.

    There is nothing to fill in them, and no background that goes through them.
    """
    block_shape, missing, gone = data.draw(cuts(mask.shape))
    found = label_blocks(~mask, block_shape, connectivity, missing)
    table = components.fill_table(found.fragments, found.pairs, max_size)
    expected = remove_small_holes(mask | gone, connectivity=connectivity, max_size=max_size)
    assert_array_equal(found.write(table, np.uint8) > 0, expected & ~mask & ~gone)


def test_a_hole_is_filled_up_to_its_size_and_at_the_border_too():
    mask = np.ones((4, 6, 6), bool)
    mask[1, 2, 1:5] = False  # 4 voxels, across a seam
    mask[0, 0, :3] = False  # 3 voxels at the border
    for max_size, n_left in ((2, 7), (3, 4), (4, 0)):
        found = label_blocks(~mask, (2, 3, 3), 1)
        table = components.fill_table(found.fragments, found.pairs, max_size)
        assert np.count_nonzero(~mask & (found.write(table, np.uint8) == 0)) == n_left


@given(masks(), shapes, connectivities, st.integers(1, 20), st.randoms())
def test_a_join_does_not_depend_on_its_batches_or_the_order_of_pairs(
    mask, block_shape, connectivity, batch, random
):
    found = label_blocks(mask, block_shape, connectivity)
    expected = components.join_fragments(found.fragments, found.pairs, min_size=2)
    shuffled = random.sample(found.pairs, len(found.pairs))
    in_one_array = np.concatenate([np.empty((0, 2), np.int64), *shuffled])
    for pairs in (iter(shuffled), in_one_array):
        joined = components.join_fragments(found.fragments, pairs, min_size=2, batch=batch)
        assert_array_equal(joined, expected)


def test_a_chain_of_joins_each_below_the_last():
    """Every batch gives the root of the batch before a new root: the longest paths there are."""
    n = 500
    fragments = components.Fragments(
        np.arange(n, dtype=np.uint64)[::-1].copy(), np.ones(n, np.uint64)
    )
    pairs = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    joined = components.join_fragments(fragments, pairs, min_size=n, batch=1)
    assert_array_equal(joined, np.ones(n))
    assert not components.join_fragments(fragments, pairs, min_size=n + 1, batch=1).any()


def test_rows_are_counted_in_as_many_bits_as_they_need():
    assert components.join_bytes(2**32 - 1, 0) < 31 * 2**32 < components.join_bytes(2**32, 0)
    found = label_blocks(np.ones((4, 4, 4), bool), (2, 2, 2), 1)
    expected = components.join_fragments(found.fragments, found.pairs)
    assert expected.dtype == np.uint32
    with mock.patch.object(components, "_smallest_dtype", return_value=np.dtype(np.uint64)):
        wide = components.join_fragments(found.fragments, found.pairs)
    assert wide.dtype == np.uint64
    assert_array_equal(wide, expected)


@pytest.mark.parametrize("n_fragments", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_a_join_stays_within_its_projection(n_fragments):
    command = [sys.executable, "-m", "benchmarks.join", "table", "corners", str(n_fragments)]
    root = Path(__file__).parents[2]
    found = json.loads(
        subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    )
    assert found["n_fragments"] >= n_fragments
    assert found["peak_bytes"] <= components.join_bytes(found["n_fragments"], found["n_pairs"])


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
    labels = components.label_block(mask, connectivity)
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
    assert int(components.list_fragments(labels, core, volume_shape).first[0]) == 2**36 - 1
    assert components.label_dtype(volume_shape) == np.uint64
    assert components.label_dtype((2, 2**16, 2**16)) == np.uint64
    assert components.label_dtype((1, 2**16, 2**16)) == np.uint32


@settings(max_examples=40)
@given(masks(), st.integers(1, 600), connectivities)
def test_slabs_of_a_block_never_change_an_id(mask, n_voxels, connectivity):
    whole = label(mask, connectivity=connectivity)
    with mock.patch.object(components, "_LABELLED_AT_ONCE", n_voxels):
        found = components.label_block(mask, connectivity)
    assert found.dtype == np.uint32
    assert_array_equal(found, whole)
