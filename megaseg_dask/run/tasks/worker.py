"""A process that runs tasks: it gets a task by its number, and returns a small summary.

No voxel travels through a scheduler. A task may run twice: it then writes the
same voxels to the same places.
"""

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import EngineError, MegasegError, StoreError, TaskError
from megaseg_dask.events import Failure
from megaseg_dask.inference import gpu
from megaseg_dask.plan.plan import Plan, PlannedVolume, runs_folder
from megaseg_dask.run.lease import Leases, Permit
from megaseg_dask.run.losses import wrote
from megaseg_dask.run.state import TaskSummary
from megaseg_dask.run.tasks.functions import run_on_volume
from megaseg_dask.run.tasks.process_memory import peak_bytes, release, reset_peak
from megaseg_dask.run.tasks.proof import prove_engine
from megaseg_dask.run.workspace import RunFolder, Workspace
from megaseg_dask.stores import (
    NO_TRAFFIC,
    Location,
    Traffic,
    clear_array_cache,
    noting,
    take_traffic,
)

DeviceState: TypeAlias = Literal["", "full", "failed", "unable"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: its summary, or the error in one line.

    ``is_infrastructure`` says whether another attempt may help. ``device`` says that
    memory of a GPU was ``full``, so that a larger one may do, or that it ``failed``:
    this process can compute nothing on it any more. A process that is ``unable`` to run the
    engine leaves the task to another one. ``traffic`` is what the process asked of stores since
    the last task that it finished.
    """

    index: int
    summary: TaskSummary = field(default_factory=TaskSummary)
    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0
    error: str = ""
    is_infrastructure: bool = False
    device: DeviceState = ""
    details: str = ""
    traffic: Traffic = NO_TRAFFIC


@dataclass(frozen=True, slots=True)
class Assignment:
    """The run that a process works for: its folder, its plan, and the lease of its client.

    The plan of a run that follows its source gets more volumes, and may keep its fingerprint.
    """

    run: Location
    fingerprint: str
    lease_id: str
    n_volumes: int

    def open_work(self) -> "RunWork":
        """Return the tasks of the run.

        Raises:
            TaskError: Another plan is recorded there by now.
        """
        # Arrays of an earlier run may have been replaced by others at the same place.
        clear_array_cache()
        plan = RunFolder(self.run).read_plan()
        if plan.fingerprint != self.fingerprint:
            raise TaskError(f"{self.run}/plan.json was replaced by another plan during this run")
        return RunWork(Workspace(plan, Permit(Leases(runs_folder(plan.target)), self.lease_id)))


class Work(Protocol):
    """Tasks that a process can run: those of a run, or of an import."""

    @property
    def tasks_at_once(self) -> int:
        """How many of them a process runs at once."""
        ...

    def prepare(self, stage: str) -> None:
        """Make this process ready for tasks of a stage; they have no memory yet."""
        ...

    def run_task(self, stage: str, index: int) -> TaskSummary:
        """Run one task, if the client that sent it still holds the run."""
        ...


class Assigned(Protocol):
    """Work that is described by so little that it travels with each group of tasks."""

    def open_work(self) -> Work:
        """Return the work, opened in this process."""
        ...


class Worker:
    """What a process keeps from one task of a run to the next."""

    def __init__(self, work: Work) -> None:
        """Run tasks of a run, or of an import."""
        self._work = work
        # Its memory is that of this many tasks, however many threads it has.
        self._places = threading.Semaphore(work.tasks_at_once)
        self._lock = threading.Lock()
        self._n_running = 0
        self._stage = ""

    def attempt(self, stage: str, index: int) -> Outcome:
        """Run one task when there is room for it, and return how it ended."""
        try:
            self._work.prepare(stage)
        except EngineError as error:
            outcome = _failed(index, error)
            return replace(outcome, device=outcome.device or "unable")
        except Exception as error:
            return _failed(index, error)
        with self._places, self._measured(stage):
            started_s = time.perf_counter()
            try:
                summary = self._work.run_task(stage, index)
            except Exception as error:
                return _failed(index, error)
            seconds = round(time.perf_counter() - started_s, 4)
            peak = peak_bytes()
            device_peak = gpu.peak_bytes()
            return Outcome(index, summary, seconds, peak, device_peak, traffic=take_traffic())

    @contextmanager
    def _measured(self, stage: str) -> Iterator[None]:
        """Measure memory again when a stage begins, unless tasks of another are still running."""
        with self._lock:
            if stage != self._stage and self._n_running == 0:
                release()
                reset_peak()
                gpu.reset_peak()
                self._stage = stage
            self._n_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_running -= 1


def _failed(index: int, error: Exception) -> Outcome:
    """Return the outcome of a task that raised an error, which is being handled.

    As text: the exception of a library may not survive the way to the client.
    """
    device = device_state(error)
    is_explained = isinstance(error, MegasegError) or device
    return Outcome(
        index,
        error=describe(error),
        is_infrastructure=is_infrastructure(error) or device == "failed",
        device=device,
        details="" if is_explained else traceback.format_exc(),
    )


class WorkerProcess:
    """The worker of this process: it is replaced as soon as a task of another run comes."""

    def __init__(self) -> None:
        """Begin without a worker."""
        self._lock = threading.Lock()
        self._assignment: Assigned | None = None
        self._worker: Worker | None = None

    def worker_for(self, assignment: Assigned) -> Worker:
        """Return the worker for a run.

        Raises:
            TaskError: Another plan is recorded there by now.
        """
        with self._lock:
            if self._worker is None or assignment != self._assignment:
                self._worker = Worker(assignment.open_work())
                self._assignment = assignment
            return self._worker


_PROCESS = WorkerProcess()


def run_tasks(assignment: Assigned, stage: str, indices: list[int]) -> list[Outcome]:
    """Run tasks of a recorded plan, one after the other; what cluster workers call."""
    worker = _PROCESS.worker_for(assignment)
    return [worker.attempt(stage, index) for index in indices]


def run_task(workspace: Workspace, stage: str, index: int) -> TaskSummary:
    """Run one task of a plan and return its summary."""
    planned = workspace.plan.stage(stage)
    volume, number = divmod(index, planned.per_volume)
    return run_on_volume(workspace, planned, volume, number)


class RunWork:
    """The tasks of a run."""

    def __init__(self, workspace: Workspace) -> None:
        """Run tasks of the plan of a workspace."""
        self._workspace = workspace
        self._lock = threading.Lock()
        self._is_proven = False

    @property
    def tasks_at_once(self) -> int:
        """How many of them a process runs at once."""
        return self._workspace.plan.tasks_at_once

    def prepare(self, stage: str) -> None:
        """Let the engine of this process prove itself before the first task that predicts.

        Raises:
            EngineError: It may not be used.
        """
        plan = self._workspace.plan
        tells_scores = "scores" in plan.stage(stage).declared.tells
        if not tells_scores or not plan.resolved.predicts():
            return
        with self._lock:
            if not self._is_proven:
                certificate = prove_engine(plan)
                if certificate is not None:
                    certificate.require()
                self._is_proven = True

    def run_task(self, stage: str, index: int) -> TaskSummary:
        """Run one task; its summary also tells what it wrote."""
        self._workspace.begin_task()
        with noting() as notes:
            summary = run_task(self._workspace, stage, index)
        return replace(summary, wrote=wrote(self._workspace.plan, notes))


# -- how tasks fail


def failure_of(plan: Plan, stage: str, outcome: Outcome) -> Failure:
    """Return the event that names a failed task: its volume, its box, its error."""
    volume, _ = plan.split_index(stage, outcome.index)
    name = volume_name(plan.volumes[volume])
    box = str(task_box(plan, stage, outcome.index))
    return Failure(stage, outcome.index, name, box, outcome.error, outcome.details)


def volume_name(planned: PlannedVolume) -> str:
    """Return field, timepoint and channel of a volume, for messages."""
    return f"{planned.image} t={planned.t} c={planned.c}".strip()


def describe(error: BaseException) -> str:
    """Return one line for an error: ours as they are, others with their class."""
    if isinstance(error, MegasegError) and not isinstance(error, TaskError):
        return str(error)
    match device_state(error):
        case "full":
            return f"the GPU of its worker has too little memory: {gpu.first_line(error)}"
        case "failed":
            return f"the GPU of its worker failed: {gpu.first_line(error)}"
    return f"{type(error).__name__}: {error}"


def is_infrastructure(error: BaseException) -> bool:
    """Return whether another attempt may help: a store or connection failed, not the data."""
    return isinstance(error, StoreError | ConnectionError | TimeoutError)


def device_state(error: BaseException) -> DeviceState:
    """Return what an error says of the GPU of this process."""
    causes = (error, error.__cause__)
    if any(map(gpu.is_out_of_memory, causes)):
        return "full"
    return "failed" if any(map(gpu.is_device_error, causes)) else ""


def task_box(plan: Plan, stage: str, index: int) -> Box:
    """Return the voxels that a task is about, at its level."""
    _, number = plan.split_index(stage, index)
    grid = plan.grid(plan.stage(stage))
    return Box.of(plan.volume_shape) if grid is None else grid[number]


def missing_box(plan: Plan, stage: str, index: int) -> dict[str, Any]:
    """Return what the output lacks because a task failed, as JSON values: volume, level and box."""
    volume, _ = plan.split_index(stage, index)
    planned = plan.volumes[volume]
    declared = plan.stage(stage)
    # Without statistics nothing of a volume can be predicted.
    is_whole = declared.declared.loss == "volume"
    box = Box.of(plan.volume_shape) if is_whole else task_box(plan, stage, index)
    missing: dict[str, Any] = {"image": planned.image} if planned.image else {}
    missing["t"] = planned.t
    missing["c"] = planned.c
    missing["level"] = declared.level
    missing["start"] = list(box.start)
    missing["stop"] = list(box.stop)
    return missing
