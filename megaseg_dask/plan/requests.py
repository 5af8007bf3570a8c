"""The requests to stores and the stored bytes of a run, known before anything starts.

Each stage reads and writes the same objects whatever the voxels are, so its requests
follow from the grids of the plan. Boxes and grids are products of axes, so a sum over
all blocks is a product of sums over axes: cheap for a million blocks.

Three things depend on more than the plan, and are estimates. How well scores, masks and
labels compress was measured on nuclei. Parts of a volume without an object are asked
about once more. Leases beat and journals grow by the clock.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import truediv

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape, steps
from megaseg_dask.algorithms.pyramids import Step
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.source_identity import SAMPLE_BYTES
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.stores import NO_TRAFFIC, Location, Traffic
from megaseg_dask.stores.traffic import PAGE

_GET = Traffic(n_get=1)
# Each task asks whether its client still holds the run.
_PERMIT = Traffic(n_get=1, n_list=1, bytes_read=160)
_STATE = Traffic(n_get=1, bytes_read=300)
# Zarr looks for the metadata of an array by three names.
_OPEN = Traffic(n_get=3, bytes_read=1500)
# The index of a shard has an entry for each of its chunks.
_INDEX_BYTES = 16
# Stored bytes of a voxel of nuclei, in the codec of ours.
_BYTES_PER_VOXEL = {
    "uint8 scores": 0.22,
    "float32 scores": 2.0,
    "logits": 3.2,
    "mask": 0.02,
    "unfilled": 0.02,
    "holes": 0.03,
    "fragments": 0.03,
    "labels": 0.03,
}
# A table of logits, and the sums of the objects of a block.
_TABLE_BYTES = 2500
_SUMS_BYTES = 3000
# Names, types and shapes in front of the arrays of a small object.
_HEAD_BYTES = 270

_Ranges = list[tuple[int, int]]


class _Boxes:
    """Boxes that are a product of axes: for each axis, the starts and stops along it."""

    def __init__(self, axes: list[_Ranges]) -> None:
        self.axes = axes

    def __len__(self) -> int:
        return math.prod(map(len, self.axes))

    def touched(self, shape: Shape) -> int:
        """Return how many cells of a grid the boxes touch, each box for itself."""
        counts = [
            sum(-(-stop // n) - start // n for start, stop in ranges)
            for ranges, n in zip(self.axes, shape, strict=True)
        ]
        return math.prod(counts)

    def filled(self, chunk: Shape, unit: Shape) -> int:
        """Return of how many units the boxes touch all chunks."""
        counts = []
        for ranges, chunk_n, unit_n in zip(self.axes, chunk, unit, strict=True):
            n = 0
            for start, stop in ranges:
                first = start // chunk_n * chunk_n
                last = -(-stop // chunk_n) * chunk_n
                n += max(last // unit_n - -(-first // unit_n), 0)
            counts.append(n)
        return math.prod(counts)

    @property
    def n_voxels(self) -> int:
        """Voxels in all boxes."""
        return math.prod(sum(stop - start for start, stop in ranges) for ranges in self.axes)


def _boxes_of(grid: BlockGrid) -> _Boxes:
    axes = []
    for extent, block in zip(grid.volume_shape, grid.block_shape, strict=True):
        starts = range(0, extent, block)
        axes.append([(start, min(start + block, extent)) for start in starts])
    return _Boxes(axes)


def _boxes_from(grid: BlockGrid, change: Callable[[Box], Box]) -> _Boxes:
    """Return the boxes that a change of each axis by itself makes of the cores of a grid."""
    first = grid.core((0,) * len(grid.grid_shape))
    axes: list[_Ranges] = []
    for axis, n_blocks in enumerate(grid.grid_shape):
        ranges = []
        for place in range(n_blocks):
            position = [0] * len(grid.grid_shape)
            position[axis] = place
            core = grid.core(position)
            box = change(
                Box(
                    (*first.start[:axis], core.start[axis], *first.start[axis + 1 :]),
                    (*first.stop[:axis], core.stop[axis], *first.stop[axis + 1 :]),
                )
            )
            ranges.append((box.start[axis], box.stop[axis]))
        axes.append(ranges)
    return _Boxes(axes)


@dataclass(frozen=True, slots=True)
class _Array:
    """How an array is stored, ``(z, y, x)``: chunk, object, and stored bytes of a chunk."""

    chunk: Shape
    unit: Shape
    chunk_bytes: float

    @property
    def is_sharded(self) -> bool:
        return self.chunk != self.unit

    def read(self, boxes: _Boxes) -> Traffic:
        """Return the traffic of reading boxes: of a part of a shard, its index and its chunks."""
        n_units = boxes.touched(self.unit)
        n_chunks = boxes.touched(self.chunk)
        n_bytes = n_chunks * self.chunk_bytes
        if not self.is_sharded:
            return Traffic(n_get=n_units, bytes_read=round(n_bytes))
        per_unit = math.prod(u // c for u, c in zip(self.unit, self.chunk, strict=True))
        n_whole = boxes.filled(self.chunk, self.unit)
        n_parts = n_units - n_whole
        n_bytes += n_parts * per_unit * _INDEX_BYTES
        n_get = n_whole + n_parts + n_chunks - n_whole * per_unit
        return Traffic(n_get=n_get, bytes_read=round(n_bytes))

    def write(self, boxes: _Boxes) -> Traffic:
        """Return the traffic of writing boxes of whole objects: a shard is looked for before."""
        n_units = boxes.touched(self.unit)
        n_bytes = boxes.touched(self.chunk) * self.chunk_bytes
        n_get = n_units if self.is_sharded else 0
        return Traffic(n_put=n_units, n_get=n_get, bytes_written=round(n_bytes))


def project_traffic(plan: Plan, n_workers: int = 1, wall_s: float = 0.0) -> Traffic | None:
    """Return the traffic of a whole run on so many processes, which takes ``wall_s``.

    ``None`` if the plan was recorded before it told how its source is stored.
    """
    if plan.stored is None:
        return None
    return sum(_Projection(plan, n_workers, wall_s).by_part().values(), NO_TRAFFIC)


def kept_bytes(plan: Plan) -> int | None:
    """Return the stored bytes of all images that a run writes, as they compress of nuclei.

    ``None`` if the plan was recorded before it told how its source is stored.
    """
    if plan.stored is None:
        return None
    projection = _Projection(plan, 1, 0.0)
    return sum(
        projection.stored_bytes(kind, level)
        for kind in plan.arrays
        for level in range(len(plan.target_image.levels))
    )


class _Projection:
    """The traffic of the parts of a run."""

    def __init__(self, plan: Plan, n_workers: int, wall_s: float) -> None:
        self._plan = plan
        self._n_workers = max(n_workers, 1)
        self._wall_s = wall_s
        self._opened: set[tuple[str, int, bool]] = set()
        self._n_outputs = len(plan.model.outputs)
        self._blocks = plan.block_grid()
        self._n = len(self._blocks)
        assert plan.stored is not None
        names = plan.source_image.axis_names
        spatial = [names.index(name) for name in "zyx"]
        chunk = tuple(plan.stored.chunk[axis] for axis in spatial)
        unit = tuple(plan.stored.unit[axis] for axis in spatial)
        shapes = zip(plan.stored.unit, plan.stored.chunk, strict=True)
        per_unit = math.prod(u // c for u, c in shapes)
        self._source = _Array(chunk, unit, plan.stored.unit_bytes / per_unit)

    def by_part(self) -> dict[str, Traffic]:
        """Return the traffic of the tasks of each stage, of opening arrays, and of the client."""
        parts = {stage.name: self._tasks(stage) for stage in self._plan.stages}
        n_objects = sum(traffic.n_put for traffic in parts.values())
        parts["many objects"] = self._pages(n_objects)
        parts["opening arrays"] = self._opens()
        parts["client"] = _client(self._plan)
        parts["time"] = _by_time(self._plan, self._wall_s)
        return parts

    # -- arrays

    def _own(self, kind: str, level: int) -> _Array:
        layout = self._plan.layout(level)
        name = f"{self._plan.resolved.scores_dtype} scores" if kind == "scores" else kind
        shape = self._plan.target_image.volume_shape(level)
        n_voxels = math.prod(map(min, layout.chunk_shape, shape))
        return _Array(layout.chunk_shape, layout.write_unit, n_voxels * _BYTES_PER_VOXEL[name])

    def stored_bytes(self, kind: str, level: int) -> int:
        """Return the stored bytes of one level of an output of all volumes."""
        grid = _boxes_of(self._plan.block_grid(level))
        n_volumes = len(self._plan.volumes)
        return self._own(kind, level).write(grid).bytes_written * self._n_outputs * n_volumes

    def _read(self, kind: str, boxes: _Boxes, level: int = 0) -> Traffic:
        """Return the traffic of reading an array of all outputs."""
        self._opened.add((kind, level, False))
        return self._own(kind, level).read(boxes).times(self._n_outputs)

    def _write(self, kind: str, boxes: _Boxes, level: int = 0) -> Traffic:
        self._opened.add((kind, level, True))
        return self._own(kind, level).write(boxes).times(self._n_outputs)

    def _read_source(self, boxes: _Boxes, n_channels: int) -> Traffic:
        self._opened.add(("source", 0, False))
        return self._source.read(boxes).times(n_channels)

    def _load(self, n: int, n_bytes: float = 0.0) -> Traffic:
        """Return the traffic of reading small objects of all outputs."""
        return Traffic(n_get=n, bytes_read=round(n * n_bytes)).times(self._n_outputs)

    def _save(self, n: int, n_bytes: float = 0.0) -> Traffic:
        """Return the traffic of writing small objects of all outputs."""
        return Traffic(n_put=n, bytes_written=round(n * n_bytes)).times(self._n_outputs)

    def _state(self, n: int) -> Traffic:
        return _STATE.times(n * self._n_outputs)

    @property
    def _cores(self) -> _Boxes:
        return _boxes_of(self._blocks)

    @property
    def _regions(self) -> _Boxes:
        """The blocks in the source."""
        start = self._plan.region.start
        return _boxes_from(self._blocks, lambda core: core.shifted(start))

    @property
    def _read_boxes(self) -> _Boxes:
        plan = self._plan
        start = plan.region.start
        return _boxes_from(self._blocks, lambda core: plan.patch_grid.read_box(core.shifted(start)))

    @property
    def _is_compared(self) -> bool:
        return self._plan.measure_level == 0 and not self._plan.is_one_task

    def _checksums(self, boxes: _Boxes) -> Traffic:
        """Return the traffic of reading what the source was when it was measured."""
        if not self._is_compared:
            return NO_TRAFFIC
        grid = self._plan.measure_grid
        n = boxes.touched(grid.block_shape)
        return Traffic(n_get=n, bytes_read=n * self._checksum_bytes)

    @property
    def _checksum_bytes(self) -> int:
        cells = self._plan.cell_grid.grid_shape(self._plan.measure_grid[0])
        return math.prod(cells) * 4 * self._plan.model.in_channels

    @property
    def _n_neighbors(self) -> int:
        """Pairs of blocks that touch."""
        n = 0
        for direction in _forward_steps(self._plan.resolved.connectivity):
            sides = zip(self._blocks.grid_shape, direction, strict=True)
            n += math.prod(max(extent - abs(step), 0) for extent, step in sides)
        return n

    @property
    def _plane_bytes(self) -> float:
        """Bytes of the six boundary planes of a block, on average."""
        shapes = zip(self._blocks.volume_shape, self._blocks.grid_shape, strict=True)
        z, y, x = (extent / n for extent, n in shapes)
        return 2 * 4 * (z * y + z * x + y * x) + 6 * _HEAD_BYTES

    # -- tasks

    def _tasks(self, stage: PlannedStage) -> Traffic:
        """Return the traffic of all tasks of a stage, without opening arrays."""
        of_volume = _STAGES[stage.declared.name](self, stage)
        of_volume += _PERMIT.times(stage.per_volume)
        if not self._plan.is_one_task:
            # The client tells them what it knows of the volume, and records what is done.
            of_volume += Traffic(n_put=2, n_get=1, bytes_written=_STATE.bytes_read)
        return of_volume.times(len(self._plan.volumes))

    def _volume(self, _: PlannedStage) -> Traffic:
        plan = self._plan
        total = NO_TRAFFIC
        if plan.resolved.predicts():
            total += self._read_source(self._read_boxes, plan.model.in_channels)
        else:
            total += self._reread_basis()
        total += self._read_measured(more_only=plan.resolved.predicts())
        kinds = [*plan.arrays, *plan.kept] if plan.resolved.predicts() else plan.arrays
        for kind in kinds:
            levels = len(plan.target_image.levels) if kind in plan.arrays else 1
            for level in range(levels):
                grid = plan.block_grid(level)
                total += self._write(kind, _boxes_of(grid), level)
        if plan.resolved.measures_objects():
            total += self._save(1, _SUMS_BYTES)
        return total

    def _read_measured(self, *, more_only: bool) -> Traffic:
        """Return the traffic of reading the channels that are measured in objects."""
        plan = self._plan
        if not plan.resolved.measures_objects():
            return NO_TRAFFIC
        n = len(plan.measured_channels(plan.volumes[0])) - more_only
        return self._read_source(self._regions, n) if n else NO_TRAFFIC

    def _measure(self, _: PlannedStage) -> Traffic:
        plan = self._plan
        boxes = _boxes_of(plan.measure_grid)
        total = self._read_source(boxes, plan.model.in_channels)
        if self._is_compared:
            n = len(plan.measure_grid)
            total += Traffic(n_put=n, bytes_written=n * self._checksum_bytes)
        return total

    def _pool(self, _: PlannedStage) -> Traffic:
        return _STATE

    def _segment(self, _: PlannedStage) -> Traffic:
        plan = self._plan
        source = self._read_source(self._read_boxes, plan.model.in_channels)
        source += self._checksums(self._read_boxes)
        # Blocks that a mask leaves out are not read.
        total = source.scaled(self._share_predicted) + _STATE.times(self._n)
        resolved = plan.resolved
        if "scores" in resolved.outputs:
            total += self._write("scores", self._cores)
        if resolved.finds_threshold() or resolved.keep_logits:
            total += self._write("logits", self._cores)
        if resolved.has_mask() and not resolved.finds_threshold():
            total += self._write(self._first_mask, self._cores)
        return total

    @property
    def _share_predicted(self) -> float:
        surveys = self._plan.surveys
        n_left_out = sum(survey.n_blocks_left_out for survey in surveys)
        return 1 - n_left_out / (self._n * len(surveys)) if surveys else 1.0

    @property
    def _first_mask(self) -> str:
        return "unfilled" if self._plan.resolved.fill_holes else "mask"

    def _reread_basis(self) -> Traffic:
        basis = self._plan.resolved.basis
        assert basis is not None
        return self._read(basis.kind, self._cores)

    def _reread(self, _: PlannedStage) -> Traffic:
        total = self._reread_basis()
        kind = "logits" if self._plan.resolved.finds_threshold() else self._first_mask
        return total + self._write(kind, self._cores)

    def _histogram(self, _: PlannedStage) -> Traffic:
        total = self._read("logits", self._cores) + self._state(self._n)
        return total + self._save(self._n, _TABLE_BYTES)

    def _cutoff(self, _: PlannedStage) -> Traffic:
        return self._load(self._n, _TABLE_BYTES) + self._state(3)

    def _threshold(self, _: PlannedStage) -> Traffic:
        total = self._read("logits", self._cores) + self._state(self._n)
        return total + self._write(self._first_mask, self._cores)

    def _label_blocks(self, mask: str, provisional: str) -> Traffic:
        total = self._read(mask, self._cores) + self._write(provisional, self._cores)
        return total + self._save(self._n, self._plane_bytes) + self._save(self._n)

    def _holes(self, _: PlannedStage) -> Traffic:
        return self._label_blocks(self._first_mask, "holes")

    def _label(self, _: PlannedStage) -> Traffic:
        total = self._label_blocks("mask", "fragments")
        if self._plan.resolved.splits_objects():
            total += self._save(self._n)
        return total

    def _seams(self, _: PlannedStage) -> Traffic:
        planes = self._load(self._n + self._n_neighbors, self._plane_bytes)
        return planes + self._save(self._n) + self._state(self._n)

    def _join_holes(self, _: PlannedStage) -> Traffic:
        return self._load(3 * self._n) + self._save(self._n) + self._state(1)

    def _fill(self, _: PlannedStage) -> Traffic:
        total = self._read(self._first_mask, self._cores) + self._read("holes", self._cores)
        return total + self._load(self._n) + self._write("mask", self._cores)

    def _join(self, stage: PlannedStage) -> Traffic:
        total = self._join_holes(stage)
        if self._plan.resolved.splits_objects():
            total += self._load(self._n) + self._save(self._n + 2) + self._state(1)
        return total

    def _split(self, _: PlannedStage) -> Traffic:
        total = self._read("fragments", self._cores) + self._state(self._n)
        return total + self._load(2 * self._n) + self._save(2 * self._n)

    def _rank(self, _: PlannedStage) -> Traffic:
        return self._load(3 * self._n + 2) + self._save(3 * self._n) + self._state(1)

    def _relabel(self, _: PlannedStage) -> Traffic:
        total = self._read("fragments", self._cores) + self._write("labels", self._cores)
        n_tables = 2 if self._plan.resolved.splits_objects() else 1
        return total + self._load(n_tables * self._n)

    def _measurements(self, _: PlannedStage) -> Traffic:
        whole = Box.of(self._plan.volume_shape)
        around = _boxes_from(self._blocks, lambda core: core.grown(1) & whole)
        total = self._read("labels", around) + self._state(self._n)
        total += self._read_measured(more_only=False).times(self._n_outputs)
        total += self._checksums(self._regions).times(self._n_outputs)
        total += self._save(self._n, _SUMS_BYTES)
        if self._plan.resolved.regions:
            total += self._save(self._n, _SUMS_BYTES)
        return total

    def _table(self, _: PlannedStage) -> Traffic:
        n_sums = 2 if self._plan.resolved.regions else 1
        total = self._load(n_sums * self._n, _SUMS_BYTES) + self._state(n_sums)
        return total + self._save(1, _SUMS_BYTES)

    def _downsample(self, stage: PlannedStage) -> Traffic:
        plan = self._plan
        level = stage.level
        grid = plan.block_grid(level)
        units = BlockGrid(grid.volume_shape, plan.layout(level).write_unit)
        step = Step(
            plan.target_image.volume_shape(level - 1), grid.volume_shape, self._factors(level)
        )
        fine = _boxes_from(units, step.source_box)
        total = self._state(len(grid))
        for kind in plan.arrays:
            total += self._read(kind, fine, level - 1) + self._write(kind, _boxes_of(units), level)
        return total

    def _factors(self, level: int) -> tuple[float, ...] | None:
        image = self._plan.target_image
        fine = image.spatial(image.levels[level - 1].scale)
        coarse = image.spatial(image.levels[level].scale)
        return tuple(map(truediv, coarse, fine)) if all(fine) else None

    def _pages(self, n_objects: int) -> Traffic:
        """Return the traffic of listing and removing more objects than one request can.

        All are listed before something is published, and intermediate data when they are removed.
        """
        n_volumes = len(self._plan.volumes)
        n_pages = n_objects // n_volumes // PAGE * n_volumes
        if self._plan.is_one_task:
            return Traffic(n_list=n_pages)
        return Traffic(n_list=2 * n_pages, n_delete=n_pages)

    def _opens(self) -> Traffic:
        """Return the traffic of opening arrays: each process opens those that it works on."""
        plan = self._plan
        n_volumes = len(plan.volumes)
        n_images = len(plan.images)
        n_source = sum(kind == "source" for kind, *_ in self._opened)
        n_outputs = sum(kind in plan.arrays for kind, *_ in self._opened)
        n_work = len(self._opened) - n_source - n_outputs
        n_processes = self._n_workers
        if plan.is_one_task:
            # An image is opened by as many processes as work on its timepoints.
            n_processes = min(n_processes, max(n_volumes // n_images, 1))
        per_process = n_images * (n_source + n_outputs * len(plan.suffixes)) + n_volumes * n_work
        return _OPEN.times(per_process * n_processes)


_STAGES: Mapping[str, Callable[[_Projection, PlannedStage], Traffic]] = {
    "volume": _Projection._volume,
    "measure": _Projection._measure,
    "pool": _Projection._pool,
    "segment": _Projection._segment,
    "reread": _Projection._reread,
    "histogram": _Projection._histogram,
    "cutoff": _Projection._cutoff,
    "threshold": _Projection._threshold,
    "holes": _Projection._holes,
    "holes-seams": _Projection._seams,
    "holes-join": _Projection._join_holes,
    "fill": _Projection._fill,
    "label": _Projection._label,
    "seams": _Projection._seams,
    "join": _Projection._join,
    "split": _Projection._split,
    "rank": _Projection._rank,
    "relabel": _Projection._relabel,
    "measurements": _Projection._measurements,
    "table": _Projection._table,
    "downsample": _Projection._downsample,
}


# -- the client: these were counted, and a test counts them again

# Reading the request, recording the plan, holding the run, and publishing: of a run, and more of a
# plate and of a table. Whether a bucket can be written is tried.
_OF_RUN = Traffic(n_put=5, n_get=29, n_list=23)
_OF_TRIAL = Traffic(n_put=2, n_delete=1)
_OF_PLATE = Traffic(n_put=5, n_get=19, n_list=3)
_OF_TABLE = Traffic(n_put=1, n_get=1, n_list=1, n_delete=1)
# Each image; its label images; each of its arrays.
_OF_IMAGE = Traffic(n_put=3, n_get=5, n_list=6)
_OF_LABELS = Traffic(n_put=3, n_get=9)
_OF_ARRAY = Traffic(n_put=1, n_get=1)
_OF_TABLE_OF_IMAGE = Traffic(n_put=4, n_get=19, n_list=2)
# In OME-Zarr 0.4 attributes are objects of their own.
_MORE_OF_IMAGE_04 = Traffic(n_put=2, n_get=9)
_MORE_OF_ARRAY_04 = Traffic(n_put=1, n_get=2)
# Intermediate data of a volume: they are made, and removed.
_OF_VOLUME = Traffic(n_list=1, n_delete=1)
# Names of metadata that are looked for in each group and array of the first image of a plate.
_N_METADATA = 4
# Metadata and records are small.
_GET_BYTES = 300
_PUT_BYTES = 700


def _client(plan: Plan) -> Traffic:
    """Return the traffic of the client, which plans, records and publishes."""
    n_images = len(plan.images)
    n_levels = len(plan.target_image.levels)
    n_suffixes = len(plan.suffixes)
    n_labels = n_suffixes * sum(kind != "scores" for kind in plan.arrays)
    n_groups = n_labels + ("scores" in plan.arrays)
    n_arrays = n_groups * n_levels
    of_image = _OF_IMAGE + _OF_LABELS.times(n_labels) + _OF_ARRAY.times(n_arrays)
    # Each level of the source is looked at.
    n_source_levels = len(plan.source_image.levels)
    of_image += _GET.times(n_source_levels)
    total = _OF_RUN + _GET.times(3 * n_source_levels + n_arrays + 4 * n_labels)
    # In each folder above the target three objects may say that it belongs to something.
    total += _GET.times(3 * _depth(plan.target))
    if plan.resolved.ome_zarr == "0.4":
        of_image += _MORE_OF_IMAGE_04 + _MORE_OF_ARRAY_04.times(n_arrays)
    if not plan.target.is_local:
        total += _OF_TRIAL
    if plan.plate is not None:
        total += _OF_PLATE
    if n_images > 1:
        # The metadata of the first image are copied.
        n_nodes = n_groups + n_arrays + (n_labels > 0)
        total += _GET.times(n_nodes * _N_METADATA)
    if plan.resolved.measures_objects():
        total += _OF_TABLE
        of_image += _OF_TABLE_OF_IMAGE.times(n_suffixes)
    if not plan.is_one_task:
        n_work = len(plan.intermediates) * len(plan.model.outputs)
        of_volume = _OF_VOLUME + _OF_ARRAY.times(n_work)
        total += of_volume.times(len(plan.volumes))
    total += of_image.times(n_images) + _samples(plan)
    n_bytes = total.n_get * _GET_BYTES
    return total + Traffic(bytes_read=n_bytes, bytes_written=total.n_put * _PUT_BYTES)


def _depth(location: Location) -> int:
    """Return the number of folders above a location."""
    n = 0
    while location.parent != location:
        location = location.parent
        n += 1
    return n


def _samples(plan: Plan) -> Traffic:
    """Return the traffic of looking at some objects of the source: their size and beginning."""
    assert plan.stored is not None
    n = plan.stored.n_samples
    # A bucket is asked for the size again before a part of an object is read.
    n_requests = 2 if plan.source.is_local else 3
    return Traffic(n_get=n_requests * n, bytes_read=n * min(plan.stored.unit_bytes, SAMPLE_BYTES))


# -- by the clock

# A heartbeat looks for another client, and renews the lease.
_BEAT = Traffic(n_put=1, n_get=1, n_list=1, bytes_read=160, bytes_written=160)
_BEAT_S = 2.0
# A part of the journal is written after a second at first, and after ten at most; it is read again
# before anything is published.
_SEGMENT = Traffic(n_put=1, n_get=1)
_SEGMENTS_PER_AGE = 300
_MAX_SEGMENT_S = 10
_TASK_BYTES = 250


def _by_time(plan: Plan, wall_s: float) -> Traffic:
    """Return the traffic of the lease and of the journal of a run that takes ``wall_s``."""
    n_tasks = sum(stage.n_tasks for stage in plan.stages)
    recorded = Traffic(bytes_written=n_tasks * _TASK_BYTES, bytes_read=n_tasks * _TASK_BYTES)
    n_segments = min(_count_segments(wall_s), n_tasks)
    return recorded + _BEAT.times(int(wall_s / _BEAT_S)) + _SEGMENT.times(n_segments)


def _count_segments(wall_s: float) -> int:
    """Return the parts of a journal: one a second for five minutes, and then fewer and fewer."""
    n = min(wall_s, _SEGMENTS_PER_AGE)
    if wall_s > _SEGMENTS_PER_AGE:
        slower_s = min(wall_s, _SEGMENTS_PER_AGE * _MAX_SEGMENT_S)
        n += _SEGMENTS_PER_AGE * math.log(slower_s / _SEGMENTS_PER_AGE)
        n += max(wall_s - slower_s, 0) / _MAX_SEGMENT_S
    return int(n)


def _forward_steps(connectivity: int) -> Iterator[Shape]:
    """Yield the directions in which later blocks are neighbors."""
    for direction in steps(3, connectivity):
        if direction > (0, 0, 0):
            yield direction
