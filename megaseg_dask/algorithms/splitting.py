"""Objects that touch, taken apart: each object by itself, so no block can matter.

The distance map of an object in µm rises from its surface. Its h-maxima are
the markers of a watershed inside the object, as scikit-image computes them on
the object's bounding box. The box is padded by one background voxel, except
where the volume ends: the borders of the volume are not borders of the object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.components import Fragments
from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape

Boxes = NDArray[np.int64]
Parts = NDArray[np.int32]

# Peak of splitting one object per voxel of its padded box: sorting the distances twice. Measured;
# `tests/run/test_memory.py` compares whole tasks with it.
SPLIT_BYTES = 128

# A distance is rounded to float32 before it is compared.
_ROUNDING = 1e-5


# -- one object


def split_object(
    mask: NDArray[np.bool_],
    at_end: Sequence[tuple[bool, bool]],
    spacing_um: Sequence[float],
    depth_um: float,
) -> Parts | None:
    """Take one object apart where its distance map has several h-maxima of a depth.

    Args:
        mask: The object in its bounding box ``(z, y, x)``.
        at_end: For each axis, whether the volume ends where the box begins, and where it stops.
        spacing_um: Size of a voxel ``(z, y, x)``.
        depth_um: Depth of the h-maxima, above 0.

    Returns:
        The parts, 1..n in the box and 0 outside the object, int32; ``None`` if it stays whole.
    """
    # Here, not above: the client plans with this module, and splits nothing.
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    padding = [(int(not first), int(not last)) for first, last in at_end]
    padded = np.pad(mask, padding)
    if padded.all():
        return None  # all of the volume: it has no surface
    distance = distance_transform_edt(padded, sampling=spacing_um).astype(np.float32)
    if _count_peaks(distance, depth_um) < 2:
        return None
    markers, n_markers = label(h_maxima(distance, depth_um), connectivity=3, return_num=True)
    if n_markers < 2:
        return None
    np.negative(distance, out=distance)
    parts = watershed(distance, markers, mask=padded)
    if not parts[padded].all():
        # Voxels that touch the rest by an edge or a corner alone join the part that they touch.
        parts = watershed(distance, parts, connectivity=3, mask=padded)
    inside = [slice(before, before + n) for (before, _), n in zip(padding, mask.shape, strict=True)]
    return np.asarray(parts[tuple(inside)], np.int32)


def _count_peaks(distance: NDArray[np.float32], depth_um: float) -> int:
    """Return how many markers there can be: each lies in a maximum at least as high as the depth.

    It is far quicker than to find the markers.
    """
    from skimage.measure import label
    from skimage.morphology import local_maxima

    lowest = np.float32(depth_um * (1 - _ROUNDING))
    if distance.max() < lowest:
        return 0
    peaks = local_maxima(distance, connectivity=3)
    peaks &= distance >= lowest
    _, n_peaks = label(peaks, connectivity=3, return_num=True)
    return int(n_peaks)


# -- the objects of a volume


@dataclass(frozen=True, slots=True)
class Objects:
    """Whole objects: raster index of the first voxel, voxel count, and bounding box.

    Row ``i`` belongs to id ``i + 1``. ``boxes`` is ``(n, 6)``: start and stop ``(z, y, x)``.
    """

    first: NDArray[np.uint64]
    size: NDArray[np.uint64]
    boxes: Boxes

    @classmethod
    def of(cls, fragments: Fragments, boxes: NDArray[np.integer], ids: NDArray[Any]) -> "Objects":
        """Add up fragments with boxes ``(6, n)`` to the objects that ``ids`` say, from 1 on."""
        n_objects = int(ids.max(initial=0))
        rows = ids.astype(np.intp) - 1
        first = np.full(n_objects, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(first, rows, fragments.first)
        size = np.zeros(n_objects, np.uint64)
        np.add.at(size, rows, fragments.size)
        joined = np.empty((n_objects, 6), np.int64)
        joined[:, :3] = np.iinfo(np.int64).max
        joined[:, 3:] = 0
        for column in range(3):
            np.minimum.at(joined[:, column], rows, boxes[column])
        for column in range(3, 6):
            np.maximum.at(joined[:, column], rows, boxes[column])
        return cls(first, size, joined)


def fragment_boxes(labels: NDArray[np.uint32], core: Box) -> NDArray[np.uint64]:
    """Return the bounding box of each fragment of a block in the volume, ``(6, n)``, uint64."""
    import cc3d

    found = cc3d.statistics(np.ascontiguousarray(labels), no_slice_conversion=True)
    # First and last index of each axis, one axis after the other; background first.
    limits = found["bounding_boxes"][1:].astype(np.int64)
    start = limits[:, 0::2] + core.start
    stop = limits[:, 1::2] + core.start + 1
    return np.concatenate([start, stop], axis=1).T.astype(np.uint64)


def padded_voxels(boxes: Boxes) -> NDArray[np.int64]:
    """Return the voxels of boxes ``(n, 6)`` with one voxel more at each side."""
    voxels: NDArray[np.int64] = np.prod(boxes[:, 3:] - boxes[:, :3] + 2, axis=1)
    return voxels


def may_split(
    boxes: Boxes, volume_shape: Shape, spacing_um: Sequence[float], depth_um: float
) -> NDArray[np.bool_]:
    """Return which boxes are large enough to hold a maximum as high as the depth.

    No voxel is further from the surface than from the nearest side of its box, unless the volume
    ends there.
    """
    highest = np.full(len(boxes), np.inf)
    for axis, (extent, spacing) in enumerate(zip(volume_shape, spacing_um, strict=True)):
        start = boxes[:, axis]
        stop = boxes[:, axis + 3]
        n_ends = (start == 0).astype(np.int64) + (stop == extent)
        n_voxels = np.where(n_ends == 0, (stop - start + 1) // 2, stop - start)
        reach = np.where(n_ends == 2, np.inf, n_voxels * spacing)
        np.minimum(highest, reach, out=highest)
    return highest >= depth_um * (1 - _ROUNDING)


def deal(boxes: Boxes, grid: BlockGrid, present: Sequence[int]) -> NDArray[np.int64]:
    """Return the number of the block whose task splits each object, of those that are present.

    An object inside one block goes to that block. The others are spread so that all tasks have
    about as many voxels of boxes.
    """
    voxels = padded_voxels(boxes)
    owner = np.zeros(len(boxes), np.int64)
    is_inside = np.ones(len(boxes), np.bool_)
    for axis, (n_blocks, extent) in enumerate(zip(grid.grid_shape, grid.block_shape, strict=True)):
        place = boxes[:, axis] // extent
        is_inside &= place == (boxes[:, axis + 3] - 1) // extent
        owner = owner * n_blocks + place
    loads = np.zeros(len(grid), np.int64)
    np.add.at(loads, owner[is_inside], voxels[is_inside])
    waiting = [(int(loads[number]), number) for number in present]
    heapify(waiting)
    spread = np.flatnonzero(~is_inside)
    # The largest first: the small ones then fill what is uneven.
    for row in spread[np.argsort(-voxels[spread], kind="stable")].tolist():
        load, number = waiting[0]
        owner[row] = number
        heapreplace(waiting, (load + int(voxels[row]), number))
    return owner


def list_parts(parts: Parts, box: Box, volume_shape: Shape) -> Fragments:
    """Return the parts of an object in its box: first voxels in the volume, and sizes."""
    flat = parts.ravel()
    inside = np.flatnonzero(flat)
    numbers = flat[inside]
    n_parts = int(numbers.max())
    first = np.empty(n_parts + 1, np.int64)
    # Of several values for one place the last one stays: backwards, the first voxel.
    first[numbers[::-1]] = inside[::-1]
    position = np.unravel_index(first[1:], box.shape)
    index = np.zeros(n_parts, np.uint64)
    for along_axis, start, extent in zip(position, box.start, volume_shape, strict=True):
        index = index * np.uint64(extent) + (along_axis + start).astype(np.uint64)
    size = np.bincount(numbers, minlength=n_parts + 1)[1:].astype(np.uint64)
    return Fragments(index, size)


def rank(
    objects: Fragments, split: NDArray[np.integer], parts: Fragments, *, min_size: int = 0
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the final ids of whole objects, and of parts; 0 for objects that were split.

    ``split`` are the ids of these, from 1 on. Objects and parts of at least ``min_size`` voxels are
    numbered 1..n by first voxel, together.
    """
    kept = objects.size >= np.uint64(min_size)
    kept[np.asarray(split, np.intp) - 1] = False
    kept_parts = parts.size >= np.uint64(min_size)
    firsts = np.concatenate([objects.first[kept], parts.first[kept_parts]])
    firsts.sort()

    def ids_of(first: NDArray[np.uint64], is_kept: NDArray[np.bool_]) -> NDArray[np.uint64]:
        found = np.searchsorted(firsts, first) + 1
        return np.where(is_kept, found, 0).astype(np.uint64)

    return ids_of(objects.first, kept), ids_of(parts.first, kept_parts)
