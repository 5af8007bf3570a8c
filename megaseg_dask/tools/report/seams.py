"""The check that no block border shows: planes across the faces of blocks against planes inside.

At a face of two blocks, planes ``at - 1`` and ``at`` were predicted and
labeled by different tasks. An error of the split would show there and not
eight planes further inside: a step in the scores, an object with two ids, or
objects that end. So each face is compared with the pairs of planes beside it,
which contain the same cells. Where patches of the network begin or end, scores
have a step in any case; so borders of patches inside blocks are counted apart,
and faces at such borders are compared with them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import max_score
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.tools.report.sampling import UNREADABLE

Array = NDArray[Any]

AXES = ("z", "y", "x")
# Planes on both sides of a face that it is compared with.
REACH = 8
# Voxels per side of the window that is read of a face; the largest number of faces, and of seconds.
_WINDOW = 256
_MAX_FACES = 64
_MAX_S = 60.0
_READERS = 4
_BATCH = 16
# The ratio of faces to their surroundings that chance explains where faces are few.
_CHANCE_RATIO = 1.25


# Sums over pairs of planes, an entry per distance from ``-REACH`` to ``REACH``.
# ``n`` is the number of pairs of voxels and ``step`` the sum of their score differences;
# ``ends`` counts pairs with one voxel in an object, ``contacts`` pairs with both in
# objects, and ``broken`` contacts of two ids.
Sums = dict[str, Array]


def _no_sums() -> Sums:
    names = ("n", "step", "ends", "contacts", "broken")
    return {name: np.zeros(2 * REACH + 1) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """A window on the face between two blocks; plane ``at`` is the first one of the second block.

    With ``is_inside`` it is not a face, but a border of patches inside a block.
    """

    plan: Plan
    output: Output
    axis: int
    at: int
    box: Box
    is_inside: bool = False


@dataclass
class Profile:
    """Sums over the faces of one axis, and over borders of patches inside blocks.

    ``n_on_borders`` is the number of faces that coincide with borders of patches.
    ``best`` is the face with most contacts.
    """

    axis: str
    n_faces: int = 0
    n_on_borders: int = 0
    sums: Sums = field(default_factory=_no_sums)
    borders: Sums = field(default_factory=_no_sums)
    best: Face | None = None
    _max_contacts: float = 0.0

    def add(self, face: Face, sums: Sums) -> None:
        """Add the sums of one face, or of one border of patches."""
        totals = self.borders if face.is_inside else self.sums
        for name, values in sums.items():
            totals[name] += values
        if face.is_inside:
            return
        self.n_faces += 1
        self.n_on_borders += face.at in _patch_borders(face.plan, face.axis)
        if sums["contacts"][REACH] >= self._max_contacts:
            self._max_contacts = sums["contacts"][REACH]
            self.best = face

    def per_pair(self, name: str) -> Array:
        """Return a measure per pair of voxels, at each distance; NaN where there is no pair."""
        return _per_pair(self.sums, name)

    def compare(self, name: str) -> "Comparison":
        """Return a measure at the faces, and beside them inside the blocks."""
        values = self.per_pair(name)
        inside = np.delete(values, REACH)
        inside = inside[np.isfinite(inside)]
        if not inside.size:
            inside = np.array([np.nan])
        return Comparison(
            at=float(values[REACH]),
            mean=float(inside.mean()),
            low=float(inside.min()),
            high=float(inside.max()),
            border=float(_per_pair(self.borders, name)[REACH]),
            on_borders=self.n_on_borders > 0,
        )


def _per_pair(sums: Sums, name: str) -> Array:
    n = sums["n"]
    shares: Array = np.where(n > 0, sums[name] / np.maximum(n, 1), np.nan)
    return shares


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure at the faces of one axis, inside blocks, and at borders of patches inside."""

    at: float
    mean: float
    low: float
    high: float
    border: float
    on_borders: bool

    @property
    def verdict(self) -> str:
        """``inside`` or ``patches`` for what the faces are like, ``unknown``, or ``more``."""
        if not self.at > max(self.high, _CHANCE_RATIO * self.mean):
            return "inside"
        if not self.on_borders or self.at > _CHANCE_RATIO * self.border:
            return "more"
        return "patches" if np.isfinite(self.border) else "unknown"


@dataclass
class Seams:
    """The result of the check: a profile per axis, of a sample of all ``n_faces``."""

    n_faces: int = 0
    profiles: list[Profile] = field(default_factory=lambda: [Profile(axis) for axis in AXES])
    n_unreadable: int = 0

    def add(self, face: Face, sums: Sums | None) -> None:
        """Add the sums of one face; ``None`` if it could not be read."""
        if sums is None:
            self.n_unreadable += 1
        else:
            self.profiles[face.axis].add(face, sums)

    @property
    def n_checked(self) -> int:
        """Number of faces that were compared."""
        return sum(profile.n_faces for profile in self.profiles)

    @property
    def n_broken(self) -> int:
        """Number of pairs of voxels across faces that touch and have two different ids."""
        return int(sum(profile.sums["broken"][REACH] for profile in self.profiles))

    @property
    def n_contacts(self) -> int:
        """Number of pairs of voxels across faces that are both in objects."""
        return int(sum(profile.sums["contacts"][REACH] for profile in self.profiles))


def check_seams(volumes: Sequence[tuple[Plan, Sequence[Output]]]) -> Seams | None:
    """Compare a sample of faces with the inside of blocks; ``None`` if no volume is split.

    ``volumes`` are the complete outputs of each plan: without all blocks there is nothing to
    compare.
    """
    max_faces = max(_MAX_FACES // len(volumes), 1)
    seams = Seams()
    samples = []
    for (plan, outputs), axis in product(volumes, range(3)):
        shape = _faces_shape(plan, outputs, axis)
        seams.n_faces += math.prod(shape)
        samples.append(_sample(plan, outputs, axis, max_faces))
    if not seams.n_faces:
        return None
    # All axes and runs in turn, until the time is over.
    faces = list(filter(None, chain.from_iterable(zip_longest(*samples))))
    deadline = time.monotonic() + _MAX_S
    for first in range(0, len(faces), _BATCH):
        batch = faces[first : first + _BATCH]
        for face, sums in zip(batch, map_threaded(_try_count, batch, _READERS), strict=True):
            seams.add(face, sums)
        if time.monotonic() > deadline:
            break
    seams.profiles = [profile for profile in seams.profiles if profile.n_faces]
    return seams


# -- the sample


def _faces_shape(plan: Plan, outputs: Sequence[Output], axis: int) -> tuple[int, ...]:
    """Return the number of outputs, and of faces of one axis in each direction."""
    shape = list(plan.block_grid().grid_shape)
    shape[axis] -= 1
    return len(outputs), *shape


def _patch_borders(plan: Plan, axis: int) -> set[int]:
    """Return the planes of an axis at which patches begin, or have just ended."""
    grid = plan.patch_grid
    on_grid = np.array(grid.starts[axis])
    resampling = grid.resampling
    step = resampling.source_shape[axis] / resampling.grid_shape[axis]
    places = np.array([on_grid, on_grid + grid.patch_shape[axis]]) * step
    starts, stops = np.rint(places).astype(int) - plan.region.start[axis]
    return {*starts.tolist(), *stops.tolist()}


def _sample(plan: Plan, outputs: Sequence[Output], axis: int, max_faces: int) -> Iterator[Face]:
    """Yield faces of one axis in random order, with a fixed seed.

    A face at a border of patches is followed by such a border inside its block.
    """
    shape = _faces_shape(plan, outputs, axis)
    n = math.prod(shape)
    rng = np.random.default_rng(axis)
    for number in rng.choice(n, min(n, max_faces), replace=False):
        output, *position = map(int, np.unravel_index(number, shape))
        position[axis] += 1
        core = plan.block_grid().core(position)
        yield from _faces_before(plan, outputs[output], axis, core, rng)


def _faces_before(
    plan: Plan, output: Output, axis: int, core: Box, rng: np.random.Generator
) -> Iterator[Face]:
    """Yield the face of a block towards the one before it along an axis."""
    start = [
        int(rng.integers(a, max(b - _WINDOW, a) + 1))
        for a, b in zip(core.start, core.stop, strict=True)
    ]
    window = Box(tuple(start), tuple(a + _WINDOW for a in start)) & core
    at = core.start[axis]
    yield Face(
        plan, output, axis, at, _between(plan, window, axis, (at - 1 - REACH, at + REACH + 1))
    )
    borders = _patch_borders(plan, axis)
    inside = sorted(border for border in borders if at < border < core.stop[axis])
    if inside and at in borders:
        border = inside[int(rng.integers(len(inside)))]
        yield Face(
            plan,
            output,
            axis,
            border,
            _between(plan, window, axis, (border - 1, border + 1)),
            is_inside=True,
        )


def _between(plan: Plan, window: Box, axis: int, ends: tuple[int, int]) -> Box:
    """Return a window with other ends along one axis, inside the volume."""
    start = list(window.start)
    stop = list(window.stop)
    start[axis], stop[axis] = ends
    return Box(tuple(start), tuple(stop)) & Box.of(plan.volume_shape)


# -- the sums


def _try_count(face: Face) -> Sums | None:
    try:
        return _count(face)
    except UNREADABLE:
        return None


def _count(face: Face) -> Sums:
    """Return the sums at one face, and at pairs of planes beside it.

    Pairs beside it count if they lie in one block and not at a border of patches.
    """
    sums = _no_sums()
    plan = face.plan
    # Each pair of planes is named by its second plane.
    planes = np.arange(face.box.start[face.axis] + 1, face.box.stop[face.axis])
    is_at_face = planes % plan.block_shape[face.axis] == 0
    is_at_border = np.isin(planes, list(_patch_borders(plan, face.axis)))
    chosen = (planes == face.at) | ~(is_at_face | is_at_border)
    distances = planes[chosen] - face.at + REACH
    if "scores" in plan.arrays:
        before, after = _pairs(face, "scores", chosen)
        steps = np.abs(before.astype(np.float32) - after.astype(np.float32))
        sums["n"][distances] = before[0].size
        sums["step"][distances] = _per_plane(steps / np.float32(max_score(before.dtype)))
    if "labels" in plan.arrays:
        before, after = _pairs(face, "labels", chosen)
        is_contact = (before != 0) & (after != 0)
        sums["n"][distances] = before[0].size
        sums["ends"][distances] = _per_plane((before != 0) != (after != 0))
        sums["contacts"][distances] = _per_plane(is_contact)
        sums["broken"][distances] = _per_plane(is_contact & (before != after))
    return sums


def _pairs(face: Face, kind: str, chosen: Array) -> tuple[Array, Array]:
    """Return the first and the second planes of the chosen pairs."""
    values = Target(face.plan).array(kind, face.output).read(face.box)
    planes = np.moveaxis(values, face.axis, 0)
    return planes[:-1][chosen], planes[1:][chosen]


def _per_plane(values: Array) -> Array:
    sums: Array = values.sum(axis=(1, 2), dtype=np.float64)
    return sums
