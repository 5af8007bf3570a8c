"""Tasks of a recorded plan without a cluster: many processes, each of which runs its share of a stage.

For job arrays on sites that forbid servers, and to look at one block that
fails. Processes of one stage work beside each other; who records a plan, or
joins what they did, works alone, and only then is anything undone or
published. So a stage sees all of the stages before it, or is refused.
"""

import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Event, Failure, Progress, Result
from megaseg_dask.plan.plan import Plan, run_folder, runs_folder
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.run import workspace
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held, Leases
from megaseg_dask.run.runner import (
    STORE_IS_LOST,
    already_done,
    begin,
    conclude,
    join_results,
    plan_runs,
    reopen,
    store_options,
    synced_by,
)
from megaseg_dask.run.schedule import Flow, iter_flows
from megaseg_dask.run.target import ownership, publish
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location, configure, stop_waiting

Emit = Callable[[Event], None]


# -- the plan


def record_plans(source: str, target: str, settings: Settings) -> list[Plan]:
    """Write the plans of a request and their empty arrays, so that tasks can be run one by one.

    Of a run that failed in part: take back what was computed, and published, without what failed. Raises what
    :func:`megaseg_dask.segment` would raise for the same request.
    """
    configure(store_options(source, settings))
    where = Location.of(target)
    with Leases(runs_folder(where)).hold() as lease:
        runs = plan_runs(source, target, settings, synced_by(lease, where))
        if settings.overwrite:
            ownership.forget_replaced([plan for plan, _ in runs])
        for plan, journal in runs:
            if journal.result is None:
                begin(plan, journal)
                with journal.flushed():
                    # Each flow makes room for its volume, and undoes what has to be done again, as it begins.
                    for _ in () if plan.is_one_task else iter_flows(plan, journal):
                        pass
    return [plan for plan, _ in runs]


def read_plan(target: str, label_name: str) -> Plan:
    """Return the recorded plan of a run; raises :class:`TargetError` if there is none."""
    run = run_folder(Location.of(target), label_name)
    plan = ownership.read_recorded(run)
    if plan is None:
        raise TargetError(
            f"no run is recorded at {run}; record one with megaseg plan SOURCE TARGET --record"
        )
    return plan


# -- which tasks


def choose_indices(
    stage: PlannedStage, texts: Sequence[str], share: str | None = None
) -> Sequence[int]:
    """Return the tasks that ``7`` and ``0-99`` (both ends included) mean, or all; of them one ``share``, as ``3/10``.

    A range that begins in a stage ends with it at the latest, and of more shares than tasks some are empty: all
    elements of a job array are alike. Raises :class:`SettingsError` for what is no task of the stage.
    """
    chosen: Sequence[int] = range(stage.n_tasks)
    if texts:
        chosen = sorted({index for text in texts for index in _parse_range(stage, text)})
    if share is None:
        return chosen
    found = re.fullmatch(r"(\d+)/(\d+)", share, re.ASCII)
    number, n_shares = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= n_shares:
        raise SettingsError(
            f"--share {share}: expected I/N, the I-th of N shares, from 1/{n_shares or 'N'} on"
        )
    return chosen[len(chosen) * (number - 1) // n_shares : len(chosen) * number // n_shares]


def _parse_range(stage: PlannedStage, text: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise SettingsError(f"task {text!r}: expected a number such as 7, or a range such as 0-99")
    if int(found[1]) >= stage.n_tasks:
        raise SettingsError(
            f"stage {stage.name} has tasks 0 to {stage.n_tasks - 1}, and no {found[1]}"
        )
    return range(int(found[1]), min(int(found[2] or found[1]) + 1, stage.n_tasks))


# -- tasks


@dataclass
class Ran:
    """What became of tasks: how many were done before, how many now, and which failed."""

    n_before: int = 0
    n_done: int = 0
    failures: list[Failure] = field(default_factory=list)


def run_tasks(plan: Plan, stage: str, indices: Sequence[int], emit: Emit = lambda _: None) -> Ran:
    """Run what is left of these tasks of one stage in this process, and record it; many processes may do so at once.

    Raises :class:`SettingsError` if the stages before are not finished, and :class:`TargetError` if a client, or a
    task of another stage, works on the run.
    """
    planned, run = plan.stage(stage), plan.run
    with Leases(run.parent).share(run.name, stage) as lease:
        sync = synced_by(lease, plan.target)
        journal = Journal.read(plan, uuid.uuid4().hex, sync)
        with journal.flushed(), workspace.holding(lease.id):
            left = _left_of(plan, journal, planned, indices)
            n_before = int(journal.done(stage)[list(indices)].sum())
            return _run_left(plan, journal, planned, left, n_before, lease, emit)


def _left_of(
    plan: Plan, journal: Journal, stage: PlannedStage, indices: Sequence[int]
) -> list[int]:
    """Return what is left of some tasks; what they have to know is then written down."""
    wanted, left = set(indices), list[int]()
    for volume in (
        (0,) if plan.is_one_task else sorted({plan.split_index(stage.name, i)[0] for i in indices})
    ):
        of_volume = [i for i in Flow(plan, journal, volume, ()).left_of(stage) if i in wanted]
        if of_volume:
            _require_ready(plan, journal, stage, volume)
            Flow(plan, journal, volume, (stage,))
            left += of_volume
    return left


def _run_left(
    plan: Plan,
    journal: Journal,
    stage: PlannedStage,
    indices: list[int],
    n_before: int,
    lease: Held,
    emit: Emit,
) -> Ran:
    ran, began, n_lost = Ran(n_before), time.monotonic(), 0
    for index in indices:
        outcome = worker.attempt(plan, stage.name, index)
        lease.require()
        n_lost = n_lost + 1 if outcome.is_infrastructure else 0
        if outcome.error:
            failure = worker.failure_of(plan, stage.name, outcome)
            journal.add_failure(failure)
            ran.failures.append(failure)
            emit(failure)
        else:
            journal.add(stage.name, index, outcome.summary, outcome.seconds, outcome.peak_bytes)
            ran.n_done += 1
        if n_lost == STORE_IS_LOST:
            stop_waiting()
            break
        elapsed_s, n = time.monotonic() - began, ran.n_done + len(ran.failures)
        emit(
            Progress(
                stage.name,
                n,
                len(indices),
                round(elapsed_s, 3),
                0.0,
                elapsed_s / n * (len(indices) - n),
            )
        )
    return ran


def _require_ready(plan: Plan, journal: Journal, stage: PlannedStage, volume: int) -> None:
    """Raise :class:`SettingsError` if a stage cannot begin, or if later ones would have to be undone for it."""
    flow = Flow(plan, journal, volume, ())
    for earlier in plan.stages[: plan.stages.index(stage)]:
        if n := flow.n_untried(earlier):
            raise SettingsError(
                f"stage {earlier.name} comes first: {n} of its {earlier.per_volume} tasks of volume "
                f"{volume} are not finished"
            )
    if flow.stale_after(stage) or not _is_withdrawn(plan):
        raise SettingsError(
            f"{plan.target} was finished without what is missing in stage {stage.name}; take that back "
            "first: the same megaseg plan … --record"
        )
    _require_work(plan, volume)


def _require_work(plan: Plan, volume: int) -> None:
    if not plan.is_one_task and not workspace.has_work(plan, volume):
        raise TargetError(
            f"{workspace.work_folder(plan, volume)} is not there: intermediate data were removed; make "
            "room for them again: the same megaseg plan … --record"
        )


def _is_withdrawn(plan: Plan) -> bool:
    return publish.provenance_at(publish.marked(plan)[0]) == publish.mark_of(plan)


# -- the end


def join_run(target: str, label_name: str, emit: Emit = lambda _: None) -> Result | None:
    """Do what is left of the quick stages in this process, and publish; ``None`` if tasks of other stages are left.

    Blocks that failed are missing from what is published, as after :func:`megaseg_dask.segment`. Raises
    :class:`TargetError` if no run of the name is recorded, or somebody works on it.
    """
    where = Location.of(target)
    where.probe(TargetError)
    read_plan(target, label_name)
    with Leases(runs_folder(where)).hold() as lease, workspace.holding(lease.id):
        results = [_join(plan, lease, emit) for plan in ownership.read_parts(where, label_name)]
    finished = [result for result in results if result is not None]
    if len(finished) < len(results):
        return None
    result = join_results(finished)
    emit(result)
    return result


def _join(plan: Plan, lease: Held, emit: Emit) -> Result | None:
    journal = Journal.read(plan, sync=synced_by(lease, plan.target))
    started = time.monotonic()
    if journal.result is not None:
        return already_done(plan, journal)
    reopen(plan)
    with journal.flushed(), journal.session():
        volumes = [0] if plan.is_one_task else range(len(plan.volumes))
        # Each of them, also after one that has to wait.
        settled = [_settle(plan, journal, volume, lease, emit) for volume in volumes]
        return conclude(plan, journal, started) if all(settled) else None


def _settle(plan: Plan, journal: Journal, volume: int, lease: Held, emit: Emit) -> bool:
    """Run the quick stages of a volume as far as the others let them; tell whether nothing is left untried."""
    for stage in plan.stages:
        flow = Flow(plan, journal, volume, ())
        left = list(flow.left_of(stage))
        if left and stage.declared.quick:
            _require_work(plan, volume)
            # What was done without them is undone, and what they have to know written down.
            Flow(plan, journal, volume, (stage,))
            _run_left(plan, journal, stage, left, 0, lease, emit)
        if flow.n_untried(stage):
            return False
    return True
