"""Where things are: boxes, the block grid and the patch grid.

Pure integer arithmetic on voxel coordinates. Both grids belong to the whole
volume, never to a worker's share, so the answer does not depend on the split.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.resampling import Resampling
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

    @classmethod
    def centered(cls, shape: Sequence[int], within: Sequence[int]) -> "Box":
        """Return the box of ``shape`` in the middle of an array of the shape ``within``.

        An axis that is shorter than ``shape`` is taken whole.
        """
        extents = tuple(map(min, shape, within))
        start = tuple((n - extent) // 2 for n, extent in zip(within, extents, strict=True))
        return cls.of(extents).shifted(start)

    @property
    def shape(self) -> Shape:
        """Extent per axis; never negative."""
        return tuple(max(b - a, 0) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Start and stop of each axis."""
        return tuple(zip(self.start, self.stop, strict=True))

    @classmethod
    def between(cls, ranges: Iterable[tuple[int, int]]) -> "Box":
        """Return the box of a start and a stop for each axis."""
        start, stop = zip(*ranges, strict=True)
        return cls(start, stop)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of an array that starts at the origin."""
        return tuple(map(slice, self.start, self.stop))

    def __and__(self, other: "Box") -> "Box":
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop)

    def __contains__(self, other: "Box") -> bool:
        return (self & other) == other

    def shifted(self, offset: Sequence[int]) -> "Box":
        """Return the box moved by ``offset`` voxels."""
        start = tuple(a + o for a, o in zip(self.start, offset, strict=True))
        stop = tuple(b + o for b, o in zip(self.stop, offset, strict=True))
        return Box(start, stop)

    def grown(self, margin: int | Sequence[int]) -> "Box":
        """Return the box with more voxels on every side, also beyond the volume.

        ``margin`` is their number, or that of each axis.
        """
        by = (margin,) * len(self.start) if isinstance(margin, int) else margin
        start = tuple(a - n for a, n in zip(self.start, by, strict=True))
        stop = tuple(b + n for b, n in zip(self.stop, by, strict=True))
        return Box(start, stop)

    def within(self, frame: "Box") -> "Box":
        """Return the same voxels in coordinates that start at ``frame.start``."""
        return self.shifted([-o for o in frame.start])

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The volume cut into blocks, whose cores tile it without overlap.

    The last blocks of an axis may be smaller.
    """

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
        reversed_position = []
        for n in reversed(self.grid_shape):
            index, along_axis = divmod(index, n)
            reversed_position.append(along_axis)
        return tuple(reversed(reversed_position))

    def index(self, position: Sequence[int]) -> int:
        """Return the index of the block at a place in the grid."""
        index = 0
        for along_axis, n in zip(position, self.grid_shape, strict=True):
            index = index * n + along_axis
        return index

    def __getitem__(self, index: int) -> Box:
        return self.core(self.position(index))

    def core(self, position: Sequence[int]) -> Box:
        """Return the voxels that the block at this place owns."""
        start = tuple(p * b for p, b in zip(position, self.block_shape, strict=True))
        return Box.of(self.block_shape).shifted(start) & Box.of(self.volume_shape)

    def __iter__(self) -> Iterator[Box]:
        return map(self.core, np.ndindex(self.grid_shape))

    def morton_order(self) -> NDArray[np.int64]:
        """Return all indices along a Z-order curve: consecutive blocks share what they read."""
        positions = np.unravel_index(np.arange(len(self), dtype=np.int64), self.grid_shape)
        code = np.zeros(len(self), np.int64)
        for bit in range(max(self.grid_shape).bit_length()):
            for axis, along_axis in enumerate(reversed(positions)):
                code |= (along_axis >> bit & 1) << (bit * len(positions) + axis)
        return np.argsort(code, kind="stable")

    def iter_overlapping(self, box: Box) -> Iterator[Shape]:
        """Yield the places of the blocks that share a voxel with ``box``, in grid order."""
        axes = zip(box.start, box.stop, self.block_shape, strict=True)
        return product(*[range(a // n, -(-b // n)) for a, b, n in axes])

    def iter_forward_neighbors(self, index: int, connectivity: int) -> Iterator[tuple[int, Shape]]:
        """Yield index and direction of each later block that the connectivity reaches.

        A direction has at most ``connectivity`` non-zero entries, the first of
        which is +1: each pair of touching blocks comes up once.
        """
        position = self.position(index)
        grid = Box.of(self.grid_shape)
        for direction in steps(len(position), connectivity):
            if direction < (0,) * len(position):
                continue
            neighbor = Box.of((1,) * len(position)).shifted(position).shifted(direction)
            if neighbor in grid:
                yield self.index(neighbor.start), direction


def steps(ndim: int, connectivity: int) -> list[Shape]:
    """Return the steps from a voxel to its neighbors: 6, 18 or 26 in three dimensions."""
    all_steps = product((-1, 0, 1), repeat=ndim)
    return [step for step in all_steps if 0 < sum(map(abs, step)) <= connectivity]


@functools.cache
def _axis_starts(extent: int, patch: int, overlap: float) -> tuple[int, ...]:
    """Return the patch starts along one axis, in the volume's coordinates, ascending.

    They are those of MONAI's ``dense_patch_slices`` with ``_get_scan_interval``.
    """
    if extent <= patch:
        return (-_axis_padding(extent, patch),)
    stride = max(int(patch * (1 - overlap)), 1)
    last = extent - patch
    n_patches = -(-last // stride) + 1
    return tuple(min(i * stride, last) for i in range(n_patches))


def _axis_padding(extent: int, patch: int) -> int:
    return max(patch - extent, 0) // 2


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The network's input patches over one whole volume, at MONAI's positions.

    A volume smaller than the patch is padded up to it: centered, the odd voxel
    at the end. Boxes are in the volume's coordinates, so those of a padded
    axis start below zero.

    The volume may be one that was resampled from ``source_shape`` voxels: then patches
    and all that they see are on its grid, while blocks (cores and read boxes) stay
    boxes of the source.
    """

    volume_shape: Shape
    patch_shape: Shape
    overlap: tuple[float, ...]
    source_shape: Shape = ()

    def __post_init__(self) -> None:
        if not len(self.volume_shape) == len(self.patch_shape) == len(self.overlap):
            raise SettingsError(
                f"patch {self.patch_shape} and overlap {self.overlap} need one number per axis "
                f"of the volume {self.volume_shape}"
            )
        if not all(0 <= o < 1 for o in self.overlap):
            raise SettingsError(f"overlap {self.overlap} must be at least 0 and below 1")

    @property
    def resampling(self) -> Resampling:
        """How the voxels of the source become those that patches are cut from."""
        return Resampling(self.source_shape or self.volume_shape, self.volume_shape)

    @property
    def padding(self) -> Shape:
        """Voxels of padding before each axis."""
        return tuple(map(_axis_padding, self.volume_shape, self.patch_shape))

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Patch starts per axis, in the volume's coordinates, ascending."""
        return tuple(map(_axis_starts, self.volume_shape, self.patch_shape, self.overlap))

    def __len__(self) -> int:
        return math.prod(map(len, self.starts))

    def _touching_starts(self, core: Box) -> list[list[int]]:
        covered = self.covered(core)
        axes = zip(self.starts, self.patch_shape, covered.start, covered.stop, strict=True)
        return [_touching(starts, patch, a, b) for starts, patch, a, b in axes]

    def covered(self, core: Box) -> Box:
        """Return the voxels of the grid from which those of a core are made."""
        return Box.between(self.resampling.grid_ranges(core.ranges))

    def count_touching(self, core: Box) -> int:
        """Return how many patches a block has to predict."""
        return math.prod(map(len, self._touching_starts(core)))

    def iter_touching(self, core: Box, where: NDArray[np.bool_] | None = None) -> Iterator[Box]:
        """Yield the patches that a block has to predict, in grid order.

        ``where`` marks the voxels of the core that are wanted, if not all are.
        """
        covered = self.covered(core)
        needed = None if where is None else self.resampling.needed_on_grid(where, core.ranges)
        for start in product(*self._touching_starts(core)):
            patch = Box.of(self.patch_shape).shifted(start)
            if needed is None or needed[(patch & covered).within(covered).slices].any():
                yield patch

    def seen_box(self, core: Box) -> Box:
        """Return the voxels of the grid that the patches of ``core`` see, without padding."""
        starts = self._touching_starts(core)
        first = Box.of(self.patch_shape).shifted([s[0] for s in starts])
        last = Box.of(self.patch_shape).shifted([s[-1] for s in starts])
        return Box(first.start, last.stop) & Box.of(self.volume_shape)

    def read_box(self, core: Box) -> Box:
        """Return the voxels of the source that a block reads: with its halo, without padding."""
        return Box.between(self.resampling.source_ranges(self.seen_box(core).ranges))

    def count_predicted(self, block_shape: Shape, region: Box | None = None) -> int:
        """Return how many patches all blocks of a region predict together.

        The region is the volume unless one is given.
        """
        return math.prod(n_patches for n_patches, _ in self._axis_totals(block_shape, region))

    def count_read(self, block_shape: Shape, region: Box | None = None) -> int:
        """Return how many voxels all blocks of a region read together, halos included."""
        return math.prod(n_voxels for _, n_voxels in self._axis_totals(block_shape, region))

    def voxels_read(self, block_shape: Shape, region: Box) -> NDArray[np.int64]:
        """Return how many voxels each block of a region reads, halos included, in grid order."""
        source_shape = self.resampling.source_shape
        axes = zip(
            source_shape,
            self.volume_shape,
            self.patch_shape,
            self.overlap,
            block_shape,
            region.ranges,
            strict=True,
        )
        per_axis = []
        for n, m, patch, overlap, block, (start, stop) in axes:
            line = PatchGrid((m,), (patch,), (overlap,), (n,))
            cores = [core.shifted((start,)) for core in BlockGrid((stop - start,), (block,))]
            per_axis.append(np.array([line.read_box(core).size for core in cores], np.int64))
        return functools.reduce(np.multiply.outer, per_axis).ravel()

    def _axis_totals(self, block_shape: Shape, region: Box | None) -> Iterator[tuple[int, int]]:
        source_shape = self.resampling.source_shape
        region = region or Box.of(source_shape)
        return map(
            _axis_totals,
            source_shape,
            self.volume_shape,
            self.patch_shape,
            self.overlap,
            block_shape,
            region.start,
            region.stop,
        )


def _touching(starts: Sequence[int], patch: int, start: int, stop: int) -> list[int]:
    return [s for s in starts if s < stop and s + patch > start]


@functools.cache
def _axis_totals(
    source_extent: int, extent: int, patch: int, overlap: float, block: int, start: int, stop: int
) -> tuple[int, int]:
    """Return patches predicted and voxels read along one axis, by the blocks of a region.

    Patches and blocks are products of axes, so a sum over all blocks is the
    product of sums over axes: cheap for a million blocks.
    """
    line = PatchGrid((extent,), (patch,), (overlap,), (source_extent,))
    cores = [core.shifted((start,)) for core in BlockGrid((stop - start,), (block,))]
    n_predicted = sum(map(line.count_touching, cores))
    n_read = sum(line.read_box(core).size for core in cores)
    return n_predicted, n_read


# Largest relative change per axis: the network was trained at this patch size.
_MAX_CHANGE = 0.25


def cheapest_patch(
    volume_shape: Shape, patch_shape: Shape, overlap: tuple[float, ...], multiple: Shape
) -> Shape:
    """Return the patch, near ``patch_shape``, whose grid makes the network see the fewest voxels.

    An axis is a multiple of ``multiple``, at least two of it, and differs from
    ``patch_shape`` by a quarter at most; one that reaches over the whole volume may
    be shorter. Of equally cheap patches the nearest is taken.
    """
    return tuple(map(_cheapest_extent, volume_shape, patch_shape, overlap, multiple))


def _cheapest_extent(extent: int, patch: int, overlap: float, multiple: int) -> int:
    whole_axis = -(-extent // multiple) * multiple
    shortest = min(patch * (1 - _MAX_CHANGE), max(whole_axis, 2 * multiple))
    longest = int(patch * (1 + _MAX_CHANGE))
    candidates = [n for n in range(2 * multiple, longest + 1, multiple) if n >= shortest]

    def cost(n: int) -> tuple[int, int]:
        n_voxels = len(_axis_starts(extent, n, overlap)) * n
        return n_voxels, abs(n - patch)

    return min(candidates, key=cost, default=patch)
