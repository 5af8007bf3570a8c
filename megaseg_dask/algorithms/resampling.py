"""A volume on another grid of voxels over the same extent: which voxels, with which weights.

A value follows from its own place in the volume alone: voxels are counted from the
volume's begin, positions are float64, and the operands of a sum come in one order. A
block therefore computes the same bits as the whole volume.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.array_library import ArrayLibrary

Shape = tuple[int, ...]
# Half-open ranges of voxels, one per axis.
Ranges = Sequence[tuple[int, int]]

_SAME_SIZE = 0.01


def resampled_shape(shape: Shape, spacing_um: Sequence[float], wanted_um: Sequence[float]) -> Shape:
    """Return the voxels ``(z, y, x)`` of a volume on a grid of about ``wanted_um``.

    It is ``shape`` if the sizes differ by 1 % at most on all axes.
    """
    if are_same_size(spacing_um, wanted_um):
        return shape
    axes = zip(shape, spacing_um, wanted_um, strict=True)
    return tuple(max(round(n * spacing / wanted), 1) for n, spacing, wanted in axes)


def are_same_size(spacing_um: Sequence[float], wanted_um: Sequence[float]) -> bool:
    """Return whether voxels are of one size: they differ by 1 % at most on all axes."""
    sizes = zip(spacing_um, wanted_um, strict=True)
    return all(abs(wanted / spacing - 1) <= _SAME_SIZE for spacing, wanted in sizes)


@dataclass(frozen=True, slots=True)
class Taps:
    """How voxels of one axis are made of others: each is a sum of ``weights`` times voxels.

    Both are ``(n_taps, n)``. ``indices`` count from the volume's begin; weights are float32.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def reach(self) -> tuple[int, int]:
        """The half-open range of voxels that are read."""
        return int(self.indices.min()), int(self.indices.max()) + 1


def _interpolating(n_from: int, n_to: int, start: int, stop: int) -> Taps:
    """Return the taps of linear interpolation at the centers of ``n_to`` voxels, for some of them.

    Beyond the first and the last center the nearest value holds.
    """
    twice_centers = 2 * np.arange(start, stop) + 1
    centers = twice_centers * n_from / (2 * n_to) - 0.5
    centers = np.clip(centers, 0, n_from - 1)
    below = np.floor(centers).astype(np.int64)
    above = np.minimum(below + 1, n_from - 1)
    weight = (centers - below).astype(np.float32)
    return Taps(np.stack([below, above]), np.stack([np.float32(1) - weight, weight]))


def _averaging(n_from: int, n_to: int, start: int, stop: int) -> Taps:
    """Return the taps of the means over ``n_to`` equal windows, for some of them.

    A voxel that lies in two windows counts in each by its share.
    """
    numbers = np.arange(start, stop)
    low = numbers * n_from / n_to
    high = (numbers + 1) * n_from / n_to
    first = np.floor(low).astype(np.int64)
    # As many for each window of the volume.
    n_taps = math.ceil(n_from / n_to) + (n_from % n_to > 0)
    indices = first + np.arange(n_taps)[:, None]
    shares = np.minimum(indices + 1, high) - np.maximum(indices, low)
    weights = np.maximum(shares, 0) * n_to / n_from
    return Taps(np.minimum(indices, n_from - 1), weights.astype(np.float32))


_Make = Callable[[int, int, int, int], Taps]


def _onto(n_from: int, n_to: int, start: int, stop: int) -> Taps:
    make: _Make = _averaging if n_to < n_from else _interpolating
    return make(n_from, n_to, start, stop)


@functools.lru_cache(maxsize=2**12)
def _reach(make: _Make, n_from: int, n_to: int, start: int, stop: int) -> tuple[int, int]:
    if n_from == n_to:
        return start, stop
    first = make(n_from, n_to, start, start + 1)
    last = make(n_from, n_to, stop - 1, stop)
    return first.reach[0], last.reach[1]


@dataclass(frozen=True, slots=True)
class Resampling:
    """The source's voxels and a grid over the same extent; both shapes are ``(z, y, x)``.

    Values go onto the grid by means where it is coarser, and by linear interpolation
    where it is finer. They come back by linear interpolation.
    """

    source_shape: Shape
    grid_shape: Shape

    @property
    def is_identity(self) -> bool:
        """Whether both are the same voxels."""
        return self.source_shape == self.grid_shape

    def source_ranges(self, grid: Ranges) -> list[tuple[int, int]]:
        """Return the voxels of the source of which these voxels of the grid are made."""
        axes = zip(self.source_shape, self.grid_shape, grid, strict=True)
        return [_reach(_onto, n, m, *limits) for n, m, limits in axes]

    def grid_ranges(self, source: Ranges) -> list[tuple[int, int]]:
        """Return the voxels of the grid of which these voxels of the source are made again."""
        axes = zip(self.grid_shape, self.source_shape, source, strict=True)
        return [_reach(_interpolating, m, n, *limits) for m, n, limits in axes]

    def onto_grid(self, values: Any, grid: Ranges, library: ArrayLibrary[Any]) -> Any:
        """Return voxels of the grid, float32 ``(c, z, y, x)``.

        ``values`` are those of :meth:`source_ranges`.
        """
        axes = zip(self.source_shape, self.grid_shape, grid, strict=True)
        return _along_axes(values, [_taps(_onto, n, m, *limits) for n, m, limits in axes], library)

    def onto_source(self, values: Any, source: Ranges, library: ArrayLibrary[Any]) -> Any:
        """Return voxels of the source, float32 ``(c, z, y, x)``.

        ``values`` are those of :meth:`grid_ranges`.
        """
        axes = zip(self.grid_shape, self.source_shape, source, strict=True)
        taps = [_taps(_interpolating, m, n, *limits) for m, n, limits in axes]
        return _along_axes(values, taps, library)

    def needed_on_grid(self, needed: NDArray[np.bool_], source: Ranges) -> NDArray[np.bool_]:
        """Return which voxels of :meth:`grid_ranges` some voxels of the source are made of.

        ``needed`` marks those among the voxels of ``source``; both are ``(z, y, x)``.
        """
        axes = zip(self.grid_shape, self.source_shape, source, strict=True)
        for axis, (m, n, limits) in enumerate(axes):
            taps = _taps(_interpolating, m, n, *limits)
            if taps is not None:
                needed = np.moveaxis(_spread(np.moveaxis(needed, axis, 0), taps), 0, axis)
        return needed

    def peak_voxels(self, from_shape: Shape, to_shape: Shape) -> int:
        """Return how many values are in memory at once while one box becomes another."""
        z, y, _ = to_shape
        steps = [from_shape, (z, *from_shape[1:]), (z, y, from_shape[2]), to_shape]
        sizes = list(map(math.prod, steps))
        return max(map(sum, itertools.pairwise(sizes)))


def _spread(needed: NDArray[np.bool_], taps: Taps) -> NDArray[np.bool_]:
    first, stop = taps.reach
    spread = np.zeros((stop - first, *needed.shape[1:]), bool)
    for row in taps.indices - first:
        for plane, index in enumerate(row):
            spread[index] |= needed[plane]
    return spread


def _taps(make: _Make, n_from: int, n_to: int, start: int, stop: int) -> Taps | None:
    """Return taps, or ``None`` where each voxel is itself."""
    return None if n_from == n_to else make(n_from, n_to, start, stop)


def _along_axes(values: Any, taps: Sequence[Taps | None], library: ArrayLibrary[Any]) -> Any:
    """Resample along z, then y, then x."""
    z, y, x = taps
    if z is not None:
        values = _along_z(values, z, library)
    if y is not None:
        values = _in_planes(values, y, library, axis=1)
    if x is not None:
        values = _in_planes(values, x, library, axis=2)
    return values


def _along_z(values: Any, taps: Taps, library: ArrayLibrary[Any]) -> Any:
    indices = (taps.indices - taps.reach[0]).T.tolist()
    weights = taps.weights.T.tolist()
    n_channels, _, *plane_shape = values.shape
    result: Any = library.zeros((n_channels, len(indices), *plane_shape))
    for plane, (planes, shares) in enumerate(zip(indices, weights, strict=True)):
        for index, share in zip(planes, shares, strict=True):
            result[:, plane] += values[:, index] * share
    return result


def _in_planes(values: Any, taps: Taps, library: ArrayLibrary[Any], axis: int) -> Any:
    """Resample along y or x, plane by plane: what is in between stays in the cache of a core."""
    n_taps, n = taps.indices.shape
    shape = list(values.shape)
    shape[axis + 1] = n
    result: Any = library.zeros(tuple(shape))
    indices = [library.asarray(row) for row in taps.indices - taps.reach[0]]
    along_axis = (n, 1) if axis == 1 else (n,)
    weights = [library.asarray(row.reshape(along_axis)) for row in taps.weights]
    for number in range(shape[1]):
        plane = values[:, number]
        for tap in range(n_taps):
            chosen = plane[:, indices[tap]] if axis == 1 else plane[:, :, indices[tap]]
            result[:, number] += chosen * weights[tap]
    return result
