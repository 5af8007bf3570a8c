"""The volume that a simulation draws in, and its only source of chance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Space:
    """A volume of `shape` (z, y, x) voxels, and the microscope's blur in it.

    Lengths are in lateral voxels: one step along z counts `anisotropy` of them.
    `sigma` is the lateral standard deviation of the blur, `elongation` how many
    times longer the blur is along z.
    """

    rng: np.random.Generator
    shape: tuple[int, int, int]
    anisotropy: float
    sigma: float
    elongation: float

    @property
    def steps(self) -> NDArray[np.float64]:
        """Size of a voxel along z, y, x, in lateral voxels."""
        return np.array([self.anisotropy, 1.0, 1.0])

    @property
    def extent(self) -> NDArray[np.float64]:
        """Size of the volume along z, y, x, in lateral voxels."""
        return np.array(self.shape) * self.steps

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """Standard deviation of the blur along z, y, x, in voxels."""
        return self.sigma * np.array([self.elongation / self.anisotropy, 1.0, 1.0])

    @property
    def fine(self) -> float:
        """The finest length that the microscope shows, in lateral voxels."""
        return max(self.sigma, 0.7)

    def between(self, low: float, high: float) -> float:
        """Return one number, log-uniform: scales and contrasts vary by factors."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def positions(self, n: int, margin: float = 0.0) -> NDArray[np.float64]:
        """Return (n, 3) points in lateral voxels; a margin lets objects be cut by the border."""
        return self.rng.uniform(-margin, self.extent + margin, (n, 3))

    def field(self, length: float, axes: tuple[int, ...] = (0, 1, 2)) -> NDArray[np.float32]:
        """Return a smooth Gaussian random field of unit variance over the given axes.

        White noise on a coarse grid times a Gaussian basis along each axis:
        a few matrix products, whatever the length.
        """
        bases = [_gaussian_basis(self.shape[axis], length / self.steps[axis]) for axis in axes]
        values = self.rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
        for axis, basis in enumerate(bases):
            values = np.moveaxis(np.tensordot(basis, values, (1, axis)), 0, axis)
        return np.ascontiguousarray(values)

    def looked_up(self, plane: Floats, points: Floats) -> Floats:
        """Return a plane's values (y, x) below points, those outside from the border."""
        y, x = np.clip(points[:, 1:].astype(int), 0, np.array(self.shape[1:]) - 1).T
        values: Floats = plane[y, x]
        return values

    def contrasts(self, n: int) -> NDArray[np.float64]:
        """Return the brightness of n objects, from all alike to bright ones beside dim ones."""
        return self.rng.lognormal(0, self.rng.uniform(0, 0.5), n)

    def patchy(self) -> NDArray[np.float32]:
        """Return a brightness per voxel that drifts within one connected structure."""
        amount = np.float32(self.rng.uniform(0, 0.5))
        drift: NDArray[np.float32] = amount * self.field(self.between(10, 60))
        return np.exp(drift)


def on_grid(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return values on another grid of `shape` over the same extent, linearly between voxels."""
    factors = np.array(shape) / values.shape
    single = values.astype(np.float32)
    return np.asarray(ndimage.zoom(single, factors, order=1, grid_mode=True, mode="nearest"))


def _gaussian_basis(n: int, length: float) -> NDArray[np.float32]:
    # Nodes closer than one voxel would only cost time: the field is white noise by then.
    spacing = max(length, 1.0)
    nodes = np.arange(-2, int(np.ceil(n / spacing)) + 3) * spacing
    weights = np.exp(-0.5 * ((np.arange(n)[:, None] - nodes) / spacing) ** 2)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), dtype=np.float32)
