"""Which part of a volume is shown: a level, and a box of it, that fits a budget of voxels.

A report on terabytes reads megabytes. A volume is shown whole at the finest
level that fits the budget; where no level does, only its middle is shown.
"""

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError
from megaseg_dask.ngff.image import Image
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.workspace import Readable, Workspace

Array = NDArray[Any]

# Errors of an array that cannot be read; a missing array on a disk is an OSError.
UNREADABLE = (MegasegError, OSError)

# The part that is shown where even the coarsest level is too large.
_MIDDLE_SHAPE = (64, 512, 512)


@dataclass(frozen=True, slots=True)
class View:
    """A box of one level: of an output, or with ``is_source`` of the source at the same place."""

    level: int
    box: Box
    is_source: bool = False

    def read(self, plan: Plan, kind: str, output: Output) -> Array:
        """Read the box of one output, ``(z, y, x)``; of a source, its first channel."""
        if self.is_source:
            volume: Readable = Workspace(plan).sources(output.volume, self.level)[0]
        else:
            volume = Target(plan).array(kind, output, self.level)
        return volume.read(self.box)


@dataclass(frozen=True, slots=True)
class _Pyramid:
    """The levels of a plan's source or target, and where they show a box of the volume."""

    image: Image
    offset: tuple[int, ...]

    def box(self, window: Box, level: int) -> Box:
        """Return a window of the volume in voxels of a level, rounded outwards."""
        window = window.shifted(self.offset)
        fine = self.image.volume_shape()
        coarse = self.image.volume_shape(level)
        start = (a * n // m for a, n, m in zip(window.start, coarse, fine, strict=True))
        stop = (-(-b * n // m) for b, n, m in zip(window.stop, coarse, fine, strict=True))
        return Box(tuple(start), tuple(stop)) & Box.of(coarse)

    def levels_within(self, window: Box, max_voxels: int) -> list[int]:
        """Return the levels at which a window has at most this number of voxels."""
        levels = range(len(self.image.levels))
        return [level for level in levels if self.box(window, level).size <= max_voxels]


def _pyramid(plan: Plan, is_source: bool) -> _Pyramid:
    if is_source:
        return _Pyramid(plan.source_image, plan.region.start)
    return _Pyramid(plan.target_image, (0, 0, 0))


def whole_or_middle(plan: Plan, max_voxels: int) -> Box:
    """Return the volume if source and target have a level within the budget, else its middle."""
    whole = Box.of(plan.volume_shape)
    for is_source in (False, True):
        if not _pyramid(plan, is_source).levels_within(whole, max_voxels):
            return Box.centered(_MIDDLE_SHAPE, plan.volume_shape)
    return whole


def choose_view(
    plan: Plan, window: Box, max_voxels: int, *, width: int = 0, is_source: bool = False
) -> View:
    """Return the finest view of a window within the budget.

    With ``width``, it is the coarsest within the budget that has as many voxels in x or y.
    """
    pyramid = _pyramid(plan, is_source)
    levels = pyramid.levels_within(window, max_voxels) or [0]
    level = levels[0]
    if width:
        wide = [v for v in levels if max(pyramid.box(window, v).shape[1:]) >= width]
        level = wide[-1] if wide else level
    return View(level, pyramid.box(window, level), is_source)


def voxels_per_voxel(plan: Plan, level: int) -> float:
    """Return the number of voxels of the finest level in one voxel of a coarser level."""
    return math.prod(plan.volume_shape) / math.prod(plan.target_image.volume_shape(level))


def spread(n: int, max_n: int) -> list[int]:
    """Return at most ``max_n`` of the numbers below ``n``, evenly spread from first to last."""
    if n <= max_n:
        return list(range(n))
    return sorted({round(i * (n - 1) / max(max_n - 1, 1)) for i in range(max_n)})
