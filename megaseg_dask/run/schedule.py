"""A volume on its way through the stages: what may start now, what has to be done again, what is left out.

A stage of a volume begins when the one before is settled: each of its tasks
is finished, or failed for good. Blocks that failed are missing from then on:
the rest of the volume goes on without them, and a later run tries them again,
together with what was computed in their absence.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megaseg_dask.plan.plan import Output, Plan, Stage
from megaseg_dask.run import workspace
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks import scores

# Stages whose tasks are about one block each; where one fails, that block is missing.
_PER_BLOCK = ("segment", "histogram", "threshold", "holes", "fill", "label", "relabel")
# Stages that have nothing to do where a block is missing.
_WITHOUT_MISSING = (*_PER_BLOCK, "seams", "holes-seams", "measurements")
# Stages without which there is no mask, or no label, of the whole volume.
_NEEDED_FOR = {
    "cutoff": "mask",
    "holes-seams": "mask",
    "holes-join": "mask",
    "seams": "labels",
    "join": "labels",
    "measurements": "table",
    "table": "table",
}


class Flow:
    """The tasks of one volume, or of all volumes where each of them is one task."""

    def __init__(
        self, plan: Plan, journal: Journal, volume: int, stages: Sequence[Stage] | None = None
    ) -> None:
        """Find what is left to do of a volume, and make the first of it ready.

        Of these ``stages`` alone, if they are given; the intermediate data that they need are then there.
        """
        self._plan, self._journal, self.volume = plan, journal, volume
        self._waiting = iter(plan.stages if stages is None else stages)
        self._pending: deque[int] = deque()
        self._n_running = 0
        self.stage: Stage = plan.stages[0]
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

    def left_of(self, stage: Stage) -> Iterator[int]:
        """Yield the tasks of a stage that are not done, neighbours after each other."""
        done = self._journal.done(stage.name)
        if self._plan.is_one_task:
            yield from (~done).nonzero()[0].tolist()
            return
        first = self.volume * stage.per_volume
        if done[first : first + stage.per_volume].all() or self._is_left_out(stage):
            return
        grid = self._plan.grid(stage.name)
        missing = set(self.missing(before=stage)) if stage.name in _WITHOUT_MISSING else set()
        for number in grid.morton_order().tolist() if grid else [0]:
            if not done[first + number] and number not in missing:
                yield first + number

    def n_untried(self, stage: Stage) -> int:
        """Return how many tasks of a stage are left that did not fail: without them it is not settled."""
        return sum((stage.name, index) not in self._journal.failed for index in self.left_of(stage))

    def _is_left_out(self, stage: Stage) -> bool:
        failed = self._failed_stages()
        if "measure" in failed:
            return stage.name != "measure"
        if stage.name.startswith("downsample-"):
            return False
        names = [s.name for s in self._plan.stages]
        return any(
            names.index(name) < names.index(stage.name) for name in failed if name in _NEEDED_FOR
        )

    def _failed_stages(self) -> set[str]:
        return {stage for stage, _ in self._failures()}

    def _failures(self) -> list[tuple[str, int]]:
        failed = [
            (stage, *self._plan.split_index(stage, index)) for stage, index in self._journal.failed
        ]
        return [(stage, number) for stage, volume, number in failed if volume == self.volume]

    def missing(self, before: Stage) -> list[int]:
        """Return the numbers of the blocks that failed in an earlier stage."""
        names = [s.name for s in self._plan.stages]
        earlier = names[: names.index(before.name)]
        return sorted(
            {
                number
                for stage, number in self._failures()
                if stage in earlier and stage in _PER_BLOCK
            }
        )

    def state(self) -> VolumeState:
        """Return what the tasks of the current stage have to know of the whole volume."""
        state = VolumeState(
            missing=tuple(self.missing(before=self.stage)), outputs=tuple(self._outputs())
        )
        if self.stage.name == "measure":
            return state
        return replace(
            state,
            statistics=scores.describe_volume(self._plan, self._summaries("measure")),
            by_output=tuple(map(self._state_of, self._plan.outputs_of(self.volume))),
        )

    def _state_of(self, output: Output) -> OutputState:
        """Return extremes and threshold of an output, as far as they are known and needed."""
        extremes = self._of_output("segment", output)
        cutoffs = self._of_output("cutoff", output)
        threshold = cutoffs[0].threshold if cutoffs else None
        return replace(scores.merge_extremes(extremes), threshold=threshold)

    def _of_output(self, stage: str, output: Output) -> list[OutputState]:
        """Return what the finished tasks of a stage tell of an output."""
        summaries = self._summaries(stage)
        return [s.by_output[output.number] for s in summaries if s.by_output]

    def _summaries(self, stage: str) -> list[TaskSummary]:
        if stage not in (s.name for s in self._plan.stages):
            return []
        return self._journal.summaries(stage, self.volume)

    def _outputs(self) -> list[str]:
        """Return the outputs that there are of this volume."""
        lost = {_NEEDED_FOR[stage] for stage in self._failed_stages() if stage in _NEEDED_FOR}
        if "mask" in lost:
            lost.add("labels")
        return [kind for kind in self._plan.arrays if kind not in lost]

    # -- what has to be done again

    def _undo_after(self, stage: Stage) -> None:
        """Forget what was computed from this stage in the absence of what is now computed, before it is."""
        self._journal.undo(self.stale_after(stage), self.volume)

    def stale_after(self, stage: Stage) -> list[str]:
        """Return the stages that were done from this one before all of it was."""
        stages = self._plan.stages
        stale = False
        undone = []
        for later in stages[stages.index(stage) + 1 :]:
            stale = stale or not later.local
            first = self.volume * later.per_volume
            if stale and self._journal.done(later.name)[first : first + later.per_volume].any():
                undone.append(later.name)
        return undone

    def _require_work(self) -> None:
        """Make the arrays of intermediate data if they are not there; what was written to them is then lost."""
        if not workspace.has_work(self._plan, self.volume):
            self._journal.undo(
                [s.name for s in self._plan.stages if s.name != "measure"], self.volume
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
