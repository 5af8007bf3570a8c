"""Simulated 3D fluorescence images of cell structures, with the truth.

A structure is drawn as a brightness per voxel, zero outside; its support is the
truth. A microscope is then put in front of it: blur, haze, background,
bleaching, offset, Poisson and read noise. The signal-to-noise ratio is chosen
first and the photons follow from it, so "hard" means the same for every kind.
Lengths are in lateral voxels; one z step counts `anisotropy` of them. Equal
arguments give equal images on one version of numpy and scipy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Simulated:
    """One simulated image: voxels (z, y, x), where the dye is, and how it was made."""

    image: NDArray[np.uint16]
    mask: Mask
    kind: str
    seed: int
    anisotropy: float
    snr: float


@dataclass(frozen=True, slots=True)
class Space:
    """The volume to draw in, and the only source of chance."""

    rng: np.random.Generator
    shape: tuple[int, int, int]
    anisotropy: float

    @property
    def steps(self) -> NDArray[np.float64]:
        """Size of a voxel along z, y, x, in lateral voxels."""
        return np.array([self.anisotropy, 1.0, 1.0])

    @property
    def extent(self) -> NDArray[np.float64]:
        """Size of the volume along z, y, x, in lateral voxels."""
        return np.array(self.shape) * self.steps

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


def _gaussian_basis(n: int, length: float) -> NDArray[np.float32]:
    # Nodes closer than one voxel would only cost time: the field is white noise by then.
    spacing = max(length, 1.0)
    nodes = np.arange(-2, int(np.ceil(n / spacing)) + 3) * spacing
    weights = np.exp(-0.5 * ((np.arange(n)[:, None] - nodes) / spacing) ** 2)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), dtype=np.float32)


# --- structures: each returns the dye per voxel, zero outside ------------------------------------


def _stamp(space: Space, points: Floats, values: Floats, radius: float) -> NDArray[np.float32]:
    """Draw balls of one radius around many points."""
    dye = np.zeros(space.shape, dtype=np.float32)
    reach = [int(radius / step) for step in space.steps]
    ranges = [np.arange(-n, n + 1) for n in reach]
    offsets = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    offsets = offsets[((offsets * space.steps) ** 2).sum(1) <= radius**2]
    voxels = np.rint(points / space.steps).astype(np.intp)
    for offset in offsets:
        moved = voxels + offset
        inside = ((moved >= 0) & (moved < space.shape)).all(1)
        dye[tuple(moved[inside].T)] = values[inside]
    return dye


def _filaments(space: Space, radius: float, per_area: float, wander: float) -> NDArray[np.float32]:
    """Persistent random walks, mostly in the plane, aligned by a smooth field of directions."""
    rng = space.rng
    n = 1 + int(per_area * space.extent[1] * space.extent[2])
    position = space.positions(n, margin=20)
    direction = space.looked_up(space.field(space.between(30, 120), axes=(1, 2)), position)
    angle = direction * rng.uniform(0.2, 2) + rng.normal(0, rng.uniform(0.05, 0.8), n)
    climb = rng.normal(0, 0.15, n)
    path = []
    for _ in range(int(space.between(60, 300))):
        position = position + np.stack([climb, np.sin(angle), np.cos(angle)], 1)
        angle = angle + rng.normal(0, wander, n)
        path.append(position)
    values = np.tile(_contrast(space, n), len(path))
    return _stamp(space, np.concatenate(path), values, radius)


def _distance_to_zero(space: Space, field: Floats) -> NDArray[np.float32]:
    """First-order distance to the field's zero set: |f| / |grad f|."""
    # np.gradient needs two voxels along an axis.
    thick = [axis for axis, n in enumerate(space.shape) if n > 1]
    slopes = [np.gradient(field, space.steps[axis], axis=axis) for axis in thick]
    slope = np.sqrt(sum(along_axis**2 for along_axis in slopes))
    # Near a saddle the slope vanishes and the estimate would swell without this floor.
    return np.asarray(np.abs(field) / np.maximum(slope, 0.4 * np.median(slope)), dtype=np.float32)


def _sheets(space: Space) -> NDArray[np.float32]:
    length = space.between(14, 45)
    wall = _distance_to_zero(space, space.field(length)) <= space.between(0.9, 2.2)
    return wall * _patchy(space)


def _junctions(space: Space, cell: float, thickness: float, n_layers: int) -> NDArray[np.float32]:
    """Voronoi walls of cell layers: sheets of full height, or belts along a curved surface."""
    rng = space.rng
    plane = np.array(space.shape[1:])
    n = int(np.prod(plane + 4 * cell) / cell**2) + 4
    seeds = rng.uniform(-2 * cell, plane + 2 * cell, (n, 2))
    dye = np.zeros(space.shape, dtype=np.float32)
    tilt = rng.normal(0, 0.25, 2)
    for layer in range(n_layers):
        moved = seeds + rng.normal(0, cell * (layer > 0), seeds.shape)
        wall = _distance_to_wall(moved, space.shape[1:]) <= thickness
        middle = space.extent[0] * (layer + rng.uniform(0.3, 0.7)) / n_layers
        surface = middle + space.between(1, 8) * space.field(2.5 * cell, axes=(1, 2))
        is_belt = n_layers > 1 or rng.random() < 0.6
        half_height = space.between(1.2, 5) if is_belt else space.extent[0] * 0.3
        for z, height in enumerate(np.arange(space.shape[0]) * space.anisotropy):
            shifts = [round(t * (height - middle)) for t in tilt]
            is_near = np.abs(height - surface) <= half_height
            dye[z][np.roll(wall, shifts, (0, 1)) & is_near] = 1
    return dye * _patchy(space)


def _contacts(space: Space) -> NDArray[np.float32]:
    """Cell-cell contacts, continuous or in spots as desmosomes are."""
    cell = space.between(25, 90)
    thickness = space.between(0.9, 2)
    is_spotted = space.rng.random() < 0.4
    dye = _junctions(space, cell, thickness, n_layers=1)
    if is_spotted:
        dye *= space.field(space.between(1.5, 4)) > space.rng.uniform(-0.5, 0.7)
    return dye


def _distance_to_wall(seeds: Floats, shape: tuple[int, int]) -> Floats:
    """Distance of each pixel to the bisector of its two nearest seeds."""
    pixels = np.moveaxis(np.indices(shape), 0, -1)
    distances, indices = cKDTree(seeds).query(pixels, k=2)
    between = np.linalg.norm(seeds[indices[..., 1]] - seeds[indices[..., 0]], axis=-1)
    to_wall: Floats = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * between)
    return to_wall


def _tubes(space: Space) -> NDArray[np.float32]:
    """Curves where two fields vanish, long or cut into short rods by a third."""
    length = space.between(7, 20)
    radius = space.between(1.2, 3.5)
    far = [_distance_to_zero(space, space.field(length)) for _ in range(2)]
    tube: Mask = np.hypot(*far) <= radius
    cut = space.field(space.between(5, 25)) > space.rng.choice([-9.0, -0.3, 0.5])
    drawn: Mask = tube & cut
    return drawn * _patchy(space)


def _blobs(
    space: Space, radii: tuple[float, float], hollow: bool, fill: float
) -> NDArray[np.float32]:
    """Draw many small ellipsoids, crowded where a field is high; hollow ones keep their skin."""
    rng = space.rng
    middle = space.between(*radii)
    n = 4 + int(fill * np.prod(space.extent) / (4.2 * middle**3))
    crowd = space.field(space.between(15, 60), axes=(1, 2))
    points = space.positions(3 * n)
    rank = space.looked_up(crowd, points) + rng.normal(0, rng.uniform(0.2, 3), 3 * n)
    points = points[np.argsort(-rank)[:n]]
    dye = np.zeros(space.shape, dtype=np.float32)
    for center, value in zip(points, _contrast(space, n), strict=True):
        radius = np.clip(middle * rng.lognormal(0, 0.2), *radii)
        box, distance = _ellipsoid(space, center, radius * rng.uniform(0.85, 1.2, 3), np.eye(3))
        inner = 1 - 1.8 / radius if hollow else -1.0
        dye[box][(distance <= 1) & (distance >= inner)] = value
    return dye


def _nuclei(space: Space, shell: bool) -> NDArray[np.float32]:
    """Large warped ellipsoids, apart or touching: filled with chromatin, or only their envelope."""
    rng = space.rng
    radius = space.between(8, 34)
    flatness = rng.uniform(0.45, 1.0)
    warp = space.field(max(0.6 * radius, 5))
    amount = rng.uniform(0.02, 0.14)
    texture = _chromatin(space)
    rim = rng.uniform(0, 1.6)
    skin = space.between(0.9, 2.0)
    dye = np.zeros(space.shape, dtype=np.float32)
    centers = _spread(space, radius, rng.uniform(0.95, 1.9))
    for center, value in zip(centers, _contrast(space, len(centers)), strict=True):
        radii = radius * np.array([flatness, 1, 1]) * rng.uniform(0.7, 1.25, 3)
        is_mitotic = rng.random() < 0.06
        roughness = amount
        if is_mitotic:
            radii = radii * rng.uniform(0.3, 0.6, 3)
            value = value * 3
            roughness = amount * 3
        # Monolayers lie flat; in tissue (flat nuclei at any angle) the whole rotation is free.
        is_tissue = flatness < 0.7 and radius < 20
        box, distance = _ellipsoid(space, center, radii, _rotation(rng, free=is_tissue))
        distance = distance + roughness * warp[box]
        depth = (1 - distance) * float(radii.min())
        if shell:
            dye[box][np.abs(depth) <= skin] = value
        else:
            drawn = value * texture[box] * (1 + rim * np.exp(-((depth / 2) ** 2)))
            dye[box][depth > 0] = np.maximum(drawn, 0.05 * value)[depth > 0]
    return dye * _patchy(space) if shell else dye


def _chromatin(space: Space) -> NDArray[np.float32]:
    """Brightness inside nuclei: grains or threads, and dark nucleoli."""
    rng = space.rng
    grains = space.field(space.between(1.2, 6))
    if rng.random() < 0.5:
        # Threads around voids, as of heterochromatin.
        grains = 1 - 2 * np.abs(grains)
    grains = np.exp(rng.uniform(0.05, 1.1) * grains)
    nucleoli = space.field(space.between(3, 8)) > rng.uniform(0.9, 2.5)
    return np.asarray(np.where(nucleoli, rng.uniform(0.15, 0.8), 1) * grains, dtype=np.float32)


def _spread(space: Space, radius: float, gap: float) -> NDArray[np.float64]:
    """Centers about `gap` diameters apart or more (random sequential), in a layer or throughout."""
    n = int(12 * np.prod(space.extent[1:] + 2 * radius) / radius**2) + 8
    candidates = space.positions(n, margin=radius)
    if space.rng.random() < 0.6:
        height = space.extent[0] * space.rng.uniform(0.3, 0.7)
        candidates[:, 0] = height + space.rng.normal(0, 0.3 * radius, n)
    min_squared = (2 * radius * gap * 0.85) ** 2
    kept = candidates[:1]
    for candidate in candidates[1:]:
        squared = ((kept - candidate) ** 2).sum(1)
        if (squared >= min_squared).all():
            kept = np.append(kept, candidate[None], axis=0)
    return kept


def _ellipsoid(
    space: Space, center: Floats, radii: Floats, axes: Floats
) -> tuple[tuple[slice, ...], Floats]:
    """Return a box with room around an ellipsoid, and distances in units of its radius."""
    reach = 1.5 * float(radii.max()) + 1
    ends = np.rint((center + np.array([[-reach], [reach]])) / space.steps)
    ends = np.clip(ends, 0, space.shape).astype(int)
    box = tuple(slice(low, high) for low, high in ends.T)
    z, y, x = (
        index * step - origin
        for index, step, origin in zip(np.ogrid[box], space.steps, center, strict=True)
    )
    along_axes = [row[0] * z + row[1] * y + row[2] * x for row in axes]
    distance: Floats = np.sqrt(
        sum((part / radius) ** 2 for part, radius in zip(along_axes, radii, strict=True))
    )
    return box, np.broadcast_to(distance, tuple(s.stop - s.start for s in box))


def _rotation(rng: np.random.Generator, free: bool) -> NDArray[np.float64]:
    if free:
        return np.linalg.qr(rng.standard_normal((3, 3)))[0]
    angle = rng.uniform(0, np.pi)
    cos = np.cos(angle)
    sin = np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def _contrast(space: Space, n: int) -> NDArray[np.float64]:
    """Brightness of n objects, from all alike to bright ones beside dim ones."""
    return space.rng.lognormal(0, space.rng.uniform(0, 0.7), n)


def _patchy(space: Space) -> NDArray[np.float32]:
    """Brightness that drifts within one connected structure."""
    amount = np.float32(space.rng.uniform(0, 0.5))
    drift: NDArray[np.float32] = amount * space.field(space.between(10, 60))
    return np.exp(drift)


_DRAW: dict[str, Callable[[Space], NDArray[np.float32]]] = {
    "filaments": lambda s: _filaments(
        s, s.between(1.0, 1.5), s.between(1e-3, 1e-2), s.between(0.01, 0.12)
    ),
    "bundles": lambda s: _filaments(
        s, s.between(1.8, 3.5), s.between(4e-4, 2.5e-3), s.between(0.005, 0.04)
    ),
    "sheets": _sheets,
    "junctions": _contacts,
    "network": lambda s: _junctions(
        s, s.between(9, 22), s.between(0.9, 1.5), int(s.rng.integers(2, 5))
    ),
    "tubes": _tubes,
    "puncta": lambda s: _blobs(s, (1.1, 2.5), False, s.between(0.001, 0.02)),
    "vesicles": lambda s: _blobs(s, (2.5, 7), False, s.between(0.005, 0.08)),
    "hollow_vesicles": lambda s: _blobs(s, (4, 10), True, s.between(0.005, 0.08)),
    "shells": lambda s: _nuclei(s, shell=True),
    "nuclei": lambda s: _nuclei(s, shell=False),
}
KINDS = tuple(_DRAW)


# --- the microscope ------------------------------------------------------------------------------


def _blur(space: Space, dye: Floats) -> NDArray[np.float32]:
    """Confocal blur (axial 2-3 times lateral) and, weakly, the light of other planes."""
    lateral = space.between(0.5, 1.6)
    axial = lateral * space.rng.uniform(2, 3) / space.anisotropy
    sharp = ndimage.gaussian_filter(dye, (axial, lateral, lateral), truncate=3)
    # The wide part is smooth: blurred on every 4th voxel it costs next to nothing.
    factors = (2, 4, 4) if min(space.shape) >= 16 else (1, 1, 1)
    coarse = sharp[:: factors[0], :: factors[1], :: factors[2]]
    sigmas = [space.between(5, 14) / f / s for f, s in zip(factors, space.steps, strict=True)]
    wide = ndimage.gaussian_filter(coarse, sigmas)
    zoom = np.array(space.shape) / wide.shape
    full = ndimage.zoom(wide, zoom, order=1, grid_mode=True, mode="nearest")
    return np.asarray(sharp + space.rng.uniform(0, 0.8) * full, dtype=np.float32)


def _background(space: Space, difficulty: float) -> NDArray[np.float32]:
    """Autofluorescence, haze and a slope, in units of the structure's mean brightness."""
    rng = space.rng
    level = space.between(0.05, 0.3 + difficulty)
    haze = np.maximum(space.field(space.between(18, 60)) + rng.uniform(-1, 1), 0)
    haze *= rng.uniform(0, 0.2 + 0.5 * difficulty)
    slope = space.field(float(max(space.extent[1:])) / 1.5, axes=(1, 2))
    slope *= rng.uniform(0, 0.15 + 0.6 * difficulty)
    return np.asarray(level + haze + np.maximum(slope + 0.5 * slope.std(), 0), dtype=np.float32)


def _light(space: Space, difficulty: float) -> NDArray[np.float32]:
    """Uneven illumination over the field times bleaching along z."""
    shade = 1 + 0.1 * (1 + difficulty) * space.field(float(max(space.extent[1:])) / 2, axes=(1, 2))
    fading = space.rng.uniform(0, 0.4 + 0.8 * difficulty)
    bleach = np.exp(-fading * np.arange(space.shape[0]) / space.shape[0])
    return np.asarray(np.clip(shade, 0.4, None) * bleach[:, None, None], dtype=np.float32)


def _expose(space: Space, scene: Floats, level: float, snr: float) -> NDArray[np.uint16]:
    """Camera image of a scene whose structure has mean brightness 1 over `level` of background.

    Photons k per unit solve snr = k / sqrt(k (1 + level) + read^2), the signal
    over the Poisson and read noise in the structure.
    """
    read = space.between(0.7, 3)
    half = snr**2 * (1 + level) / 2
    photons = half + np.sqrt(half**2 + (snr * read) ** 2)
    counts = space.rng.poisson(scene * np.float32(photons)).astype(np.float32)
    counts += np.float32(read) * space.rng.standard_normal(space.shape, dtype=np.float32)
    counts *= space.between(2, 12)
    counts += space.rng.uniform(80, 500)
    return np.clip(counts, 0, 65535).astype(np.uint16)


def simulate(
    seed: int, shape: tuple[int, int, int], kind: str | None = None, difficulty: float = 0.5
) -> Simulated:
    """Simulate one image of `shape` (z, y, x) voxels.

    `kind` is one of KINDS, or None for any. `difficulty` runs from 0 (bright,
    even) to 1 (signal-to-noise ratio 1.5 to 3, background as bright as the
    structure and uneven).

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    if kind is None:
        kind = str(rng.choice(KINDS))
    space = Space(rng, shape, anisotropy=float(rng.choice([1.0, rng.uniform(1, 3)])))
    dye = _DRAW[kind](space)
    mask = dye > 0
    signal = _blur(space, dye)
    signal /= signal[mask].mean() if mask.any() else 1
    background = _background(space, difficulty)
    snr = space.between(12 * 0.125**difficulty, 50 * 0.06**difficulty)
    scene = (signal + background) * _light(space, difficulty)
    image = _expose(space, scene, float(background.mean()), snr)
    return Simulated(image, mask, kind, seed, space.anisotropy, snr)
