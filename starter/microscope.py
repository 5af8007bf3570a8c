"""The microscope and its camera: blur, light of other planes, background, noise; and the truth."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from starter.space import Floats, Mask, Space, on_grid
from starter.structures import Drawing

# Dye below this part of what is typical of its volume is not seen as structure.
_MIN_SEEN = 0.2
_EIGHT_BITS = 255
# The light of near planes, at most, in units of the mean of the dye around.
_MAX_NEAR = 5.0


def blur(space: Space, dye: Floats) -> NDArray[np.float32]:
    """Return the dye as a confocal microscope shows it, without other planes or noise."""
    return np.asarray(ndimage.gaussian_filter(dye, space.sigmas, truncate=3), dtype=np.float32)


def visible(space: Space, drawing: Drawing) -> Mask:
    """Return where an expert sees the structure: above half of its local contrast.

    What counts is that there is dye, blurred as the microscope blurs it, not how
    bright the grains of it are: a nucleus has no holes where its chromatin is thin.
    Of a thin structure its surroundings are taken off (a white top hat with a box
    that it does not fill), so the gaps of a dense network stay gaps. The local
    contrast is the largest value within 1.5 standard deviations of the blur: of a
    line, the truth is as wide as its profile at half of its maximum.
    """
    support = drawing.dye > 0
    if not support.any():
        return support
    seen = blur(space, support.astype(np.float32))
    if drawing.thickness > 0:
        thickness = drawing.thickness / space.steps + 3 * space.sigmas
        size = [2 * int(np.ceil(n / 2)) + 1 for n in thickness]
        opened = ndimage.maximum_filter(ndimage.minimum_filter(seen, size), size)
        seen = seen - opened
    reach = [2 * max(1, int(np.ceil(1.5 * sigma))) + 1 for sigma in space.sigmas]
    typical = float(np.percentile(seen[support], 90))
    mask = (seen >= 0.5 * ndimage.maximum_filter(seen, reach)) & (seen >= _MIN_SEEN * typical)
    return np.asarray(mask & _is_bright(space, drawing.dye, support))


def _is_bright(space: Space, dye: Floats, support: Mask) -> Mask:
    """Return where the dye's brightness, averaged over some voxels, is not far below typical."""
    size = [2 * max(1, round(6 / step)) + 1 for step in space.steps]
    total = ndimage.uniform_filter(dye, size)
    share = ndimage.uniform_filter(support.astype(np.float32), size)
    brightness = total / np.maximum(share, 1e-6)
    return np.asarray(brightness >= _MIN_SEEN * np.median(brightness[support]))


def light_of_other_planes(
    space: Space, sharp: Floats, mask: Mask, haze: float
) -> NDArray[np.float32]:
    """Return the wide and smooth part of the microscope's blur, of mean `haze` in the structure.

    A few lines in an empty volume have little light near them, a dense network much. Beyond
    that the light is even smoother, as if from planes that are far away.
    """
    near = space.between(3, 8) * max(1.3, space.sigma)
    far = space.between(12, 40)
    share_of_far = space.rng.uniform(0, 0.6)
    if not mask.any():
        return np.zeros_like(sharp)
    wide = _smooth(space, sharp, near)
    smooth = _smooth(space, sharp, far)
    mean = float(wide[mask].mean())
    mean_of_far = float(smooth[mask].mean())
    if mean <= 0 or mean_of_far <= 0:
        # A structure of some voxels may lie between those that the smooth part is made of.
        return np.zeros_like(sharp)
    of_near = min((1 - share_of_far) * haze, _MAX_NEAR * mean)
    of_far = haze - of_near
    return of_near / mean * wide + of_far / mean_of_far * smooth


def _smooth(space: Space, sharp: Floats, width: float) -> NDArray[np.float32]:
    """Return dye after a Gaussian of a large width."""
    # It is smooth: blurred on every fourth voxel it costs next to nothing.
    factors = (2, 4, 4) if min(space.shape) >= 16 else (1, 1, 1)
    coarse = sharp[:: factors[0], :: factors[1], :: factors[2]]
    sigmas = [width / factor / step for factor, step in zip(factors, space.steps, strict=True)]
    wide = ndimage.gaussian_filter(coarse, sigmas)
    return on_grid(wide, space.shape)


def background(space: Space, difficulty: float) -> NDArray[np.float32]:
    """Return autofluorescence, cells that glow and a slope, in units of the structure's mean."""
    rng = space.rng
    level = space.between(0.05, 0.3 + difficulty)
    glow = np.maximum(space.field(space.between(18, 60)) + rng.uniform(-1, 1), 0)
    glow *= rng.uniform(0, 0.2 + 0.5 * difficulty)
    slope = space.field(float(max(space.extent[1:])) / 1.5, axes=(1, 2))
    slope *= rng.uniform(0, 0.15 + 0.6 * difficulty)
    return np.asarray(level + glow + np.maximum(slope + 0.5 * slope.std(), 0), dtype=np.float32)


def illumination(space: Space, difficulty: float) -> NDArray[np.float32]:
    """Return uneven illumination over the field times bleaching along z."""
    shade = 1 + 0.1 * (1 + difficulty) * space.field(float(max(space.extent[1:])) / 2, axes=(1, 2))
    fading = space.rng.uniform(0, 0.4 + 0.8 * difficulty)
    bleach = np.exp(-fading * np.arange(space.shape[0]) / space.shape[0])
    return np.asarray(np.clip(shade, 0.4, None) * bleach[:, None, None], dtype=np.float32)


def expose(
    space: Space, scene: Floats, level: float, snr: float, read_noise: float
) -> NDArray[np.float32]:
    """Return what the camera counts of a scene: mean 1 in the structure over `level` around it.

    Photons k per unit solve snr = k / sqrt(k (1 + level) + read_noise^2), the signal
    over the Poisson and read noise in the structure.
    """
    half = snr**2 * (1 + level) / 2
    photons = half + np.sqrt(half**2 + (snr * read_noise) ** 2)
    counts = space.rng.poisson(scene * np.float32(photons)).astype(np.float32)
    counts += np.float32(read_noise) * space.rng.standard_normal(space.shape, dtype=np.float32)
    return counts


def digitize(space: Space, counts: Floats) -> NDArray[np.uint16] | NDArray[np.uint8]:
    """Return the counts as a file holds them: 16 bits, sometimes 8, sometimes saturated."""
    rng = space.rng
    is_saturated = rng.random() < 0.12
    has_8_bits = rng.random() < 0.15
    gain = space.between(2, 12)
    offset = rng.uniform(80, 500)
    top = float(np.percentile(counts, rng.uniform(98.5, 99.98))) if is_saturated else np.inf
    clipped = np.minimum(counts, top)
    if not has_8_bits:
        return np.clip(clipped * gain + offset, 0, 65535).astype(np.uint16)
    low = float(clipped.min())
    span = max(float(clipped.max()) - low, 1e-6)
    levels = space.between(30, _EIGHT_BITS)
    return ((clipped - low) / span * levels).astype(np.uint8)


def to_16_bits(values: Floats) -> NDArray[np.uint16]:
    """Return values from 0 to 1 as gray values of 16 bits."""
    return (values * 60000).astype(np.uint16)
