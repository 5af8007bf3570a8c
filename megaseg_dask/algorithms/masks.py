"""Masks on the voxels of an image: the nearest voxels of a mask, and a margin around it.

What a voxel gets follows from the volume alone, whatever part of it is read.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Shape

Mask = NDArray[np.bool_]

# Of positions in voxels, and of distances: sums that are equal may differ in their last bits.
ROUNDING = 1e-6
# Working memory of SciPy's distance transform, measured, per voxel.
DISTANCE_BYTES = 72


def nearest_voxels(start: int, stop: int, step: float, offset: float, n: int) -> NDArray[np.int64]:
    """Return the voxels of a mask nearest to some of an image along one axis; of two, the first.

    The center of voxel ``i`` of the image lies at ``offset + i * step`` voxels of the mask,
    which has ``n``.
    """
    places = offset + np.arange(start, stop) * step
    nearest: NDArray[np.int64] = np.ceil(places - 0.5 - ROUNDING).astype(np.int64)
    return nearest.clip(0, n - 1)


def reach(margin_um: float, spacing_um: Sequence[float]) -> Shape:
    """Return the voxels ``(z, y, x)`` that a margin reaches."""
    return tuple(math.floor(margin_um / size * (1 + ROUNDING)) for size in spacing_um)


def near(mask: Mask, margin_um: float, spacing_um: Sequence[float]) -> Mask:
    """Return which voxels are at most ``margin_um`` from a voxel of the mask."""
    if not mask.any() or mask.all():
        return mask
    from scipy.ndimage import distance_transform_edt

    # Of features at one distance SciPy takes any: their sums may differ in the last bit.
    distances = distance_transform_edt(~mask, sampling=spacing_um)
    is_near: Mask = distances <= margin_um * (1 + ROUNDING)
    return is_near
