"""Carry out a plan: what the journal lacks goes to the workers, what they finish goes to the journal.

What the journal holds is never computed again, and the final state is derived
from it: a run in which something failed ends as failed, names it, and records
in the output which boxes are missing.
"""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from typing import Any

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import MegasegError, SettingsError, TargetError
from megaseg_dask.events import Event, Failure, Result, RunStatus, Started
from megaseg_dask.inference.calibration import measure_patch_s
from megaseg_dask.models.registry import reporting
from megaseg_dask.plan.plan import Plan, run_names, runs_folder
from megaseg_dask.plan.planner import make_plan
from megaseg_dask.plan.plate_parts import Part, read_parts
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import Fact
from megaseg_dask.run import workspace
from megaseg_dask.run.cluster.workers import Workers, connect
from megaseg_dask.run.dispatcher import Dispatcher, GroupSize
from megaseg_dask.run.journal import FOLDER as journal_folder
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held, Leases, Timing
from megaseg_dask.run.log import logged
from megaseg_dask.run.pace import Pace
from megaseg_dask.run.schedule import Flow, iter_flows
from megaseg_dask.run.state import Ending, TaskSummary, VolumeState
from megaseg_dask.run.target import ownership, publish
from megaseg_dask.run.target.tables import remove_tables, require_own_tables, write_tables
from megaseg_dask.run.tasks import worker
from megaseg_dask.run.tasks.worker import Outcome
from megaseg_dask.stores import Location, StoreOptions, configure, stop_waiting

Emit = Callable[[Event], None]
Sync = Callable[[], None]

# After this many store failures in a row the disk is full or the store is gone, which is more than
# one chunk: stop, and let the next run resume.
STORE_IS_LOST = 5
LEASE_TIMING = Timing()
# Between two events of one stage.
_PROGRESS_S = 0.2


def plan_runs(
    source: str, target: str, settings: Settings, sync: Sync = lambda: None
) -> list[tuple[Plan, Journal]]:
    """Return the plans to carry out and what earlier runs of them finished; writes nothing.

    The journals call ``sync`` before they write.

    It is one plan, but for a plate whose fields are of several forms or were planned at several times. Raises
    :class:`TargetError` if the target holds another run, or is not ours.
    """
    configure(store_options(source, settings))
    # Before all else: a store that is not there is asked only once.
    to = Location.of(target)
    if not to.is_listable:
        raise SettingsError(
            f"{to}: nothing can be written to a web server; choose a folder or a bucket as TARGET"
        )
    to.probe(TargetError)
    parts = read_parts(
        Location.of(source), to, settings, ownership.read_parts(to, settings.label_name)
    )
    return [_plan_run(source, target, settings, part, sync) for part in parts]


def _plan_run(
    source: str, target: str, settings: Settings, part: Part, sync: Sync
) -> tuple[Plan, Journal]:
    plan = make_plan(source, target, settings, part)
    if part.recorded is not None:
        ownership.require_same(plan, part.recorded)
        if ownership.is_present(plan):
            return plan, Journal.read(plan, sync=sync)
    for other in part.others:
        ownership.require_alike(plan, other)
    # Nothing is done in arrays that are not there, whatever a record beside them says.
    ownership.require_free(plan, is_joining=bool(part.others))
    require_own_tables(plan)
    return plan, Journal.of(plan, sync=sync)


def store_options(source: str | None, settings: Settings) -> StoreOptions:
    """Return how the stores of a run are opened; raises :class:`SettingsError`."""
    return StoreOptions.parse(
        settings.endpoint, settings.anon, settings.storage_option or (), source
    )


def estimate_time(plan: Plan) -> dict[str, Any]:
    """Return seconds of a patch, from forward passes on this machine, and of all patches on one worker like it."""
    try:
        patch_s = measure_patch_s(plan.model, plan.engine, plan.batch, plan.patch_grid.patch_shape)
    except MegasegError as error:
        return {"patch_s": None, "projected_s": None, "time_unknown": str(error)}
    n_patches = plan.patch_grid.count_predicted(plan.block_shape) * len(plan.volumes)
    return {"patch_s": patch_s, "projected_s": round(patch_s * n_patches, 1)}


def segment(
    source: str, target: str, settings: Settings, *, client: Any = None, emit: Emit = lambda _: None
) -> Result:
    """Segment ``source`` into ``target``; resumes what an earlier run of the same plan left undone.

    ``client`` is a Dask client to use instead of starting workers. Raises
    :class:`MegasegError`; a run in which tasks failed returns a result that names them.
    """
    with reporting(emit):
        runs = plan_runs(source, target, settings)
    if any(journal.result is None for _, journal in runs):
        plan = runs[0][0]
        own = Workers(client, plan.engine.engine, plan.engine.device, emit)
        with connect(plan, emit) if client is None else nullcontext(own) as workers:
            # Workers first: a scheduler that does not answer is a wrong request, and writes nothing.
            workers.greet()
            with Leases(runs_folder(plan.target), LEASE_TIMING).hold() as lease:
                # Again: another client may have worked on it until now.
                runs = plan_runs(source, target, settings, synced_by(lease, plan.target))
                result = _carry_out(runs, workers, lease, emit, store_options(source, settings))
    else:
        result = join_results([already_done(plan, journal) for plan, journal in runs])
    emit(result)
    return result


def synced_by(lease: Held, target: Location) -> Sync:
    """Return what a journal of a target calls before it writes: the lease is held, data are safe."""

    def sync() -> None:
        lease.require()
        target.sync()

    return sync


def already_done(plan: Plan, journal: Journal) -> Result:
    """Return the result of a run that was complete before."""
    # A run that was killed in its last moment left them.
    ownership.remove_work(plan)
    warnings = journal.result.warnings if journal.result else []
    failures = _unread(plan)
    n_objects = None if failures else _n_objects(plan, journal)
    status = "failed" if failures else "done"
    return Result(
        status,
        plan.target.url,
        n_objects,
        0.0,
        already_done=True,
        failures=failures,
        warnings=warnings,
        run=plan.run.url,
    )


def _carry_out(
    runs: list[tuple[Plan, Journal]],
    workers: Workers,
    lease: Held,
    emit: Emit,
    options: StoreOptions,
) -> Result:
    """Record what is to be done, all of it before any of it is, and do it."""
    to_do = [(plan, journal) for plan, journal in runs if journal.result is None]
    if runs[0][0].options.overwrite:
        ownership.forget_replaced([plan for plan, _ in runs])
    for plan, journal in to_do:
        begin(plan, journal)
    results = []
    first = runs[0][0]
    with workers.ready(first.model, first.run, options):
        for plan, journal in runs:
            is_done = journal.result is not None
            results.append(
                already_done(plan, journal)
                if is_done
                else run_plan(plan, journal, workers, lease, emit)
            )
    return join_results(results)


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
        warnings=list(chain.from_iterable(result.warnings for result in results)),
        peak_bytes=_highest_peaks(results),
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


def _highest_peaks(results: Sequence[Result]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for result in results:
        for stage, peak in result.peak_bytes.items():
            peaks[stage] = max(peak, peaks.get(stage, 0))
    return peaks


def _unread(plan: Plan) -> list[Failure]:
    """Return what is listed in a plate and cannot be read, and so has no task that could fail."""
    missing = plan.plate.missing if plan.plate is not None else ()
    return [Failure("plan", i, path, "", reason) for i, (path, reason) in enumerate(missing)]


def status(target: str, label_name: str | None = None) -> list[RunStatus]:
    """Return how the runs on a target stand, of one label name or of all, from their journals alone.

    Raises :class:`TargetError` if no run is recorded there.
    """
    Location.of(target).probe(TargetError)
    folder = runs_folder(Location.of(target))
    wanted = run_names(label_name).fullmatch if label_name else bool
    names = [name for name in folder.children() if wanted(name) and (folder / name).is_folder()]
    plans = {name: ownership.read_recorded(folder / name) for name in names}
    found = [_status_of(name, plan) for name, plan in plans.items() if plan is not None]
    if not found:
        named = f" of the name {label_name}" if label_name else ""
        raise TargetError(
            f"no run{named} is recorded at {folder}{Location.of(target).hint()}; start one with megaseg segment"
        )
    return found


def _status_of(name: str, plan: Plan) -> RunStatus:
    journal = Journal.read(plan)
    return RunStatus(
        label_name=name,
        # A record beside nothing is a record of nothing.
        done=journal.result is not None and ownership.is_present(plan),
        stages={s.name: (int(journal.done(s.name).sum()), s.n_tasks) for s in plan.stages},
        failures=[
            *journal.failed.values(),
            *_unread(plan),
        ],
    )


def begin(plan: Plan, journal: Journal) -> None:
    """Record the plan, then create its arrays, anew until a task is done.

    In that order a run killed in between finds its record and goes on, and a
    target without a record is not ours.
    """
    run = plan.run
    if journal.n_done == 0:
        for stale in (journal_folder, workspace.WORK, workspace.VOLUMES, workspace.SUMS):
            (run / stale).remove()
    run.put(ownership.PLAN, plan.model_dump_json(indent=1).encode())
    if journal.n_done == 0:
        ownership.clear(plan)
        if plan.options.overwrite:
            remove_tables(plan)
        ownership.create(plan)
    else:
        reopen(plan)
    publish.refresh_consolidated(plan)


def reopen(plan: Plan) -> None:
    """Take back what was published of a run that goes on, and remove what was being written when it was interrupted."""
    publish.withdraw(plan)
    for place in (*(group.location(plan) for group in workspace.groups(plan)), plan.run):
        place.sweep_partial()


def _head_of(plan: Plan) -> list[str]:
    """Return the first lines of a log."""
    engine = plan.engine
    release = version("megaseg-dask")
    return [
        f"megaseg-dask {release} on {platform.node()}: {plan.source} to {plan.target}",
        f"{plan.model.name} {plan.model.digest[:16]}, {engine.engine} {engine.precision} on "
        f"{engine.device}, plan {plan.fingerprint[:16]}",
    ]


def run_plan(plan: Plan, journal: Journal, workers: Workers, lease: Held, emit: Emit) -> Result:
    """Run what the journal lacks, and publish what there is; the next run goes on with what failed."""
    with logged(plan.run, _head_of(plan)) as log:

        def tell(event: Event) -> None:
            log.note(event)
            emit(event)

        result = replace(_run_plan(plan, journal, workers, lease, tell), log=log.url)
        log.note(result)
        return result


def _run_plan(plan: Plan, journal: Journal, workers: Workers, lease: Held, emit: Emit) -> Result:
    started = time.monotonic()
    n_tasks = sum(stage.n_tasks for stage in plan.stages)
    emit(Started(plan.target.url, n_tasks, journal.n_done, _dashboard(workers.client)))
    for failure in _unread(plan):
        emit(failure)

    runner = _Runner(plan, journal, workers, lease, emit)
    with journal.flushed(), journal.session(workers.joined.values):
        runner.run()
        lease.require()
        return conclude(plan, journal, started, is_published=not runner.store_is_lost)


def conclude(plan: Plan, journal: Journal, started: float, *, is_published: bool = True) -> Result:
    """Publish what there is once all tasks were tried, and record the end of a run in which none failed."""
    failures = [*journal.failed.values(), *_unread(plan)]
    states = read_states(plan, journal)
    if any(states) and is_published:
        missing = [
            worker.missing_box(plan, stage, index) for stage, index in sorted(journal.failed)
        ]
        publish.publish(plan, states, missing)
        if "measurements" in plan.options.outputs:
            write_tables(plan)
        publish.refresh_consolidated(plan)
    warnings = _doubts(plan, states, journal)
    if not failures:
        journal.finish(Ending(_n_objects(plan, journal), warnings))
        ownership.remove_work(plan)
    return Result(
        status="failed" if failures else "done",
        target=plan.target.url,
        n_objects=None if failures else _n_objects(plan, journal),
        wall_s=round(time.monotonic() - started, 3),
        failures=failures,
        warnings=warnings,
        peak_bytes={
            name: timing.peak_bytes for name, timing in journal.timings.items() if timing.n_tasks
        },
        run=plan.run.url,
    )


def _dashboard(client: Any) -> str | None:
    """Return where to watch the workers; Dask's page says nothing without bokeh."""
    return client.dashboard_link if find_spec("bokeh") else None


def read_states(plan: Plan, journal: Journal) -> list[VolumeState | None]:
    """Return the state of each volume; ``None`` for one that is missing as a whole."""
    if plan.is_one_task:
        return list(map(_state_of, journal.by_index(plan.stages[0].name)))
    unmeasured = {
        plan.split_index(stage, index)[0]
        for stage, index in journal.failed
        if plan.stage(stage).declared.loss == "volume"
    }

    def read(volume: int) -> VolumeState | None:
        return None if volume in unmeasured else workspace.read_state(plan, volume)

    return map_threaded(read, range(len(plan.volumes)))


def _state_of(summary: TaskSummary | None) -> VolumeState | None:
    if summary is None:
        return None
    return VolumeState(statistics=summary.statistics, by_output=summary.by_output)


def _doubts(plan: Plan, states: list[VolumeState | None], journal: Journal) -> list[str]:
    """Name volumes whose segmentation is meaningless; count absent chunks and smaller batches."""
    doubts = []
    for planned, state in zip(plan.volumes, states, strict=True):
        if state and any(channel.std == 0 for channel in state.statistics):
            name = worker.volume_name(planned)
            doubts.append(f"{name} is constant; its segmentation is meaningless")
    # Absent chunks are counted where the finest level is read first.
    counting: Fact = "statistics" if plan.measure_level == 0 else "scores"
    n_absent = sum(summary.absent for summary in _summaries(plan, journal, counting))
    if n_absent:
        doubts.append(
            f"{n_absent} chunks of the source are not there, and were read as its fill value"
        )
    predicted = _summaries(plan, journal, "scores")
    shrunk = [summary.batch for summary in predicted if summary.batch]
    if shrunk:
        doubts.append(
            f"a device ran out of memory: {len(shrunk)} tasks went in batches down to "
            f"{min(shrunk)}, not {plan.batch}, which may change the last bits; "
            "choose a smaller --batch"
        )
    return doubts


def _n_objects(plan: Plan, journal: Journal) -> int | None:
    if "labels" not in plan.options.outputs:
        return None
    summaries = _summaries(plan, journal, "objects")
    outputs = chain.from_iterable(summary.by_output for summary in summaries)
    return sum(output.n_objects or 0 for output in outputs)


def _summaries(plan: Plan, journal: Journal, fact: Fact) -> list[TaskSummary]:
    stage = plan.stage_telling(fact)
    return journal.summaries(stage.name) if stage else []


@dataclass
class _Runner:
    """Feeds the dispatcher with tasks that may start, and the journal with what became of them."""

    plan: Plan
    journal: Journal
    workers: Workers
    lease: Held
    emit: Emit
    store_is_lost: bool = False
    _active: list[Flow] = field(default_factory=list)
    _seen: dict[str, Pace] = field(default_factory=dict)

    def run(self) -> None:
        """Run all volumes; a stage of one does not wait for another volume."""
        self._upcoming = iter_flows(self.plan, self.journal)
        dispatcher = Dispatcher(
            self.workers,
            self.plan.run,
            self.plan.fingerprint,
            self.lease.id,
            self.plan.options.retries,
            self.plan.options.timeout,
            self.emit,
        )
        n_in_a_row = 0
        for stage, outcome in dispatcher.outcomes(self._ready):
            self.lease.require()
            if not outcome.error:
                n_in_a_row = 0
                self.journal.add(
                    stage, outcome.index, outcome.summary, outcome.seconds, outcome.peak_bytes
                )
                self._seen[stage].n_done += 1
            else:
                n_in_a_row += outcome.is_infrastructure
                self._fail(stage, outcome)
                self._seen[stage].n_failed += 1
            self._show(stage)
            self._settle(stage, outcome.index)
            if n_in_a_row >= STORE_IS_LOST or (
                outcome.is_infrastructure and not self._stores_answer()
            ):
                self.store_is_lost = True
                stop_waiting()
                return

    def _ready(self, size: GroupSize) -> tuple[str, Any]:
        """Return tasks of the first volume that has some; volumes begin only when those before leave workers idle."""
        while True:
            for flow in self._active:
                if flow.n_ready:
                    stage = flow.stage.name
                    if stage not in self._seen:
                        self._begin_stage(flow)
                    return flow.take(size(stage, flow.n_ready))
            following = next(self._upcoming, None)
            if following is None:
                return "", ()
            if not following.is_over:
                self._active.append(following)

    def _settle(self, stage: str, index: int) -> None:
        volume = self.plan.split_index(stage, index)[0] if not self.plan.is_one_task else 0
        flow = next(f for f in self._active if f.volume == volume)
        flow.settle()
        if flow.is_over:
            self._active.remove(flow)
            if self.journal.is_complete(volume) and not self.plan.is_one_task:
                # What is finished needs no more than its outputs: disks are not filled by volumes that are done.
                # Recorded first: a kill in between would leave a volume to be relabelled, and nothing to relabel.
                self.journal.flush()
                workspace.work_folder(self.plan, volume).remove()

    def _begin_stage(self, flow: Flow) -> None:
        stage = flow.stage
        self._seen[stage.name] = Pace.of(self.plan, stage, int(self.journal.done(stage.name).sum()))
        # A first block may take minutes: show the stage before it is done.
        self.emit(self._seen[stage.name].progress())

    def _show(self, stage: str) -> None:
        pace = self._seen[stage]
        if (
            pace.n_ended in (pace.n_before + 1, pace.n_tasks)
            or time.monotonic() - pace.shown > _PROGRESS_S
        ):
            self.emit(pace.progress())

    def _stores_answer(self) -> bool:
        """Ask source and target once: a task that waited for one in vain need not be followed by others that do."""
        try:
            return self.plan.source.probe() and self.plan.target.probe()
        except MegasegError:
            return False

    def _fail(self, stage: str, outcome: Outcome) -> None:
        failure = worker.failure_of(self.plan, stage, outcome)
        self.journal.add_failure(failure)
        self.emit(failure)
