"""A threshold by eye: how many objects a threshold gives in the plane that is seen."""

import math
from dataclasses import dataclass

from megaseg_dask.algorithms.blending import mask_of_scores
from megaseg_dask.algorithms.components import label_block
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.tools.view.gallery import Layer
from megaseg_dask.tools.view.objects import factors

# Voxels of a plane that are looked at.
_MAX_SEEN_VOXELS = 2**24


@dataclass(frozen=True, slots=True)
class View:
    """The part of a plane that is seen, in voxels of the layer.

    ``y`` and ``x`` are pairs of bounds, which may lie outside; a pixel of the screen shows
    ``pixel`` voxels along an axis.
    """

    t: int
    z: int
    y: tuple[float, float]
    x: tuple[float, float]
    pixel: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Number of objects in view, and the level of the scores at which they were counted.

    Both are ``None`` if more is in view than is counted.
    """

    n_objects: int | None
    level: int | None


def count_in_view(layer: Layer, view: View, threshold: float, connectivity: int) -> Seen:
    """Count the connected parts of what is above a threshold in the plane that is seen.

    It is counted at the level that a screen of this size shows, or at a coarser one if that is
    too large.

    Raises:
        MegasegError: The scores cannot be read.
    """
    level = _level_of(layer, view)
    if level is None:
        return Seen(None, None)
    scale = factors(layer, level)
    whole = Box.of(layer.image.volume_shape(level))
    start = (view.z, view.y[0], view.x[0])
    stop = (view.z + 1, view.y[1], view.x[1])
    box = Box(
        tuple(math.floor(a / f) for a, f in zip(start, scale, strict=True)),
        tuple(math.ceil(b / f) for b, f in zip(stop, scale, strict=True)),
    )
    # One plane, also where several planes of the finest level make one of this.
    box = Box(box.start, (box.start[0] + 1, *box.stop[1:])) & whole
    if min(box.shape) <= 0:
        return Seen(0, level)
    mask = mask_of_scores(layer.volume(level, view.t).read(box), threshold)
    return Seen(int(label_block(mask, connectivity).max()), level)


def _level_of(layer: Layer, view: View) -> int | None:
    """Return the level that the screen shows, or a coarser one that is bounded; none if none is."""
    scales = [factors(layer, level)[1:] for level in range(len(layer.image.levels))]
    fitting = [level for level, scale in enumerate(scales) if max(scale) <= view.pixel]
    area = (view.y[1] - view.y[0]) * (view.x[1] - view.x[0])
    for level in range(max(fitting, default=0), len(scales)):
        if area / math.prod(scales[level]) <= _MAX_SEEN_VOXELS:
            return level
    return None
