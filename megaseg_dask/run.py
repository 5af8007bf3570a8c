"""Carry out a plan: the pending tasks of each stage over a bounded window of futures.

The scheduler sees a few hundred futures and small summaries, however many
blocks there are. What is finished goes to the journal; what it holds is never
computed again. The final state is derived from the journal.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from megaseg_dask import targets, tasks
from megaseg_dask.cluster import connect
from megaseg_dask.errors import MegasegError, StoreError, TargetError, TaskError
from megaseg_dask.events import Event, Failure, Progress, Result, RunStatus, Started
from megaseg_dask.journal import FOLDER as journal_folder
from megaseg_dask.journal import Journal
from megaseg_dask.lease import Held, held
from megaseg_dask.plan import Plan, make_plan, run_folder, runs_folder
from megaseg_dask.settings import Settings
from megaseg_dask.stores import Location

Emit = Callable[[Event], None]

# Enough tasks in flight that no worker waits for the client, few enough that memory stays flat.
_LEAST_WINDOW = 8
_PER_WORKER = 2
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0


def plan_run(source: str, target: str, settings: Settings) -> tuple[Plan, Journal]:
    """Return the plan to carry out and what an earlier run of it finished; writes nothing.

    Raises :class:`TargetError` if the target holds another run, or is not ours.
    """
    run = run_folder(Location.of(target), settings.label_name)
    recorded = None if settings.overwrite else targets.read_recorded(run)
    plan = make_plan(source, target, settings, recorded=recorded)
    if recorded is not None:
        targets.require_same(plan, recorded)
        journal = Journal.read(run, plan.fingerprint)
        if targets.is_present(plan, finished=journal.result is not None):
            return plan, journal
    # Nothing is done in arrays that are not there, whatever a record beside them says.
    targets.require_free(plan)
    return plan, Journal(run, plan.fingerprint)


def segment(source: str, target: str, settings: Settings, *, client: Any = None, emit: Emit = lambda _: None) -> Result:
    """Segment ``source`` into ``target``; resumes what an earlier run of the same plan left undone.

    ``client`` is a Dask client to use instead of starting workers. Raises
    :class:`MegasegError`; a run in which tasks failed returns a result that names them.
    """
    plan, journal = plan_run(source, target, settings)
    if journal.result is None:
        # Workers first: a scheduler that does not answer is a wrong request, and writes nothing.
        with (
            connect(plan) if client is None else nullcontext(client) as workers,
            held(runs_folder(Location(plan.target))) as lease,
        ):
            # Again: another client may have worked on it until now.
            plan, journal = plan_run(source, target, settings)
            result = _carry_out(plan, journal, workers, lease, emit)
    else:
        result = _already_done(plan, journal)
    emit(result)
    return result


def _already_done(plan: Plan, journal: Journal) -> Result:
    # A run that was killed in its last moment left them.
    targets.remove_work(plan)
    return Result("done", plan.target, _n_objects(plan, journal), 0.0, already_done=True, run=plan.run)


def _carry_out(plan: Plan, journal: Journal, client: Any, lease: Held, emit: Emit) -> Result:
    if journal.result is not None:
        return _already_done(plan, journal)
    _begin(plan, journal)
    return run_plan(plan, journal, client, lease, emit)


def status(target: str) -> list[RunStatus]:
    """Return how the runs on a target stand, one for each label name, from their journals alone.

    Raises :class:`TargetError` if no run is recorded there.
    """
    folder = runs_folder(Location.of(target))
    names = sorted(p.name for p in folder.path.iterdir() if p.is_dir()) if folder.exists() else []
    plans = {name: targets.read_recorded(folder / name) for name in names}
    found = [_status_of(name, plan, folder / name) for name, plan in plans.items() if plan is not None]
    if not found:
        raise TargetError(f"no run is recorded at {folder}; start one with megaseg segment")
    return found


def _status_of(name: str, plan: Plan, run: Location) -> RunStatus:
    journal = Journal.read(run, plan.fingerprint)
    return RunStatus(
        label_name=name,
        done=journal.result is not None,
        stages={s.name: (len(journal.done.get(s.name, {})), s.n_tasks) for s in plan.stages},
        failures=list(map(dict, journal.failed.values())),
    )


def _begin(plan: Plan, journal: Journal) -> None:
    """Record the plan, then create its arrays, anew until a task is done.

    In that order a run killed in between finds its record and goes on, and a
    target without a record is not ours.
    """
    run = Location(plan.run)
    if journal.n_done == 0:
        for stale in (journal_folder, tasks.WORK):
            (run / stale).remove()
    run.put(targets.PLAN, plan.model_dump_json(indent=1).encode())
    if journal.n_done == 0:
        targets.clear(plan)
        targets.create(plan)


def run_plan(plan: Plan, journal: Journal, client: Any, lease: Held, emit: Emit) -> Result:
    """Run what the journal lacks, stage by stage, and publish the result if nothing failed."""
    started = time.monotonic()
    n_tasks = sum(stage.n_tasks for stage in plan.stages)
    emit(Started(plan.target, n_tasks, journal.n_done, client.dashboard_link))
    progress = _StageRunner(plan, journal, client, lease, emit)
    with journal.flushed():
        for stage in plan.stages:
            progress.run(stage.name, stage.n_tasks)
            if progress.failures:
                break
            if stage.name == "measure":
                tasks.merge_measurements(plan, journal.summaries("measure"))
        else:
            targets.publish(plan, _statistics(plan, journal))
            journal.finish({"n_objects": _n_objects(plan, journal)})
            targets.remove_work(plan)
    return Result(
        status="failed" if progress.failures else "done",
        target=plan.target,
        n_objects=None if progress.failures else _n_objects(plan, journal),
        wall_s=round(time.monotonic() - started, 3),
        failures=[failure.as_dict() for failure in progress.failures],
        warnings=[] if progress.failures else _doubts(plan, journal),
        peak_bytes=progress.peak_bytes,
        run=plan.run,
    )


def _statistics(plan: Plan, journal: Journal) -> list[dict[str, float]]:
    if plan.is_one_task:
        return [dict(summary["statistics"]) for summary in journal.summaries("volume")]  # type: ignore[call-overload]
    return tasks.read_statistics(plan)


def _doubts(plan: Plan, journal: Journal) -> list[str]:
    """Name volumes whose result means nothing, although it is what the network says."""
    found = zip(plan.volumes, _statistics(plan, journal), strict=True)
    return [f"t={v.t} c={v.c} is constant: what is found in it means nothing" for v, s in found if not s["std"]]


def _n_objects(plan: Plan, journal: Journal) -> int | None:
    counts = [s.get("n_objects") for s in journal.summaries("volume" if plan.is_one_task else "join")]
    return sum(map(int, counts)) if counts and None not in counts else None  # type: ignore[arg-type]


@dataclass
class _StageRunner:
    """Feeds the tasks of one stage after the other, and keeps what failed."""

    plan: Plan
    journal: Journal
    client: Any
    lease: Held
    emit: Emit
    failures: list[Failure] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def run(self, stage: str, n_tasks: int) -> None:
        """Run the tasks of a stage that the journal lacks."""
        pending = [i for i in range(n_tasks) if not self.journal.is_done(stage, i)]
        started = time.monotonic()
        if pending:
            # A first block may take minutes: show the stage before it is done.
            self.emit(Progress(stage, n_tasks - len(pending), n_tasks, 0.0, 0.0, None))
        for n, (index, outcome) in enumerate(self._outcomes(stage, iter(pending)), start=1):
            self.lease.require()
            if isinstance(outcome, BaseException):
                self._fail(stage, index, outcome)
                if isinstance(outcome, StoreError):
                    # A full disk or a lost store fails every task alike: stop, so that the next run resumes.
                    return
                continue
            self.peak_bytes[stage] = max(self.peak_bytes.get(stage, 0), outcome.pop("peak_bytes"))
            self.journal.add(stage, index, outcome)
            self.emit(self._progress(stage, n, len(pending), n_tasks, time.monotonic() - started))

    def _progress(self, stage: str, n: int, n_pending: int, n_tasks: int, elapsed_s: float) -> Progress:
        shape = self.plan.volume_shape
        voxels = len(self.plan.volumes) * shape[0] * shape[1] * shape[2] / n_tasks
        rate = voxels * n / elapsed_s if elapsed_s else 0.0
        n_done = n_tasks - n_pending + n
        return Progress(stage, n_done, n_tasks, round(elapsed_s, 3), rate, elapsed_s / n * (n_pending - n))

    def _fail(self, stage: str, index: int, error: BaseException) -> None:
        volume, box = tasks.task_box(self.plan, stage, index)
        failure = Failure(stage, index, volume, box, describe(error))
        self.failures.append(failure)
        self.journal.add_failure(stage, index, failure.as_dict())
        self.emit(failure)

    def _outcomes(self, stage: str, pending: Iterator[int]) -> Iterator[tuple[int, Any]]:
        """Yield index and summary (or exception) of each task, in order of arrival."""
        from distributed import as_completed

        n_workers = max(len(self.client.scheduler_info()["workers"]), 1)
        attempts: dict[int, int] = {}
        waiting = as_completed(raise_errors=False)
        running: dict[Any, int] = {}

        def submit(index: int) -> None:
            attempts[index] = attempts.get(index, 0) + 1
            key = f"{stage}-{index}-{attempts[index]}-{self.plan.fingerprint[:8]}-{time.monotonic_ns()}"
            future = self.client.submit(
                tasks.run_task, self.plan.run, self.plan.fingerprint, stage, index, key=key, pure=False
            )
            running[future] = index
            waiting.add(future)

        for index in _first(pending, max(_LEAST_WINDOW, _PER_WORKER * n_workers)):
            submit(index)
        try:
            for future in waiting:
                index = running.pop(future)
                outcome = future.result() if future.status == "finished" else future.exception()
                future.release()
                if is_infrastructure(outcome) and attempts[index] <= self.plan.options.retries:
                    time.sleep(min(_FIRST_PAUSE_S * 2 ** (attempts[index] - 1), _LONGEST_PAUSE_S))
                    submit(index)
                    continue
                yield index, outcome
                for following in _first(pending, 1):
                    submit(following)
        finally:
            self.client.cancel(list(running))


def _first(items: Iterator[int], n: int) -> Iterator[int]:
    for _ in range(n):
        try:
            yield next(items)
        except StopIteration:
            return


def is_infrastructure(outcome: object) -> bool:
    """Tell whether another attempt may help: a lost worker or a store that failed, not a bug or bad data."""
    from distributed import CancelledError, KilledWorker

    return isinstance(outcome, StoreError | KilledWorker | CancelledError | ConnectionError | TimeoutError)


def describe(error: BaseException) -> str:
    """Return one line for an error: ours as they are, others with their class."""
    if isinstance(error, MegasegError) and not isinstance(error, TaskError):
        return str(error)
    return f"{type(error).__name__}: {error}"
