"""The plan of an import: which parts of which files become which images, and its tasks.

A plan is a value, recorded as JSON, as that of a run is. The tasks of a stage are
numbered image by image: the images of a plate may differ in shape.
"""

import hashlib
import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from pydantic import BaseModel, ConfigDict

from megaseg_dask.algorithms.chunking import CHUNK_SHAPE, SHARD_SHAPE, Layout, write_layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.pyramids import Step
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.plate import Plate
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.plan.plan import RecordedLocation, runs_folder
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import PlannedStage, Stage
from megaseg_dask.stores import Location

# No label name begins with a plus, so no run is found here.
_RUN = "+import"
_COPY = Stage("import", "", over="blocks")
_DOWNSAMPLE = Stage("downsample", "", over="levels")
# A worker before its first task; then planes, their chunks and the compressed chunks.
_IDLE_BYTES = 400 * 10**6
_COPIES = 3
_MAX_BLOCK_BYTES = 256 * 10**6
# Fewer planes than these in a chunk make many small objects.
_MIN_DEPTH = 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A series of a file to import, and what tells that it is still the same file.

    ``digest`` is of its beginning and its end; ``modified_ns`` of the rest.
    """

    path: str
    n_bytes: int
    digest: str
    series: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class FilePart:
    """Where a file lies in an image: ``start`` and ``shape`` are ``(t, c, z)``."""

    file: int
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    def place(self, t: int, c: int, z: int) -> tuple[int, int, int] | None:
        """Return timepoint, channel and plane in the file, if it has this one of the image."""
        inside = tuple(n - first for n, first in zip((t, c, z), self.start, strict=True))
        if any(not 0 <= n < extent for n, extent in zip(inside, self.shape, strict=True)):
            return None
        return inside[0], inside[1], inside[2]


@dataclass(frozen=True, slots=True)
class ImportedImage:
    """One image of the target, its path, the files that it is made of, and its blocks."""

    path: str
    image: Image
    parts: tuple[FilePart, ...]
    block: Shape

    def grid(self, level: int) -> BlockGrid:
        """Return the blocks ``(z, y, x)`` of a level, whose cores are whole write units."""
        return BlockGrid(self.image.volume_shape(level), self.block)

    def layout(self, level: int) -> Layout:
        """Return the chunk and the write unit ``(z, y, x)`` of a level."""
        has_shards = VERSIONS[self.image.version].has_shards
        return write_layout(self.image.volume_shape(level), self.block, sharded=has_shards)

    def step(self, level: int) -> Step:
        """Return how a level follows from the one below it."""
        shapes = [self.image.volume_shape(each) for each in (level - 1, level)]
        scales = [self.image.spatial(self.image.levels[each].scale) for each in (level - 1, level)]
        factors = tuple(coarse / fine for fine, coarse in zip(*scales, strict=True))
        return Step(shapes[0], shapes[1], factors)

    def count_tasks(self, level: int) -> int:
        """Return the number of tasks that write a level."""
        if level >= len(self.image.levels):
            return 0
        return self.image.extent("t") * self.image.extent("c") * len(self.grid(level))


@dataclass(frozen=True, slots=True)
class ImportTask:
    """One block of one timepoint and channel of an image, at a level."""

    image: ImportedImage
    level: int
    t: int
    c: int
    box: Box

    def __str__(self) -> str:
        return f"{self.image.path} t={self.t} c={self.c}".strip()


class ImportPlan(BaseModel):
    """Everything that the tasks of an import need to know."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))

    files: tuple[SourceFile, ...]
    # The axes of each file, if they were given.
    axes: str | None
    target: RecordedLocation
    images: tuple[ImportedImage, ...]
    plate: Plate | None = None
    settings: Settings

    @property
    def run(self) -> Location:
        """The folder of its record and its journal."""
        return runs_folder(self.target) / _RUN

    # -- work

    @cached_property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The levels in order, with the number of their tasks."""
        planned = []
        for level, bounds in enumerate(self._bounds):
            stage = _DOWNSAMPLE if level else _COPY
            planned.append(PlannedStage(stage, bounds[-1], bounds[-1], level))
        return tuple(planned)

    @cached_property
    def _bounds(self) -> list[list[int]]:
        """For each level, the number of tasks up to each image."""
        n_levels = max(len(image.image.levels) for image in self.images)
        bounds = []
        for level in range(n_levels):
            counts = [image.count_tasks(level) for image in self.images]
            bounds.append(list(accumulate(counts, initial=0)))
        return bounds

    def task(self, stage: str, index: int) -> ImportTask:
        """Return what a task is about."""
        level = next(each.level for each in self.stages if each.name == stage)
        bounds = self._bounds[level]
        number = bisect_right(bounds, index) - 1
        image = self.images[number]
        grid = image.grid(level)
        plane, block = divmod(index - bounds[number], len(grid))
        t, c = divmod(plane, image.image.extent("c"))
        return ImportTask(image, level, t, c, grid[block])

    # -- identity

    @property
    def determinants(self) -> dict[str, object]:
        """All that determines the voxels and the metadata; no address and no block does."""
        images = [
            [each.path, asdict(each.image), list(map(asdict, each.parts))] for each in self.images
        ]
        files = [[file.n_bytes, file.digest, file.series] for file in self.files]
        return {"files": files, "axes": self.axes, "images": images}

    @property
    def fingerprint(self) -> str:
        """Digest of :attr:`determinants`."""
        return hashlib.sha256(json.dumps(self.determinants, sort_keys=True).encode()).hexdigest()

    # -- what workers have to offer

    @property
    def engine(self) -> EngineSpec:
        """What all workers have: nothing is predicted."""
        return EngineSpec("torch", "cpu", "fp32", 1)

    @property
    def projected_bytes(self) -> dict[str, int]:
        """Peak memory of a worker, in bytes: the same in all stages."""
        largest = max(math.prod(i.block) * _itemsize(i.image) for i in self.images)
        return {_COPY.name: _IDLE_BYTES + _COPIES * largest}


def _itemsize(image: Image) -> int:
    return np.dtype(image.dtype).itemsize


def choose_block(image: Image, memory_bytes: int) -> Shape:
    """Return the block ``(z, y, x)`` of one task: whole planes where the memory allows.

    Raises:
        SettingsError: No block fits.
    """
    budget = min((memory_bytes - _IDLE_BYTES) // _COPIES, _MAX_BLOCK_BYTES) // _itemsize(image)
    depth, height, width = image.volume_shape()
    least = min(depth, _MIN_DEPTH)
    for planes in (SHARD_SHAPE[0], CHUNK_SHAPE[0], CHUNK_SHAPE[0] // 2, _MIN_DEPTH):
        if min(planes, depth) * height * width <= budget:
            return min(planes, depth), height, width
    # Cut along y first: rows of a plane lie together in most files.
    rows = budget // (least * width) // CHUNK_SHAPE[1] * CHUNK_SHAPE[1]
    if rows:
        return least, min(rows, height), width
    n_rows = min(CHUNK_SHAPE[1], height)
    columns = budget // (least * n_rows) // CHUNK_SHAPE[2] * CHUNK_SHAPE[2]
    if columns <= 0:
        needed = _IDLE_BYTES + _COPIES * least * n_rows * CHUNK_SHAPE[2] * _itemsize(image)
        raise SettingsError(
            f"--memory {memory_bytes / 1e9:.2f} GB: an import needs {needed / 1e9:.2f} GB"
        )
    return least, n_rows, min(columns, width)


def import_folder(target: Location) -> Location:
    """Return the folder of the record of an import to a target."""
    return runs_folder(target) / _RUN
