"""The proof that nothing is cut: what lies across the faces of blocks, against the same inside blocks.

At a face of two blocks, planes ``at - 1`` and ``at`` were predicted and
labelled by different tasks. Whatever the split changed would show there and
not eight planes further: a step in the scores, an object with two ids, or
objects that end. So each face is compared with the pairs of planes beside it,
which hold the same cells.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import MegasegError
from megaseg_dask.geometry import BlockGrid, Box
from megaseg_dask.plan import Plan
from megaseg_dask.products import product
from megaseg_dask.stores import at_once

Array = NDArray[Any]

AXES = ("z", "y", "x")
# Planes on both sides of a face that it is compared with.
REACH = 8
# Of each face a window so wide; and no more faces, or seconds.
_WINDOW = 256
_MOST_FACES = 64
_MOST_S = 60.0
_AT_A_TIME = 16


@dataclass(frozen=True, slots=True)
class Face:
    """A window on the face between two blocks of one volume: plane ``at`` of an axis is the first of the second."""

    volume: int
    axis: int
    at: int
    box: Box


@dataclass
class Profile:
    """Sums over the faces of one axis, an entry for each pair of planes from ``-REACH`` to ``REACH``; 0 is the face.

    ``step`` adds score differences of ``n`` pairs of voxels, ``ends`` counts those of which one is in an object,
    ``contacts`` those of which both are, and ``broken`` contacts of two ids.
    """

    axis: str
    n_faces: int = 0
    sums: dict[str, Array] = field(
        default_factory=lambda: {name: np.zeros(2 * REACH + 1) for name in ("n", "step", "ends", "contacts", "broken")}
    )

    def add(self, other: dict[str, Array]) -> None:
        """Add what was counted at one face."""
        self.n_faces += 1
        for name, counted in other.items():
            self.sums[name] += counted

    def per_pair(self, name: str) -> NDArray[np.float64]:
        """Return a sum per pair of voxels, at each distance; NaN where there was none."""
        n = self.sums["n"]
        shares: NDArray[np.float64] = np.divide(self.sums[name], n, out=np.full(len(n), np.nan), where=n > 0)
        return shares

    def compare(self, name: str) -> tuple[float, float, float, float]:
        """Return a sum per pair at the face, and mean, least and most of it inside the blocks."""
        values = self.per_pair(name)
        inside = np.delete(values, REACH)
        inside = inside[np.isfinite(inside)]
        if not inside.size:
            return float(values[REACH]), np.nan, np.nan, np.nan
        return float(values[REACH]), float(inside.mean()), float(inside.min()), float(inside.max())


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


def check_seams(plan: Plan, failed: set[int]) -> Seams | None:
    """Compare a sample of faces with the inside of blocks; ``None`` if volumes are not split.

    Volumes in ``failed`` are left out: blocks are missing there, and named.
    """
    grid = plan.block_grid()
    if len(grid) == 1:
        return None
    faces = list(_sample(plan, [v for v in range(len(plan.volumes)) if v not in failed]))
    n_all = sum(_n_faces(grid, axis) for axis in range(3)) * (len(plan.volumes) - len(failed))
    found = Seams([Profile(axis) for axis in AXES], n_all)
    kinds = [kind for kind in ("scores", "labels") if kind in plan.arrays]
    most: dict[str, float] = {}
    unread, until = 0, time.monotonic() + _MOST_S

    def look(face: Face) -> dict[str, Array] | None:
        try:
            return _count(plan, face, kinds)
        except MegasegError:
            return None

    for first in range(0, len(faces), _AT_A_TIME):
        some = faces[first : first + _AT_A_TIME]
        for face, counted in zip(some, at_once(look, some, 4), strict=True):
            if counted is None:
                unread += 1
                continue
            axis = AXES[face.axis]
            found.profiles[face.axis].add(counted)
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


def _sample(plan: Plan, volumes: list[int]) -> Iterator[Face]:
    """Yield faces of all axes in turn, drawn with a fixed seed; all of them if they are few."""
    grid, rng = plan.block_grid(), np.random.default_rng(0)
    per_axis = []
    for axis in range(3):
        n = _n_faces(grid, axis) * len(volumes)
        numbers = rng.permutation(n) if n <= _MOST_FACES else rng.integers(0, n, _MOST_FACES)
        shape = list(grid.grid_shape)
        shape[axis] -= 1
        per_axis.append([(axis, *np.unravel_index(int(i), (len(volumes), *shape))) for i in numbers])
    for axis, v, *position in filter(None, itertools.chain(*itertools.zip_longest(*per_axis))):
        position[axis] += 1
        core = grid.core([int(p) for p in position])
        at = core.start[axis]
        start, stop = list(core.start), list(core.stop)
        start[axis], stop[axis] = max(at - 1 - REACH, 0), min(at + REACH + 1, plan.volume_shape[axis])
        for other in {0, 1, 2} - {axis}:
            start[other] += int(rng.integers(0, max(stop[other] - start[other] - _WINDOW, 0) + 1))
            stop[other] = min(start[other] + _WINDOW, stop[other])
        yield Face(volumes[int(v)], axis, at, Box(tuple(start), tuple(stop)))


def _count(plan: Plan, face: Face, kinds: Sequence[str]) -> dict[str, Array]:
    """Count at one face, and at the pairs of planes beside it that lie in one block."""
    counted = {name: np.zeros(2 * REACH + 1) for name in ("n", "step", "ends", "contacts", "broken")}
    first = face.box.start[face.axis]
    # The pair of planes (p, p + 1) has the place p + 1 - at; those of other faces are left out.
    places = np.arange(first, face.box.stop[face.axis] - 1) + 1 - face.at
    keep = (places == 0) | ((places + face.at) % plan.block_shape[face.axis] != 0)
    index = places[keep] + REACH
    for kind in kinds:
        planes = np.moveaxis(product(plan, kind, face.volume).read(face.box), face.axis, 0)
        one, other = planes[:-1][keep], planes[1:][keep]
        counted["n"][index] = one[0].size

        def add(name: str, values: Array) -> None:
            counted[name][index] = values.sum(axis=(1, 2), dtype=np.float64)

        if kind == "scores":
            scale = 255.0 if planes.dtype == np.uint8 else 1.0
            add("step", np.abs(one.astype(np.float32) - other.astype(np.float32)) / np.float32(scale))
        else:
            both = (one != 0) & (other != 0)
            add("ends", (one != 0) != (other != 0))
            add("contacts", both)
            add("broken", both & (one != other))
    return counted
