"""Tasks in this process, one after the other: `--workers 0`, job arrays, and most tests."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context

from megaseg_dask.errors import EngineError
from megaseg_dask.events import Emit, Joined, PatchProgress, ignore
from megaseg_dask.inference.block import telling
from megaseg_dask.inference.certificate import Certificate
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.lease import Leases, Permit
from megaseg_dask.run.progress import Ready, watched_stages
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.tasks.proof import prove_engine
from megaseg_dask.run.tasks.worker import Outcome, RunWork, Worker
from megaseg_dask.run.workspace import Workspace
from megaseg_dask.stores import StoreOptions


class SerialDispatcher:
    """Runs the tasks of one run in this process."""

    def __init__(
        self,
        worker: Worker,
        retries: Retries,
        emit: Emit = ignore,
        watched: Mapping[str, int] | None = None,
    ) -> None:
        """Run tasks by a worker that belongs to this process.

        ``watched`` are the stages that show patches, with their numbers of tasks.
        """
        self._worker = worker
        self._retries = retries
        self._emit = emit
        self._watched = watched or {}

    def outcomes(self, ready: Ready) -> Iterator[tuple[str, Outcome]]:
        """Yield stage and outcome of each task, in order.

        Raises:
            EngineError: The GPU of this process failed.
        """
        while True:
            stage, indices = ready(lambda stage, n_ready: 1)
            if not indices:
                return
            for index in indices:
                yield stage, self._attempt(stage, index)

    def _attempt(self, stage: str, index: int) -> Outcome:
        attempt = 1
        outcome = self._try(stage, index)
        while outcome.is_infrastructure and self._retries.allow(attempt):
            attempt += 1
            time.sleep(self._retries.pause_s(attempt))
            outcome = self._try(stage, index)
        return outcome

    def _try(self, stage: str, index: int) -> Outcome:
        """Run a task once.

        Raises:
            EngineError: The GPU of this process failed: nothing can be predicted here any more.
        """
        # What is told may be written to the log, and is then no output of the task.
        outside = copy_context()

        def tell(n_done: int, n_patches: int, left_s: float) -> None:
            outside.run(self._show, stage, n_done, n_patches, left_s)

        with telling(tell) if stage in self._watched else nullcontext():
            outcome = self._worker.attempt(stage, index)
        if outcome.device == "failed":
            raise EngineError(f"{outcome.error}; run the same command again to resume")
        return outcome

    def _show(self, stage: str, n_done: int, n_patches: int, left_s: float) -> None:
        is_only = self._watched[stage] == 1
        self._emit(PatchProgress(stage, n_done, n_patches, left_s=left_s if is_only else None))


class SerialExecutor:
    """Carries out the tasks of a request in this process."""

    dashboard: str | None = None
    workers: Sequence[Joined] = ()

    def check(self) -> None:
        """Check nothing: this process made the plan."""

    def ready(self, plan: Plan, options: StoreOptions) -> AbstractContextManager[None]:
        """Do nothing: the stores of this process are configured."""
        return nullcontext()

    def prove(self, plan: Plan) -> Certificate | None:
        """Let the engine of this process prove itself."""
        return prove_engine(plan)

    def dispatcher(self, plan: Plan, lease_id: str, emit: Emit) -> SerialDispatcher:
        """Return a dispatcher of the tasks of one run."""
        permit = Permit(Leases(runs_folder(plan.target)), lease_id)
        worker = Worker(RunWork(Workspace(plan, permit)))
        retries = Retries(plan.settings.retries)
        return SerialDispatcher(worker, retries, emit, watched_stages(plan))
