"""Carry out a request: what the journal lacks goes to workers, their outcomes go to the journal.

What the journal holds is never computed again, and the final state is derived
from it: a run in which something failed ends as failed, names it, and records
in the output which boxes are missing.
"""

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

from megaseg_dask.errors import MegasegError, SettingsError, StoreError
from megaseg_dask.events import Emit, Event, Failure, Joined, Notice, Result, Started, Step
from megaseg_dask.inference.calibration import measure_patch_s
from megaseg_dask.inference.certificate import Certificate
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.gpu import require_devices
from megaseg_dask.messages import count, version_of
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.plan.planner import require_machine
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.conclude import already_done, begin, conclude
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held, Leases, Timing
from megaseg_dask.run.log import RunLog, logged
from megaseg_dask.run.losses import undo_losses
from megaseg_dask.run.on_volume import VolumeCommand, calling, describe_volume
from megaseg_dask.run.progress import Dispatcher, Recorder, StageProgress
from megaseg_dask.run.request import Relabelling, Request, Runs
from megaseg_dask.run.schedule import Schedule
from megaseg_dask.run.source_listing import Listing, list_reads, take_back_changed
from megaseg_dask.run.status import unread_fields
from megaseg_dask.run.target import publish
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.ownership import (
    find_relabelled,
    remove_relabelled,
    remove_replaced,
)
from megaseg_dask.run.tasks.worker import failure_of
from megaseg_dask.run.usage import with_usage
from megaseg_dask.run.workspace import RunFolder, Workspace
from megaseg_dask.stores import StoreOptions, take_traffic

LEASE_TIMING = Timing()
_HOST = EngineSpec("torch", "cpu", "fp32", 1)
# Tasks whose objects are gone at the end run again, and then once more.
_MAX_ROUNDS = 3


class Executor(Protocol):
    """Where the tasks of a request are carried out: on workers, or in this process."""

    @property
    def dashboard(self) -> str | None:
        """Address of a page that shows the workers."""
        ...

    @property
    def workers(self) -> Sequence[Joined]:
        """All workers that ever joined."""
        ...

    def check(self) -> None:
        """Check the workers before anything is written.

        Raises:
            SettingsError: They cannot carry out the plan.
        """
        ...

    def ready(self, plan: Plan, options: StoreOptions) -> AbstractContextManager[None]:
        """Make the workers ready for tasks, and take it back at the end."""
        ...

    def prove(self, plan: Plan) -> Certificate | None:
        """Let a worker's engine prove itself; float32 PyTorch needs no certificate.

        Raises:
            MegasegError: The worker cannot run the engine.
        """
        ...

    def dispatcher(self, plan: Plan, lease_id: str, emit: Emit) -> Dispatcher:
        """Return a dispatcher of the tasks of one run."""
        ...


@contextmanager
def open_executor(plan: Plan, client: Any, emit: Emit) -> Iterator[Executor]:
    """Yield the executor that the settings ask for, if this machine has room for it.

    The modules of a cluster are imported only if there is one.
    """
    if client is None:
        require_machine(plan)
        _require_device(plan)
    if client is None and plan.settings.workers == 0:
        from megaseg_dask.run.serial import SerialExecutor

        yield SerialExecutor()
        return
    emit(Step("starting workers"))
    from megaseg_dask.run.dispatcher import open_workers

    needs = plan if plan.resolved.predicts() else _NoNetwork(plan.settings, plan.projected_bytes)
    with open_workers(needs, client, emit) as executor:
        yield executor


def _require_device(plan: Plan) -> None:
    """Check that this machine has the plan's device, unless workers elsewhere compute.

    Raises:
        SettingsError: It has no GPU.
    """
    settings = plan.settings
    is_elsewhere = bool(settings.scheduler or settings.cluster)
    if plan.engine.device == "cuda" and plan.resolved.predicts() and not is_elsewhere:
        require_devices()


@dataclass(frozen=True, slots=True)
class _NoNetwork:
    """What workers need that run no network: no device, and one task at a time."""

    settings: Settings
    projected_bytes: Mapping[str, int]
    engine: EngineSpec = _HOST


def segment(
    source: str,
    target: str,
    settings: Settings,
    *,
    client: Any = None,
    emit: Emit = lambda _: None,
) -> Result:
    """Segment ``source`` into ``target``; resumes what an earlier run of the same plan left.

    ``client`` is a Dask client to use instead of starting workers. A run in which tasks failed
    returns a result that names them.

    Raises:
        MegasegError: The request cannot be carried out, or was stopped.
    """
    # What this process did before is no part of the run.
    take_traffic()
    with calling(settings.on_volume) as calls:
        if settings.follow:
            # It is imported for few runs.
            from megaseg_dask.run.follow import follow

            return follow(source, target, settings, client=client, emit=emit, calls=calls)
        emit(Step("reading the image and the model"))
        request = Request(source, target, settings, emit, is_here=client is None)
        return _carry_out(request, client, emit, calls)


def relabel(
    target: str, settings: Settings, *, client: Any = None, emit: Emit = lambda _: None
) -> Result:
    """Label again what a run on ``target`` predicted; resumes what an earlier attempt left.

    No network runs. Options that are not given are those of the run, but for the outputs.

    Raises:
        MegasegError: The request cannot be carried out, or was stopped.
    """
    take_traffic()
    with calling(settings.on_volume) as calls:
        emit(Step("reading the record of the run"))
        return _carry_out(Relabelling(target, settings), client, emit, calls)


def _carry_out(
    request: Request | Relabelling, client: Any, emit: Emit, calls: VolumeCommand | None
) -> Result:
    """Carry out a request, on workers or in this process."""
    runs = request.open_runs()
    if all(journal.result is not None for _, journal in runs):
        result = join_results([already_done(plan, journal) for plan, journal in runs])
        result = with_usage(result, runs)
        emit(result)
        return result
    with open_session(request, runs[0][0], client, emit, calls) as (runs, session):
        results = [session.run(plan, journal) for plan, journal in runs]
        result = with_calls(join_results(results), calls)
    result = with_usage(result, runs)
    emit(result)
    return result


@contextmanager
def open_session(
    request: Request | Relabelling,
    plan: Plan,
    client: Any,
    emit: Emit,
    calls: VolumeCommand | None,
) -> "Iterator[tuple[Runs, Session]]":
    """Yield the recorded runs of a request and a session that carries them out.

    ``plan`` is one of its plans. Workers are there and the lease is held meanwhile.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    with open_executor(plan, client, emit) as executor:
        # Workers first: a scheduler that does not answer is a wrong request, and writes nothing.
        executor.check()
        with Leases(runs_folder(plan.target), LEASE_TIMING).hold() as lease:
            runs = request.reopen_runs(lease)
            with executor.ready(plan, request.store_options):
                runs, certificate = prove(executor, request, lease, runs, emit)
                record(runs, request.superseded, lease, emit)
                yield runs, Session(executor, lease, certificate, emit, calls)


def with_calls(result: Result, calls: VolumeCommand | None) -> Result:
    """Return a result with the warnings of a command that is run for each volume."""
    if calls is None:
        return result
    return result.with_warnings(calls.finish())


def prove(
    executor: Executor, request: Request | Relabelling, lease: Held, runs: Runs, emit: Emit
) -> tuple[Runs, Certificate | None]:
    """Return the runs, in float32 if the engine is off in half precision, and its certificate.

    Raises:
        SettingsError: The engine may not be used.
    """
    certificate = _prove(executor, runs)
    if certificate is not None and not certificate.holds:
        return _without_halves(request, lease, runs, certificate, emit)
    return runs, certificate


def _prove(executor: Executor, runs: Runs) -> Certificate | None:
    """Return the certificate of a worker's engine, if it needs one and could be asked.

    Each worker proves itself before its first task, and names what is wrong with it.
    """
    for plan, journal in runs:
        stage = plan.stage_telling("scores")
        is_predicted = stage is None or bool(journal.done(stage.name).all())
        if plan.resolved.predicts() and not is_predicted:
            with suppress(Exception):
                return executor.prove(plan)
            return None
    return None


def _without_halves(
    request: Request | Relabelling, lease: Held, runs: Runs, refused: Certificate, emit: Emit
) -> tuple[Runs, Certificate | None]:
    """Return the runs in float32, if the precision was ours to choose and nothing is recorded.

    Raises:
        SettingsError: It was not, or the engine is off in float32 too.
    """
    is_recorded = any(journal.n_done for _, journal in runs)
    is_open = isinstance(request, Request) and request.chooses_precision
    if refused.precision != "fp32" and is_recorded:
        raise SettingsError(
            f"{refused.refusal} together with --overwrite, or resume on the machine where the run "
            "was started: this machine has another processor or GPU, or other packages"
        )
    if refused.precision == "fp32" or not is_open:
        raise SettingsError(refused.refusal)
    assert isinstance(request, Request)
    emit(Notice(f"{refused}: the run continues in float32"))
    request.use_precision("fp32")
    return request.reopen_runs(lease), None


def record(runs: Runs, superseded: Sequence[Plan], lease: Held, emit: Emit) -> None:
    """Record what is to be done, all of it before any of it is.

    What is recorded of ``superseded`` runs is removed. ``emit`` is told of labels that go with
    the scores that they were made of.

    Raises:
        StoreError: Another client took the run over, or the store failed.
    """
    plans = [plan for plan, _ in runs]
    if plans[0].settings.overwrite:
        _remove_relabelled(plans, lease, emit)
        lease.require()
        remove_replaced(plans)
    for other in superseded:
        lease.require()
        RunFolder(other.run).remove()
    for plan, journal in runs:
        if journal.result is None:
            begin(plan, journal, lease)


def _remove_relabelled(plans: Sequence[Plan], lease: Held, emit: Emit) -> None:
    """Remove the labels that were made again of scores that are replaced."""
    relabelled = find_relabelled(plans)
    for name in dict.fromkeys(plan.resolved.label_name for plan in relabelled):
        emit(
            Notice(
                f"{plans[0].target}: labels {name} were made from scores that this run replaces; "
                "they are removed, with their record and tables"
            )
        )
    for plan in relabelled:
        lease.require()
        remove_relabelled(plan, plans)


class Session:
    """The work of this client on the runs of a request."""

    def __init__(
        self,
        executor: Executor,
        lease: Held,
        certificate: Certificate | None,
        emit: Emit,
        calls: VolumeCommand | None = None,
    ) -> None:
        """Work on runs while the lease is held; ``calls`` are told of finished volumes."""
        self._executor = executor
        self.lease = lease
        self._certificate = certificate
        self._emit = emit
        self._calls = calls

    def run(self, plan: Plan, journal: Journal) -> Result:
        """Run what the journal of a plan lacks, and publish what there is."""
        if journal.result is not None:
            return already_done(plan, journal)
        with self.opened(plan, journal) as work:
            work.show_start(plan)
            return work.finish(self.step(plan, work))

    @contextmanager
    def opened(self, plan: Plan, journal: Journal) -> Iterator["OpenRun"]:
        """Open the log and the journal of a run for the work of this client."""
        with logged(plan.run, _head_of_log(plan)) as log:

            def emit(event: Event) -> None:
                log.note(event)
                self._emit(event)

            with journal.flushed(), journal.session(lambda: self._executor.workers):
                journal.certify(self._certificate)
                yield OpenRun(journal, log, emit, self._executor.dashboard)

    def step(
        self,
        plan: Plan,
        work: "OpenRun",
        *,
        is_over: bool = True,
        left_out: Collection[int] = (),
    ) -> Result:
        """Run what a plan lacks but for volumes that are ``left_out``, and publish what there is.

        A run that follows its source may not be over then.
        """
        started_s = time.monotonic()
        journal = work.journal
        emit = work.emit
        dispatcher = self._executor.dispatcher(plan, self.lease.id, emit)
        recorder = Recorder(
            (plan.source, plan.target),
            journal,
            self.lease,
            emit,
            partial(_begin_stage, plan, journal),
            partial(failure_of, plan),
        )
        finished: list[int] = []
        tell = finished.append if plan.grows else partial(self._tell, plan, journal)

        def schedule() -> Schedule:
            return Schedule(Workspace(plan), journal, tell, left_out)

        # Where a source is followed, its chunks are looked at until they do not change.
        listing = None if plan.grows else list_reads(plan, is_needed=False)
        listing = self._run_tasks(plan, journal, dispatcher, recorder, schedule, emit, listing)
        changed: list[Failure] = []
        if listing is not None and not recorder.store_is_lost:
            now = list_reads(plan, is_needed=not journal.failed)
            changed = take_back_changed(plan, journal, listing, now)
            listing = listing.completed(now)
            for failure in changed:
                emit(failure)
        result = conclude(
            plan,
            journal,
            self.lease,
            started_s,
            listing=listing,
            changed=changed,
            is_published=not (recorder.store_is_lost or changed),
            is_over=is_over,
        )
        for volume in dict.fromkeys(finished):
            self._tell(plan, journal, volume)
        return result

    def _tell(self, plan: Plan, journal: Journal, volume: int) -> None:
        """Tell the command of a volume; of a followed source when it is published."""
        if self._calls is not None:
            self._calls.tell(describe_volume(plan, journal, volume, is_published=plan.grows))

    def _run_tasks(
        self,
        plan: Plan,
        journal: Journal,
        dispatcher: Dispatcher,
        recorder: Recorder,
        schedule: Callable[[], Schedule],
        emit: Emit,
        listing: Listing | None,
    ) -> Listing | None:
        """Run all tasks, until all that they wrote is there.

        Returns the ``listing`` of what they read, renewed for volumes that are done again.
        """
        for _ in range(_MAX_ROUNDS):
            recorder.run(dispatcher, schedule())
            if recorder.store_is_lost:
                return listing
            self.lease.require()
            n_lost = undo_losses(plan, journal)
            if not n_lost:
                return listing
            if listing is not None:
                first = plan.stages[0].name
                volumes = range(len(plan.volumes))
                anew = [volume for volume in volumes if not journal.has_begun(first, volume)]
                listing = listing.refreshed(list_reads(plan, is_needed=False), anew)
            publish.withdraw(Target(plan))
            emit(
                Notice(
                    f"data that {count(n_lost, 'task')} read or wrote have changed; run again: "
                    f"{count(n_lost, 'task')}"
                )
            )
        raise StoreError(
            f"data in {plan.source} or {plan.target} keep changing during the run; find the "
            "program that changes them, and run the same command again"
        )


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that this client works on: its journal, its log, and who is told of it."""

    journal: Journal
    log: RunLog
    emit: Emit
    dashboard: str | None

    def show_start(self, plan: Plan) -> None:
        """Tell what there is to do, and what a plate lists that cannot be read."""
        started = Started(
            target=plan.target.url,
            n_tasks=sum(stage.n_tasks for stage in plan.stages),
            n_done=self.journal.n_done,
            dashboard=self.dashboard,
            channels=plan.channel_texts,
            fields=plan.field_paths,
        )
        self.emit(started)
        for failure in unread_fields(plan):
            self.emit(failure)

    def finish(self, result: Result) -> Result:
        """Tell how the run ended, and return it with the address of the log."""
        result = replace(result, log=self.log.url)
        for doubt in result.doubts:
            self.emit(doubt)
        self.log.note(result)
        return result


def _begin_stage(plan: Plan, journal: Journal, name: str) -> StageProgress:
    """Begin to count the tasks of a stage, in blocks, volumes or fields."""
    stage = plan.stage(name)
    n_done = int(journal.done(name).sum())
    n_volumes = len(plan.volumes)
    voxels = n_volumes * math.prod(plan.volume_shape) / stage.n_tasks
    progress = StageProgress(name, n_done, stage.n_tasks, voxels)
    if plan.grid(stage) is not None:
        return replace(progress, unit="blocks", units=1.0)
    if plan.plate is None:
        return replace(progress, unit="volumes", units=1.0)
    # A field of a plate is a volume for each timepoint and channel.
    n_fields = len({volume.image for volume in plan.volumes})
    return replace(progress, unit="fields", units=n_fields / n_volumes)


def _head_of_log(plan: Plan) -> list[str]:
    engine = plan.engine
    return [
        f"megaseg-dask {version_of('megaseg-dask')} on {platform.node()}: "
        f"{plan.source} to {plan.target}",
        f"{plan.model.name} {plan.model.digest[:16]}, {engine.engine} {engine.precision} on "
        f"{engine.device}, plan {plan.fingerprint[:16]}",
    ]


def estimate_time(plan: Plan) -> dict[str, Any]:
    """Return the seconds of one patch, and of all patches on one worker like this machine.

    The keys are ``patch_s`` and ``projected_s``, and ``time_unknown`` with a reason where a
    forward pass is not possible here.
    """
    try:
        patch_s = measure_patch_s(plan.model, plan.engine, plan.batch, plan.patch_grid.patch_shape)
    except MegasegError as error:
        return {"patch_s": None, "projected_s": None, "time_unknown": str(error)}
    return {"patch_s": patch_s, "projected_s": round(patch_s * plan.n_predicted, 1)}


def join_results(results: Sequence[Result]) -> Result:
    """Return the one result of a request that took several runs.

    Its ``run`` and ``log`` are those of the first run that failed, else of the first.
    """
    if len(results) == 1:
        return results[0]
    failed = [result for result in results if result.failures]
    shown = failed[0] if failed else results[0]
    return Result(
        status="failed" if failed else "done",
        target=shown.target,
        n_objects=_sum_objects(results),
        wall_s=round(sum(result.wall_s for result in results), 3),
        already_done=all(result.already_done for result in results),
        failures=list(chain.from_iterable(result.failures for result in results)),
        warnings=list(dict.fromkeys(chain.from_iterable(r.warnings for r in results))),
        doubts=list(chain.from_iterable(result.doubts for result in results)),
        peak_bytes=_highest([result.peak_bytes for result in results]),
        device_peak_bytes=_highest([result.device_peak_bytes for result in results]),
        run=shown.run,
        log=shown.log,
    )


def _sum_objects(results: Sequence[Result]) -> int | None:
    """Return the objects of all runs; ``None`` if one of them did not count its objects."""
    total = 0
    for result in results:
        if result.n_objects is None:
            return None
        total += result.n_objects
    return total


def _highest(peaks_of_runs: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest peak of each stage."""
    highest: dict[str, int] = {}
    for peaks in peaks_of_runs:
        for stage, peak in peaks.items():
            highest[stage] = max(peak, highest.get(stage, 0))
    return highest
