"""What is worth looking at of a volume, whatever its size: a level, and a box of it, that can be read at once.

A report on terabytes reads megabytes. A volume is seen whole at the level of
its pyramid that fits a budget of voxels; where none does, its middle is.
"""

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace

Array = NDArray[Any]

# What a place that cannot be read raises; on a disk, an array that is gone is an error of the system.
UNREADABLE = (MegasegError, OSError)

# What is looked at in full where even the coarsest level is too large.
_MIDDLE_SHAPE = (64, 512, 512)


@dataclass(frozen=True, slots=True)
class View:
    """A box of one level: of an output, or with ``is_source`` of the source in the same place."""

    level: int
    box: Box
    is_source: bool = False

    def read(self, plan: Plan, kind: str, output: Output) -> Array:
        """Read it of one output of a volume, ``(z, y, x)``; of a source the channel, or the first of several."""
        return self._volume(plan, kind, output).read(self.box)

    def _volume(self, plan: Plan, kind: str, output: Output) -> Volume:
        if self.is_source:
            return workspace.sources(plan, output.volume, self.level)[0]
        return workspace.product(plan, kind, output, self.level)


def whole_or_middle(plan: Plan, budget: int) -> Box:
    """Return the whole volume if source and target each have a level of at most so many voxels, else its middle."""
    whole = Box.of(plan.volume_shape)
    if all(_levels_within(plan, whole, budget, is_source=source) for source in (False, True)):
        return whole
    return Box.centered(_MIDDLE_SHAPE, plan.volume_shape)


def choose_view(
    plan: Plan, window: Box, budget: int, *, width: int | None = None, is_source: bool = False
) -> View:
    """Return the finest view of a window of the volume within a budget of voxels; or the coarsest so wide in x or y."""
    levels = _levels_within(plan, window, budget, is_source=is_source) or [0]
    if width is not None:
        wide = [
            v for v in levels if max(_box(plan, window, v, is_source=is_source).shape[1:]) >= width
        ]
        levels = wide[-1:] or levels
    return View(levels[0], _box(plan, window, levels[0], is_source=is_source), is_source)


def _levels_within(plan: Plan, window: Box, budget: int, *, is_source: bool) -> list[int]:
    n_levels = len(_image(plan, is_source).levels)
    return [
        level
        for level in range(n_levels)
        if _box(plan, window, level, is_source=is_source).size <= budget
    ]


def _image(plan: Plan, is_source: bool) -> Image:
    return plan.source_image if is_source else plan.target_image


def _box(plan: Plan, window: Box, level: int, *, is_source: bool) -> Box:
    """Return a window of the segmented volume in the voxels of a level."""
    image = _image(plan, is_source)
    if is_source:
        window = window.shifted(plan.region.start)
    fine, coarse = image.volume_shape(), image.volume_shape(level)
    return Box(
        tuple(a * n // m for a, n, m in zip(window.start, coarse, fine, strict=True)),
        tuple(min(-(-b * n // m), n) for b, n, m in zip(window.stop, coarse, fine, strict=True)),
    )


def voxels_per_voxel(plan: Plan, level: int) -> float:
    """Return how many voxels of the finest level one of a coarser level stands for."""
    return math.prod(plan.volume_shape) / math.prod(plan.target_image.volume_shape(level))


def spread(n: int, most: int) -> list[int]:
    """Return at most so many of ``n`` numbers, evenly spread, the first and the last among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / max(most - 1, 1)) for i in range(most)})
