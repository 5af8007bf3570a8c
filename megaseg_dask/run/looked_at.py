"""One run of which somebody looks at parts: its statistics, boxes of its scores, and its tasks.

A box is predicted from its own patches alone. Patches lie on the grid of the volume
and are normalized by its statistics, so the box is a crop of what a run writes, bit
for bit. Statistics of a large volume take long: until they are measured, those of a
coarser level stand in, and what is predicted by them is provisional.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.array_library import NUMPY
from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.algorithms.normalization import measure, require_finite
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import StoreError
from megaseg_dask.events import Emit, ignore
from megaseg_dask.inference.block import (
    Block,
    HostOutputs,
    blend_predictions,
    cut_patch,
    predict_patches,
    resampled,
    stack,
)
from megaseg_dask.inference.remembering import PatchMemory, Remembering, digest_of
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.progress import GroupSize, Recorder, StageProgress
from megaseg_dask.run.schedule import VolumeProgress
from megaseg_dask.run.serial import SerialDispatcher, SerialExecutor
from megaseg_dask.run.state import ChannelStatistics, PartStatistics, TaskSummary
from megaseg_dask.run.tasks.scores import block_of, find_unknown, is_nan_background
from megaseg_dask.run.tasks.statistics import (
    describe_channel,
    describe_group,
    describe_volume,
    measure_block,
)
from megaseg_dask.run.tasks.worker import failure_of
from megaseg_dask.run.workspace import Workspace

Array = NDArray[Any]

# A volume of so many voxels is measured in about a second: nobody sees provisional scores of it.
QUICK_VOXELS = 2**26
# What is read at a time. Of a larger volume, a level or a part of so many voxels gives provisional
# statistics.
_SAMPLE_SHAPE: Shape = (64, 512, 512)
# While one part is counted, the next one is read.
_PARTS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the intensities of a volume; ``origin`` says of what, if not of all."""

    statistics: tuple[ChannelStatistics, ...]
    origin: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether a run normalizes by these statistics."""
        return not self.origin


class _Reading(Workspace):
    """The source of a run; nothing is written."""

    reads_once = True


class _Chosen:
    """Tasks of a stage that may all start now, until the work is to end."""

    def __init__(self, stage: str, indices: Sequence[int], is_over: threading.Event) -> None:
        self._stage = stage
        self._waiting = list(reversed(indices))
        self._is_over = is_over

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return the next task."""
        if self._is_over.is_set() or not self._waiting:
            return self._stage, []
        return self._stage, [self._waiting.pop()]

    def settle(self, stage: str, index: int) -> None:
        """Nothing waits for a task to end."""


class LookedAt:
    """One run of a request: the statistics of its volumes, and what is done of it.

    Without a ``lease`` nothing is recorded of it.
    """

    def __init__(self, plan: Plan, journal: Journal, lease: Held | None, memory: PatchMemory):
        """Look at a run; nothing is read or written."""
        self.plan = plan
        self.journal = journal
        self.lease = lease
        self.workspace = Workspace(plan)
        # Statistics belong to the volume, so they may be measured in smaller parts than blocks.
        self._reading = _Reading(plan.with_block(_SAMPLE_SHAPE))
        self._memory = memory
        self._known: dict[int, Known] = {}
        self._with_work: set[int] = set()
        self._dispatcher: SerialDispatcher | None = None

    # -- statistics

    @property
    def is_quick_to_measure(self) -> bool:
        """Whether exact statistics of a volume are there within about a second."""
        n_volumes = max(map(len, self.plan.groups.values()), default=1)
        n_voxels = math.prod(self.plan.measure_grid.volume_shape) * n_volumes
        return n_voxels * self.plan.model.in_channels <= QUICK_VOXELS

    def known(self, volume: int) -> Known | None:
        """Return what is known of a volume."""
        return self._known.get(volume)

    def learn(self, volume: int, known: Known) -> None:
        """Take over what was measured."""
        self._known[volume] = known

    def measure(self, volume: int, is_over: threading.Event, emit: Emit = ignore) -> Known:
        """Measure a volume, or all of its group, as a run does.

        Raises:
            DataError: A voxel is not finite.
            KeyboardInterrupt: The work is to end.
        """
        plan = self.plan
        if plan.measure_level is None:
            return Known(describe_volume(plan, ()))
        if not plan.resolved.pools_statistics():
            return Known(describe_volume(plan, self._measure(volume, is_over, emit)))
        members = plan.groups[plan.group_of(volume)]
        told = [self._measure(each, is_over, emit) for each in members]
        return Known(describe_group(plan, told))

    def _measure(self, volume: int, is_over: threading.Event, emit: Emit) -> list[TaskSummary]:
        n_parts = len(self._reading.plan.measure_grid)
        progress = StageProgress("measure", n_done=0, n_tasks=n_parts)
        summaries = []
        measured = partial(measure_block, self._reading, volume)
        for _, summary in read_ahead(measured, range(n_parts), _PARTS_AT_ONCE):
            if is_over.is_set():
                raise KeyboardInterrupt
            summaries.append(summary)
            progress.n_done += 1
            emit(progress.show())
        return summaries

    def estimate(self, volume: int) -> Known:
        """Return statistics of a volume from a coarser level, or from its middle if it has none.

        Raises:
            DataError: A voxel is not finite.
        """
        image = self.plan.source_image
        measured = self.plan.measure_level or 0
        coarser = range(min(measured + 1, len(image.levels) - 1), len(image.levels))
        limit = math.prod(_SAMPLE_SHAPE)
        sizes = {level: math.prod(image.volume_shape(level)) for level in coarser}
        level = next((level for level, size in sizes.items() if size <= limit), coarser[-1])
        shape = image.volume_shape(level)
        box = Box.of(shape)
        origin = f"level {level + self.plan.resolved.level}"
        if box.size > limit:
            box = Box.centered(_SAMPLE_SHAPE, shape)
            origin = f"the middle of {origin}"
        described = []
        for channel in self._reading.sources(volume, level):
            sample = measure(
                channel.read(box), box, nan_to_background=self.plan.resolved.nan_to_background
            )
            described.append(describe_channel(self.plan, [PartStatistics(0, sample)]))
        return Known(tuple(described), origin)

    # -- scores

    def count_missing(self, volume: int, core: Box) -> int:
        """Return how many patches have to be predicted for a box of the target."""
        region = core.shifted(self.plan.region.start)
        known = self.known(volume)
        if known is None:
            return self.plan.patch_grid.count_touching(region)
        patches = self.plan.patch_grid.iter_touching(region)
        names = (self._name(volume, known, patch) for patch in patches)
        return sum(self._memory.find_named(name) is None for name in names)

    def _name(self, volume: int, known: Known, patch: Box) -> tuple[object, ...]:
        """Return the name of a patch in memory; other statistics make another one."""
        return (self.plan.run, volume, known, patch)

    def predict(self, volume: int, core: Box, known: Known, engine: Remembering) -> Array:
        """Return the scores ``(outputs, z, y, x)`` of a box of the target, as a run stores them.

        Raises:
            DataError: A voxel is not finite.
            EngineError: A logit is not finite, or the engine failed.
        """
        plan = self.plan
        region = core.shifted(plan.region.start)
        wanted = self._wanted(volume, region)
        dtype = plan.resolved.scores_dtype
        if wanted is not None and not wanted.any():
            return np.zeros((len(plan.model.outputs), *core.shape), dtype)
        unknown = None
        if is_nan_background(plan):
            unknown = find_unknown(self._read(volume, region))
        block = block_of(plan, region, known.statistics, wanted, unknown)
        logits = self._logits(volume, block, known, engine)
        blended = blend_predictions(block, logits.items(), block.patches.weights, NUMPY)
        return np.stack([HostOutputs(channel).scores(dtype) for channel in blended])

    def _wanted(self, volume: int, region: Box) -> NDArray[np.bool_] | None:
        reader = self.plan.mask_reader(self.plan.volumes[volume])
        return None if reader is None else reader.read(region)

    def _read(self, volume: int, box: Box) -> Array:
        return stack([channel.read(box) for channel in self._reading.sources(volume)])

    def _logits(
        self, volume: int, block: Block, known: Known, engine: Remembering
    ) -> dict[Box, Array]:
        """Return the logits of the patches of a block in grid order, predicted where necessary."""
        patches = list(block.patches.grid.iter_touching(block.core, block.where))
        names = {patch: self._name(volume, known, patch) for patch in patches}
        found = {patch: self._memory.find_named(names[patch]) for patch in patches}
        missing = [patch for patch, logits in found.items() if logits is None]
        if missing:
            values = self._read(volume, block.read_box)
            if values.dtype.kind == "f" and not is_nan_background(self.plan):
                for channel in values:
                    require_finite(channel, block.read_box)
            on_grid = resampled(replace(block, values=values), NUMPY)
            digests = {}

            def cut() -> Iterator[tuple[Box, Array]]:
                for patch in missing:
                    prepared = cut_patch(on_grid, patch, NUMPY)
                    digests[patch] = digest_of(prepared)
                    yield patch, prepared

            predicted = predict_patches(cut(), engine.predict_now, block.patches.batch, NUMPY)
            for patch, logits in predicted:
                found[patch] = logits
                self._memory.name(names[patch], digests[patch])
        return {patch: logits for patch, logits in found.items() if logits is not None}

    # -- what is done

    def _done(self, volume: int, core: Box) -> NDArray[np.bool_]:
        """Return which of the blocks that share a voxel with a box are done."""
        plan = self.plan
        if plan.is_one_task:
            return self.journal.done(plan.stages[0].name)[volume : volume + 1]
        stage = plan.stage("segment")
        first = volume * stage.per_volume
        done = self.journal.done(stage.name)[first : first + stage.per_volume]
        grid = plan.block_grid()
        axes = zip(core.start, core.stop, grid.block_shape, strict=True)
        touched = tuple(slice(a // n, -(-b // n)) for a, b, n in axes)
        return done.reshape(grid.grid_shape)[touched]

    def is_any_done(self, volume: int, core: Box) -> bool:
        """Return whether a block that shares a voxel with a box is stored."""
        return "scores" in self.plan.arrays and bool(self._done(volume, core).any())

    def stored(self, volume: int, core: Box) -> Array | None:
        """Return the scores ``(outputs, z, y, x)`` of a box, if they are all stored.

        Raises:
            DataError: A chunk is corrupt or lost.
        """
        if "scores" not in self.plan.arrays or not self._done(volume, core).all():
            return None
        outputs = self.plan.outputs_of(volume)
        return np.stack([self.workspace.array("scores", each).read(core) for each in outputs])

    def tasks_at(self, volume: int, core: Box) -> list[int]:
        """Return the tasks of the blocks that share a voxel with a box, and are not tried yet."""
        plan = self.plan
        name = plan.stages[0].name if plan.is_one_task else "segment"
        numbers = [0]
        if not plan.is_one_task:
            grid = plan.block_grid()
            numbers = [grid.index(position) for position in grid.iter_overlapping(core)]
        first = volume * plan.stage(name).per_volume
        return [index for index in (first + n for n in numbers) if self._is_untried(name, index)]

    def _is_untried(self, stage: str, index: int) -> bool:
        return not self.journal.done(stage)[index] and (stage, index) not in self.journal.failed

    # -- tasks

    def recorded(self, volume: int) -> Known | None:
        """Return the exact statistics of a volume, if its run has recorded them."""
        plan = self.plan
        stage = plan.stage_telling("statistics")
        if stage is None or not self.journal.is_stage_complete(stage.name, volume):
            return None
        if plan.is_one_task:
            (summary,) = self.journal.summaries(stage.name, volume)
            return Known(summary.statistics)
        progress = VolumeProgress(self.workspace, self.journal, volume)
        if not progress.is_group_settled:
            return None
        state = progress.state(("statistics",))
        return None if state.lacking else Known(state.statistics)

    def measure_recorded(self, volume: int, emit: Emit, is_over: threading.Event) -> Known | None:
        """Carry out the tasks of a volume that come before it is predicted.

        Returns its exact statistics, or none if a task failed or the end came.

        Raises:
            StoreError: Another client took the run over, or the store failed.
        """
        plan = self.plan
        segment = plan.stage("segment")
        for stage in plan.stages[: plan.stages.index(segment)]:
            for each in self._volumes_before(stage, volume):
                self._settle(stage, each, emit, is_over)
            if any(True for _ in self._progress_of(volume).left_of(stage)):
                return None
        if plan.measure_level is None:
            return Known(describe_volume(plan, ()))
        return self.recorded(volume)

    def run_looked_at(
        self,
        index: int,
        emit: Emit,
        is_over: threading.Event,
        measured: Callable[[int, Known], None],
    ) -> None:
        """Carry out the task of a block that was looked at, after those that it needs.

        ``measured`` is called once the exact statistics of the volume are known.

        Raises:
            StoreError: Another client took the run over, or the store failed.
        """
        plan = self.plan
        if plan.is_one_task:
            self._run(plan.stages[0], [index], emit, is_over)
            return
        segment = plan.stage("segment")
        volume, _ = plan.split_index(segment.name, index)
        known = self.measure_recorded(volume, emit, is_over)
        if known is None:
            return
        measured(volume, known)
        progress = self._progress_of(volume)
        if index in set(progress.left_of(segment)):
            progress.prepare(segment)
            self._run(segment, [index], emit, is_over)

    def _volumes_before(self, stage: PlannedStage, volume: int) -> Sequence[int]:
        """Return the volumes of which a stage comes before a volume is predicted."""
        is_pooled = self.plan.resolved.pools_statistics()
        if is_pooled and "statistics" in stage.declared.tells:
            return range(len(self.plan.volumes))
        return [volume]

    def _settle(
        self, stage: PlannedStage, volume: int, emit: Emit, is_over: threading.Event
    ) -> None:
        """Run what is left of a stage of a volume."""
        progress = self._progress_of(volume)
        untried = [i for i in progress.left_of(stage) if self._is_untried(stage.name, i)]
        if untried:
            progress.prepare(stage)
            self._run(stage, untried, emit, is_over)

    def _progress_of(self, volume: int) -> VolumeProgress:
        if volume not in self._with_work:
            self.workspace.create_work(volume)
            self._with_work.add(volume)
        return VolumeProgress(self.workspace, self.journal, volume)

    def _run(
        self, stage: PlannedStage, indices: Sequence[int], emit: Emit, is_over: threading.Event
    ) -> None:
        plan = self.plan
        assert self.lease is not None
        if self._dispatcher is None:
            self._dispatcher = SerialExecutor().dispatcher(plan, self.lease.id, emit)
        recorder = Recorder(
            (plan.source, plan.target),
            self.journal,
            self.lease,
            emit,
            lambda name: StageProgress(name, n_done=0, n_tasks=len(indices)),
            partial(failure_of, plan),
        )
        recorder.run(self._dispatcher, _Chosen(stage.name, indices, is_over))
        # A kill at any moment loses nothing that was finished before.
        self.journal.flush()
        if recorder.store_is_lost:
            raise StoreError(
                f"{plan.source} or {plan.target} does not answer; the blocks that you look at are "
                "no longer recorded: end the viewer and start it again"
            )
