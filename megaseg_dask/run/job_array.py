"""Tasks of a recorded plan without a cluster: many processes, each with its share of a stage.

For job arrays on sites that forbid servers, and to look at one block that
fails. Processes of one stage work beside each other. A process that records a
plan, or joins finished tasks, works alone, and only then is anything undone or
published. So a stage sees all of the stages before it, or is refused.
"""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Emit, Failure, Result
from megaseg_dask.plan.plan import Plan, run_folder, runs_folder
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.run.conclude import already_done, conclude, reopen
from megaseg_dask.run.finished import read_journal
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held, Leases
from megaseg_dask.run.losses import undo_losses
from megaseg_dask.run.progress import GroupSize, Recorder, StageProgress
from megaseg_dask.run.request import Request, synced_by
from megaseg_dask.run.runner import join_results, record
from megaseg_dask.run.schedule import Schedule, VolumeProgress
from megaseg_dask.run.serial import SerialExecutor
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.publish import is_withdrawn
from megaseg_dask.run.tasks.worker import failure_of
from megaseg_dask.run.usage import with_usage
from megaseg_dask.run.workspace import RunFolder, Workspace
from megaseg_dask.stores import Location

_TAKE_BACK = "the same megaseg plan … --record"


# -- the plan


def record_plans(
    source: str, target: str, settings: Settings, emit: Emit = lambda _: None
) -> list[Plan]:
    """Write the plans of a request and their empty arrays, so that tasks can be run one by one.

    A run that failed in part is taken back: what was published, and what was computed in the
    absence of the failed tasks.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    if settings.follow:
        raise SettingsError(
            "--follow plans many times, but a job array has one plan; omit --record or --follow"
        )
    # Tasks run elsewhere, and each proves its engine alone.
    request = Request(source, target, settings, emit, is_here=False)
    with Leases(runs_folder(Location.of(target))).hold() as lease:
        runs = request.reopen_runs(lease)
        record(runs, request.superseded, lease, emit)
        for plan, journal in runs:
            if journal.result is None:
                with journal.flushed():
                    Schedule(Workspace(plan), journal).prepare()
    return [plan for plan, _ in runs]


def read_plan(target: str, label_name: str) -> Plan:
    """Return the recorded plan of a run.

    Raises:
        TargetError: There is none.
    """
    return RunFolder(run_folder(Location.of(target), label_name)).read_plan()


# -- which tasks


def choose_indices(
    stage: PlannedStage, texts: Sequence[str], share: str | None = None
) -> Sequence[int]:
    """Return the tasks that ``7`` and ``0-99`` (both ends included) mean, or all tasks.

    With a ``share``, such as ``3/10``, return that part of them. All elements of a job array are
    alike: a range that begins in a stage ends with it at the latest, and of more shares than
    tasks some are empty.

    Raises:
        SettingsError: A text names no task of the stage.
    """
    chosen: Sequence[int] = range(stage.n_tasks)
    if texts:
        indices: set[int] = set()
        for text in texts:
            indices.update(_parse_range(stage, text))
        chosen = sorted(indices)
    if share is None:
        return chosen
    number, n_shares = _parse_share(share)
    first = len(chosen) * (number - 1) // n_shares
    return chosen[first : len(chosen) * number // n_shares]


def _parse_share(share: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", share, re.ASCII)
    number = int(match[1]) if match else 0
    n_shares = int(match[2]) if match else 0
    if not 1 <= number <= n_shares:
        raise SettingsError(
            f"--share {share}: expected I/N, the I-th of N shares, with I from 1 to "
            f"{n_shares or 'N'}"
        )
    return number, n_shares


def _parse_range(stage: PlannedStage, text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else -1
    if last < first:
        raise SettingsError(f"task {text!r}: expected a number such as 7, or a range such as 0-99")
    if first >= stage.n_tasks:
        raise SettingsError(
            f"stage {stage.name} has tasks 0 to {stage.n_tasks - 1}, and no {first}"
        )
    return range(first, min(last + 1, stage.n_tasks))


# -- tasks


@dataclass
class Ran:
    """What became of tasks: how many were done before, how many now, and which failed."""

    n_before: int = 0
    n_done: int = 0
    failures: list[Failure] = field(default_factory=list)


class _GivenTasks:
    """Tasks of one stage that may all start now."""

    def __init__(self, stage: str, indices: Sequence[int]) -> None:
        self._stage = stage
        self._waiting = list(reversed(indices))

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return the next task."""
        return self._stage, [self._waiting.pop()] if self._waiting else []

    def settle(self, stage: str, index: int) -> None:
        """Nothing waits for a task to end."""


class _Process:
    """A process that runs tasks of a plan while it holds a lease."""

    def __init__(self, plan: Plan, journal: Journal, lease: Held, emit: Emit) -> None:
        self.plan = plan
        self.journal = journal
        self.workspace = Workspace(plan)
        self._lease = lease
        self._emit = emit

    def run(self, stage: PlannedStage, indices: Sequence[int]) -> Recorder:
        """Run tasks of a stage, and return what was recorded of them."""
        n_tasks = len(indices)
        recorder = Recorder(
            (self.plan.source, self.plan.target),
            self.journal,
            self._lease,
            self._emit,
            lambda name: StageProgress(name, n_done=0, n_tasks=n_tasks),
            partial(failure_of, self.plan),
        )
        dispatcher = SerialExecutor().dispatcher(self.plan, self._lease.id, self._emit)
        recorder.run(dispatcher, _GivenTasks(stage.name, indices))
        return recorder

    def progress_of(self, volume: int) -> VolumeProgress:
        """Return the tasks of a volume that are left."""
        return VolumeProgress(self.workspace, self.journal, volume)

    @property
    def volumes(self) -> range:
        """The volumes whose stages follow each other; 0 stands for all that are one task each."""
        return range(1 if self.plan.is_one_task else len(self.plan.volumes))

    def require_work(self, volume: int) -> None:
        """Check that the intermediate data of a volume exist."""
        if not self.plan.is_one_task and not self.workspace.has_work(volume):
            raise TargetError(
                f"{self.workspace.folder.work(volume)} is missing because intermediate data were "
                f"removed; first run {_TAKE_BACK}"
            )


def run_tasks(plan: Plan, stage: str, indices: Sequence[int], emit: Emit = lambda _: None) -> Ran:
    """Run what is left of these tasks of one stage in this process, and record it.

    Many processes may do so at once.

    Raises:
        SettingsError: The stages before are not finished.
        TargetError: A client, or a task of another stage, works on the run.
    """
    planned = plan.stage(stage)
    with Leases(plan.run.parent).share(plan.run.basename, stage) as lease:
        journal = Journal.read(plan, uuid.uuid4().hex, synced_by(lease, plan.target))
        if journal.discarded:
            # What this process records would follow them, and not count either.
            raise TargetError(
                f"{plan.run}/{journal.discarded[0]} is damaged, so it and the "
                f"{len(journal.discarded) - 1} records after it are not used; first run "
                f"{_TAKE_BACK}"
            )
        process = _Process(plan, journal, lease, emit)
        with journal.flushed():
            left = _prepare(process, planned, indices)
            n_before = int(journal.done(stage)[list(indices)].sum())
            recorder = process.run(planned, left)
            return Ran(n_before, recorder.n_done, recorder.failures)


def _prepare(process: _Process, stage: PlannedStage, indices: Sequence[int]) -> list[int]:
    """Return what is left of some tasks, after what they have to know is written."""
    chosen = set(indices)
    volumes: Sequence[int] = process.volumes
    if not process.plan.is_one_task:
        numbers = {process.plan.split_index(stage.name, index)[0] for index in indices}
        volumes = [volume for volume in volumes if volume in numbers]
    left: list[int] = []
    for volume in volumes:
        progress = process.progress_of(volume)
        of_volume = [index for index in progress.left_of(stage) if index in chosen]
        if of_volume:
            _require_ready(process, stage, volume)
            progress.prepare(stage)
            left += of_volume
    return left


def _require_ready(process: _Process, stage: PlannedStage, volume: int) -> None:
    """Check that a stage can begin, and that no later stage would have to be undone for it.

    Raises:
        SettingsError: It cannot.
        TargetError: Intermediate data are gone.
    """
    plan = process.plan
    progress = process.progress_of(volume)
    if "statistics" in stage.declared.needs and not progress.is_group_settled:
        raise SettingsError(
            f"first run stage {plan.stages[0].name} of all volumes, because groups of volumes "
            "share their statistics"
        )
    for earlier in plan.stages[: plan.stages.index(stage)]:
        n_untried = progress.count_untried(earlier)
        if n_untried:
            raise SettingsError(
                f"run stage {earlier.name} first: {n_untried} of its {earlier.per_volume} tasks of "
                f"volume {volume} are not finished"
            )
    if progress.stale_after(stage) or not is_withdrawn(Target(plan)):
        raise SettingsError(
            f"{plan.target} was finished without the failed tasks of stage {stage.name}; first run "
            f"{_TAKE_BACK}"
        )
    process.require_work(volume)


# -- the end


def join_run(target: str, label_name: str, emit: Emit = lambda _: None) -> Result | None:
    """Do what is left of the quick stages in this process, and publish.

    Returns ``None`` if tasks of other stages are left. Blocks that failed are missing from what is
    published, as after :func:`megaseg_dask.segment`.

    Raises:
        TargetError: No run of the name is recorded, or a process works on it.
    """
    where = Location.of(target)
    where.probe(TargetError)
    read_plan(target, label_name)
    with Leases(runs_folder(where)).hold() as lease:
        plans = RunFolder.plans(where, label_name)
        results = [_join(plan, lease, emit) for plan in plans]
    finished = [result for result in results if result is not None]
    if len(finished) < len(results):
        return None
    result = with_usage(join_results(finished), [(plan, Journal.read(plan)) for plan in plans])
    emit(result)
    return result


def _join(plan: Plan, lease: Held, emit: Emit) -> Result | None:
    journal = read_journal(plan, synced_by(lease, plan.target))
    started_s = time.monotonic()
    if journal.result is not None:
        return already_done(plan, journal)
    lease.require()
    reopen(Target(plan), journal)
    process = _Process(plan, journal, lease, emit)
    with journal.flushed(), journal.session():
        # Each of them, also after one that has to wait.
        are_settled = [_settle(process, volume) for volume in process.volumes]
        if not all(are_settled) or undo_losses(plan, journal):
            return None
        return conclude(plan, journal, lease, started_s)


def _settle(process: _Process, volume: int) -> bool:
    """Run the quick stages of a volume as far as the others let them.

    Returns whether nothing is left untried.
    """
    for stage in process.plan.stages:
        progress = process.progress_of(volume)
        left = list(progress.left_of(stage))
        if left and "statistics" in stage.declared.needs and not progress.is_group_settled:
            return False
        if left and stage.declared.quick:
            process.require_work(volume)
            progress.prepare(stage)
            process.run(stage, left)
        if progress.count_untried(stage):
            return False
    return True
