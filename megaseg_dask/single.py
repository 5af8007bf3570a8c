"""Tasks of a recorded plan without a cluster: one process runs what it is told to.

For job arrays on sites that forbid servers, and to look at one block that
fails. The journal takes records of several writers; the same `segment` command
does what is left, and publishes.
"""

import re
from collections.abc import Callable, Sequence

from megaseg_dask import products, targets, tasks
from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Event, Failure
from megaseg_dask.flows import Flow
from megaseg_dask.journal import Journal
from megaseg_dask.lease import held
from megaseg_dask.plan import Plan, run_folder, runs_folder
from megaseg_dask.run import begin, plan_runs, store_options
from megaseg_dask.settings import Settings
from megaseg_dask.stores import Location, configure


def record_plans(source: str, target: str, settings: Settings) -> list[Plan]:
    """Write the plans of a request and their empty arrays, so that tasks can be run one by one.

    Raises what :func:`megaseg_dask.segment` would raise for the same request.
    """
    configure(store_options(source, settings))
    with held(runs_folder(Location.of(target))):
        runs = plan_runs(source, target, settings)
        for plan, journal in runs:
            if journal.result is None:
                begin(plan, journal)
                for volume in () if plan.is_one_task else range(len(plan.volumes)):
                    if not products.has_work(plan, volume):
                        products.create_work(plan, volume)
    return [plan for plan, _ in runs]


def read_plan(target: str, label_name: str) -> Plan:
    """Return the recorded plan of a run; raises :class:`TargetError` if there is none."""
    run = run_folder(Location.of(target), label_name)
    plan = targets.read_recorded(run)
    if plan is None:
        raise TargetError(f"no run is recorded at {run}; record one with megaseg plan SOURCE TARGET --record")
    return plan


def run_tasks(plan: Plan, stage: str, indices: Sequence[int], emit: Callable[[Event], None]) -> list[Failure]:
    """Run tasks of one stage in this process and record them; return those that failed.

    Raises :class:`SettingsError` for a stage or an index that the plan does not
    have, or if the stage before is not finished.
    """
    planned = plan.stage(stage)
    if wrong := [i for i in indices if not 0 <= i < planned.n_tasks]:
        raise SettingsError(f"stage {stage} has tasks 0 to {planned.n_tasks - 1}, and no {wrong[0]}")
    journal, failures = Journal.read(plan), []
    for volume in sorted({plan.split_index(stage, i)[0] for i in indices}):
        _require_ready(plan, journal, stage, volume)
    with journal.flushed():
        for index in indices:
            outcome = tasks.attempt(plan, stage, index)
            if outcome.error:
                failure = tasks.failure_of(plan, stage, outcome)
                journal.add_failure(stage, index, failure.fields())
                failures.append(failure)
                emit(failure)
            else:
                journal.add(stage, index, outcome.summary, outcome.seconds, outcome.peak_bytes)
    return failures


def _require_ready(plan: Plan, journal: Journal, stage: str, volume: int) -> None:
    """Raise :class:`SettingsError` if a stage cannot begin; else write down what its tasks have to know."""
    for earlier in plan.stages:
        if earlier.name == stage:
            break
        first = volume * earlier.per_volume
        left = earlier.per_volume - int(journal.done(earlier.name)[first : first + earlier.per_volume].sum())
        if left:
            raise SettingsError(f"stage {earlier.name} comes first: {left} of its {earlier.per_volume} tasks of volume "
                                f"{volume} are not finished")  # fmt: skip
    if not plan.is_one_task:
        if not products.has_work(plan, volume):
            raise TargetError(f"{products.work_folder(plan, volume)} is not there: the volume is finished, or its "
                              "intermediate data were removed; run the same segment command to go on")  # fmt: skip
        Flow(plan, journal, volume)


def parse_indices(texts: Sequence[str]) -> list[int]:
    """Return the indices that ``7`` and ``0-99`` (both ends included) mean; raises :class:`SettingsError`."""
    indices: list[int] = []
    for text in texts:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise SettingsError(f"task {text!r}: expected a number such as 7, or a range such as 0-99")
        indices += range(int(found[1]), int(found[2] or found[1]) + 1)
    return indices
