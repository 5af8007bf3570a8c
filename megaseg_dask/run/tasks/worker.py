"""One function per stage: it reads what the stage before wrote, and writes its own objects.

A task gets its plan's address and its number, and returns a small summary;
no voxel travels through the scheduler. A task may run twice: it then writes
the same voxels to the same places.
"""

import functools
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError, StoreError, TaskError
from megaseg_dask.events import Failure
from megaseg_dask.plan.plan import Plan, PlannedVolume
from megaseg_dask.plan.stages import Stage
from megaseg_dask.run.state import TaskSummary
from megaseg_dask.run.tasks.process_memory import peak_bytes, release, reset_peak
from megaseg_dask.run.workspace import holding
from megaseg_dask.stores import Location, clear_array_cache


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: its summary, or the error in one line and whether another attempt may help."""

    index: int
    summary: TaskSummary = field(default_factory=TaskSummary)
    seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    is_infrastructure: bool = False
    details: str = ""


@functools.lru_cache(maxsize=1)
def load_plan(run: Location, fingerprint: str) -> Plan:
    """Read the plan of a run, once per process; raises :class:`TaskError` if it is another by now."""
    # Arrays of an earlier run may have been replaced by others at the same place.
    clear_array_cache()
    plan = Plan.model_validate_json(run.get("plan.json") or b"{}")
    if plan.fingerprint != fingerprint:
        raise TaskError(f"{run}/plan.json was replaced by another plan while this run was going on")
    return plan


@functools.lru_cache(maxsize=1)
def enter_stage(stage: str) -> None:
    """Once per stage and process: what the last stage held is not this one's memory."""
    release()
    reset_peak()


def function_of(stage: Stage) -> Callable[..., Any]:
    """Return the function below this package that a stage names."""
    module, _, name = stage.function.partition(".")
    function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
    return function


def run_task(plan: Plan, stage: str, index: int) -> TaskSummary:
    """Run one task of a plan and return its summary."""
    planned = plan.stage(stage)
    volume, number = plan.split_index(stage, index)
    function = function_of(planned.declared)
    if planned.declared.per == "volume":
        summary: TaskSummary = function(plan, volume, number)
        return summary
    if planned.declared.over == "levels":
        function = partial(function, level=planned.level)
    outputs = plan.outputs_of(volume)
    return TaskSummary(by_output=tuple(function(plan, output, number) for output in outputs))


def run_tasks(
    run: Location, fingerprint: str, lease_id: str | None, stage: str, indices: list[int]
) -> list[Outcome]:
    """Run tasks of a recorded plan, one after the other, for the client that holds the lease; what workers call."""
    plan = load_plan(run, fingerprint)
    with holding(lease_id):
        return [_attempt_in_turn(plan, stage, index) for index in indices]


def _attempt_in_turn(plan: Plan, stage: str, index: int) -> Outcome:
    # However many threads a worker has, its memory is that of as many tasks as the plan projects.
    with _places(plan.tasks_at_once):
        return attempt(plan, stage, index)


@functools.cache
def _places(n: int) -> threading.Semaphore:
    return threading.Semaphore(n)


def attempt(plan: Plan, stage: str, index: int) -> Outcome:
    """Run one task of a plan, and tell how it ended."""
    enter_stage(stage)
    started = time.perf_counter()
    try:
        summary = run_task(plan, stage, index)
    except Exception as error:
        # As text: an exception of a library may not survive the way to the client.
        details = "" if isinstance(error, MegasegError) else traceback.format_exc()
        return Outcome(
            index,
            error=describe(error),
            is_infrastructure=is_infrastructure(error),
            details=details,
        )
    return Outcome(index, summary, round(time.perf_counter() - started, 4), peak_bytes())


def failure_of(plan: Plan, stage: str, outcome: Outcome) -> Failure:
    """Return the event that names a failed task: its volume, its box, its error."""
    planned = plan.volumes[plan.split_index(stage, outcome.index)[0]]
    box = str(task_box(plan, stage, outcome.index))
    return Failure(stage, outcome.index, volume_name(planned), box, outcome.error, outcome.details)


def volume_name(planned: PlannedVolume) -> str:
    """Return field, timepoint and channel of a volume, for messages."""
    return f"{planned.image} t={planned.t} c={planned.c}".strip()


def describe(error: BaseException) -> str:
    """Return one line for an error: ours as they are, others with their class."""
    if isinstance(error, MegasegError) and not isinstance(error, TaskError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def is_infrastructure(error: BaseException) -> bool:
    """Tell whether another attempt may help: a store or connection that failed, not a bug or bad data."""
    return isinstance(error, StoreError | ConnectionError | TimeoutError)


def task_box(plan: Plan, stage: str, index: int) -> Box:
    """Return the voxels that a task is about, at its level."""
    _, number = plan.split_index(stage, index)
    grid = plan.grid(plan.stage(stage))
    return grid[number] if grid else Box.of(plan.volume_shape)


def missing_box(plan: Plan, stage: str, index: int) -> dict[str, Any]:
    """Return what is missing in the output because a task failed, as JSON values: volume, level and box."""
    volume, _ = plan.split_index(stage, index)
    planned = plan.volumes[volume]
    failed = plan.stage(stage)
    is_whole = failed.declared.loss == "volume"
    box = Box.of(plan.volume_shape) if is_whole else task_box(plan, stage, index)
    where = {"image": planned.image} if planned.image else {}
    return {
        **where,
        "t": planned.t,
        "c": planned.c,
        "level": failed.level,
        "start": list(box.start),
        "stop": list(box.stop),
    }
