"""The surface of one object as triangles, for a picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Corners float32 ``(n, 3)`` in z, y, x, and triangles uint32 ``(m, 3)`` of their numbers."""

    corners: NDArray[np.float32]
    triangles: NDArray[np.uint32]


def mesh_of(mask: NDArray[Any]) -> Mesh:
    """Return the surface of the voxels of a mask ``(z, y, x)``, closed where the array ends.

    Corners are in voxels: the center of the first voxel is 0, 0, 0. It is that of
    ``skimage.measure.marching_cubes`` at 0.5, and has no corner for an empty mask.
    """
    from skimage.measure import marching_cubes

    padded = np.pad(mask.astype(np.uint8), 1)
    if not padded.any():
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint32))
    corners, triangles, _, _ = marching_cubes(padded, 0.5)
    return Mesh((corners - 1).astype(np.float32), triangles.astype(np.uint32))
