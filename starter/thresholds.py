"""What a person can do without a network: global thresholds, and the best of many local ones.

The local threshold is the strongest opponent that its kind can be: every setting of a grid is
tried, and the one that suits a row of images best is chosen with the truth known. No user has
that. All images are (z, y, x).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.filters import gaussian, threshold_otsu

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

# Voxels of the Gaussian before a threshold.
SMOOTHED = (0.0, 1.0, 2.0)
# In each slice, as `skimage.filters.threshold_local` does with its default method: odd sizes of
# its block, whose Gaussian has a sigma of (size - 1) / 6.
BLOCKS = (9, 15, 31, 51, 101)
# As threshold_local with the method "mean".
BOXES = (51, 151)
# In 3D: sigmas (z, y, x) of the surroundings that are subtracted.
SURROUNDINGS = ((1, 2, 2), (2, 4, 4), (3, 7, 7), (6, 15, 15), (10, 30, 30))
# How far above its surroundings a voxel must be, in deviations of the image from them.
OFFSETS = (*(round(-1 + 0.2 * k, 1) for k in range(26)), *(4.5 + 0.5 * k for k in range(16)))
_CUTS = np.array(OFFSETS, np.float32)


def otsu(image: Array) -> Mask:
    """Return the voxels above one threshold for the whole image."""
    return np.asarray(image > threshold_otsu(image))


def otsu_smoothed(image: Array) -> Mask:
    """Return Otsu's mask of the image after a Gaussian of one voxel."""
    return otsu(gaussian(image.astype(np.float32), 1, preserve_range=True))


def local_settings() -> list[str]:
    """Return the names of all local thresholds, in the order of :func:`local_dice`."""
    windows = [
        *(f"slices, Gaussian block {size}" for size in BLOCKS),
        *(f"slices, mean of {size}" for size in BOXES),
        *(f"3D, Gaussian {sigmas}" for sigmas in SURROUNDINGS),
    ]
    return [
        f"{window}, smoothed {sigma:g}, offset {offset:g}"
        for window in windows
        for sigma in SMOOTHED
        for offset in OFFSETS
    ]


def local_dice(image: Array, truth: Mask) -> NDArray[np.float64]:
    """Return the Dice of each local threshold, float64 of the length of :func:`local_settings`."""
    found = []
    for contrast in _contrasts(image.astype(np.float32)):
        for sigma in SMOOTHED:
            found += dice_above(_in_deviations(_smoothed(contrast, sigma)), truth, _CUTS).tolist()
    return np.array(found)


def local_mask(image: Array, window: int, sigma: float, offset: float) -> Mask:
    """Return the voxels that one local threshold takes; ``window`` counts those of the grid."""
    contrast = list(_contrasts(image.astype(np.float32)))[window]
    return np.asarray(_in_deviations(_smoothed(contrast, sigma)) > np.float32(offset))


def dice_above(values: Array, truth: Mask, cuts: Floats) -> NDArray[np.float64]:
    """Return the Dice of the voxels above each of some ascending cuts, float32."""
    # How many cuts a voxel exceeds: one pass instead of a mask for each cut.
    n_exceeded = np.searchsorted(cuts, values.ravel(), side="left")
    n = np.bincount(n_exceeded, minlength=len(cuts) + 1)
    n_true = np.bincount(n_exceeded[truth.ravel()], minlength=len(cuts) + 1)
    return dice_of_bins(n, n_true)


def dice_of_bins(n: Array, n_true: Array) -> NDArray[np.float64]:
    """Return the Dice of all voxels from the second, third, ... bin on; 0 where nothing is."""
    n_above = np.cumsum(n[::-1])[::-1][1:]
    n_shared = np.cumsum(n_true[::-1])[::-1][1:]
    both = n_above + n_true.sum()
    return np.divide(2.0 * n_shared, both, out=np.zeros(len(both)), where=both > 0)


def _contrasts(image: Floats) -> Iterator[Floats]:
    """Yield the image less its surroundings, for each window of the grid.

    To smooth the difference is to smooth the image and then its surroundings: both are linear.
    """
    for size in BLOCKS:
        sigma = (size - 1) / 6
        yield image - gaussian_filter(image, (0, sigma, sigma))
    for size in BOXES:
        yield image - uniform_filter(image, (1, size, size))
    for sigmas in SURROUNDINGS:
        yield image - gaussian_filter(image, sigmas)


def _smoothed(values: Floats, sigma: float) -> Floats:
    return gaussian_filter(values, sigma) if sigma else values


def _in_deviations(contrast: Floats) -> Floats:
    deviation = contrast.std()
    return np.asarray(contrast / deviation if deviation else contrast)
