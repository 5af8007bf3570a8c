"""Parts of a labelled real stack, each changed in its own way, to train on.

The stack is 6001240 of idr0062 (Blin et al. 2019, Image Data Resource, CC BY 4.0), level 1. What
is trained on is not judged on: the other labelled stack, the nuclei, is kept out wholly.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tifffile import imread

from starter.microscope import to_16_bits
from starter.space import Floats, Mask, on_grid

IMAGE = "6001240_L1_DAPI.ome.tif"
LABELS = "6001240_L1_labels_GT61.ome.tif"
# Its voxels of 0.5 × 0.72 × 0.72 µm become those of the simulations, or stay as they are.
_FINER_Z = (1.0, 2.0)
_FINER_YX = (1.0, 4.0)
# Nuclei lie in a shell; a part of the stack that holds less says little about them.
_MIN_SHARE = 0.01
_MAX_TRIES = 50


def read_stack(folder: Path) -> tuple[Floats, Mask]:
    """Return the stack (z, y, x), gray values from 0 to 1, and where its nuclei are."""
    image = imread(folder / IMAGE).astype(np.float32)
    low = image.min()
    return (image - low) / (image.max() - low), imread(folder / LABELS) > 0


def draw_part(
    image: Floats, mask: Mask, shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint16], Mask]:
    """Return a part of a stack and its mask: turned, on a finer grid, with other gray and noise."""
    z = rng.uniform(*_FINER_Z)
    y, x = np.exp(rng.uniform(*np.log(_FINER_YX)) + rng.normal(0, 0.05, 2))
    extent = np.minimum(np.ceil(np.array(shape) / (z, y, x)).astype(int), image.shape)
    for _ in range(_MAX_TRIES):
        first = rng.integers(0, np.array(image.shape) - extent + 1)
        box = tuple(slice(low, low + n) for low, n in zip(first, extent, strict=True))
        if mask[box].mean() > _MIN_SHARE:
            break
    values = on_grid(image[box], shape)
    inside = on_grid(mask[box], shape)
    turned = tuple(slice(None, None, int(rng.choice([1, -1]))) for _ in range(3))
    values = np.clip(values[turned], 0, 1) ** rng.uniform(0.6, 1.4)
    values = ndimage.gaussian_filter(values, rng.uniform(0, 1.2, 3), truncate=2)
    photons = np.exp(rng.uniform(np.log(15), np.log(600)))
    counts = rng.poisson(values * photons) + rng.normal(0, rng.uniform(0.3, 2), shape)
    return to_16_bits((counts - counts.min()) / np.ptp(counts)), inside[turned] >= 0.5
