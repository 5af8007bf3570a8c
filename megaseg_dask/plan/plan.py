"""The plan of a run: its tasks, stage by stage, and their memory.

A plan is a value: it prints, it is JSON, and two plans with one fingerprint give the
same output. The tasks of a stage are numbered, volume by volume.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from megaseg_dask.algorithms.checksums import CellGrid
from megaseg_dask.algorithms.chunking import Layout, write_layout
from megaseg_dask.algorithms.components import label_dtype
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import PARTITION_SHAPE
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import EngineSpec, Forward
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.messages import first_few
from megaseg_dask.ngff.group import RUNS
from megaseg_dask.ngff.image import Image, Placement
from megaseg_dask.ngff.plate import Plate, well_of
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan import stages
from megaseg_dask.plan.choice import channel_text
from megaseg_dask.plan.companion import Companion
from megaseg_dask.plan.memory import (
    IDLE_BYTES,
    EngineBytes,
    Sizes,
    decoded_bytes,
    device_bytes,
    pinned_bytes,
    resampling_bytes,
)
from megaseg_dask.plan.resolved import Given, OfGroup, OfLevel, Resolved
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import Fact, PlannedStage, Stage
from megaseg_dask.plan.stored import Stored
from megaseg_dask.plan.voxel_size import VolumeForm, is_far, size_text, times_text
from megaseg_dask.plan.where import MaskReader, MaskSurvey, PlannedMask, reading_bytes
from megaseg_dask.stores import Location

# What to do about voxels that are far from those of the model.
RESAMPLING = "--voxel-size model resamples the image to them"
# On a GPU one task computes, while another reads and a third labels, compresses and writes. On a
# CPU one task already uses all cores: more tasks would only take more memory.
TASKS_AT_ONCE = {"cuda": 3}


_ROUNDED = (
    "the stored scores have 8 bits: a voxel is foreground where its stored score is above 255 "
    "times the threshold, which differs from a new run only where the score lies within 1/510 of it"
)


def _parse_location(value: object) -> object:
    return Location(value) if isinstance(value, str) else value


# A location is recorded as the text of its address.
RecordedLocation = Annotated[
    Location, BeforeValidator(_parse_location), PlainSerializer(str, return_type=str)
]


@dataclass(frozen=True, slots=True)
class PlannedVolume:
    """One image, timepoint and channel: the unit of normalization and labelling.

    A network of several inputs takes several ``channels`` at once. ``image`` is the path of
    a field below its plate. ``target_t`` and ``target_c`` are the timepoint and the channel
    of the target to which the first output of the network goes.
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


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """What is one image's own: its place at the target, the names of its channels, its mask."""

    placement: Placement
    channel_names: tuple[str, ...]
    regions: Companion | None = None
    mask: PlannedMask | None = None


class Output(NamedTuple):
    """One output of the network for one volume, with its scores, mask and labels."""

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
    # How the source is stored, unless the plan was recorded by an earlier version.
    stored: Stored | None = None
    volumes: tuple[PlannedVolume, ...]
    # By their paths below the source and the target. The images above are those of the first one.
    images: dict[str, PlannedImage]
    # For each channel of the target, the end of the name of its label image. Empty if there is only
    # one channel.
    suffixes: tuple[str, ...] = ("",)
    # The endings of the columns of channels that are measured by themselves.
    measured_names: tuple[str, ...] = ()
    plate: Plate | None = None
    model: ModelRef
    resolved: Resolved
    # The settings as they were given. They alone hold the options that do not change the output.
    settings: Settings
    memory_bytes: int
    n_parameters: int
    first_filters: int
    # The patch of ``--patch auto``, to report how much it would save.
    auto_patch: Shape
    # The patch that engines prove themselves on.
    proof_patch: Shape
    # Voxels of the largest padded box of an object to split; a run that resumes keeps it.
    split_voxels: int = 0
    # Of the images that the model was trained on (z, y, x), if it is known.
    model_voxel_size_um: tuple[float, ...] | None = None
    model_voxel_range_um: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    # What the masks of the volumes mean for their blocks, if there are masks.
    surveys: tuple[MaskSurvey, ...] = ()
    # Of a run that follows its source, the fingerprint of its first plan. Later plans have more
    # volumes, after those that were there before: tasks and volumes keep their numbers.
    began_as: str = ""
    # Whether the source then announced more timepoints or fields than it had.
    is_announced: bool = False

    # -- geometry

    @property
    def engine(self) -> EngineSpec:
        """The engine that runs the network."""
        return self.resolved.engine

    @property
    def batch(self) -> int:
        """Patches per forward pass."""
        return self.resolved.batch

    @property
    def volume_shape(self) -> Shape:
        """Voxels ``(z, y, x)`` of each volume, or of its ROI."""
        return self.target_image.volume_shape()

    @property
    def region(self) -> Box:
        """The voxels of each source volume that are segmented: all of them, or the ROI."""
        return self.resolved.roi or Box.of(self.source_image.volume_shape())

    def target_image_at(self, path: str) -> Image:
        """Return the metadata of the scores of one image."""
        image = self.target_image.placed(self.images[path].placement)
        return image.with_times(0, self.n_times_of(path))

    def n_times_of(self, path: str) -> int:
        """Return how many timepoints of one image are planned: of a followed plate, not all yet."""
        return self._times_of_images[path]

    @cached_property
    def _times_of_images(self) -> dict[str, int]:
        n_times: dict[str, int] = defaultdict(int)
        for volume in self.volumes:
            n_times[volume.image] = max(n_times[volume.image], volume.target_t + 1)
        return dict(n_times)

    @cached_property
    def output_order(self) -> tuple[Output, ...]:
        """All outputs, by image, timepoint and channel, in whatever order they were planned."""
        places = {path: number for number, path in enumerate(self.images)}

        def place(volume: int) -> tuple[int, int, int]:
            planned = self.volumes[volume]
            return places[planned.image], planned.target_t, planned.target_c

        outputs: list[Output] = []
        for volume in sorted(range(len(self.volumes)), key=place):
            outputs += self.outputs_of(volume)
        return tuple(outputs)

    def channel_name(self, path: str, channel: int) -> str:
        """Return the name of a chosen channel of one image; its index if it has none."""
        number = self.resolved.channels.index(channel)
        return self.images[path].channel_names[number]

    def measured_channels(self, volume: PlannedVolume) -> tuple[int, ...]:
        """Return the channels whose intensities are measured in the objects of a volume.

        The first is the one that is segmented.
        """
        return tuple(dict.fromkeys((volume.c, *self.resolved.measure_channels)))

    def counted_when_measured(self, output: "Output") -> dict[int, int]:
        """Return the channels whose absent chunks are counted when objects are measured.

        They are those that are not segmented, by their place among the measured channels. Heads
        of a network have the same channels, which are counted once.
        """
        if output.number:
            return {}
        segmented = self.resolved.channels if self.resolved.predicts() else ()
        measured = enumerate(self.measured_channels(self.volumes[output.volume]))
        return {number: channel for number, channel in measured if channel not in segmented}

    @property
    def table(self) -> Location:
        """The file of the run's measurements."""
        return table_of(self.target, self.resolved.table, label_name=self.table_label)

    @property
    def known_spacing_um(self) -> tuple[float, ...] | None:
        """The voxel size of the labels, if it is known."""
        image = self.target_image
        return image.spacing_um if image.unknown_size is None else None

    @property
    def tables(self) -> list[Location]:
        """The files of all that the run measures."""
        if not self.resolved.regions:
            return [self.table]
        form = self.resolved.table
        return [self.table, table_of(self.target, form, "regions", self.table_label)]

    @property
    def table_label(self) -> str:
        """What names the tables of labels that were made again, beside those of the first run."""
        return "" if self.resolved.predicts() else self.resolved.label_name

    @property
    def times(self) -> range:
        """The timepoints of the source that are segmented."""
        return range(*self.resolved.times)

    @property
    def warnings(self) -> list[str]:
        """What a person should know before the run, though nothing fails."""
        texts = [_ROUNDED] if self.resolved.has_rounded_basis() else []
        reason = self.target_image.unknown_size
        if reason is not None and self.resolved.measures_objects():
            texts.append(
                f"{self.source}: its voxel size is unknown ({reason}), so the measurements have no "
                "columns in µm; to get them, write the voxel size into its metadata"
            )
        if self.far_voxels is not None:
            texts.append(f"{self.source}: {self.far_voxels}; {RESAMPLING}")
        return texts

    @property
    def far_voxels(self) -> str | None:
        """How far the source's voxels are from those of the model; ``None`` if they are near."""
        times = self.source_form.times(self.model_voxel_size_um)
        if self.resolved.voxel_size_um is not None or times is None or not is_far(times):
            return None
        if self.source_form.is_within(self.model_voxel_range_um):
            return None
        return (
            f"its voxels of {size_text(self.source_form.spacing_um)} are {times_text(times)} times "
            f"those that {self.model.name} was trained on"
        )

    @property
    def source_form(self) -> VolumeForm:
        """Shape and voxel size of a whole volume of the source."""
        return VolumeForm.of(self.source_image)

    @property
    def field_paths(self) -> list[str]:
        """The paths of the fields of a plate that are segmented; empty for an image."""
        return [] if self.plate is None else list(self.images)

    @property
    def channel_texts(self) -> list[str]:
        """Each chosen channel as people know it: its index, and its names in the images."""
        texts = []
        for number, channel in enumerate(self.resolved.channels):
            names = {image.channel_names[number] for image in self.images.values()}
            texts.append(channel_text(channel, first_few(names)))
        return texts

    @property
    def block_shape(self) -> Shape:
        """Voxels ``(z, y, x)`` of a block's core."""
        return self.resolved.block

    @cached_property
    def patch_grid(self) -> PatchGrid:
        """The network's patches over a whole volume, also if only a ROI is segmented."""
        form = self.source_form
        grid_shape = form.on_grid(self.resolved.voxel_size_um)
        return PatchGrid(grid_shape, self.resolved.patch, self.resolved.overlap, form.shape)

    def mask_reader(
        self, volume: PlannedVolume, listed: frozenset[str] | None = None
    ) -> MaskReader | None:
        """Return what reads the mask of a volume; ``None`` if there is none.

        ``listed`` are the keys of all stored objects of its image, if they were listed.
        """
        where = self.resolved.where
        mask = self.images[volume.image].mask
        if where is None or mask is None:
            return None
        image = self.source / volume.image
        form = self.source_form
        return MaskReader(
            mask,
            image,
            volume.t,
            [Volume.of(image, self.source_image, t=volume.t, c=c) for c in volume.channels],
            form.shape,
            form.spacing_um,
            where.margin_um,
            listed,
        )

    def survey_of(self, volume: PlannedVolume) -> MaskSurvey:
        """Return what the mask of a volume means for its blocks."""
        return self._surveys[volume]

    @cached_property
    def _surveys(self) -> dict[PlannedVolume, MaskSurvey]:
        return dict(zip(self.volumes, self.surveys, strict=True))

    @cached_property
    def n_predicted(self) -> int:
        """Patches that all blocks of all volumes predict together."""
        if self.surveys:
            return sum(int(each.patches_of_blocks.sum()) for each in self.surveys)
        of_volume = self.patch_grid.count_predicted(self.block_shape, self.region)
        return of_volume * len(self.volumes)

    def block_grid(self, level: int = 0) -> BlockGrid:
        """Return the blocks of a level, whose cores are whole write units."""
        return BlockGrid(self.target_image.volume_shape(level), self.block_shape)

    @property
    def is_one_task(self) -> bool:
        """Whether a volume is one block, and so one task."""
        if len(self.block_grid()) > 1 or self.resolved.pools_statistics():
            return False
        # A ROI has the statistics of its whole volume, which may be large.
        return self.resolved.roi is None or self.measure_level is None

    @property
    def tasks_at_once(self) -> int:
        """Tasks that a worker runs at once, each in a thread; one of them computes."""
        return TASKS_AT_ONCE.get(self.engine.device, 1) if self.resolved.predicts() else 1

    @property
    def measure_level(self) -> int | None:
        """Level, counted from the segmented one, whose voxels give the normalization.

        ``None`` if the settings give it.
        """
        if not self.resolved.predicts():
            return None
        match self.resolved.normalization:
            case Given():
                return None
            case OfLevel(level):
                return level - self.resolved.level
        return 0

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """The volumes that have one normalization, where the settings ask for groups, by names."""
        groups: dict[str, list[int]] = defaultdict(list)
        if self.resolved.pools_statistics():
            for number in range(len(self.volumes)):
                groups[self.group_of(number)].append(number)
        return dict(groups)

    def group_of(self, volume: int) -> str:
        """Return the name of the group of a volume; its channels are those of the volume."""
        assert isinstance(self.resolved.normalization, OfGroup)
        planned = self.volumes[volume]
        group = group_of_field(self.resolved.normalization, self.plate, planned.image)
        channels = ",".join(map(str, planned.channels))
        return f"{group} c={channels}".strip()

    @property
    def measure_grid(self) -> BlockGrid:
        """The boxes that tasks of ``measure`` read: whole parts of the fixed partition."""
        shape = self.source_image.volume_shape(self.measure_level or 0)
        return BlockGrid(shape, _measured_shape(self.block_shape))

    @cached_property
    def cell_grid(self) -> CellGrid:
        """The cells of the source, cut wherever a task that reads it begins or ends."""
        boxes = list(_iter_diagonal(self.measure_grid))
        for core in _iter_diagonal(self.block_grid()):
            region = core.shifted(self.region.start)
            boxes += [region, self.patch_grid.read_box(region)]
        return CellGrid.between(boxes)

    def layout(self, level: int) -> Layout:
        """Return the chunk and the write unit ``(z, y, x)`` of a level."""
        shape = self.target_image.volume_shape(level)
        has_shards = VERSIONS[self.resolved.ome_zarr].has_shards
        return write_layout(shape, self.block_shape, sharded=has_shards)

    # -- work

    @cached_property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages in order, with the number of their tasks."""
        if self.is_one_task:
            predicts = self.resolved.predicts()
            stage = stages.WHOLE_VOLUME if predicts else stages.WHOLE_VOLUME_AGAIN
            return (PlannedStage(stage, len(self.volumes), 1),)
        return self.staged

    @cached_property
    def staged(self) -> tuple[PlannedStage, ...]:
        """The stages over blocks; if a volume is one block, one task runs them all in memory."""
        return tuple(self._iter_stages())

    def _iter_stages(self) -> Iterator[PlannedStage]:
        for stage in stages.STAGES:
            if not stage.when(self.resolved):
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
        """The outputs that are images, not tables."""
        return tuple(kind for kind in self.resolved.outputs if kind != "measurements")

    @property
    def intermediates(self) -> dict[str, str]:
        """Kinds and dtypes of the arrays that are in the run folder until a volume is done."""
        dtypes: dict[str, str] = {}
        for stage in self.stages:
            dtypes.update(stage.declared.arrays)
        others = {*self.arrays, *self.kept}
        return {kind: dtype for kind, dtype in dtypes.items() if kind not in others}

    @property
    def kept(self) -> tuple[str, ...]:
        """Kinds of arrays that stay in the run folder."""
        return ("logits",) if self.resolved.keep_logits else ()

    def stage(self, name: str) -> PlannedStage:
        """Return the stage of a name.

        Raises:
            SettingsError: There is none; the message lists the names.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise SettingsError(f"this run has no stage {name}; it has {names}")

    def stage_telling(self, fact: Fact) -> PlannedStage | None:
        """Return the last stage whose summaries hold a fact about each volume, if it is planned."""
        for stage in reversed(self.stages):
            if fact in stage.declared.tells:
                return stage
        return None

    def grid(self, stage: PlannedStage) -> BlockGrid | None:
        """Return the boxes of a stage's tasks; ``None`` if each task is about a whole volume."""
        return self._grid(stage.declared, stage.level)

    def outputs_of(self, volume: int) -> list[Output]:
        """Return the outputs of a volume, in the network's order."""
        return [Output(volume, number) for number in range(len(self.model.outputs))]

    def target_channel(self, output: Output) -> int:
        """Return the channel of the target that holds an output."""
        return self.volumes[output.volume].target_c + output.number

    def split_index(self, stage: str, index: int) -> tuple[int, int]:
        """Return the volume of a task, and the task's number in that volume."""
        return divmod(index, self.stage(stage).per_volume)

    # -- identity

    @property
    def determinants(self) -> dict[str, object]:
        """All that determines the output, as JSON values; no address, time or worker does."""
        masks = {} if self.resolved.where is None else {"mask": self.mask_digest}
        basis = self.resolved.basis
        return {
            "source": self.source_digest,
            "model": self.model.digest,
            **self._digest_of_regions(),
            **masks,
            **self.resolved.options(),
            **({"basis": asdict(basis)} if basis else {}),
        }

    def _digest_of_regions(self) -> dict[str, str]:
        digests = [image.regions.digest for image in self.images.values() if image.regions]
        if not digests:
            return {}
        return {"digest of regions": hashlib.sha256(" ".join(digests).encode()).hexdigest()}

    @property
    def mask_digest(self) -> str:
        """Digest of the masks of all images: of what is set, and of how they lie on the images."""
        masks = [self.images[path].mask for path in sorted(self.images)]
        parts = [(mask.step, mask.offset, mask.digests) for mask in masks if mask is not None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Digest of :attr:`determinants`."""
        return hashlib.sha256(json.dumps(self.determinants, sort_keys=True).encode()).hexdigest()

    @property
    def grows(self) -> bool:
        """Whether later plans of the same run may have more volumes."""
        return bool(self.began_as)

    @property
    def identity(self) -> str:
        """What the journal and the marks of a run name: it stays the same while the run grows."""
        return self.began_as or self.fingerprint

    def followed(
        self, volumes: tuple[PlannedVolume, ...], began_as: str, *, is_announced: bool
    ) -> "Plan":
        """Return the same plan with these volumes, as one that may grow."""
        changed = {"volumes": volumes, "began_as": began_as, "is_announced": is_announced}
        return Plan.model_construct(**{**dict(self), **changed})

    def with_block(self, block: Shape) -> "Plan":
        """Return the same plan with other blocks."""
        resolved = replace(self.resolved, block=block)
        # A copy would keep the cached grids and projections of the old block.
        return Plan.model_construct(**{**dict(self), "resolved": resolved})

    def with_precision(self, precision: str) -> "Plan":
        """Return the same plan, whose engine computes in another precision."""
        engine = replace(self.engine, precision=precision)
        resolved = replace(self.resolved, engine=engine)
        return Plan.model_construct(**{**dict(self), "resolved": resolved})

    def with_split(self, voxels: int) -> "Plan":
        """Return the same plan, in which objects of padded boxes up to so many voxels are split."""
        return Plan.model_construct(**{**dict(self), "split_voxels": voxels})

    @property
    def is_in_place(self) -> bool:
        """Whether labels go into the source, whose own group and image are not ours."""
        return self.target.is_same(self.source)

    def require_kept(self) -> None:
        """Require that a run replaces no labels that it reads.

        Raises:
            SettingsError: It would.
        """
        for path, image in self.images.items():
            place = self.source / path
            if image.regions is not None:
                self._require_kept("--regions", image.regions.location(place))
            if image.mask is not None and not image.mask.is_data:
                self._require_kept("--where", image.mask.location(place).parent)

    def _require_kept(self, option: str, label: Location) -> None:
        is_replaced = label.is_inside(self.target)
        advice = "copy these labels to another place first"
        if self.adds_labels:
            names = [self.resolved.label_name + suffix for suffix in self.suffixes]
            is_replaced &= label.basename in [*names, *(f"{name}_mask" for name in names)]
            advice = "choose another --label-name"
        if is_replaced:
            raise SettingsError(f"{option} {label}: this run would replace it; {advice}")

    @property
    def adds_labels(self) -> bool:
        """Whether labels go into images that are there already, and are not this run's."""
        return self.is_in_place or not self.resolved.predicts()

    @property
    def basis_run(self) -> Location:
        """The folder of the run whose scores or logits are labelled again."""
        assert self.resolved.basis is not None
        return self.run.parent / self.resolved.basis.run

    def found_in(self, run: Location) -> "Plan":
        """Return the plan of a run that is found in a folder.

        Recorded addresses say where it was made. A source that was the target still is.
        """
        target = target_of(run)
        source = target if self.is_in_place else self.source
        return self.model_copy(update={"source": source, "target": target, "run": run})

    # -- memory

    @cached_property
    def projected_bytes(self) -> dict[str, int]:
        """Peak memory of a worker in each stage, in bytes; all levels are one stage."""
        return self.project(self.block_shape)

    def projected(self, stage: PlannedStage) -> int:
        """Return the peak memory of a worker in a stage, in bytes.

        A stage that has no projection takes less than the last stage before it that has one.
        """
        if self.is_one_task:
            return self.projected_bytes[stage.name]
        n_bytes = 0
        for earlier in stages.STAGES:
            n_bytes = self.projected_bytes.get(earlier.name, n_bytes)
            if earlier == stage.declared:
                break
        return n_bytes

    def project(self, block: Shape) -> dict[str, int]:
        """Return the peak memory of a worker in each stage with other blocks ``(z, y, x)``."""
        engine = self._engine_bytes
        sizes = self._sizes_of(block)
        is_one_block = sizes.core_voxels == sizes.volume_voxels
        if self.resolved.pools_statistics():
            # Volumes wait for each other between two stages.
            is_one_block = False
        of_tasks = stages.project(sizes, self.resolved, is_one_block=is_one_block)
        # The engine is kept open from one task to the next.
        idle = IDLE_BYTES + engine.kept
        peaks = {name: idle + n_bytes * self.tasks_at_once for name, n_bytes in of_tasks.items()}
        if self._is_proven:
            # Before the first task that predicts, when no block is in memory.
            proof = self.reference_bytes(self.proof_patch)
            for name in {"volume", "segment"} & peaks.keys():
                peaks[name] = max(peaks[name], proof)
        return peaks

    @property
    def device_bytes(self) -> int:
        """Memory of a GPU that a block takes there, in bytes; 0 on a CPU."""
        return self.project_device(self.block_shape, self.batch)

    def project_device(self, block: Shape, batch: int) -> int:
        """Return the memory of a GPU with other blocks ``(z, y, x)`` and another batch."""
        forward = replace(self._forward, batch=batch)
        n_bytes = device_bytes(self._sizes_of(block), self.engine, forward)
        if not self._is_proven:
            return n_bytes
        reference = replace(self.engine, precision="fp32")
        no_block = replace(self._sizes, core_voxels=0, read_voxels=0, resampling_bytes=0)
        forward = replace(forward, batch=1, patch_voxels=math.prod(self.proof_patch))
        return max(n_bytes, device_bytes(no_block, reference, forward))

    @property
    def _is_proven(self) -> bool:
        """Whether workers compare their engine with another one, which takes memory."""
        return self.resolved.predicts() and not self.engine.is_reference

    @cached_property
    def _engine_bytes(self) -> EngineBytes:
        if not self.resolved.predicts():
            return EngineBytes(0, 0)
        return EngineBytes.of(self.engine, self._forward)

    @property
    def _forward(self) -> Forward:
        n_models = len(self.model.bundles)
        n_outputs = len(self.model.outputs)
        return Forward(
            patch_voxels=math.prod(self.resolved.patch),
            batch=self.batch,
            # Heads with layers of their own have as many maps as the backbone has outputs.
            n_filters=max(self.first_filters, n_outputs),
            n_inputs=self.model.in_channels,
            n_outputs=n_outputs,
            n_models=n_models,
            n_parameters=self.n_parameters,
            is_averaged=self.engine.tta or n_models > 1,
        )

    def reference_bytes(self, patch: Shape) -> int:
        """Return the peak memory of a worker while float32 PyTorch predicts one patch."""
        forward = replace(self._forward, patch_voxels=math.prod(patch), batch=1)
        reference = replace(self.engine, engine="torch", precision="fp32")
        n_bytes = EngineBytes.of(reference, forward)
        return IDLE_BYTES + n_bytes.kept + n_bytes.forward

    def _sizes_of(self, block: Shape) -> Sizes:
        grid = BlockGrid(self.volume_shape, block)
        first = grid[0]
        # A block in the middle reads the most: it has halos on all sides.
        middle = grid.core(tuple(n // 2 for n in grid.grid_shape))
        offset = self.region.start
        regions = [core.shifted(offset) for core in (first, middle)]
        read_boxes = list(map(self.patch_grid.read_box, regions))
        measured = BlockGrid(self.volume_shape, _measured_shape(block))[0]
        sizes = replace(
            self._sizes,
            core_voxels=first.size,
            read_voxels=max(box.size for box in read_boxes),
            measured_voxels=measured.size,
            resampling_bytes=max(map(self._resampling_bytes, regions)),
            mask_bytes=reading_bytes(self.resolved.where, first.shape, self.source_form.spacing_um),
        )
        if self.engine.device == "cpu":
            return sizes
        return replace(sizes, forward_bytes=pinned_bytes(sizes))

    def _resampling_bytes(self, region: Box) -> int:
        """Return the bytes of voxels on the grid, and on the way there and back, of a block."""
        grid = self.patch_grid
        resampling = grid.resampling
        if resampling.is_identity:
            return 0
        read_shape = grid.read_box(region).shape
        covered_shape = grid.covered(region).shape
        n_there = resampling.peak_voxels(read_shape, grid.seen_box(region).shape)
        n_back = resampling.peak_voxels(covered_shape, region.shape)
        model = self.model
        return resampling_bytes(
            # Wide numbers are normalized in float64.
            there=(2 * math.prod(read_shape) + n_there) * model.in_channels,
            back=(math.prod(covered_shape) + n_back) * len(model.outputs),
            blended=math.prod(covered_shape),
        )

    @cached_property
    def _sizes(self) -> Sizes:
        """The sizes that are the same for all block shapes."""
        return Sizes(
            volume_voxels=math.prod(self.volume_shape),
            core_voxels=0,
            read_voxels=0,
            measured_voxels=0,
            resampling_bytes=0,
            mask_bytes=0,
            decoded_bytes=decoded_bytes(self.source_chunk_bytes, self.n_source_chunks),
            source_bytes=np.dtype(self.source_image.dtype).itemsize,
            scores_bytes=np.dtype(self.resolved.scores_dtype).itemsize,
            label_bytes=label_dtype(self.volume_shape).itemsize,
            forward_bytes=self._engine_bytes.forward,
            n_inputs=self.model.in_channels,
            n_measured=max(len(self.measured_channels(volume)) for volume in self.volumes),
            n_outputs=len(self.model.outputs),
            has_regions=self.resolved.regions is not None,
            finds_threshold=self.resolved.finds_threshold() or self.resolved.keep_logits,
            fills_holes=self.resolved.fills_holes(),
            split_voxels=self.split_voxels,
        )


def group_of_field(normalization: OfGroup, plate: Plate | None, path: str) -> str:
    """Return the name of the group of a field, ``""`` of an image that is in no plate."""
    match normalization.kind:
        case "series":
            return path
        case "well":
            return well_of(path)
        case "acquisition" if plate is not None:
            ids = [field.acquisition for field in plate.fields if field.path == path]
            return f"acquisition {ids[0]}" if ids else "acquisition unknown"
    return "plate"


def _iter_diagonal(grid: BlockGrid) -> Iterator[Box]:
    """Yield blocks that have all bounds of a grid along each axis."""
    for number in range(max(grid.grid_shape)):
        yield grid.core(tuple(min(number, n - 1) for n in grid.grid_shape))


def _measured_shape(block: Shape) -> Shape:
    """Return a shape of whole parts of the fixed partition, about as large as a block."""
    return tuple(max(b // p, 1) * p for b, p in zip(block, PARTITION_SHAPE, strict=True))


def run_folder(target: Location, label_name: str) -> Location:
    """Return the folder of a run's plan, journal and intermediate data."""
    return runs_folder(target) / label_name


def iter_run_folders(target: Location, label_name: str) -> Iterator[Location]:
    """Yield the folders that runs of one label name use in turn; a plate may need several."""
    yield run_folder(target, label_name)
    for number in count(2):
        # No label name contains a plus.
        yield run_folder(target, f"{label_name}+{number}")


def run_names(label_name: str) -> re.Pattern[str]:
    """Return the pattern of the names of the run folders of a label name."""
    return re.compile(rf"{re.escape(label_name)}(\+\d+)?")


def runs_folder(target: Location) -> Location:
    """Return the folder that holds a target's run folders, and the lease that they share."""
    return target.sibling(RUNS)


def is_runs_folder(location: Location) -> bool:
    """Return whether a name is that of the folder of a target's run folders."""
    return location.basename.endswith(RUNS)


def table_of(
    target: Location, form: str, kind: str = "measurements", label_name: str = ""
) -> Location:
    """Return the table of a target's measurements or regions, ``parquet`` or ``csv``.

    ``label_name`` is that of labels that were made again.
    """
    name = f".{label_name}" if label_name else ""
    return target.sibling(f"{name}.{kind}.{form}")


def target_of(run: Location) -> Location:
    """Return the target beside which a run folder lies."""
    runs = run.parent
    return replace(runs, url=runs.url.removesuffix(RUNS))
