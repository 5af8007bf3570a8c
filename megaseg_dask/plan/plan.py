"""The plan of a run: what is computed, by which tasks of which stages, and at what cost.

A plan is a value: it prints, it is JSON, and two plans with one fingerprint
give the same output. Tasks are numbered per stage, volume by volume.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from megaseg_dask.algorithms.chunking import Layout, write_layout
from megaseg_dask.algorithms.components import label_dtype
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import PARTITION_SHAPE
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import EngineSpec, Forward
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.plate import Plate
from megaseg_dask.plan import stages
from megaseg_dask.plan.memory import IDLE_BYTES, EngineBytes, Sizes, decoded_bytes
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import Fact, PlannedStage, Stage
from megaseg_dask.stores import Location

# On a GPU one task computes, while another reads and a third one labels, compresses and writes. A CPU computes in all
# of its cores anyway: there it would be memory for nothing.
TASKS_AT_ONCE = {"cuda": 3}


def _parse_location(value: object) -> object:
    return Location(value) if isinstance(value, str) else value


# A location is recorded as the text of its address.
RecordedLocation = Annotated[
    Location, BeforeValidator(_parse_location), PlainSerializer(str, return_type=str)
]


@dataclass(frozen=True, slots=True)
class PlannedVolume:
    """One image, timepoint and channel: the unit of normalisation and labelling.

    A network of several inputs takes several channels at once. ``image`` is the
    path of a field below its plate; ``target_t`` and ``target_c`` are the places in
    the output of its first, or only, output.
    """

    t: int
    channels: tuple[int, ...]
    target_t: int
    target_c: int = 0
    image: str = ""

    @property
    def c(self) -> int:
        """The channel, or the first of several."""
        return self.channels[0]


class Output(NamedTuple):
    """One output of the network, of one volume, by their numbers: it has scores, a mask and labels of its own."""

    volume: int
    number: int = 0


class Plan(BaseModel):
    """Everything that the tasks of a run need to know; recorded as JSON in the run folder."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))

    source: RecordedLocation
    target: RecordedLocation
    run: RecordedLocation
    source_image: Image
    target_image: Image
    source_digest: str
    source_sample: str
    source_chunk_bytes: int
    n_source_chunks: int
    volumes: tuple[PlannedVolume, ...]
    # What the label image of each channel of the target has after its name; nothing where there is only one.
    suffixes: tuple[str, ...] = ("",)
    plate: Plate | None = None
    model: ModelRef
    engine: EngineSpec
    batch: int
    options: Settings
    memory_bytes: int
    n_parameters: int
    first_filters: int
    # What `--patch auto` takes, for who asks what it would save.
    auto_patch: Shape

    # -- geometry

    @property
    def volume_shape(self) -> Shape:
        """Voxels ``(z, y, x)`` of each volume, or of its ROI."""
        return self.target_image.volume_shape()

    @property
    def region(self) -> Box:
        """The voxels of the source that are segmented: all of a volume, or the ROI."""
        if self.options.roi is None:
            return Box.of(self.source_image.volume_shape())
        start, stop = zip(*self.options.roi, strict=True)
        return Box(start, stop)

    @property
    def label_image(self) -> Image:
        """Metadata of a label image: those of the scores without channels."""
        return self.target_image.without_channels()

    @property
    def block_shape(self) -> Shape:
        """Voxels of a block's core."""
        assert self.options.block is not None
        return self.options.block

    @cached_property
    def patch_grid(self) -> PatchGrid:
        """The network's patches over a volume, of which a ROI is only a part."""
        assert isinstance(self.options.patch, tuple)
        assert self.options.overlap is not None
        return PatchGrid(self.source_image.volume_shape(), self.options.patch, self.options.overlap)

    def block_grid(self, level: int = 0) -> BlockGrid:
        """Return the blocks of a level; their cores are whole write units."""
        return BlockGrid(self.target_image.volume_shape(level), self.block_shape)

    @property
    def is_one_task(self) -> bool:
        """Tell whether a volume fits one block, and so runs as one task."""
        # The statistics of a ROI are those of its volume, which may be of any size.
        return len(self.block_grid()) == 1 and (
            self.options.roi is None or self.measure_level is None
        )

    @property
    def tasks_at_once(self) -> int:
        """Tasks that a worker has in hand, each on a thread of its own; one at a time computes."""
        return TASKS_AT_ONCE.get(self.engine.device, 1)

    @property
    def measure_level(self) -> int | None:
        """Level of the source whose voxels give the normalisation; ``None`` if the settings give it."""
        match self.options.normalization:
            case None:
                return 0
            case str(text):
                return int(text.removeprefix("level:")) - self.options.level
        return None

    @property
    def measure_grid(self) -> BlockGrid:
        """What each task of ``measure`` reads: about a block, but whole parts of the fixed partition."""
        parts = (max(b // p, 1) * p for b, p in zip(self.block_shape, PARTITION_SHAPE, strict=True))
        return BlockGrid(self.source_image.volume_shape(self.measure_level or 0), tuple(parts))

    def layout(self, level: int) -> Layout:
        """Return chunk and write unit of a level, ``(z, y, x)``."""
        shape = self.target_image.volume_shape(level)
        return write_layout(shape, self.block_shape, sharded=self.options.ome_zarr == "0.5")

    # -- work

    @cached_property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages in order, with their number of tasks over all volumes."""
        if self.is_one_task:
            return (PlannedStage(stages.WHOLE_VOLUME, len(self.volumes), 1),)
        return self.staged

    @cached_property
    def staged(self) -> tuple[PlannedStage, ...]:
        """The stages over blocks, which one task runs in memory where a volume fits one block."""
        return tuple(self._iter_stages())

    def _iter_stages(self) -> Iterator[PlannedStage]:
        for stage in stages.STAGES:
            if not stage.when(self.options):
                continue
            levels = range(1, len(self.target_image.levels)) if stage.over == "levels" else (0,)
            for level in levels:
                grid = self._grid(stage, level)
                per_volume = 1 if grid is None else len(grid)
                yield PlannedStage(stage, per_volume * len(self.volumes), per_volume, level)

    def _grid(self, stage: Stage, level: int) -> BlockGrid | None:
        match stage.over:
            case "parts":
                return self.measure_grid
            case "blocks" | "levels":
                return self.block_grid(level)
            case "volume":
                return None

    @property
    def arrays(self) -> tuple[str, ...]:
        """The outputs that are images; measurements are a table."""
        return tuple(kind for kind in self.options.outputs if kind != "measurements")

    @property
    def intermediates(self) -> dict[str, str]:
        """Kind and dtype of the arrays that the run folder holds while a volume of several blocks is in work."""
        return {
            kind: dtype
            for stage in self.stages
            for kind, dtype in stage.declared.arrays.items()
            if kind not in self.arrays
        }

    @property
    def has_mask(self) -> bool:
        """Return whether scores are turned into a mask."""
        return stages.has_mask(self.options)

    def stage(self, name: str) -> PlannedStage:
        """Return a stage.

        Raises:
            SettingsError: If there is none of this name; it lists those there are.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise SettingsError(f"no stage {name} in this run; it has {names}")

    def stage_telling(self, fact: Fact) -> PlannedStage | None:
        """Return the stage whose summaries tell something of each volume, if it is part of the plan."""
        for stage in self.stages:
            if fact in stage.declared.tells:
                return stage
        return None

    def grid(self, stage: PlannedStage) -> BlockGrid | None:
        """Return the blocks that the tasks of a stage are about; ``None`` where a task is about a whole volume."""
        return self._grid(stage.declared, stage.level)

    def outputs_of(self, volume: int) -> list[Output]:
        """Return the outputs of a volume, in the order of the network's."""
        return [Output(volume, number) for number in range(len(self.model.outputs))]

    def target_channel(self, output: Output) -> int:
        """Return the channel of the target that an output is."""
        return self.volumes[output.volume].target_c + output.number

    def split_index(self, stage: str, index: int) -> tuple[int, int]:
        """Return the number of a task's volume, and the task's number in that volume."""
        return divmod(index, self.stage(stage).per_volume)

    # -- identity and cost

    @property
    def determinants(self) -> dict[str, object]:
        """All that determines the output, as JSON values: never an address, a time or a worker."""
        return {
            "source": self.source_digest,
            "model": self.model.digest,
            **self.options.result_options(),
        }

    @property
    def fingerprint(self) -> str:
        """Digest of :attr:`determinants`."""
        return hashlib.sha256(json.dumps(self.determinants, sort_keys=True).encode()).hexdigest()

    @cached_property
    def projected_bytes(self) -> dict[str, int]:
        """Peak memory of a worker in each stage; the stages of all levels are one."""
        engine = EngineBytes.of(self.engine, self._forward())
        sizes = self._sizes(engine.forward)
        is_one_block = sizes.core_voxels == sizes.volume_voxels
        of_tasks = stages.project(sizes, self.options, is_one_block=is_one_block)
        # The engine stays open from one task to the next.
        idle = IDLE_BYTES + engine.kept
        return {name: idle + n_bytes * self.tasks_at_once for name, n_bytes in of_tasks.items()}

    def projected(self, stage: PlannedStage) -> int:
        """Return the peak memory of a worker in a stage, or in the one before it that takes more."""
        if self.is_one_task:
            return self.projected_bytes[stage.name]
        n_bytes = 0
        for earlier in stages.STAGES:
            n_bytes = self.projected_bytes.get(earlier.name, n_bytes)
            if earlier == stage.declared:
                break
        return n_bytes

    def _forward(self) -> Forward:
        n_models = len(self.model.bundles)
        n_outputs = len(self.model.outputs)
        return Forward(
            patch_voxels=math.prod(self.patch_grid.patch_shape),
            batch=self.batch,
            # Heads with layers of their own have as many maps as the backbone has outputs.
            n_filters=max(self.first_filters, n_outputs),
            n_inputs=self.model.in_channels,
            n_outputs=n_outputs,
            n_models=n_models,
            n_parameters=self.n_parameters,
            is_averaged=self.engine.tta or n_models > 1,
        )

    def _sizes(self, forward_bytes: int) -> Sizes:
        settings = self.options
        grid = self.block_grid()
        # Read boxes grow from the rim inwards: a block in the middle has halos on all sides.
        middle = grid.core(tuple(n // 2 for n in grid.grid_shape))
        cores = [core.shifted(self.region.start) for core in (middle, grid[0])]
        measured = BlockGrid(self.volume_shape, self.measure_grid.block_shape)
        return Sizes(
            volume_voxels=math.prod(self.volume_shape),
            core_voxels=grid[0].size,
            read_voxels=max(self.patch_grid.read_box(core).size for core in cores),
            measured_voxels=measured[0].size,
            decoded_bytes=decoded_bytes(self.source_chunk_bytes, self.n_source_chunks),
            source_bytes=np.dtype(self.source_image.dtype).itemsize,
            scores_bytes=np.dtype(settings.scores_dtype).itemsize,
            label_bytes=label_dtype(self.volume_shape).itemsize,
            forward_bytes=forward_bytes,
            n_inputs=self.model.in_channels,
            n_outputs=len(self.model.outputs),
            finds_threshold=stages.finds_threshold(settings),
            fills_holes=stages.fills_holes(settings),
        )

    def with_block(self, block: Shape) -> "Plan":
        """Return the same plan with other blocks."""
        options = self.options.model_copy(update={"block": block})
        # A constructed copy leaves the cached grids and projections of the old block behind.
        return Plan.model_construct(**{**dict(self), "options": options})

    def summary(self) -> dict[str, object]:
        """Return what ``megaseg plan`` shows, as JSON values."""
        grid = self.patch_grid
        voxels, n_patches = math.prod(self.volume_shape), grid.count_touching(self.region)
        n_predicted = grid.count_predicted(self.block_shape, self.region)
        auto = PatchGrid(grid.volume_shape, self.auto_patch, grid.overlap)
        item = np.dtype(self.source_image.dtype).itemsize
        # Statistics take one more read, except where a volume is read once for all.
        measured = (
            0
            if self.is_one_task or self.measure_level is None
            else math.prod(self.measure_grid.volume_shape)
        )
        read = (grid.count_read(self.block_shape, self.region) + measured) * self.model.in_channels
        if "measurements" in self.options.outputs and not self.is_one_task:
            read += voxels
        sizes = {
            "labels": label_dtype(self.volume_shape).itemsize,
            "mask": 1,
            "scores": np.dtype(self.options.scores_dtype).itemsize,
        }
        n_images = len({volume.image for volume in self.volumes})
        written = n_images * sum(math.prod(v.shape) for v in self.target_image.levels)
        return {
            "source": self.source.url,
            "target": self.target.url,
            "fingerprint": self.fingerprint,
            "volumes": len(self.volumes),
            "volume_shape": self.volume_shape,
            "fields": len({volume.image for volume in self.volumes}) if self.plate else None,
            # Of a plate: what it lists and does not have, and why; such a run will end as failed.
            "missing": dict(self.plate.missing) if self.plate else {},
            "dtype": self.source_image.dtype,
            "model": {
                "name": self.model.name,
                "digest": self.model.digest,
                "parameters": self.n_parameters,
                "outputs": self.model.outputs,
            },
            "engine": self.engine.record(self.batch),
            "patch_shape": self.options.patch,
            "overlap": self.options.overlap,
            "patches": n_patches,
            "patch_voxels_per_voxel": round(n_patches * math.prod(grid.patch_shape) / voxels, 2),
            "auto_patch_shape": self.auto_patch,
            "auto_patch_voxels_per_voxel": round(
                len(auto) * math.prod(auto.patch_shape) / voxels, 2
            ),
            "block_shape": self.block_shape,
            "blocks": len(self.block_grid()),
            "redundancy": round(n_predicted / n_patches, 3),
            "bytes_read": read * item * len(self.volumes),
            "read_amplification": round(read / voxels / self.model.in_channels, 2),
            "bytes_written": written * sum(sizes[name] for name in self.arrays),
            # Of one volume: they are removed when it is finished.
            "bytes_intermediate": voxels
            * len(self.model.outputs)
            * sum(map(_itemsize, self.intermediates.values())),
            "label_dtype": str(label_dtype(self.volume_shape)),
            "memory_bytes": self.memory_bytes,
            "projected_bytes": self.projected_bytes,
            "stages": {s.name: s.n_tasks for s in self.stages},
            "options": self.options.result_options(),
        }


def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def run_folder(target: Location, label_name: str) -> Location:
    """Return where the plan, the journal and intermediate data of a run live."""
    return runs_folder(target) / label_name


def iter_run_folders(target: Location, label_name: str) -> Iterator[Location]:
    """Yield where the runs of one label name live, without end: a plate is done in one run or several."""
    yield run_folder(target, label_name)
    for number in count(2):
        # No label name holds a plus.
        yield run_folder(target, f"{label_name}+{number}")


def run_names(label_name: str) -> re.Pattern[str]:
    """Return what the names of these folders look like."""
    return re.compile(rf"{re.escape(label_name)}(\+\d+)?")


def runs_folder(target: Location) -> Location:
    """Return what holds the run folders of a target, and its lease: all runs write its scores and metadata."""
    return target.sibling(".run")
