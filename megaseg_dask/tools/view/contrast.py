"""The range of gray values of an image, from a few of its voxels.

What is empty says nothing about it: absent chunks and zeros, as around a cropped or stitched
image, are left out unless nothing else is there.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import MegasegError
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.pictures import gray_limits

Limits = tuple[float, float]

# Voxels of a level that is read whole.
_MAX_WHOLE_VOXELS = 2**22
# Of a larger one, voxels that are read at a time, and those with a value that are enough.
_SAMPLE_SHAPE = (16, 256, 256)
_ENOUGH_VOXELS = 2**15
# Where samples are taken, as shares of an axis: the middle first.
_SHARES = (0.5, 0.25, 0.75)


def find_limits(location: Location, image: Image, c: int) -> Limits:
    """Return the values of a channel that become black and white.

    Samples are taken from the coarsest level of the first timepoint, or of a later one where that
    is empty.
    """
    values = np.zeros(0)
    try:
        for sample in _iter_samples(location, image, c):
            values = np.concatenate([values, sample[sample != 0]])
            if len(values) >= _ENOUGH_VOXELS:
                break
    except (MegasegError, OSError):
        # The picture says what cannot be read.
        pass
    return gray_limits(values)


def _iter_samples(location: Location, image: Image, c: int) -> Iterator[NDArray[Any]]:
    level = len(image.levels) - 1
    shape = image.volume_shape(level)
    n_times = image.extent("t")
    for t in dict.fromkeys((0, n_times // 2, n_times - 1)):
        volume = Volume.of(location, image, level=level, t=t, c=c)
        for box in _boxes(shape):
            yield volume.read(box).ravel()


def _boxes(shape: Shape) -> Iterator[Box]:
    """Yield the whole if it is small, or the box in the middle and then others around it."""
    if math.prod(shape) <= _MAX_WHOLE_VOXELS:
        yield Box.of(shape)
        return
    extents = tuple(map(min, _SAMPLE_SHAPE, shape))
    boxes = []
    for z in _SHARES:
        for y in _SHARES:
            for x in _SHARES:
                start = tuple(
                    int((n - extent) * share)
                    for n, extent, share in zip(shape, extents, (z, y, x), strict=True)
                )
                boxes.append(Box.of(extents).shifted(start))
    yield from dict.fromkeys(boxes)
