"""The proof that nothing is cut: what lies across the faces of blocks, against the same inside blocks.

At a face of two blocks, planes ``at - 1`` and ``at`` were predicted and
labelled by different tasks. Whatever the split changed would show there and
not eight planes further: a step in the scores, an object with two ids, or
objects that end. So each face is compared with the pairs of planes beside it,
which hold the same cells. Where patches of the network begin or end, scores
have a step of their own, split or not; so borders of patches inside blocks are
counted apart, and are what faces that fall on such borders are compared with.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.workspace import product
from megaseg_dask.tools.report.sampling import UNREADABLE

Array = NDArray[Any]

AXES = ("z", "y", "x")
# Planes on both sides of a face that it is compared with.
REACH = 8
# Of each face a window so wide; and no more faces, or seconds.
_WINDOW = 256
_MOST_FACES = 64
_MOST_S = 60.0
_AT_A_TIME = 16
# Faces may differ by so much from their surroundings where they are few.
_BY_CHANCE = 1.25

Counts = dict[str, Array]


def _none() -> Counts:
    return {name: np.zeros(2 * REACH + 1) for name in ("n", "step", "ends", "contacts", "broken")}


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """A window on the face between two blocks of one volume: plane ``at`` of an axis is the first of the second.

    With ``is_inside`` it is no face, but a border of patches inside a block.
    """

    plan: Plan
    output: Output
    axis: int
    at: int
    box: Box
    is_inside: bool = False


@dataclass
class Profile:
    """Sums over the faces of one axis, an entry for each pair of planes from ``-REACH`` to ``REACH``; 0 is the face.

    ``step`` adds score differences of ``n`` pairs of voxels, ``ends`` counts those of which one is in an object,
    ``contacts`` those of which both are, and ``broken`` contacts of two ids. ``borders`` has the same of borders of
    patches inside blocks; so many of the faces lie ``n_on_borders``.
    """

    axis: str
    n_faces: int = 0
    n_on_borders: int = 0
    sums: Counts = field(default_factory=_none)
    borders: Counts = field(default_factory=_none)

    def add(self, face: Face, counted: Counts) -> None:
        """Add what was counted at one face, or at a border of patches."""
        self.n_faces += not face.is_inside
        self.n_on_borders += not face.is_inside and face.at in _borders(face.plan, face.axis)
        sums = self.borders if face.is_inside else self.sums
        for name, values in counted.items():
            sums[name] += values

    def per_pair(self, name: str) -> NDArray[np.float64]:
        """Return a sum per pair of voxels, at each distance; NaN where there was none."""
        n = self.sums["n"]
        shares: NDArray[np.float64] = np.divide(
            self.sums[name], n, out=np.full(len(n), np.nan), where=n > 0
        )
        return shares

    def compare(self, name: str) -> "Comparison":
        """Return what is at the faces, and with what it is compared."""
        values = self.per_pair(name)
        inside = np.delete(values, REACH)
        inside = inside[np.isfinite(inside)]
        low, mean, high = (
            float(how(inside)) if inside.size else np.nan for how in (np.min, np.mean, np.max)
        )
        n = self.borders["n"][REACH]
        border = float(self.borders[name][REACH] / n) if n else np.nan
        return Comparison(float(values[REACH]), mean, low, high, border, self.n_on_borders > 0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure at the faces of one axis, and inside blocks: mean, least, most, and where patches meet."""

    at: float
    mean: float
    low: float
    high: float
    border: float
    on_borders: bool

    @property
    def ratio(self) -> float:
        """How many times the inside the faces have."""
        return self.at / self.mean if self.mean else np.nan

    @property
    def verdict(self) -> str:
        """Return ``inside`` or ``patches`` for what faces are like, ``unknown``, or ``more``."""
        if not self.at > max(self.high, _BY_CHANCE * self.mean):
            return "inside"
        if self.on_borders and not self.at > _BY_CHANCE * self.border:
            return "patches" if np.isfinite(self.border) else "unknown"
        return "more"


@dataclass
class Seams:
    """What was found at the faces of a run; ``best`` is the face of each axis with most objects across."""

    profiles: list[Profile]
    n_faces: int
    best: dict[str, Face] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def n_looked_at(self) -> int:
        """Number of faces that were looked at."""
        return sum(profile.n_faces for profile in self.profiles)

    @property
    def n_broken(self) -> int:
        """Number of pairs of neighbouring voxels at faces that are of one object by their place, and of two by id."""
        return int(sum(profile.sums["broken"][REACH] for profile in self.profiles))

    @property
    def n_contacts(self) -> int:
        """Number of pairs of neighbouring voxels at faces that are both in an object."""
        return int(sum(profile.sums["contacts"][REACH] for profile in self.profiles))


def check_seams(volumes: Sequence[tuple[Plan, Sequence[Output]]]) -> Seams | None:
    """Compare a sample of faces with the inside of blocks; ``None`` if no volume is split.

    ``volumes`` are the outputs to look at of each plan: where blocks are missing there is nothing to compare.
    """
    split = [(plan, numbers) for plan, numbers in volumes if len(plan.block_grid()) > 1 and numbers]
    if not split:
        return None
    # Faces of all axes and runs in turn, as far as the time goes.
    sampled = [_sample(plan, numbers, max(_MOST_FACES // len(split), 1)) for plan, numbers in split]
    faces = [face for some in itertools.zip_longest(*sampled) for face in some if face]
    n_all = sum(
        _n_faces(p.block_grid(), axis) * len(numbers) for p, numbers in split for axis in range(3)
    )
    found = Seams([Profile(axis) for axis in AXES], n_all)
    most: dict[str, float] = {}
    unread, until = 0, time.monotonic() + _MOST_S

    def look(face: Face) -> Counts | None:
        try:
            return _count(face)
        except UNREADABLE:
            return None

    for first in range(0, len(faces), _AT_A_TIME):
        some = faces[first : first + _AT_A_TIME]
        for face, counted in zip(some, map_threaded(look, some, 4), strict=True):
            if counted is None:
                unread += 1
                continue
            axis = AXES[face.axis]
            found.profiles[face.axis].add(face, counted)
            if face.is_inside:
                continue
            contacts = float(counted["contacts"][REACH])
            if contacts >= most.get(axis, 0.0):
                most[axis], found.best[axis] = contacts, face
        if time.monotonic() > until:
            break
    if unread:
        found.notes.append(f"{unread} faces could not be read.")
    found.profiles = [profile for profile in found.profiles if profile.n_faces]
    return found


def _n_faces(grid: BlockGrid, axis: int) -> int:
    n = list(grid.grid_shape)
    n[axis] -= 1
    return int(np.prod(n))


def _borders(plan: Plan, axis: int) -> set[int]:
    """Return the planes of an axis at which patches begin, or the first behind them."""
    starts, patch, offset = (
        plan.patch_grid.starts[axis],
        plan.patch_grid.patch_shape[axis],
        plan.region.start[axis],
    )
    return {start + end - offset for start in starts for end in (0, patch)}


def _sample(plan: Plan, volumes: Sequence[Output], most: int) -> Iterator[Face]:
    """Yield faces of all axes in turn, drawn with a fixed seed, all of them if they are few; and borders of patches."""
    grid, rng = plan.block_grid(), np.random.default_rng(0)
    per_axis = []
    for axis in range(3):
        n = _n_faces(grid, axis) * len(volumes)
        numbers = rng.permutation(n) if n <= most else rng.integers(0, n, most)
        shape = list(grid.grid_shape)
        shape[axis] -= 1
        per_axis.append(
            [(axis, *np.unravel_index(int(i), (len(volumes), *shape))) for i in numbers]
        )
    for axis, v, *position in filter(None, itertools.chain(*itertools.zip_longest(*per_axis))):
        position[axis] += 1
        core = grid.core([int(p) for p in position])
        at = core.start[axis]
        start, stop = list(core.start), list(core.stop)
        for other in {0, 1, 2} - {axis}:
            start[other] += int(rng.integers(0, max(stop[other] - start[other] - _WINDOW, 0) + 1))
            stop[other] = min(start[other] + _WINDOW, stop[other])

        def window(
            first: int,
            last: int,
            start: list[int] = start,
            stop: list[int] = stop,
            axis: int = axis,
        ) -> Box:
            ends = [
                (first, last) if i == axis else (a, b)
                for i, (a, b) in enumerate(zip(start, stop, strict=True))
            ]
            return Box(*zip(*ends, strict=True)) & Box.of(plan.volume_shape)

        yield Face(plan, volumes[int(v)], axis, at, window(max(at - 1 - REACH, 0), at + REACH + 1))
        inside = sorted(b for b in _borders(plan, axis) if core.start[axis] < b < core.stop[axis])
        if inside and at in _borders(plan, axis):
            border = inside[int(rng.integers(len(inside)))]
            yield Face(
                plan, volumes[int(v)], axis, border, window(border - 1, border + 1), is_inside=True
            )


def _count(face: Face) -> Counts:
    """Count at one face, and at the pairs of planes beside it that lie in one block, and where no patch ends."""
    counted = _none()
    first = face.box.start[face.axis]
    # The pair of planes (p, p + 1) has the place p + 1 - at.
    places = np.arange(first, face.box.stop[face.axis] - 1) + 1 - face.at
    planes_at = places + face.at
    special = (planes_at % face.plan.block_shape[face.axis] == 0) | np.isin(
        planes_at, list(_borders(face.plan, face.axis))
    )
    keep = (places == 0) | ~special
    index = places[keep] + REACH
    for kind in {"scores", "labels"} & set(face.plan.arrays):
        planes = np.moveaxis(product(face.plan, kind, face.output).read(face.box), face.axis, 0)
        one, other = planes[:-1][keep], planes[1:][keep]
        counted["n"][index] = one[0].size

        def add(name: str, values: Array) -> None:
            counted[name][index] = values.sum(axis=(1, 2), dtype=np.float64)

        if kind == "scores":
            scale = 255.0 if planes.dtype == np.uint8 else 1.0
            add(
                "step",
                np.abs(one.astype(np.float32) - other.astype(np.float32)) / np.float32(scale),
            )
        else:
            both = (one != 0) & (other != 0)
            add("ends", (one != 0) != (other != 0))
            add("contacts", both)
            add("broken", both & (one != other))
    return counted
