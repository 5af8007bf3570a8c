"""Pyramid levels: their shapes, and how one level follows from the level below it.

Windows are anchored to the volume, so a level does not depend on which task
computed which part of it. Scores are averaged; labels take the mode, never a
mean (the mean of objects 3 and 7 is object 5).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape

Array = NDArray[Any]

# A viewer shows a level of this size at once; nobody needs a coarser one.
_MAX_COARSEST_EXTENT = 256


def default_level_shapes(
    shape: Shape, spacing_um: tuple[float, ...]
) -> Iterator[tuple[Shape, Shape]]:
    """Yield shape and factor of each coarser level for a source that has no pyramid.

    Axes are halved while the plane is larger than 256 voxels; z only once its
    spacing is no coarser than that of the plane, so voxels grow towards cubes.
    """
    # Some files say 0 for an unknown pixel size.
    spacing = [abs(s) or 1.0 for s in spacing_um]
    while max(shape[-2:]) > _MAX_COARSEST_EXTENT:
        finest = min(s for n, s in zip(shape, spacing, strict=True) if n > 1)
        is_halved = [n > 1 and s < 2 * finest for n, s in zip(shape, spacing, strict=True)]
        factor = tuple(1 + halved for halved in is_halved)
        shape = tuple(-(-n // f) for n, f in zip(shape, factor, strict=True))
        spacing = [s * f for s, f in zip(spacing, factor, strict=True)]
        yield shape, factor


def integer_factor(fine: int, coarse: int, scaled: float | None = None) -> int | None:
    """Return the whole factor between two extents, or ``None`` if there is none.

    Floor and ceiling division are both allowed. Of several factors that fit,
    ``scaled`` decides: how many times larger the voxels are by the levels' own
    scales. From 11 to 3 may be a factor of 3, 4 or 5.
    """
    # From 10 to 4 is a factor of 3 that was rounded up, though 2 is as near.
    candidates = [round(fine / coarse), fine // coarse, -(-fine // coarse)]
    if scaled and scaled <= fine:
        candidates.insert(0, round(scaled))
    for factor in candidates:
        if factor > 0 and coarse in (fine // factor, -(-fine // factor)):
            return factor
    return None


@dataclass(frozen=True, slots=True)
class Step:
    """From one level to the next coarser one: their shapes.

    ``scaled`` says how many times larger voxels become by the levels' scales.
    """

    fine_shape: Shape
    coarse_shape: Shape
    scaled: tuple[float, ...] | None = None

    @property
    def factors(self) -> list[int | None]:
        """The whole factor of each axis, ``None`` where there is none."""
        scaled = self.scaled or [None] * len(self.fine_shape)
        return list(map(integer_factor, self.fine_shape, self.coarse_shape, scaled))

    def source_box(self, box: Box) -> Box:
        """Return the voxels of the finer level that a box of the coarser one is computed from."""
        first = self._windows(box.start)
        last = self._windows([n - 1 for n in box.stop])
        return Box(tuple(w.start for w in first), tuple(w.stop for w in last))

    def _windows(self, voxel: Sequence[int]) -> list[range]:
        return list(map(_window, voxel, self.fine_shape, self.coarse_shape, self.factors))


def _window(index: int, fine: int, coarse: int, factor: int | None) -> range:
    """Return the voxels of the finer level, along one axis, of a voxel of the coarser level."""
    if factor is None:
        nearest = (2 * index + 1) * fine // (2 * coarse)
        return range(nearest, nearest + 1)
    return range(index * factor, min((index + 1) * factor, fine))


def downsample(values: Array, fine_box: Box, box: Box, step: Step, *, mode: bool) -> Array:
    """Compute ``box`` of the coarser level from ``values``, ``fine_box`` of the finer one.

    ``mode`` takes the most frequent id of a window, ties to the smallest
    non-zero one; else the mean, rounded half to even for integers. An axis
    without a whole factor takes the nearest voxel.
    """
    combine = _mean
    if mode:
        combine = _mode
    factors = [factor or 1 for factor in step.factors]
    values = _take_nearest(values, fine_box, box, step)
    result = np.empty(box.shape, values.dtype)
    # Full windows in one go; the last, cut-off window of an axis in a call of its own.
    for coarse in product(*map(_full_and_cut, values.shape, factors)):
        fine = (slice(c.start * f, c.stop * f) for c, f in zip(coarse, factors, strict=True))
        inside = values[tuple(fine)]
        result[coarse] = combine(_samples(inside, map(min, factors, inside.shape)))
    return result


def _take_nearest(values: Array, fine_box: Box, box: Box, step: Step) -> Array:
    """Return the nearest voxels along each axis without a whole factor, all along the others."""
    for axis, factor in enumerate(step.factors):
        if factor is None:
            fine = step.fine_shape[axis]
            coarse = step.coarse_shape[axis]
            indices = range(box.start[axis], box.stop[axis])
            nearest = [_window(i, fine, coarse, None).start for i in indices]
            values = values.take(np.subtract(nearest, fine_box.start[axis]), axis=axis)
    return values


def _full_and_cut(extent: int, factor: int) -> list[slice]:
    n_full, rest = divmod(extent, factor)
    windows = []
    if n_full:
        windows.append(slice(0, n_full))
    if rest:
        windows.append(slice(n_full, n_full + 1))
    return windows


def _samples(values: Array, window: Iterable[int]) -> list[Array]:
    """Return, for each place in a window, the voxels there of all windows.

    They are views, in raster order.
    """
    strides = tuple(window)
    to_end = (None,) * len(strides)
    return [values[tuple(map(slice, place, to_end, strides))] for place in np.ndindex(strides)]


def _mean(samples: list[Array]) -> Array:
    # One order of summation for every split, and no rounding in it that the result could show.
    dtype = samples[0].dtype
    is_small = dtype.kind == "u" and dtype.itemsize <= 2
    total = np.zeros(samples[0].shape, np.uint32 if is_small else np.float64)
    for sample in samples:
        total += sample
    mean = total / len(samples)
    if dtype.kind != "f":
        mean = np.rint(mean)
    return mean.astype(dtype)


def _mode(samples: list[Array]) -> Array:
    best: Array = samples[0].copy()
    # Most windows lie inside one object or outside all: only the mixed ones are counted.
    mixed = np.zeros(best.shape, bool)
    for sample in samples[1:]:
        mixed |= sample != best
    if mixed.any():
        rows = np.stack([sample[mixed] for sample in samples], axis=-1)
        rows.sort(axis=-1)
        best[mixed] = _mode_of_rows(rows)
    return best


def _mode_of_rows(rows: Array) -> Array:
    """Return the mode of each sorted row ``(n, window)``; ties to the smallest non-zero value."""
    columns = np.ascontiguousarray(rows.T)
    best: Array = columns[0].copy()
    run = np.ones(len(best), np.uint32)
    longest = run.copy()
    for before, here in pairwise(columns):
        run *= before == here
        run += 1
        # Rows ascend, so on a tie the earlier value stays, unless it is the background.
        better = (run > longest) | ((run == longest) & (best == 0))
        np.copyto(best, here, where=better)
        np.copyto(longest, run, where=better)
    return best
