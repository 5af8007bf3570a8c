"""Where things are: boxes, the block grid and the patch grid.

Pure integer arithmetic on voxel coordinates. Both grids belong to the whole
volume, never to a worker's share, so the answer does not depend on the split.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import SettingsError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open region ``[start, stop)`` of voxels, one pair per axis."""

    start: Shape
    stop: Shape

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Box":
        """Return the box of a whole array."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        """Extent per axis; never negative."""
        return tuple(max(b - a, 0) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of an array that starts at the origin."""
        return tuple(map(slice, self.start, self.stop))

    def __and__(self, other: "Box") -> "Box":
        return Box(tuple(map(max, self.start, other.start)), tuple(map(min, self.stop, other.stop)))

    def __contains__(self, other: "Box") -> bool:
        return (self & other) == other

    def shifted(self, offset: Sequence[int]) -> "Box":
        """Return the box moved by ``offset`` voxels."""
        move = [(a + o, b + o) for a, b, o in zip(self.start, self.stop, offset, strict=True)]
        return Box(tuple(a for a, _ in move), tuple(b for _, b in move))

    def within(self, frame: "Box") -> "Box":
        """Return the same voxels in coordinates that start at ``frame.start``."""
        return self.shifted([-o for o in frame.start])

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The volume cut into blocks: their cores tile it without overlap, the last ones may be smaller."""

    volume_shape: Shape
    block_shape: Shape

    def __post_init__(self) -> None:
        if len(self.volume_shape) != len(self.block_shape) or min(self.block_shape) < 1:
            raise SettingsError(
                f"block {self.block_shape} does not fit volume {self.volume_shape}: "
                "one positive number per axis is needed"
            )

    @property
    def grid_shape(self) -> Shape:
        """Number of blocks per axis."""
        return tuple(-(-n // b) for n, b in zip(self.volume_shape, self.block_shape, strict=True))

    def __len__(self) -> int:
        return math.prod(self.grid_shape)

    def position(self, index: int) -> Shape:
        """Return the place of block ``index`` in the grid; indices run in grid (raster) order."""
        place = []
        for n in reversed(self.grid_shape):
            index, p = divmod(index, n)
            place.append(p)
        return tuple(reversed(place))

    def index(self, position: Sequence[int]) -> int:
        """Return the index of the block at a place in the grid."""
        index = 0
        for p, n in zip(position, self.grid_shape, strict=True):
            index = index * n + p
        return index

    def __getitem__(self, index: int) -> Box:
        return self.core(self.position(index))

    def core(self, position: Sequence[int]) -> Box:
        """Return the voxels that the block at this place owns."""
        start = tuple(p * b for p, b in zip(position, self.block_shape, strict=True))
        return Box(
            start, tuple(a + b for a, b in zip(start, self.block_shape, strict=True))
        ) & Box.of(self.volume_shape)

    def __iter__(self) -> Iterator[Box]:
        return map(self.core, product(*map(range, self.grid_shape)))

    def morton_order(self) -> NDArray[np.int64]:
        """Return all indices along a Z-order curve: blocks that follow each other share what they read."""
        positions = np.unravel_index(np.arange(len(self), dtype=np.int64), self.grid_shape)
        code = np.zeros(len(self), np.int64)
        for bit in range(max(self.grid_shape).bit_length()):
            for axis, place in enumerate(reversed(positions)):
                code |= (place >> bit & 1) << (bit * len(positions) + axis)
        return np.argsort(code, kind="stable")

    def iter_overlapping(self, box: Box) -> Iterator[Shape]:
        """Yield the places of the blocks that share a voxel with ``box``, in grid order."""
        ranges = [
            range(a // n, -(-b // n))
            for a, b, n in zip(box.start, box.stop, self.block_shape, strict=True)
        ]
        return product(*ranges)

    def iter_forward_neighbours(self, index: int, connectivity: int) -> Iterator[tuple[int, Shape]]:
        """Yield index and direction of each later block that the connectivity reaches.

        A direction has at most ``connectivity`` non-zero entries, the first of
        which is +1: each pair of touching blocks comes up once.
        """
        here = self.position(index)
        for direction in steps(len(here), connectivity):
            if direction < (0,) * len(here):
                continue
            there = tuple(map(sum, zip(here, direction, strict=True)))
            if all(0 <= p < n for p, n in zip(there, self.grid_shape, strict=True)):
                yield self.index(there), direction


def steps(ndim: int, connectivity: int) -> list[Shape]:
    """Return the steps from a voxel to its neighbours: 6, 18 or 26 in three dimensions."""
    return [s for s in product((-1, 0, 1), repeat=ndim) if 0 < sum(map(abs, s)) <= connectivity]


def _axis_starts(extent: int, patch: int, overlap: float) -> list[int]:
    """Return patch starts along one axis: MONAI's ``dense_patch_slices`` with ``_get_scan_interval``."""
    if extent == patch:
        return [0]
    stride = max(int(patch * (1 - overlap)), 1)
    n = -(-(extent - patch) // stride) + 1
    return [min(i * stride, extent - patch) for i in range(n)]


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The network's input patches over one whole volume, at MONAI's positions.

    A volume smaller than the patch is padded up to it: centred, the odd voxel
    at the end. Boxes are in the volume's coordinates, so those of a padded
    axis start below zero.
    """

    volume_shape: Shape
    patch_shape: Shape
    overlap: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.volume_shape) == len(self.patch_shape) == len(self.overlap):
            raise SettingsError(
                f"patch {self.patch_shape} and overlap {self.overlap} need one number per axis "
                f"of the volume {self.volume_shape}"
            )
        if not all(0 <= o < 1 for o in self.overlap):
            raise SettingsError(f"overlap {self.overlap} must be at least 0 and below 1")

    @property
    def padding(self) -> Shape:
        """Voxels of padding before each axis."""
        return tuple(
            max(p - n, 0) // 2 for n, p in zip(self.volume_shape, self.patch_shape, strict=True)
        )

    @property
    def starts(self) -> tuple[list[int], ...]:
        """Patch starts per axis, in the volume's coordinates, ascending."""
        return tuple(
            [start - before for start in _axis_starts(max(n, p), p, o)]
            for n, p, o, before in zip(
                self.volume_shape, self.patch_shape, self.overlap, self.padding, strict=True
            )
        )

    def __len__(self) -> int:
        return math.prod(map(len, self.starts))

    def _touching_starts(self, core: Box) -> list[list[int]]:
        return [
            [s for s in starts if s < b and s + p > a]
            for starts, p, a, b in zip(
                self.starts, self.patch_shape, core.start, core.stop, strict=True
            )
        ]

    def count_touching(self, core: Box) -> int:
        """Return how many patches a block has to predict."""
        return math.prod(map(len, self._touching_starts(core)))

    def iter_touching(self, core: Box) -> Iterator[Box]:
        """Yield the patches that share a voxel with ``core``, in grid order."""
        for start in product(*self._touching_starts(core)):
            yield Box(start, tuple(s + p for s, p in zip(start, self.patch_shape, strict=True)))

    def read_box(self, core: Box) -> Box:
        """Return the voxels that the patches of ``core`` see: its halo included, padding excluded."""
        starts = self._touching_starts(core)
        hull = Box(
            tuple(s[0] for s in starts),
            tuple(s[-1] + p for s, p in zip(starts, self.patch_shape, strict=True)),
        )
        return hull & Box.of(self.volume_shape)

    def count_predicted(self, block_shape: Shape, region: Box | None = None) -> int:
        """Return how many patches all blocks of a region, by default the volume, predict together."""
        return math.prod(n_patches for n_patches, _ in self._axis_totals(block_shape, region))

    def count_read(self, block_shape: Shape, region: Box | None = None) -> int:
        """Return how many voxels all blocks of a region read together, halos included."""
        return math.prod(n_voxels for _, n_voxels in self._axis_totals(block_shape, region))

    def _axis_totals(self, block_shape: Shape, region: Box | None) -> Iterator[tuple[int, int]]:
        region = region or Box.of(self.volume_shape)
        axes = zip(
            self.volume_shape,
            self.patch_shape,
            self.overlap,
            block_shape,
            region.start,
            region.stop,
            strict=True,
        )
        return (_axis_totals(*axis) for axis in axes)


# A patch may be changed by so much of itself: the network was trained on one of its size.
_NEAR = 0.25


def cheapest_patch(
    volume_shape: Shape, patch_shape: Shape, overlap: tuple[float, ...], multiple: Shape
) -> Shape:
    """Return the patch, near ``patch_shape``, whose grid makes the network see the fewest voxels.

    An axis is a multiple of ``multiple``, at least two of it, and differs from
    ``patch_shape`` by a quarter at most; one that reaches over the whole volume may
    be shorter. Of equally cheap patches the nearest is taken.
    """

    def cheapest(extent: int, patch: int, share: float, step: int) -> int:
        covering = -(-extent // step) * step
        shortest = min(patch * (1 - _NEAR), max(covering, 2 * step))
        possible = [
            n for n in range(2 * step, int(patch * (1 + _NEAR)) + 1, step) if n >= shortest
        ] or [patch]
        return min(
            possible,
            key=lambda n: (len(_axis_starts(max(extent, n), n, share)) * n, abs(n - patch)),
        )

    return tuple(
        cheapest(*axis) for axis in zip(volume_shape, patch_shape, overlap, multiple, strict=True)
    )


@functools.cache
def _axis_totals(
    extent: int, patch: int, overlap: float, block: int, start: int, stop: int
) -> tuple[int, int]:
    """Return patches predicted and voxels read along one axis, summed over the blocks from ``start`` to ``stop``.

    Patches and blocks are products of axes, so a sum over all blocks is the
    product of sums over axes: cheap for a million blocks.
    """
    line = PatchGrid((extent,), (patch,), (overlap,))
    cores = [core.shifted((start,)) for core in BlockGrid((stop - start,), (block,))]
    return sum(map(line.count_touching, cores)), sum(line.read_box(core).size for core in cores)
