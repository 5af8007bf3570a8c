"""Structures of cells, drawn as dye per voxel: filaments, membranes, vesicles, nuclei.

Each function takes a `Space` and returns a `Drawing`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from starter.space import Floats, Mask, Space

# The depth of a voxel that no nucleus is near to.
_FAR = -1e6


@dataclass(frozen=True, slots=True)
class Drawing:
    """Dye per voxel, zero outside the structure.

    `thickness` is the largest thickness of a thin structure, in lateral voxels,
    and 0 for objects that are as wide as they are long.
    """

    dye: NDArray[np.float32]
    thickness: float = 0.0


# --- lines -----------------------------------------------------------------------------------


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


def _walks(
    space: Space,
    radius: float,
    per_area: float,
    wander: float,
    steps: tuple[float, float],
    climb: float = 0.15,
) -> Drawing:
    """Persistent random walks, mostly in the plane, aligned by a smooth field of directions."""
    rng = space.rng
    n = 1 + int(per_area * space.extent[1] * space.extent[2])
    position = space.positions(n, margin=20)
    direction = space.looked_up(space.field(space.between(30, 120), axes=(1, 2)), position)
    angle = direction * rng.uniform(0.2, 2) + rng.normal(0, rng.uniform(0.05, 0.8), n)
    climbs = rng.normal(0, climb, n)
    path = []
    for _ in range(int(space.between(*steps))):
        position = position + np.stack([climbs, np.sin(angle), np.cos(angle)], 1)
        angle = angle + rng.normal(0, wander, n)
        path.append(position)
    values = np.tile(space.contrasts(n), len(path))
    return Drawing(_stamp(space, np.concatenate(path), values, radius), 2 * radius + 1)


def _filaments(space: Space) -> Drawing:
    per_area = space.between(1e-3, 1e-2) / space.fine
    radius = space.between(0.4, 1.2)
    return _walks(space, radius, per_area, space.between(0.01, 0.12), (60, 300))


def _bundles(space: Space) -> Drawing:
    per_area = space.between(4e-4, 2.5e-3)
    radius = space.between(1.4, 3.5)
    return _walks(space, radius, per_area, space.between(0.005, 0.04), (60, 300))


def _mitochondria(space: Space) -> Drawing:
    """Short and long curved rods, crowded in a part of the field."""
    radius = space.between(1.0, 3.0) * max(1.0, space.fine)
    per_area = space.between(1e-3, 6e-3) / radius
    drawn = _walks(space, radius, per_area, space.between(0.05, 0.25), (12, 120), climb=0.25)
    crowd = space.field(space.between(25, 80), axes=(1, 2)) > space.rng.choice([-9.0, -0.5, 0.0])
    return Drawing(drawn.dye * crowd * space.patchy(), drawn.thickness)


def _tubes(space: Space) -> Drawing:
    """Curves where two fields vanish, long or cut into short rods by a third."""
    length = space.between(7, 20)
    radius = space.between(1.0, 3.5)
    far = [_distance_to_zero(space, space.field(length)) for _ in range(2)]
    tube: Mask = np.hypot(*far) <= radius
    cut = space.field(space.between(5, 25)) > space.rng.choice([-9.0, -0.3, 0.5])
    drawn: Mask = tube & cut
    return Drawing(drawn * space.patchy(), 5 * radius + 1)


# --- surfaces --------------------------------------------------------------------------------


def _distance_to_zero(space: Space, field: Floats) -> NDArray[np.float32]:
    """First-order distance to the field's zero set: |f| / |grad f|."""
    # np.gradient needs two voxels along an axis.
    thick = [axis for axis, n in enumerate(space.shape) if n > 1]
    slopes = [np.gradient(field, space.steps[axis], axis=axis) for axis in thick]
    slope = np.sqrt(sum(along_axis**2 for along_axis in slopes))
    # Near a saddle the slope vanishes and the estimate would swell without this floor.
    return np.asarray(np.abs(field) / np.maximum(slope, 0.4 * np.median(slope)), dtype=np.float32)


def _sheets(space: Space) -> Drawing:
    length = space.between(14, 45)
    half = space.between(0.7, 2.2)
    wall = _distance_to_zero(space, space.field(length)) <= half
    # Near a saddle the wall is up to 2.5 times as thick.
    return Drawing(wall * space.patchy(), 5 * half + 1)


def _distance_to_wall(seeds: Floats, shape: tuple[int, int], warp: float, space: Space) -> Floats:
    """Distance of each pixel to the bisector of its two nearest seeds, in a warped plane."""
    pixels = np.moveaxis(np.indices(shape), 0, -1).astype(np.float32)
    if warp > 0:
        length = space.between(8, 25)
        for axis in range(2):
            pixels[..., axis] += warp * space.field(length, axes=(1, 2))
    distances, indices = cKDTree(seeds).query(pixels, k=2)
    between = np.linalg.norm(seeds[indices[..., 1]] - seeds[indices[..., 0]], axis=-1)
    to_wall: Floats = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * between)
    return to_wall


@dataclass(frozen=True, slots=True)
class _Layers:
    """Layers of Voronoi walls: size of a cell, half thickness of walls, waviness, heights."""

    cell: float
    half: float
    n: int
    warp: float = 0.0
    belt: tuple[float, float] = (1.2, 5.0)
    always_belts: bool = False


def _junctions(space: Space, layers: _Layers) -> NDArray[np.float32]:
    """Voronoi walls of cell layers: sheets of full height, or belts along a curved surface."""
    rng = space.rng
    cell = layers.cell
    plane = np.array(space.shape[1:])
    n = int(np.prod(plane + 4 * cell) / cell**2) + 4
    seeds = rng.uniform(-2 * cell, plane + 2 * cell, (n, 2))
    dye = np.zeros(space.shape, dtype=np.float32)
    tilt = rng.normal(0, 0.25, 2)
    for layer in range(layers.n):
        moved = seeds + rng.normal(0, cell * (layer > 0), seeds.shape)
        wall = _distance_to_wall(moved, space.shape[1:], layers.warp, space) <= layers.half
        middle = space.extent[0] * (layer + rng.uniform(0.3, 0.7)) / layers.n
        surface = middle + space.between(1, 8) * space.field(2.5 * cell, axes=(1, 2))
        is_belt = layers.always_belts or layers.n > 1 or rng.random() < 0.6
        half_height = space.between(*layers.belt) if is_belt else space.extent[0] * 0.3
        # A layer that is thinner than a step along z still lies in one plane.
        half_height = max(half_height, 0.5 * space.anisotropy)
        for z, height in enumerate(np.arange(space.shape[0]) * space.anisotropy):
            shifts = [round(t * (height - middle)) for t in tilt]
            is_near = np.abs(height - surface) <= half_height
            dye[z][np.roll(wall, shifts, (0, 1)) & is_near] = 1
    return dye * space.patchy()


def _contacts(space: Space) -> Drawing:
    """Cell-cell contacts, continuous or in spots as desmosomes are."""
    half = space.between(0.7, 2)
    is_spotted = space.rng.random() < 0.4
    warp = space.rng.uniform(0, 3)
    dye = _junctions(space, _Layers(space.between(25, 90), half, 1, warp))
    if is_spotted:
        dye *= space.field(space.between(1.5, 4)) > space.rng.uniform(-0.5, 0.7)
    return Drawing(dye, 2 * half + 1)


def _network(space: Space) -> Drawing:
    """Small cells in two to four layers."""
    half = space.between(0.7, 1.5)
    layers = _Layers(space.between(9, 22), half, int(space.rng.integers(2, 5)), warp=1.0)
    return Drawing(_junctions(space, layers), 2 * half + 1)


def _reticulum(space: Space) -> Drawing:
    """Endoplasmic reticulum: dense polygons of tubes, sheets among them, around dark nuclei."""
    rng = space.rng
    fine = space.fine
    half = space.between(0.5, 0.9) * fine
    cell = space.between(5, 13) * fine
    depth = space.between(4, 12) * fine * space.elongation / 2
    n = int(np.clip(space.extent[0] / depth, 1, 12))
    layers = _Layers(cell, half, n, 0.25 * cell, (0.4 * fine, 1.2 * fine), always_belts=True)
    dye = _junctions(space, layers)
    # Tubes break off, and sheets fill some polygons.
    dye *= space.field(space.between(3, 8)) > rng.uniform(-3, -0.8)
    is_sheet = space.field(cell) > rng.uniform(1.2, 4)
    near = ndimage.grey_dilation(dye, size=(1, 2 * int(fine) + 3, 2 * int(fine) + 3))
    dye = np.where(is_sheet, 0.7 * near, dye)
    # The cell ends somewhere, and its nuclei hold none of it.
    if rng.random() < 0.6:
        dye *= space.field(space.between(40, 120), axes=(1, 2)) > rng.uniform(-1.5, 0)
    radius = space.between(20, 60)
    skin = half / radius
    for center in space.positions(int(rng.integers(0, 4)), margin=radius):
        radii = radius * np.array([rng.uniform(0.4, 0.9), 1, rng.uniform(0.8, 1.2)])
        box, distance = ellipsoid(space, center, radii, np.eye(3))
        dye[box][distance < 1] = 0
        dye[box][np.abs(distance - 1) <= skin] = 1
    return Drawing(dye.astype(np.float32), 2 * half + 2)


# --- closed objects --------------------------------------------------------------------------


def ellipsoid(
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


def _blobs(space: Space, radii: tuple[float, float], hollow: bool, fill: float) -> Drawing:
    """Draw many small ellipsoids, crowded where a field is high; hollow ones keep their skin."""
    rng = space.rng
    middle = space.between(*radii)
    n = 4 + int(fill * np.prod(space.extent) / (4.2 * middle**3))
    crowd = space.field(space.between(15, 60), axes=(1, 2))
    points = space.positions(3 * n)
    rank = space.looked_up(crowd, points) + rng.normal(0, rng.uniform(0.2, 3), 3 * n)
    points = points[np.argsort(-rank)[:n]]
    dye = np.zeros(space.shape, dtype=np.float32)
    for center, value in zip(points, space.contrasts(n), strict=True):
        radius = np.clip(middle * rng.lognormal(0, 0.2), *radii)
        box, distance = ellipsoid(space, center, radius * rng.uniform(0.85, 1.2, 3), np.eye(3))
        inner = 1 - 1.8 / radius if hollow else -1.0
        dye[box][(distance <= 1) & (distance >= inner)] = value
    return Drawing(dye)


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


def _chromatin(space: Space) -> NDArray[np.float32]:
    """Brightness inside nuclei: grains or threads, and dark nucleoli."""
    rng = space.rng
    # Fine grains, coarse ones, or both.
    share = rng.choice([0.0, 1.0, rng.uniform(0.3, 0.7)])
    grains = share * space.field(space.between(1.0, 2.5))
    grains = grains + (1 - share) * space.field(space.between(2.5, 8))
    if rng.random() < 0.5:
        # Threads around voids, as of heterochromatin.
        grains = 1 - 2 * np.abs(grains)
    grains = np.exp(rng.uniform(0.1, 1.3) * grains)
    nucleoli = space.field(space.between(3, 14)) > rng.uniform(0.9, 2.5)
    return np.asarray(np.where(nucleoli, rng.uniform(0.15, 0.8), 1) * grains, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Nuclei:
    """Nuclei of one volume: which is nearest to each voxel, how deep, and how far the next."""

    owner: NDArray[np.int32]
    depth: NDArray[np.float32]
    gap: NDArray[np.float32]
    is_bright: Mask


def _placed(space: Space) -> _Nuclei:
    """Place warped ellipsoids, apart or touching; a few are mitotic: small, rough and bright."""
    rng = space.rng
    radius = space.between(6, 50)
    flatness = rng.uniform(0.35, 1.0)
    warp = space.field(max(0.6 * radius, 5))
    amount = rng.uniform(0.02, 0.14)
    depth = np.full(space.shape, _FAR, dtype=np.float32)
    second = depth.copy()
    owner = np.zeros(space.shape, dtype=np.int32)
    centers = _spread(space, radius, rng.uniform(0.95, 1.9))
    is_bright = rng.random(len(centers)) < 0.06
    # Monolayers lie flat; in tissue (flat nuclei at any angle) the whole rotation is free.
    is_tissue = flatness < 0.7 and radius < 20
    for number, center in enumerate(centers):
        radii = radius * np.array([flatness, 1, 1]) * rng.uniform(0.7, 1.25, 3)
        roughness = amount
        if is_bright[number]:
            radii = radii * rng.uniform(0.3, 0.6, 3)
            roughness = amount * 3
        box, distance = ellipsoid(space, center, radii, _rotation(rng, free=is_tissue))
        here = (1 - distance - roughness * warp[box]) * float(radii.min())
        is_deeper = here > depth[box]
        second[box] = np.where(is_deeper, depth[box], np.maximum(second[box], here))
        owner[box][is_deeper] = number
        depth[box] = np.maximum(depth[box], here)
    return _Nuclei(owner, depth, depth - second, is_bright)


def _nuclei(space: Space) -> Drawing:
    """Nuclei filled with chromatin; in most volumes a dark gap lies between those that touch."""
    rng = space.rng
    placed = _placed(space)
    inside = placed.depth > 0
    if rng.random() < 0.7:
        inside &= placed.gap > space.fine * rng.uniform(1.0, 3.0)
    values = space.contrasts(len(placed.is_bright)) * np.where(placed.is_bright, 3.0, 1.0)
    rim = 1 + rng.uniform(0, 1.6) * np.exp(-((placed.depth / 2) ** 2))
    value = values[placed.owner].astype(np.float32)
    texture = np.maximum(_chromatin(space) * rim, 0.05)
    return Drawing(np.where(inside, value * texture, 0).astype(np.float32))


def _shells(space: Space) -> Drawing:
    """Only the envelope of nuclei, closed all around."""
    placed = _placed(space)
    skin = space.between(0.7, 2.0)
    wall = np.abs(placed.depth) <= skin
    values = space.contrasts(len(placed.is_bright))[placed.owner]
    dye = np.where(wall, values * space.patchy(), 0).astype(np.float32)
    return Drawing(dye, 2 * skin + 1)


DRAW: dict[str, Callable[[Space], Drawing]] = {
    "filaments": _filaments,
    "bundles": _bundles,
    "mitochondria": _mitochondria,
    "tubes": _tubes,
    "sheets": _sheets,
    "junctions": _contacts,
    "network": _network,
    "reticulum": _reticulum,
    "shells": _shells,
    "puncta": lambda s: _blobs(s, (1.1, 2.5), False, s.between(0.001, 0.02)),
    "vesicles": lambda s: _blobs(s, (2.5, 7), False, s.between(0.005, 0.08)),
    "hollow_vesicles": lambda s: _blobs(s, (4, 10), True, s.between(0.005, 0.08)),
    "nuclei": _nuclei,
}
