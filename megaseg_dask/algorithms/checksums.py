"""Checksums of a volume by cells, to tell whether two readers of its boxes saw the same voxels.

Cells are cut wherever a box of either reader begins or ends. Each box is then
whole cells, and boxes that overlap are compared where they do.
"""

import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape

Checksums = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class CellGrid:
    """A partition of a volume by planes; ``cuts`` are their coordinates, ascending, per axis."""

    cuts: tuple[tuple[int, ...], ...]

    @classmethod
    def between(cls, boxes: Sequence[Box]) -> "CellGrid":
        """Return the coarsest grid of which all these boxes are whole cells."""
        corners = np.array([bound for box in boxes for bound in (box.start, box.stop)])
        return cls(tuple(tuple(np.unique(axis).tolist()) for axis in corners.T))

    def index(self, box: Box, within: Box | None = None) -> tuple[slice, ...]:
        """Return the range of a box's cells along each axis, among those of the volume or a box."""
        first = (0,) * len(self.cuts)
        if within is not None:
            first = tuple(map(bisect_left, self.cuts, within.start))
        axes = zip(self.cuts, box.start, box.stop, first, strict=True)
        return tuple(slice(bisect_left(c, a) - n, bisect_left(c, b) - n) for c, a, b, n in axes)

    def grid_shape(self, box: Box) -> Shape:
        """Return the number of cells of a box along each axis."""
        return tuple(span.stop - span.start for span in self.index(box))

    def iter_cells(self, box: Box) -> Iterator[Box]:
        """Yield the cells of a box, in grid order."""
        spans = zip(self.cuts, self.index(box), strict=True)
        edges = [list(pairwise(cuts[span.start : span.stop + 1])) for cuts, span in spans]
        for cell in product(*edges):
            yield Box(tuple(start for start, _ in cell), tuple(stop for _, stop in cell))

    def checksums(self, values: NDArray[Any], box: Box) -> Checksums:
        """Return a checksum of each cell of a box of voxels, in the shape of their grid."""
        sums = [_checksum(values[cell.within(box).slices]) for cell in self.iter_cells(box)]
        return np.array(sums, np.uint32).reshape(self.grid_shape(box))


def _checksum(values: NDArray[Any]) -> int:
    checksum = 0
    # Plane by plane: a copy of a whole cell would be memory that nobody planned.
    for plane in values:
        checksum = zlib.crc32(np.ascontiguousarray(plane).data, checksum)
    return checksum
