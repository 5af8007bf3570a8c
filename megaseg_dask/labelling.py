"""Labels of a whole volume from labels of its blocks, id for id.

A component's rank is the smallest raster index of its voxels: that is how
``skimage.measure.label`` numbers, and it can be known without the volume. Each
block reports its fragments (first voxel, size) and its boundary planes; seams
yield pairs of touching fragments; one union-find over those pairs, and a sort
by first voxel, gives every fragment its final id. Nothing is ever sized by the
largest id.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megaseg_dask.geometry import Box, Shape, steps

UInt = NDArray[np.unsignedinteger]
UInt64 = NDArray[np.uint64]

_CC3D_CONNECTIVITY = {1: 6, 2: 18, 3: 26}


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
    first = np.concatenate(firsts)
    sizes = cc3d.statistics(labels, no_slice_conversion=True)["voxel_counts"][1:].astype(np.uint64)
    place = np.unravel_index(first, core.shape)
    index = np.zeros(len(first), np.uint64)
    for inside, start, extent in zip(place, core.start, volume_shape, strict=True):
        index = index * np.uint64(extent) + (inside + start).astype(np.uint64)
    return Fragments(index, sizes)


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
    start[axis], stop[axis] = (stop[axis] - 1, stop[axis]) if side else (start[axis], start[axis] + 1)
    return Box(tuple(start), tuple(stop))


def seam_keys(direction: Shape) -> tuple[str, str]:
    """Return which plane of a block, and which of its neighbour in a forward direction, face each other."""
    axis = next(i for i, d in enumerate(direction) if d)
    return f"{axis},1", f"{axis},0"


def pair_across_seam(here: UInt, here_box: Box, there: UInt, there_box: Box, connectivity: int) -> UInt64:
    """Return the unique pairs of local ids that touch between two planes, uint64 ``(n, 2)``.

    ``here`` and ``there`` are label arrays of the two boxes, in the volume's
    coordinates; two voxels touch if a step of the connectivity joins them.
    """
    pairs = [np.empty((0, 2), np.uint64)]
    # All steps, not only forward ones: along a seam in y, a neighbour may lie one plane up in z.
    for step in steps(len(here_box.start), connectivity):
        touching = here_box & there_box.shifted([-s for s in step])
        if not touching.size:
            continue
        a = here[touching.within(here_box).slices].ravel()
        b = there[touching.shifted(step).within(there_box).slices].ravel()
        both = (a > 0) & (b > 0)
        pairs.append(np.unique(np.stack([a[both], b[both]], axis=1).astype(np.uint64), axis=0))
    return np.unique(np.concatenate(pairs), axis=0)


def join_fragments(fragments: Fragments, pairs: NDArray[np.integer], *, min_size: int = 0) -> UInt64:
    """Return the final id of each fragment, uint64; 0 where its component is below ``min_size`` voxels.

    ``pairs`` are rows of ``fragments`` (0-based, ``(n, 2)``). Components
    are numbered 1..n by first voxel, which equals ``skimage.measure.label``.
    """
    root = np.arange(len(fragments), dtype=np.int64)
    size, first = fragments.size.copy(), fragments.first.copy()
    # Only fragments that touch a seam need a graph; the rest are their own root.
    nodes, edges = np.unique(pairs, return_inverse=True)
    if len(nodes):
        a, b = edges.reshape(-1, 2).T
        graph = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(len(nodes), len(nodes)))
        n_components, component = connected_components(graph, directed=False)
        roots = np.full(n_components, len(fragments), np.int64)
        np.minimum.at(roots, component, nodes)
        root[nodes] = roots[component]
        moved = nodes[root[nodes] != nodes]
        np.add.at(size, root[moved], fragments.size[moved])
        np.minimum.at(first, root[moved], fragments.first[moved])
    survivors = np.flatnonzero((root == np.arange(len(root))) & (size >= min_size))
    final = np.zeros(len(root), np.uint64)
    final[survivors[np.argsort(first[survivors])]] = np.arange(1, len(survivors) + 1, dtype=np.uint64)
    return final[root]


def relabel(labels: UInt, table: UInt, dtype: np.dtype[np.unsignedinteger]) -> UInt:
    """Replace block-local ids by final ids: ``table[i]`` is the final id of local id ``i + 1``."""
    with_background = np.concatenate([np.zeros(1, dtype), table.astype(dtype)])
    return with_background[labels]


def offsets_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return where each block's fragments start in the table of all, and the total, int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def label_dtype(volume_shape: Shape) -> np.dtype[np.unsignedinteger]:
    """Return uint32, or uint64 where half the voxels exceed 2^32 - 1 (no mask has more components)."""
    voxels = Box.of(volume_shape).size
    return np.dtype(np.uint64 if (voxels + 1) // 2 > 2**32 - 1 else np.uint32)
