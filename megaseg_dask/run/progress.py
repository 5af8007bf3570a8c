"""What becomes of tasks: a dispatcher runs them, the journal records them, events report them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megaseg_dask.events import Emit, Failure, Progress
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.retries import StoreWatch
from megaseg_dask.run.tasks.worker import Outcome
from megaseg_dask.stores import Location, stop_waiting

# Given a stage and how many of its tasks are ready, how many to take.
GroupSize = Callable[[str, int], int]
# Given that, a stage and the indices of tasks that may start now; none if there are none.
Ready = Callable[[GroupSize], tuple[str, Sequence[int]]]

# Between two events of one stage.
_MIN_PAUSE_S = 0.2


class Dispatcher(Protocol):
    """Runs tasks somewhere."""

    def outcomes(self, ready: Ready) -> Iterator[tuple[str, Outcome]]:
        """Yield stage and outcome of each task that is done, or has failed for good.

        ``ready`` is asked for tasks again after each outcome.
        """
        ...


class Tasks(Protocol):
    """The tasks to run."""

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return a stage and the indices of tasks that may start now, which are then running."""
        ...

    def settle(self, stage: str, index: int) -> None:
        """Mark a running task as ended; its outcome is in the journal."""
        ...


# A stage with more tasks than this shows progress enough by counting them.
_MAX_WATCHED_TASKS = 16


def watched_stages(plan: Plan) -> dict[str, int]:
    """Return the number of tasks of each stage whose blocks tell how far they are."""
    return {
        stage.name: stage.n_tasks
        for stage in plan.stages
        if "scores" in stage.declared.tells and stage.n_tasks <= _MAX_WATCHED_TASKS
    }


@dataclass
class StageProgress:
    """Counts the tasks of a stage; ``voxels`` and ``units`` are those of a task, on average."""

    stage: str
    n_done: int
    n_tasks: int
    voxels: float = 0.0
    unit: str = ""
    units: float = 0.0
    n_failed: int = 0
    began_s: float = field(default_factory=time.monotonic)
    shown_s: float = 0.0

    def __post_init__(self) -> None:
        self.n_before = self.n_done

    @property
    def is_due(self) -> bool:
        """Whether the stage is to be shown: after its first and last task, and now and then."""
        n_ended = self.n_done + self.n_failed
        if n_ended in (self.n_before + 1, self.n_tasks):
            return True
        return time.monotonic() - self.shown_s > _MIN_PAUSE_S

    def show(self) -> Progress:
        """Return the event of this moment."""
        self.shown_s = time.monotonic()
        elapsed_s = self.shown_s - self.began_s
        per_s = (self.n_done - self.n_before) / elapsed_s if elapsed_s else 0.0
        n_left = self.n_tasks - self.n_done - self.n_failed
        return Progress(
            stage=self.stage,
            n_done=self.n_done,
            n_tasks=self.n_tasks,
            elapsed_s=round(elapsed_s, 3),
            voxels_per_s=per_s * self.voxels,
            left_s=n_left / per_s if per_s else None,
            n_failed=self.n_failed,
            unit=self.unit,
            units_per_s=per_s * self.units,
        )


class Recorder:
    """Records the outcomes of tasks in the journal, and reports them."""

    def __init__(
        self,
        stores: Sequence[Location],
        journal: Journal,
        lease: Held,
        emit: Emit,
        progress_of: Callable[[str], StageProgress],
        failure_of: Callable[[str, Outcome], Failure],
    ) -> None:
        """Record for the client that holds a lease, of tasks that read and write ``stores``.

        ``progress_of`` begins to count a stage, and ``failure_of`` names a task that failed.
        """
        self._journal = journal
        self._lease = lease
        self._emit = emit
        self._progress_of = progress_of
        self._failure_of = failure_of
        self._progress: dict[str, StageProgress] = {}
        self._stores = StoreWatch(stores)
        self.n_done = 0
        self.failures: list[Failure] = []
        self.store_is_lost = False

    def run(self, dispatcher: Dispatcher, tasks: Tasks) -> None:
        """Run tasks until none is left, or a store is lost.

        Raises:
            StoreError: Another client took the run over, or the journal cannot be written.
            ClusterError: The workers are lost.
        """

        def ready(size: GroupSize) -> tuple[str, Sequence[int]]:
            stage, indices = tasks.take(size)
            if indices:
                self._begin(stage)
            return stage, indices

        # Tasks that ran before may run again.
        self._progress.clear()
        for stage, outcome in dispatcher.outcomes(ready):
            # A store that failed a task was waited for; before a write it is asked again.
            if not outcome.is_infrastructure:
                self._lease.require()
            self._record(stage, outcome)
            tasks.settle(stage, outcome.index)
            if self._stores.is_lost_after(outcome):
                self.store_is_lost = True
                stop_waiting()
                return

    def _begin(self, stage: str) -> None:
        if stage not in self._progress:
            self._progress[stage] = self._progress_of(stage)
            # A first block may take minutes: show the stage before it is done.
            self._emit(self._progress[stage].show())

    def _record(self, stage: str, outcome: Outcome) -> None:
        progress = self._progress[stage]
        if outcome.error:
            failure = self._failure_of(stage, outcome)
            self._journal.add_failure(failure)
            self.failures.append(failure)
            self._emit(failure)
            progress.n_failed += 1
        else:
            self._journal.add(
                stage,
                outcome.index,
                outcome.summary,
                outcome.seconds,
                outcome.peak_bytes,
                outcome.device_peak_bytes,
                outcome.traffic,
            )
            self.n_done += 1
            progress.n_done += 1
        if progress.is_due:
            self._emit(progress.show())
