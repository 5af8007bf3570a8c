"""A volume on its way through the stages: what may start now, what has to be done again, what is left out.

A stage of a volume begins when the one before is settled: each of its tasks
is finished, or failed for good. Blocks that failed are missing from then on:
the rest of the volume goes on without them, and a later run tries them again,
together with what was computed in their absence.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.plan.stages import Fact, PlannedStage
from megaseg_dask.run import workspace
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks import scores


class Flow:
    """The tasks of one volume, or of all volumes where each of them is one task."""

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        volume: int,
        stages: Sequence[PlannedStage] | None = None,
    ) -> None:
        """Find what is left to do of a volume, and make the first of it ready.

        Of these ``stages`` alone, if they are given; the intermediate data that they need are then there.
        """
        self._plan, self._journal, self.volume = plan, journal, volume
        self._waiting = iter(plan.stages if stages is None else stages)
        self._pending: deque[int] = deque()
        self._n_running = 0
        self.stage: PlannedStage = plan.stages[0]
        if stages is None and not plan.is_one_task and not journal.is_complete(volume):
            self._require_work()
        self._advance()

    # -- what the runner sees

    @property
    def n_ready(self) -> int:
        """Number of tasks that may start now."""
        return len(self._pending)

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is left that could run."""
        return not self._pending and not self._n_running

    def take(self, n: int) -> tuple[str, Sequence[int]]:
        """Return the stage and the indices of the next ``n`` tasks, which are now running."""
        taken = [self._pending.popleft() for _ in range(min(n, len(self._pending)))]
        self._n_running += len(taken)
        return self.stage.name, taken

    def settle(self, n: int = 1) -> None:
        """Note that running tasks ended, one way or the other; the journal knows which."""
        self._n_running -= n
        if self.is_over:
            self._advance()

    # -- from stage to stage

    def _advance(self) -> None:
        for stage in self._waiting:
            self.stage = stage
            self._pending = deque(self.left_of(stage))
            if self._pending:
                if not self._plan.is_one_task:
                    self._undo_after(stage)
                    workspace.write_state(self._plan, self.volume, self.state())
                return

    def left_of(self, stage: PlannedStage) -> Iterator[int]:
        """Yield the tasks of a stage that are not done, neighbours after each other."""
        done = self._journal.done(stage.name)
        if self._plan.is_one_task:
            yield from (~done).nonzero()[0].tolist()
            return
        first = self.volume * stage.per_volume
        if done[first : first + stage.per_volume].all() or self._is_left_out(stage):
            return
        grid = self._plan.grid(stage)
        missing = set(self.missing(before=stage)) if stage.skips_missing else set()
        for number in grid.morton_order().tolist() if grid else [0]:
            if not done[first + number] and number not in missing:
                yield first + number

    def n_untried(self, stage: PlannedStage) -> int:
        """Return how many tasks of a stage are left that did not fail: without them it is not settled."""
        return sum((stage.name, index) not in self._journal.failed for index in self.left_of(stage))

    def _is_left_out(self, stage: PlannedStage) -> bool:
        earlier = self._stages_before(stage)
        losses = {failed.declared.loss for failed in self._failed_stages() if failed in earlier}
        if "volume" in losses:
            return True
        # Coarser levels are made of what there is.
        return stage.declared.over != "levels" and bool(losses - {"block"})

    def _stages_before(self, stage: PlannedStage) -> Sequence[PlannedStage]:
        stages = self._plan.stages
        return stages[: stages.index(stage)]

    def _failed_stages(self) -> set[PlannedStage]:
        return {stage for stage, _ in self._failures()}

    def _failures(self) -> list[tuple[PlannedStage, int]]:
        """Return stage and number of the tasks of this volume that failed."""
        failures = []
        for name, index in self._journal.failed:
            volume, number = self._plan.split_index(name, index)
            if volume == self.volume:
                failures.append((self._plan.stage(name), number))
        return failures

    def missing(self, before: PlannedStage) -> list[int]:
        """Return the numbers of the blocks that failed in an earlier stage."""
        losing = [stage for stage in self._stages_before(before) if stage.loses_block]
        return sorted({number for stage, number in self._failures() if stage in losing})

    def state(self) -> VolumeState:
        """Return what the tasks of the current stage have to know of the whole volume."""
        state = VolumeState(
            missing=tuple(self.missing(before=self.stage)), outputs=tuple(self._outputs())
        )
        if "statistics" in self.stage.declared.tells:
            return state
        return replace(
            state,
            statistics=scores.describe_volume(self._plan, self._summaries("statistics")),
            by_output=tuple(map(self._state_of, self._plan.outputs_of(self.volume))),
        )

    def _state_of(self, output: Output) -> OutputState:
        """Return extremes and threshold of an output, as far as they are known and needed."""
        extremes = self._of_output("scores", output)
        cutoffs = self._of_output("threshold", output)
        threshold = cutoffs[0].threshold if cutoffs else None
        return replace(scores.merge_extremes(extremes), threshold=threshold)

    def _of_output(self, fact: Fact, output: Output) -> list[OutputState]:
        """Return what finished tasks tell of an output."""
        summaries = self._summaries(fact)
        return [s.by_output[output.number] for s in summaries if s.by_output]

    def _summaries(self, fact: Fact) -> list[TaskSummary]:
        stage = self._plan.stage_telling(fact)
        return self._journal.summaries(stage.name, self.volume) if stage else []

    def _outputs(self) -> list[str]:
        """Return the outputs that there are of this volume."""
        lost: set[str] = {stage.declared.loss for stage in self._failed_stages()}
        if "mask" in lost:
            lost.add("labels")
        return [kind for kind in self._plan.arrays if kind not in lost]

    # -- what has to be done again

    def _undo_after(self, stage: PlannedStage) -> None:
        """Forget what was computed from this stage in the absence of what is now computed, before it is."""
        self._journal.undo(self.stale_after(stage), self.volume)

    def stale_after(self, stage: PlannedStage) -> list[str]:
        """Return the stages that were done from this one before all of it was."""
        stages = self._plan.stages
        stale = False
        undone = []
        for later in stages[stages.index(stage) + 1 :]:
            stale = stale or not later.declared.local
            first = self.volume * later.per_volume
            if stale and self._journal.done(later.name)[first : first + later.per_volume].any():
                undone.append(later.name)
        return undone

    def _require_work(self) -> None:
        """Make the arrays of intermediate data if they are not there; what was written to them is then lost."""
        if not workspace.has_work(self._plan, self.volume):
            self._journal.undo(
                [s.name for s in self._plan.stages if "statistics" not in s.declared.tells],
                self.volume,
            )
            workspace.work_folder(self._plan, self.volume).remove()
            workspace.create_work(self._plan, self.volume)


def iter_flows(plan: Plan, journal: Journal) -> Iterator[Flow]:
    """Yield a flow for each volume that is not complete; they begin when asked for."""
    if plan.is_one_task:
        yield Flow(plan, journal, 0)
        return
    for volume in range(len(plan.volumes)):
        if not journal.is_complete(volume):
            yield Flow(plan, journal, volume)
