"""Which tasks may start now, which are left out, and which have to be done again.

A stage of a volume begins when the one before is settled: each of its tasks
is finished, or failed for good. Blocks that failed are missing from then on:
the rest of the volume goes on without them, and a later run tries them again,
together with all that was computed in their absence.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.plan.stages import Fact, PlannedStage
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.progress import GroupSize
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks.statistics import describe_group, describe_volume
from megaseg_dask.run.tasks.thresholds import merge_extremes, merge_sums
from megaseg_dask.run.tasks.worker import volume_name
from megaseg_dask.run.workspace import Workspace


class VolumeProgress:
    """The tasks of one volume that are left, stage by stage, as its journal has them.

    Where each volume is one task, volume 0 stands for all of them.
    """

    def __init__(
        self,
        workspace: Workspace,
        journal: Journal,
        volume: int,
        left_out: Collection[int] = (),
    ) -> None:
        """Look at one volume; nothing is read or written.

        Where each volume is one task, those that are ``left_out`` are not left.
        """
        self.volume = volume
        self._left_out = left_out
        self._workspace = workspace
        self._plan = workspace.plan
        self._journal = journal

    def left_of(self, stage: PlannedStage) -> Iterator[int]:
        """Yield the tasks of a stage that are not done, neighbors after each other."""
        done = self._journal.done(stage.name)
        if self._plan.is_one_task:
            for index in (~done).nonzero()[0].tolist():
                if index not in self._left_out:
                    yield index
            return
        if self._journal.is_stage_complete(stage.name, self.volume) or self._is_left_out(stage):
            return
        grid = self._plan.grid(stage)
        missing = set(self.missing_before(stage)) if stage.skips_missing else set()
        first = self.volume * stage.per_volume
        for number in grid.morton_order().tolist() if grid else [0]:
            if not done[first + number] and number not in missing:
                yield first + number

    def count_untried(self, stage: PlannedStage) -> int:
        """Return how many tasks of a stage are left that did not fail.

        The stage is settled when there are none.
        """
        failed = self._journal.failed
        return sum((stage.name, index) not in failed for index in self.left_of(stage))

    def missing_before(self, stage: PlannedStage) -> list[int]:
        """Return the numbers of the blocks that failed in an earlier stage.

        A coarser level has no holes where the finest one has some: what counts for the next is
        which of its own blocks failed.
        """
        failures = self._failures()
        if stage.level > 1:
            return sorted(n for failed, n in failures if failed.level == stage.level - 1)
        earlier = self._stages_before(stage)
        return sorted({n for failed, n in failures if failed in earlier and failed.loses_block})

    def stale_after(self, stage: PlannedStage) -> list[str]:
        """Return the later stages that were begun before all of this stage was done.

        A task that was done then, and whose objects are lost, was not missing.
        """
        lost = self._journal.lost
        if all((stage.name, index) in lost for index in self.left_of(stage)):
            return []
        # Stages of which tasks run again, here only where a block was missing.
        redone = [stage]
        is_stale = False
        names = []
        position = self._plan.stages.index(stage)
        for later in self._plan.stages[position + 1 :]:
            is_stale = is_stale or any(map(later.depends_on, redone))
            redone.append(later)
            if is_stale and self._journal.has_begun(later.name, self.volume):
                names.append(later.name)
        return names

    def prepare(self, stage: PlannedStage) -> None:
        """Undo what is stale, and write what the tasks of a stage have to know.

        Later stages that were computed in the absence of a task are forgotten before it runs.
        """
        if not self._plan.is_one_task:
            self._journal.undo(self.stale_after(stage), self.volume)
            self._workspace.folder.write_state(self.volume, self.state_before(stage))

    def state_before(self, stage: PlannedStage) -> VolumeState:
        """Return what the tasks of a stage have to know of the whole volume, and nothing else."""
        return replace(
            self.state(stage.declared.needs),
            missing=tuple(self.missing_before(stage)),
            outputs=tuple(self._outputs()),
        )

    def state(self, facts: Sequence[Fact]) -> VolumeState:
        """Return facts about the volume, from what its finished tasks told."""
        state = VolumeState()
        if "statistics" in facts:
            state = self._measured()
        outputs = self._plan.outputs_of(self.volume)
        by_output = tuple(self._output_state(output, facts) for output in outputs)
        return replace(state, by_output=by_output)

    def _measured(self) -> VolumeState:
        """Return the statistics of the volume, or those of its group."""
        if self._plan.resolved.pools_statistics():
            return groups_of(self._plan, self._journal).measured(self._plan.group_of(self.volume))
        statistics = describe_volume(self._plan, self._summaries("statistics"))
        return VolumeState(statistics=statistics)

    @property
    def is_group_settled(self) -> bool:
        """Whether nothing is left untried to measure, if statistics are those of groups."""
        if not self._plan.resolved.pools_statistics():
            return True
        measure = self._plan.stages[0].name
        n_failed = sum(stage == measure for stage, _ in self._journal.failed)
        return int((~self._journal.done(measure)).sum()) == n_failed

    def _output_state(self, output: Output, facts: Sequence[Fact]) -> OutputState:
        state = OutputState()
        if "scores" in facts:
            told_of_blocks = self._told_of(output, "scores")
            state = merge_extremes(told_of_blocks).updated(merge_sums(told_of_blocks))
        if "threshold" in facts:
            for told in self._told_of(output, "threshold"):
                state = state.updated(told)
        if "objects" in facts:
            for told in self._told_of(output, "objects"):
                state = state.updated(told)
        return state

    def _told_of(self, output: Output, fact: Fact) -> list[OutputState]:
        summaries = self._summaries(fact)
        return [summary.output(output.number) for summary in summaries if summary.by_output]

    def _summaries(self, fact: Fact) -> list[TaskSummary]:
        stage = self._plan.stage_telling(fact)
        return self._journal.summaries(stage.name, self.volume) if stage else []

    def _outputs(self) -> list[str]:
        """Return the kinds of arrays that the volume will have."""
        lost: set[str] = {stage.declared.loss for stage, _ in self._failures()}
        if "mask" in lost:
            lost.add("labels")
        return [kind for kind in self._plan.arrays if kind not in lost]

    def _is_left_out(self, stage: PlannedStage) -> bool:
        earlier = self._stages_before(stage)
        losses = {failed.declared.loss for failed, _ in self._failures() if failed in earlier}
        if "volume" in losses:
            return True
        # Coarser levels are computed of the arrays that there are.
        return stage.declared.over != "levels" and bool(losses - {"block"})

    def _failures(self) -> list[tuple[PlannedStage, int]]:
        """Return stage and number of the tasks of this volume that failed."""
        failures = []
        for name, index in self._journal.failed:
            volume, number = self._plan.split_index(name, index)
            if volume == self.volume:
                failures.append((self._plan.stage(name), number))
        return failures

    def _stages_before(self, stage: PlannedStage) -> tuple[PlannedStage, ...]:
        return self._plan.stages[: self._plan.stages.index(stage)]


class GroupStatistics:
    """The statistics of groups of volumes, each computed once from what its tasks told."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        """Look at a journal; nothing is read or written."""
        self._plan = plan
        self._done = journal.done(plan.stages[0].name)
        self._summaries = partial(journal.summaries, plan.stages[0].name)
        self._n_done = 0
        self._known: dict[str, VolumeState] = {}

    def measured(self, group: str) -> VolumeState:
        """Return the statistics of a group, or the names of the volumes that it lacks."""
        n_done = int(self._done.sum())
        if n_done != self._n_done:
            self._known.clear()
            self._n_done = n_done
        if group not in self._known:
            self._known[group] = self._describe(group)
        return self._known[group]

    def _describe(self, group: str) -> VolumeState:
        members = self._plan.groups[group]
        by_volume = self._done.reshape(len(self._plan.volumes), -1)
        unmeasured = set(np.flatnonzero(~by_volume.all(axis=1)).tolist())
        lacking = [self._plan.volumes[volume] for volume in members if volume in unmeasured]
        if lacking:
            return VolumeState(lacking=tuple(map(volume_name, lacking)))
        told = [self._summaries(volume) for volume in members]
        return VolumeState(statistics=describe_group(self._plan, told))


_GROUPS: WeakKeyDictionary[Journal, GroupStatistics] = WeakKeyDictionary()


def groups_of(plan: Plan, journal: Journal) -> GroupStatistics:
    """Return the statistics of groups that a journal tells."""
    if journal not in _GROUPS:
        _GROUPS[journal] = GroupStatistics(plan, journal)
    return _GROUPS[journal]


class GroupMeasures:
    """The tasks that measure all volumes, before a volume of any group is predicted."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        """Find what is left."""
        self.stage = plan.stages[0].name
        self._pending = deque((~journal.done(self.stage)).nonzero()[0].tolist())
        self._n_running = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left that could run."""
        return not self._pending and not self._n_running

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return tasks that may start now, which are then running."""
        n_taken = min(size(self.stage, len(self._pending)), len(self._pending))
        self._n_running += n_taken
        return self.stage, [self._pending.popleft() for _ in range(n_taken)]

    def settle(self) -> None:
        """Mark a running task as ended."""
        self._n_running -= 1


class VolumeSchedule:
    """The tasks of one volume that may start now.

    A stage follows when the one before is settled.
    """

    def __init__(self, progress: VolumeProgress, stages: Sequence[PlannedStage]) -> None:
        """Make the first stage ready that has something left."""
        self.volume = progress.volume
        self._progress = progress
        self._waiting = iter(stages)
        self._stage = ""
        self._pending: deque[int] = deque()
        self._n_running = 0
        self._advance()

    @property
    def n_ready(self) -> int:
        """Number of tasks that may start now."""
        return len(self._pending)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left that could run."""
        return not self._pending and not self._n_running

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return the stage and the indices of tasks that may start now, which are then running."""
        n_taken = min(size(self._stage, self.n_ready), self.n_ready)
        indices = [self._pending.popleft() for _ in range(n_taken)]
        self._n_running += n_taken
        return self._stage, indices

    def settle(self) -> None:
        """Mark a running task as ended; its outcome is in the journal."""
        self._n_running -= 1
        if self.is_over:
            self._advance()

    def _advance(self) -> None:
        for stage in self._waiting:
            self._stage = stage.name
            self._pending = deque(self._progress.left_of(stage))
            if self._pending:
                self._progress.prepare(stage)
                return


class Schedule:
    """The tasks of all volumes of a run; a stage of one does not wait for another volume."""

    def __init__(
        self,
        workspace: Workspace,
        journal: Journal,
        finished: Callable[[int], None] = lambda volume: None,
        left_out: Collection[int] = (),
    ) -> None:
        """Begin no volume yet.

        ``finished`` is told of each volume when its last task is recorded. Volumes that are
        ``left_out`` are not tried.
        """
        self._workspace = workspace
        self._plan = workspace.plan
        self._journal = journal
        self._finished = finished
        self._left_out = left_out
        self._measures: GroupMeasures | None = None
        if self._plan.resolved.pools_statistics():
            self._measures = GroupMeasures(self._plan, journal)
        self._active: list[VolumeSchedule] = []
        self._upcoming = self._iter_volumes()

    def prepare(self) -> None:
        """Make room for all volumes, and undo what has to be done again, without running a task."""
        if not self._plan.is_one_task:
            for _ in self._upcoming:
                pass

    def _iter_volumes(self) -> Iterator[VolumeSchedule]:
        """Yield the volumes that are not complete; each begins when it is asked for."""
        volumes = range(1 if self._plan.is_one_task else len(self._plan.volumes))
        for volume in volumes:
            if not self._plan.is_one_task:
                if self._journal.is_complete(volume) or volume in self._left_out:
                    continue
                self._workspace.create_work(volume)
            progress = VolumeProgress(self._workspace, self._journal, volume, self._left_out)
            stages = self._plan.stages
            if self._measures is not None:
                # A volume that could not be measured is tried again by the next run.
                stages = stages[1:]
            yield VolumeSchedule(progress, stages)

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return tasks of the first volume that has some.

        A volume begins only when those before leave workers idle.
        """
        if self._measures is not None and not self._measures.is_over:
            return self._measures.take(size)
        while True:
            for schedule in self._active:
                if schedule.n_ready:
                    return schedule.take(size)
            following = next(self._upcoming, None)
            if following is None:
                return "", ()
            if not following.is_over:
                self._active.append(following)

    def settle(self, stage: str, index: int) -> None:
        """Mark a running task as ended, and remove the intermediate data of a finished volume."""
        if self._measures is not None and stage == self._measures.stage:
            self._measures.settle()
            return
        volume = 0
        if not self._plan.is_one_task:
            volume, _ = self._plan.split_index(stage, index)
        schedule = next(active for active in self._active if active.volume == volume)
        schedule.settle()
        if self._plan.is_one_task and self._journal.done(stage)[index]:
            self._finished(index)
        if not schedule.is_over:
            return
        self._active.remove(schedule)
        if self._journal.is_complete(volume) and not self._plan.is_one_task:
            self._finished(volume)
            # Disks are not filled by finished volumes. Recorded first: a kill in between would
            # leave a volume to be relabelled, and nothing to relabel.
            self._journal.flush()
            self._workspace.folder.work(volume).remove()
