"""Labels of a whole volume from labels of its blocks, id for id.

A component's rank is the smallest raster index of its voxels: that is how
``skimage.measure.label`` numbers, and it can be known without the volume. Each
block reports its fragments (first voxel, size) and its boundary planes; seams
yield pairs of touching fragments; one union-find over those pairs, and a sort
by first voxel, gives every fragment its final id. Nothing is ever sized by the
largest id. The tables of a terabyte have 10^8 fragments, so the join works in
place and a part at a time, and says beforehand what it will hold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megaseg_dask.algorithms.geometry import Box, Shape, steps

UInt = NDArray[np.unsignedinteger]
UInt64 = NDArray[np.uint64]
Pairs = NDArray[np.integer] | Iterable[NDArray[np.integer]]

_HALF, _LOWER = np.uint64(32), np.uint64(2**32 - 1)
_CC3D_CONNECTIVITY = {1: 6, 2: 18, 3: 26}

# Voxels whose labels are counted at a time.
_COUNTED_AT_ONCE = 2**22

# Pairs, and rows of the table, that a join works on at a time.
JOIN_BATCH = 2**20
# What a join holds, in bytes; measured in fresh processes at 10^6, 10^7 and 10^8 fragments (benchmarks/join.py).
# Per fragment, beside its root: first voxel 8, size 8, components' sizes or their first voxels 8, two flags.
FRAGMENT_BYTES = 26
# Per pair in an array: two int64. Per pair of the batch at work: 65 measured where all join different fragments.
PAIR_BYTES, BATCH_BYTES = 16, 80
# Per row of the part at work: row, first voxel, search and result, and what the heap loses: 45 measured.
PART_BYTES = 64


@dataclass(frozen=True, slots=True)
class Fragments:
    """The components inside one block (or many): raster index of the first voxel, and voxel count.

    Row ``i`` belongs to block-local id ``i + 1``. Both columns are uint64.
    """

    first: UInt64
    size: UInt64

    def __len__(self) -> int:
        return len(self.first)


def label_block(mask: NDArray[np.generic], connectivity: int) -> NDArray[np.uint32]:
    """Label one block ``(z, y, x)``; ids 1..n in raster order of their first voxels, uint32."""
    labels = cc3d.connected_components(
        np.ascontiguousarray(mask, np.uint8),
        connectivity=_CC3D_CONNECTIVITY[connectivity],
        # Not binary_image: for small blocks with many corners cc3d 4.1 then estimates too few labels, and fails.
        out_dtype=np.uint32,
    )
    return np.ascontiguousarray(labels)


def list_fragments(labels: NDArray[np.uint32], core: Box, volume_shape: Shape) -> Fragments:
    """Return the fragments of a block's labels, with first voxels as raster indices of the volume."""
    # Ids appear in raster order, so a first voxel is where the running maximum grows;
    # plane by plane, since temporaries of the whole block would cost more than the labels.
    firsts, top = [np.empty(0, np.int64)], np.uint32(0)
    for z, plane in enumerate(labels):
        running = np.maximum(np.maximum.accumulate(plane.ravel()), top)
        firsts.append(np.flatnonzero(np.diff(running, prepend=top)) + z * plane.size)
        top = running[-1]
    first, sizes = np.concatenate(firsts), _count_voxels(labels)
    place = np.unravel_index(first, core.shape)
    index = np.zeros(len(first), np.uint64)
    for inside, start, extent in zip(place, core.start, volume_shape, strict=True):
        index = index * np.uint64(extent) + (inside + start).astype(np.uint64)
    return Fragments(index, sizes)


def _count_voxels(labels: NDArray[np.uint32]) -> UInt64:
    # In parts: a temporary of 8 bytes for each voxel of the block would cost more than the labels.
    counts = np.zeros(int(labels.max(initial=0)) + 1, np.intp)
    flat = labels.reshape(-1)
    at_once = max(_COUNTED_AT_ONCE, len(counts))
    for start in range(0, flat.size, at_once):
        counts += np.bincount(flat[start : start + at_once], minlength=len(counts))
    return counts[1:].astype(np.uint64)


def boundary_planes(labels: UInt) -> dict[str, UInt]:
    """Return the first and last plane of each axis, one voxel thick, keyed ``"axis,side"``."""
    planes = {}
    for axis, extent in enumerate(labels.shape):
        for side, where in ((0, slice(0, 1)), (1, slice(extent - 1, extent))):
            index = (slice(None),) * axis + (where,)
            planes[f"{axis},{side}"] = labels[index]
    return planes


def plane_box(core: Box, key: str) -> Box:
    """Return the voxels of a boundary plane of a block."""
    axis, side = map(int, key.split(","))
    start, stop = list(core.start), list(core.stop)
    start[axis], stop[axis] = (
        (stop[axis] - 1, stop[axis]) if side else (start[axis], start[axis] + 1)
    )
    return Box(tuple(start), tuple(stop))


def seam_keys(direction: Shape) -> tuple[str, str]:
    """Return which plane of a block, and which of its neighbour in a forward direction, face each other."""
    axis = next(i for i, d in enumerate(direction) if d)
    return f"{axis},1", f"{axis},0"


def pair_across_seam(
    here: UInt, here_box: Box, there: UInt, there_box: Box, connectivity: int
) -> UInt64:
    """Return the unique pairs of local ids that touch between two planes, uint64 ``(n, 2)``.

    ``here`` and ``there`` are label arrays of the two boxes, in the volume's
    coordinates; two voxels touch if a step of the connectivity joins them.
    """
    pairs = [np.empty(0, np.uint64)]
    # All steps, not only forward ones: along a seam in y, a neighbour may lie one plane up in z.
    for step in steps(len(here_box.start), connectivity):
        touching = here_box & there_box.shifted([-s for s in step])
        if not touching.size:
            continue
        a = here[touching.within(here_box).slices].ravel()
        b = there[touching.shifted(step).within(there_box).slices].ravel()
        both = (a > 0) & (b > 0)
        # Ids of a block have 32 bits: two make one number, which sorts far faster than rows of two.
        pairs.append(_unique((a[both].astype(np.uint64) << _HALF) | b[both]))
    packed = _unique(np.concatenate(pairs))
    return np.stack([packed >> _HALF, packed & _LOWER], axis=1)


def _unique(values: UInt) -> UInt:
    """Sort in place and return what differs; ``np.unique`` hashes since NumPy 2.3, and took a hundred times as long."""
    values.sort()
    starts_run = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=starts_run[1:])
    return values[starts_run]


def join_fragments(fragments: Fragments, pairs: Pairs, *, min_size: int = 0) -> UInt:
    """Return the final id of each fragment; 0 where its component is below ``min_size`` voxels.

    ``pairs`` are rows of ``fragments`` (0-based, ``(n, 2)``), in one array or
    in many: an iterator keeps them out of memory. Components are numbered
    1..n by first voxel, which equals ``skimage.measure.label``. The ids are
    uint32, or uint64 where there are more fragments than that can count.
    """
    root = _find_roots(fragments, pairs)
    kept = np.zeros(len(root), np.bool_)
    for part in _iter_parts(len(root)):
        kept[root[part]] = True
    if min_size:
        kept &= _component_sizes(fragments, root) >= np.uint64(min_size)
    # Sorted values and a binary search, not an argsort: that would hold three arrays of this size at once.
    firsts = fragments.first[kept]
    firsts.sort()
    for part in _iter_parts(len(root)):
        rows = root[part]
        # A part of ``root`` is read for the last time here, and so can take the result.
        root[part] = np.where(kept[rows], np.searchsorted(firsts, fragments.first[rows]) + 1, 0)
    return root


def fill_table(fragments: Fragments, pairs: Pairs, max_size: int) -> NDArray[np.bool_]:
    """Return which fragments of the background are holes: their component has at most ``max_size`` voxels.

    ``fragments`` and ``pairs`` are those of the inverted mask, as for
    :func:`join_fragments`. Filling them equals
    ``skimage.morphology.remove_small_holes(mask, max_size=max_size)`` with the
    connectivity that labelled the background; a component that touches the
    border of the volume counts as a hole too.
    """
    root = _find_roots(fragments, pairs)
    small = _component_sizes(fragments, root) <= np.uint64(max_size)
    filled = np.empty(len(root), np.bool_)
    for part in _iter_parts(len(root)):
        filled[part] = small[root[part]]
    return filled


def join_bytes(n_fragments: int, n_pairs: int) -> int:
    """Return the projected peak of a join in bytes, its input and output included; holes need no more.

    ``n_pairs`` counts int64 pairs in one array; of pairs from an iterator no
    more than ``2 * JOIN_BATCH`` are ever held.
    """
    table = n_fragments * (FRAGMENT_BYTES + _rows_dtype(n_fragments).itemsize)
    at_work = min(n_pairs, 2 * JOIN_BATCH) * BATCH_BYTES + JOIN_BATCH * PART_BYTES
    return table + n_pairs * PAIR_BYTES + at_work


def _rows_dtype(n_rows: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(np.uint64 if n_rows > 2**32 - 1 else np.uint32)


def _iter_parts(n_rows: int) -> Iterator[slice]:
    return (slice(start, start + JOIN_BATCH) for start in range(0, n_rows, JOIN_BATCH))


def _iter_batches(pairs: Pairs) -> Iterator[NDArray[np.integer]]:
    """Yield all pairs, between ``JOIN_BATCH`` and twice that at a time: arrays per seam are many and small."""
    waiting: list[NDArray[np.integer]] = []
    n_waiting = 0
    for array in [pairs] if isinstance(pairs, np.ndarray) else pairs:
        for part in _iter_parts(len(array)):
            waiting.append(array[part])
            n_waiting += len(waiting[-1])
            if n_waiting >= JOIN_BATCH:
                yield np.concatenate(waiting)
                waiting, n_waiting = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _find_roots(fragments: Fragments, pairs: Pairs) -> UInt:
    """Return for each fragment the row of its component's root: the fragment with the smallest first voxel."""
    n = len(fragments)
    root = np.arange(n, dtype=_rows_dtype(n))
    for batch in _iter_batches(pairs):
        _join_batch(root, fragments.first, batch)
    for part in _iter_parts(n):
        root[part] = _follow(root, root[part])
    return root


def _follow(root: UInt, rows: NDArray[np.integer]) -> UInt:
    found: UInt = root[rows]
    while not np.array_equal(found, further := root[found]):
        found = further
    return found


def _join_batch(root: UInt, first: UInt64, pairs: NDArray[np.integer]) -> None:
    """Let one root stand for all that a batch of pairs joins; the graph holds the batch's roots alone."""
    ends = _follow(root, pairs.T)
    ends = ends[:, ends[0] != ends[1]]
    nodes = _unique(ends.flatten())
    if not len(nodes):
        return
    a, b = (np.searchsorted(nodes, end).astype(np.int32) for end in ends)
    graph = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(len(nodes), len(nodes)))
    n_components, component = connected_components(graph, directed=False)
    voxels = first[nodes]
    smallest = np.full(n_components, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, component, voxels)
    top = voxels == smallest[component]
    roots = np.empty(n_components, root.dtype)
    roots[component[top]] = nodes[top]
    root[nodes] = roots[component]


def _component_sizes(fragments: Fragments, root: UInt) -> UInt64:
    """Return the voxels of each component at the row of its root; other rows keep their fragment's."""
    total = fragments.size.copy()
    for part in _iter_parts(len(root)):
        rows = root[part]
        moved = np.flatnonzero(
            rows != np.arange(part.start, part.start + len(rows), dtype=root.dtype)
        )
        np.add.at(total, rows[moved].astype(np.intp), fragments.size[part][moved])
    return total


def relabel(
    labels: UInt, table: UInt | NDArray[np.bool_], dtype: np.dtype[np.unsignedinteger]
) -> UInt:
    """Replace block-local ids by final ids: ``table[i]`` is the final id of local id ``i + 1``."""
    if table.dtype != np.bool_ and np.array_equal(table, np.arange(1, len(table) + 1)):
        return labels.astype(dtype, copy=False)
    with_background = np.concatenate([np.zeros(1, dtype), table.astype(dtype)])
    return with_background[labels]


def offsets_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return where each block's fragments start in the table of all, and the total, int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def label_dtype(volume_shape: Shape) -> np.dtype[np.unsignedinteger]:
    """Return uint32, or uint64 where half the voxels exceed 2^32 - 1 (no mask has more components)."""
    voxels = Box.of(volume_shape).size
    return np.dtype(np.uint64 if (voxels + 1) // 2 > 2**32 - 1 else np.uint32)
