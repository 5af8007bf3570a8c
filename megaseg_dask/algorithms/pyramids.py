"""Pyramid levels: their shapes, and how one level follows from the level below it.

Windows are anchored to the volume, so a level does not depend on who computed
which part of it. Scores are averaged; labels take the mode, never a mean (the
mean of objects 3 and 7 is object 5).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape

Array = NDArray[Any]

# A viewer shows a level of this size at once; a coarser one would help nobody.
_SMALLEST_LEVEL = 256


def default_level_shapes(
    shape: Shape, spacing_um: tuple[float, ...]
) -> Iterator[tuple[Shape, Shape]]:
    """Yield shape and factor of each coarser level for a source that has no pyramid.

    Axes are halved while the plane is larger than 256 voxels; z only once its
    spacing is no coarser than that of the plane, so voxels grow towards cubes.
    """
    # Some files say 0 for an unknown pixel size.
    spacing = [abs(s) or 1.0 for s in spacing_um]
    while max(shape[-2:]) > _SMALLEST_LEVEL:
        finest = min(s for n, s in zip(shape, spacing, strict=True) if n > 1)
        factor = tuple(
            2 if n > 1 and s < 2 * finest else 1 for n, s in zip(shape, spacing, strict=True)
        )
        shape = tuple(-(-n // f) for n, f in zip(shape, factor, strict=True))
        spacing = [s * f for s, f in zip(spacing, factor, strict=True)]
        yield shape, factor


def integer_factor(fine: int, coarse: int, scaled: float | None = None) -> int | None:
    """Return the whole factor between two extents, floor and ceiling division both allowed; else ``None``.

    Of several that fit, ``scaled`` decides: how many times larger the voxels
    are by the levels' own scales. From 11 to 3 may be a factor of 3, 4 or 5.
    """
    nearest = round(fine / coarse)
    # From 10 to 4 is a factor of 3 that was rounded up, though 2 is as near.
    candidates = (
        *([round(scaled)] if scaled and scaled <= fine else []),
        nearest,
        fine // coarse,
        -(-fine // coarse),
    )
    return next((f for f in candidates if f > 0 and coarse in (fine // f, -(-fine // f))), None)


@dataclass(frozen=True, slots=True)
class Step:
    """From one level to the next coarser one: their shapes, and how many times larger voxels become by their scales."""

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
        starts = [first for first, _ in self._ranges(box.start)]
        stops = [stop for _, stop in self._ranges([n - 1 for n in box.stop])]
        return Box(tuple(starts), tuple(stops))

    def _ranges(self, place: Sequence[int]) -> list[tuple[int, int]]:
        axes = zip(place, self.fine_shape, self.coarse_shape, self.factors, strict=True)
        return [_source_range(*axis) for axis in axes]


def _source_range(index: int, fine: int, coarse: int, factor: int | None) -> tuple[int, int]:
    if factor is None:
        nearest = (2 * index + 1) * fine // (2 * coarse)
        return nearest, nearest + 1
    return index * factor, min((index + 1) * factor, fine)


def downsample(values: Array, fine_box: Box, box: Box, step: Step, *, mode: bool) -> Array:
    """Compute ``box`` of the coarser level from ``values``, which are ``fine_box`` of the finer one.

    ``mode`` takes the most frequent id of a window, ties to the smallest
    non-zero one; else the mean, rounded half to even for integers. An axis
    without a whole factor takes the nearest voxel.
    """
    factors = []
    axes = zip(step.fine_shape, step.coarse_shape, step.factors, strict=True)
    for axis, (fine, coarse, factor) in enumerate(axes):
        if factor is None:
            nearest = [
                _source_range(i, fine, coarse, None)[0] - fine_box.start[axis]
                for i in range(box.start[axis], box.stop[axis])
            ]
            values = values.take(nearest, axis=axis)
        factors.append(factor or 1)
    reduce_ = _mode if mode else _mean
    result = np.empty(box.shape, values.dtype)
    # Full windows in one go; the last, cut-off window of an axis in a call of its own.
    for part in product(*(_full_and_cut(n, f) for n, f in zip(values.shape, factors, strict=True))):
        inside = values[tuple(slice(a * f, b * f) for (a, b), f in zip(part, factors, strict=True))]
        window = map(min, factors, inside.shape)
        result[tuple(slice(a, b) for a, b in part)] = reduce_(_samples(inside, window))
    return result


def _full_and_cut(extent: int, factor: int) -> list[tuple[int, int]]:
    full, rest = divmod(extent, factor)
    return [(0, full)] * (full > 0) + [(full, full + 1)] * (rest > 0)


def _samples(values: Array, window: Iterable[int]) -> list[Array]:
    """Return, for each place in a window, the voxels there of all windows: views, in raster order."""
    window = tuple(window)
    return [
        values[tuple(map(slice, place, [None] * len(place), window))]
        for place in np.ndindex(window)
    ]


def _mean(samples: list[Array]) -> Array:
    # One order of summation for every split, and no rounding in it that the result could show.
    total = np.zeros(samples[0].shape, np.float64 if samples[0].dtype.kind == "f" else np.uint32)
    for sample in samples:
        total += sample
    mean = total / len(samples)
    return (mean if samples[0].dtype.kind == "f" else np.rint(mean)).astype(samples[0].dtype)


def _mode(samples: list[Array]) -> Array:
    best: Array = samples[0].copy()
    # Most windows lie inside one object or outside all: only the mixed ones are counted.
    mixed = np.zeros(best.shape, bool)
    for sample in samples[1:]:
        mixed |= sample != best
    if mixed.any():
        best[mixed] = _mode_of_rows(
            np.sort(np.stack([sample[mixed] for sample in samples], axis=-1), axis=-1)
        )
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
        # Rows ascend, so on a tie the earlier value stands, unless it is the background.
        better = (run > longest) | ((run == longest) & (best == 0))
        np.copyto(best, here, where=better)
        np.copyto(longest, run, where=better)
    return best
