"""Labels of a whole volume from labels of its blocks, id for id.

A component's rank is the smallest raster index of its voxels: that is how
``skimage.measure.label`` numbers, and it can be known without the volume. Each
block reports its fragments (first voxel, size) and its boundary planes; seams
yield pairs of touching fragments; one union-find over those pairs, and a sort
by first voxel, gives every fragment its final id. Nothing is ever sized by the
largest id. The tables of a terabyte have 10^8 fragments, so the join works in
place and a part at a time, and its memory can be projected (:func:`join_bytes`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape, steps

UInt = NDArray[np.unsignedinteger]
UInt64 = NDArray[np.uint64]
Pairs = NDArray[np.integer] | Iterable[NDArray[np.integer]]

_HALF_BITS = np.uint64(32)
_LOWER_HALF = np.uint64(2**32 - 1)
_CC3D_CONNECTIVITY = {1: 6, 2: 18, 3: 26}

# Voxels that cc3d labels at a time, for about 20 ms.
_LABELLED_AT_ONCE = 2**21

# Voxels whose labels are counted at a time.
_COUNTED_AT_ONCE = 2**22

# Pairs, and rows of the table, that a join works on at a time.
JOIN_BATCH = 2**20

# What a join holds, in bytes; measured in fresh processes at 10^6, 10^7 and 10^8 fragments
# (benchmarks/join.py).
# Per fragment, beside its root: first voxel 8, size 8, components' sizes or first voxels 8, two
# flags.
_FRAGMENT_BYTES = 26
# Per pair in an array: two int64.
_PAIR_BYTES = 16
# Per pair of the batch at work: 65 measured where all join different fragments.
_BATCH_BYTES = 80
# Per row of the part at work: row, first voxel, search and result, and what the heap loses: 45
# measured.
_PART_BYTES = 64


@dataclass(frozen=True, slots=True)
class Fragments:
    """The components inside one block (or many): raster index of the first voxel, voxel count.

    Row ``i`` belongs to block-local id ``i + 1``. Both columns are uint64.
    """

    first: UInt64
    size: UInt64

    def __len__(self) -> int:
        return len(self.first)


# -- one block


def label_block(mask: NDArray[np.generic], connectivity: int) -> NDArray[np.uint32]:
    """Label one block ``(z, y, x)``; ids 1..n in raster order of their first voxels, uint32.

    It is labelled in slabs, which are joined as blocks are: cc3d holds Python's lock, and a GPU
    waits for the thread that feeds it.
    """
    plane_voxels = mask[0].size
    n_planes = max(_LABELLED_AT_ONCE // max(plane_voxels, 1), 1)
    if n_planes >= len(mask):
        return _label(mask, connectivity)
    labels = np.empty(mask.shape, np.uint32)
    starts = range(0, len(mask), n_planes)
    # Where the ids of each slab begin in those of all.
    offsets = [0]
    pairs = []
    for start in starts:
        slab = labels[start : start + n_planes]
        slab[:] = _label(mask[start : start + n_planes], connectivity)
        offsets.append(offsets[-1] + int(slab.max()))
        if start:
            touching = _pair_planes(labels, start, connectivity)
            pairs.append(touching.astype(np.int64) - 1 + offsets[-3:-1])
    # Slabs are numbered in raster order, and follow each other in it.
    order = np.arange(offsets[-1], dtype=np.uint64)
    final = join_fragments(Fragments(order, np.zeros_like(order)), pairs)
    for start, first, last in zip(starts, offsets, offsets[1:], strict=False):
        slab = labels[start : start + n_planes]
        slab[:] = relabel(slab, final[first:last], labels.dtype)
    return labels


def _label(mask: NDArray[np.generic], connectivity: int) -> NDArray[np.uint32]:
    import cc3d

    labels = cc3d.connected_components(
        np.ascontiguousarray(mask, np.uint8),
        connectivity=_CC3D_CONNECTIVITY[connectivity],
        # Not binary_image: for small blocks with many corners cc3d 4.1 then estimates too few
        # labels, and fails.
        out_dtype=np.uint32,
    )
    return np.ascontiguousarray(labels)


def _pair_planes(labels: NDArray[np.uint32], z: int, connectivity: int) -> UInt64:
    """Return which ids of the plane above ``z`` touch which of the plane at ``z``."""
    whole = Box.of(labels.shape)
    above = Box((z - 1, 0, 0), (z, *whole.stop[1:]))
    below = above.shifted((1, 0, 0))
    here = labels[above.slices]
    there = labels[below.slices]
    return pair_across_seam(here, above, there, below, connectivity)


def list_fragments(labels: NDArray[np.uint32], core: Box, volume_shape: Shape) -> Fragments:
    """Return the fragments of a block's labels.

    First voxels are raster indices of the volume; ``core`` is where the block lies.
    """
    first = _first_voxels(labels)
    index = np.zeros(len(first), np.uint64)
    position = np.unravel_index(first, core.shape)
    for along_axis, start, extent in zip(position, core.start, volume_shape, strict=True):
        index = index * np.uint64(extent) + (along_axis + start).astype(np.uint64)
    return Fragments(index, _count_voxels(labels))


def _first_voxels(labels: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the raster index in the block of each label's first voxel."""
    # Ids appear in raster order, so a first voxel is where the running maximum grows; plane by
    # plane, since temporaries of the whole block would cost more than the labels.
    firsts = [np.empty(0, np.int64)]
    highest = np.uint32(0)
    for z, plane in enumerate(labels):
        running = np.maximum(np.maximum.accumulate(plane.ravel()), highest)
        grows = np.diff(running, prepend=highest)
        firsts.append(np.flatnonzero(grows) + z * plane.size)
        highest = running[-1]
    return np.concatenate(firsts)


def _count_voxels(labels: NDArray[np.uint32]) -> UInt64:
    # In parts: a temporary of 8 bytes for each voxel would cost more than the labels.
    counts = np.zeros(int(labels.max(initial=0)) + 1, np.intp)
    flat = labels.reshape(-1)
    at_once = max(_COUNTED_AT_ONCE, len(counts))
    for start in range(0, flat.size, at_once):
        counts += np.bincount(flat[start : start + at_once], minlength=len(counts))
    return counts[1:].astype(np.uint64)


def relabel(
    labels: UInt, table: UInt | NDArray[np.bool_], dtype: np.dtype[np.unsignedinteger]
) -> UInt:
    """Replace block-local ids by final ids: ``table[i]`` is the final id of local id ``i + 1``."""
    if table.dtype != np.bool_ and np.array_equal(table, np.arange(1, len(table) + 1)):
        return labels.astype(dtype, copy=False)
    with_background = np.concatenate([np.zeros(1, dtype), table.astype(dtype)])
    return with_background[labels]


# -- seams between blocks


def boundary_planes(labels: UInt) -> dict[str, UInt]:
    """Return the first and last plane of each axis, one voxel thick, keyed ``"axis,side"``."""
    planes = {}
    block = Box.of(labels.shape)
    for axis in range(labels.ndim):
        for side in (0, 1):
            key = f"{axis},{side}"
            planes[key] = labels[plane_box(block, key).slices]
    return planes


def plane_box(core: Box, key: str) -> Box:
    """Return the voxels of a boundary plane of a block."""
    axis, side = map(int, key.split(","))
    start = list(core.start)
    stop = list(core.stop)
    if side:
        start[axis] = stop[axis] - 1
    else:
        stop[axis] = start[axis] + 1
    return Box(tuple(start), tuple(stop))


def seam_keys(direction: Shape) -> tuple[str, str]:
    """Return the keys of the two planes that face each other across a seam.

    The first is a plane of the block, the second one of its neighbor in a forward
    ``direction``.
    """
    axis = next(i for i, d in enumerate(direction) if d)
    return f"{axis},1", f"{axis},0"


def pair_across_seam(
    here: UInt, here_box: Box, there: UInt, there_box: Box, connectivity: int
) -> UInt64:
    """Return the unique pairs of local ids that touch between two planes, uint64 ``(n, 2)``.

    ``here`` and ``there`` are label arrays of the two boxes, in the volume's
    coordinates; two voxels touch if a step of the connectivity joins them.
    """
    packed_pairs = [np.empty(0, np.uint64)]
    # All steps, not only forward ones: along a seam in y, a neighbor may lie one plane up in z.
    for step in steps(len(here_box.start), connectivity):
        touching = here_box & there_box.shifted([-s for s in step])
        if not touching.size:
            continue
        a = here[touching.within(here_box).slices].ravel()
        b = there[touching.shifted(step).within(there_box).slices].ravel()
        both = (a > 0) & (b > 0)
        # Ids of a block have 32 bits: two make one number, which sorts far faster than rows of
        # two.
        packed_pairs.append(_unique((a[both].astype(np.uint64) << _HALF_BITS) | b[both]))
    packed = _unique(np.concatenate(packed_pairs))
    return np.stack([packed >> _HALF_BITS, packed & _LOWER_HALF], axis=1)


def _unique(values: UInt) -> UInt:
    """Sort in place and return the distinct values.

    ``np.unique`` hashes since NumPy 2.3, and took a hundred times as long.
    """
    values.sort()
    starts_run = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=starts_run[1:])
    return values[starts_run]


# -- the join of a volume


def join_fragments(
    fragments: Fragments, pairs: Pairs, *, min_size: int = 0, batch: int = JOIN_BATCH
) -> UInt:
    """Return the final id of each fragment; 0 where its component is below ``min_size`` voxels.

    ``pairs`` are rows of ``fragments`` (0-based, ``(n, 2)``), in one array or
    in many: an iterator keeps them out of memory. Components are numbered
    1..n by first voxel, which equals ``skimage.measure.label``. The ids are
    uint32, or uint64 where there are more fragments than that can count.
    ``batch`` pairs or rows are worked on at a time; it changes no id.
    """
    root = _find_roots(fragments, pairs, batch)
    kept = np.zeros(len(root), np.bool_)
    for part in _iter_parts(len(root), batch):
        kept[root[part]] = True
    if min_size:
        kept &= _component_sizes(fragments, root, batch) >= np.uint64(min_size)
    # Sorted values and a binary search, not an argsort: that would hold three arrays of this size
    # at once.
    firsts = fragments.first[kept]
    firsts.sort()
    for part in _iter_parts(len(root), batch):
        rows = root[part]
        ids = np.searchsorted(firsts, fragments.first[rows]) + 1
        # A part of ``root`` is read for the last time here, and so can take the result.
        root[part] = np.where(kept[rows], ids, 0)
    return root


def fill_table(
    fragments: Fragments, pairs: Pairs, max_size: int, *, batch: int = JOIN_BATCH
) -> NDArray[np.bool_]:
    """Return which fragments of the background are holes of at most ``max_size`` voxels.

    ``fragments`` and ``pairs`` are those of the inverted mask, as for
    :func:`join_fragments`. Filling them equals
    ``skimage.morphology.remove_small_holes(mask, max_size=max_size)`` with the
    connectivity that labelled the background; a component that touches the
    border of the volume counts as a hole too.
    """
    root = _find_roots(fragments, pairs, batch)
    small = _component_sizes(fragments, root, batch) <= np.uint64(max_size)
    filled = np.empty(len(root), np.bool_)
    for part in _iter_parts(len(root), batch):
        filled[part] = small[root[part]]
    return filled


def join_bytes(n_fragments: int, n_pairs: int | None = None) -> int:
    """Return the projected peak of a join in bytes, its input and output included.

    ``n_pairs`` counts int64 pairs in one array. Without it the pairs come from
    an iterator, of which a join holds two batches at most. Holes need no more.
    """
    max_at_work = 2 * JOIN_BATCH
    if n_pairs is None:
        n_pairs = max_at_work
    table = n_fragments * (_FRAGMENT_BYTES + _smallest_dtype(n_fragments).itemsize)
    at_work = min(n_pairs, max_at_work) * _BATCH_BYTES + JOIN_BATCH * _PART_BYTES
    return table + n_pairs * _PAIR_BYTES + at_work


def _smallest_dtype(most: int) -> np.dtype[np.unsignedinteger]:
    """Return uint32 if it can hold ``most``, else uint64."""
    if most <= np.iinfo(np.uint32).max:
        return np.dtype(np.uint32)
    return np.dtype(np.uint64)


def _iter_parts(n_rows: int, batch: int) -> Iterator[slice]:
    return (slice(start, start + batch) for start in range(0, n_rows, batch))


def _iter_batches(pairs: Pairs, batch: int) -> Iterator[NDArray[np.integer]]:
    """Yield all pairs, between ``batch`` and twice that at a time.

    The arrays of seams are many and small.
    """
    waiting: list[NDArray[np.integer]] = []
    n_waiting = 0
    arrays = [pairs] if isinstance(pairs, np.ndarray) else pairs
    for array in arrays:
        for part in _iter_parts(len(array), batch):
            waiting.append(array[part])
            n_waiting += len(array[part])
            if n_waiting >= batch:
                yield np.concatenate(waiting)
                waiting = []
                n_waiting = 0
    if waiting:
        yield np.concatenate(waiting)


def _find_roots(fragments: Fragments, pairs: Pairs, batch: int) -> UInt:
    """Return for each fragment the row of its component's root.

    The root is the fragment with the smallest first voxel.
    """
    n = len(fragments)
    root = np.arange(n, dtype=_smallest_dtype(n))
    for some_pairs in _iter_batches(pairs, batch):
        _join_batch(root, fragments.first, some_pairs)
    for part in _iter_parts(n, batch):
        root[part] = _follow(root, root[part])
    return root


def _follow(root: UInt, rows: NDArray[np.integer]) -> UInt:
    """Return the rows at the ends of the paths of roots."""
    ends: UInt = root[rows]
    while True:
        further = root[ends]
        if np.array_equal(ends, further):
            return ends
        ends = further


def _join_batch(root: UInt, first: UInt64, pairs: NDArray[np.integer]) -> None:
    """Give all that a batch of pairs joins one root; the graph holds the batch's roots alone."""
    # Here, not above: a client plans with this module's memory model, and joins nothing.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = _follow(root, pairs.T)
    ends = ends[:, ends[0] != ends[1]]
    nodes = _unique(ends.flatten())
    n_nodes = len(nodes)
    if not n_nodes:
        return
    # One end after the other: both at once would hold another 16 bytes a pair.
    a, b = (np.searchsorted(nodes, end).astype(np.int32) for end in ends)
    graph = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(n_nodes, n_nodes))
    n_components, component = connected_components(graph, directed=False)
    node_first = first[nodes]
    component_first = np.full(n_components, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(component_first, component, node_first)
    is_root = node_first == component_first[component]
    component_root = np.empty(n_components, root.dtype)
    component_root[component[is_root]] = nodes[is_root]
    root[nodes] = component_root[component]


def _component_sizes(fragments: Fragments, root: UInt, batch: int) -> UInt64:
    """Return the voxels of each component at the row of its root.

    Other rows keep the size of their fragment.
    """
    total = fragments.size.copy()
    for part in _iter_parts(len(root), batch):
        rows = root[part]
        own_rows = np.arange(part.start, part.start + len(rows), dtype=root.dtype)
        joined = np.flatnonzero(rows != own_rows)
        np.add.at(total, rows[joined].astype(np.intp), fragments.size[part][joined])
    return total


# -- tables of all blocks


def offsets_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return where each block's fragments start in the table of all, and the total, int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def label_dtype(volume_shape: Shape) -> np.dtype[np.unsignedinteger]:
    """Return uint32, or uint64 where half the voxels exceed 2^32 - 1.

    No mask has more components than half its voxels, rounded up.
    """
    return _smallest_dtype((Box.of(volume_shape).size + 1) // 2)
