"""Simulated 3D fluorescence images of cell structures, with the truth.

A structure is drawn as dye per voxel (`starter.structures`), a microscope is put in
front of it (`starter.microscope`). The truth is not where dye is, but where an expert
would draw it: where the dye, seen through the microscope without noise and haze, is
above half of its local contrast.

The signal-to-noise ratio is chosen first and the photons follow from it, so "hard"
means the same for every kind. Equal arguments give equal images on one version of
numpy and scipy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starter.microscope import (
    background,
    blur,
    digitize,
    expose,
    illumination,
    light_of_other_planes,
    visible,
)
from starter.space import Mask, Space
from starter.structures import DRAW, Drawing, ellipsoid

KINDS = tuple(DRAW)
THIN = frozenset(
    ("filaments", "bundles", "mitochondria", "tubes", "sheets", "junctions", "network", "reticulum")
)
NOISE = "noise"

# Voxel sizes in µm from which one is drawn, along z and across; the last is the finest blur.
VOXEL_Z_UM = (0.2, 0.5)
VOXEL_YX_UM = (0.06, 0.3)
_BLUR_UM = (0.08, 0.16)
# Planes that a volume needs for a layer of cells in a deep empty stack.
_MIN_DEEP = 32


@dataclass(frozen=True, slots=True)
class Simulated:
    """One simulated image: voxels (z, y, x), the structure that is seen, how it was made."""

    image: NDArray[np.uint16] | NDArray[np.uint8]
    mask: Mask
    kind: str
    seed: int
    voxel_size_um: tuple[float, float, float]
    snr: float


def simulate(
    seed: int,
    shape: tuple[int, int, int],
    kind: str | None = None,
    difficulty: float = 0.5,
    *,
    snr: float | None = None,
    haze: float | None = None,
    read_noise: float | None = None,
    voxel_size_um: tuple[float, float, float] | None = None,
    sparse: bool = False,
) -> Simulated:
    """Simulate one image of `shape` (z, y, x) voxels.

    `kind` is one of KINDS, "noise" for an image that holds no structure, or None
    for any kind of structure. `difficulty` runs from 0 (bright, even) to 1 (signal-to-noise
    ratio 1.5 to 3, background as bright as the structure and uneven). `snr`, `haze`
    (light of other planes, in units of the structure's mean), `read_noise` (standard
    deviation in photons, 0 for a detector that counts them) and `voxel_size_um`
    (z, y, x; y and x equal) are drawn unless they are given. With `sparse`, only a small
    part of the field holds structure.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in (*KINDS, NOISE):
        raise ValueError(f"kind {kind!r} is none of {', '.join((*KINDS, NOISE))}")
    rng = np.random.default_rng(seed)
    if kind is None:
        kind = str(rng.choice(KINDS))
    voxel = _drawn_voxel(rng) if voxel_size_um is None else voxel_size_um
    space = _space(rng, shape, voxel)
    drawing = _drawn(space, kind)
    if sparse:
        drawing = _in_a_part(space, drawing)
    mask = visible(space, drawing)
    signal = blur(space, drawing.dye)
    norm = float(signal[mask].mean()) if mask.any() else 1.0
    signal /= norm
    if haze is None:
        haze = space.between(0.05, 0.3 + 1.7 * difficulty * (1.0 if drawing.thickness else 0.3))
    ground = background(space, difficulty) + light_of_other_planes(space, signal, mask, haze)
    light = illumination(space, difficulty)
    if kind == NOISE and rng.random() < 0.5:
        # Nothing but noise, over even ground.
        ground = np.full_like(ground, ground.mean())
        light = np.ones_like(light)
    if snr is None:
        snr = space.between(12 * 0.125**difficulty, 50 * 0.06**difficulty)
    scene = (signal + ground) * light
    level = float(ground[mask].mean()) if mask.any() else float(ground.mean())
    if read_noise is None:
        read_noise = space.between(0.7, 3)
    image = digitize(space, expose(space, scene, level, snr, read_noise))
    return Simulated(image, mask, kind, seed, voxel, snr)


def _drawn_voxel(rng: np.random.Generator) -> tuple[float, float, float]:
    low, high = np.log(VOXEL_YX_UM)
    lateral = float(np.exp(rng.uniform(low, high)))
    axial = float(rng.uniform(*VOXEL_Z_UM))
    # Light-sheet microscopes and resampled stacks have voxels of about equal sides.
    if rng.random() < 0.2:
        axial = lateral * float(rng.uniform(0.65, 1.3))
    return axial, lateral, lateral


def _space(
    rng: np.random.Generator, shape: tuple[int, int, int], voxel: tuple[float, float, float]
) -> Space:
    axial, lateral, _ = voxel
    sigma = float(np.clip(rng.uniform(*_BLUR_UM) / lateral, 0.4, 2.7))
    return Space(rng, shape, axial / lateral, sigma, elongation=float(rng.uniform(2, 3.5)))


def _drawn(space: Space, kind: str) -> Drawing:
    """Draw a structure, now and then as a thin layer in a deep stack that holds nothing else."""
    if kind == NOISE:
        return Drawing(np.zeros(space.shape, dtype=np.float32))
    n_planes = space.shape[0]
    if n_planes < _MIN_DEEP or space.rng.random() >= 0.15:
        return DRAW[kind](space)
    n_layer = int(space.rng.integers(n_planes // 6, n_planes // 2))
    first = int(space.rng.integers(0, n_planes - n_layer))
    layer = Space(
        space.rng, (n_layer, *space.shape[1:]), space.anisotropy, space.sigma, space.elongation
    )
    drawing = DRAW[kind](layer)
    dye = np.zeros(space.shape, dtype=np.float32)
    dye[first : first + n_layer] = drawing.dye
    return Drawing(dye, drawing.thickness)


def _in_a_part(space: Space, drawing: Drawing) -> Drawing:
    """Keep what lies in a ball: almost all of the field is empty then."""
    radius = space.between(8, 30)
    [center] = space.positions(1)
    box, distance = ellipsoid(space, center, np.full(3, radius), np.eye(3))
    dye = np.zeros_like(drawing.dye)
    dye[box] = np.where(distance < 1, drawing.dye[box], 0)
    return Drawing(dye, drawing.thickness)
