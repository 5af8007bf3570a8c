"""Tasks on Dask workers: a bounded window of groups, further attempts, and a watch on workers.

A group is a few tasks of one stage that one worker runs in a row: one where a
task takes seconds, many where it takes milliseconds. The scheduler sees some
hundred groups, however many tasks there are.
"""

import heapq
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from megaseg_dask.errors import ClusterError
from megaseg_dask.events import Emit, Joined, Notice, PatchProgress
from megaseg_dask.inference.block import telling
from megaseg_dask.inference.certificate import Certificate
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.cluster.connection import Needs, connect, dashboard_of, require_client
from megaseg_dask.run.cluster.workers import UNKNOWN_LOSS, Workers
from megaseg_dask.run.progress import Ready, watched_stages
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.tasks.proof import prove_engine, sample_of
from megaseg_dask.run.tasks.worker import (
    Assigned,
    Assignment,
    Outcome,
    is_infrastructure,
    run_tasks,
)
from megaseg_dask.stores import StoreOptions

# Groups in flight: enough that no worker waits for the client, few enough that memory stays flat.
_MIN_WINDOW = 8
_MAX_WINDOW = 512
_GROUPS_PER_WORKER = 4
# How long a group of quick tasks lasts, about, and how many it holds at most.
_GROUP_S = 0.5
_MAX_TASKS_IN_GROUP = 256
# A group takes client and scheduler some 3 ms; they are to be idle for most of the time
# (docs/scaling.md).
_GROUP_COST_S = 0.01
_POLL_S = 0.02
_TICK_S = 1.0
_ANSWER_S = 30.0
# For a worker to load the network, and to predict a patch twice.
_PROOF_S = 600.0

# A task may take this many times the longest of its stage, and at least this long.
_TASK_FACTOR = 20
_MIN_TASK_S = 300.0


def window_of(n_workers: int) -> int:
    """Return how many groups may be in flight; each worker has one, and one to come."""
    window = min(max(_MIN_WINDOW, _GROUPS_PER_WORKER * n_workers), _MAX_WINDOW)
    return max(window, 2 * n_workers)


def group_size_of(mean_s: float | None, n_ready: int, n_workers: int) -> int:
    """Return how many tasks go together, so that client and scheduler keep up with all workers.

    ``mean_s`` is the duration of a task, if it is known.
    """
    group_s = max(_GROUP_S, _GROUP_COST_S * n_workers)
    task_s = _GROUP_S if mean_s is None else mean_s
    by_time = int(group_s / max(task_s, 1e-6))
    # The last tasks are shared among the workers.
    share = n_ready // (2 * n_workers)
    return max(min(by_time, _MAX_TASKS_IN_GROUP, share), 1)


@dataclass(slots=True)
class _Group:
    """Tasks that one worker runs in a row, and when a worker was first seen to have them.

    ``cause`` is why the worker of an earlier attempt was lost, if that was known.
    """

    stage: str
    indices: Sequence[int]
    attempt: int = 1
    since: float | None = None
    cause: str = ""

    def __str__(self) -> str:
        first = self.indices[0]
        last = self.indices[-1]
        return f"{self.stage} {first}" if first == last else f"{self.stage} {first} to {last}"

    def each(self) -> "list[_Group]":
        """Return a group for each task, of the same attempt."""
        return [_Group(self.stage, [index], self.attempt) for index in self.indices]

    def again(self) -> "_Group":
        """Return the group of the next attempt."""
        return _Group(self.stage, self.indices, self.attempt + 1, cause=self.cause)


class _Durations:
    """How long the tasks of each stage take."""

    def __init__(self) -> None:
        self._mean_s: dict[str, float] = {}
        self._max_s: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Learn from a task; recent ones count most."""
        mean_s = self._mean_s.get(stage, seconds)
        self._mean_s[stage] = mean_s + (seconds - mean_s) / 8
        self._max_s[stage] = max(self._max_s.get(stage, 0.0), seconds)

    def mean_s(self, stage: str) -> float | None:
        """Return the duration of a task, if one has ended."""
        return self._mean_s.get(stage)

    def deadline_s(self, stage: str, n_tasks: int) -> float:
        """Return how long tasks in a row may take before their worker is taken to hang."""
        if stage not in self._max_s:
            return float("inf")
        return max(_MIN_TASK_S, _TASK_FACTOR * self._max_s[stage] * n_tasks)


class DaskDispatcher:
    """Runs tasks of one run on Dask workers."""

    def __init__(
        self,
        workers: Workers,
        assignment: Assigned,
        retries: Retries,
        timeout_s: float | None,
        emit: Emit,
        watched: Mapping[str, int] | None = None,
    ) -> None:
        """Run tasks on ``workers``; ``timeout_s`` is how long a task may take, if it is given.

        ``watched`` are the stages that show patches, with their numbers of tasks.
        """
        self._workers = workers
        self._client = workers.client
        self._assignment = assignment
        self._retries = retries
        self._timeout_s = timeout_s
        self._emit = emit
        self._running: dict[Any, _Group] = {}
        # Due time, a number that breaks ties, what to run, and on which worker not to.
        self._delayed: list[tuple[float, int, _Group, str]] = []
        # Groups that workers died of, to be run with nothing beside them.
        self._to_run_alone: deque[_Group] = deque()
        self._is_alone = False
        self._durations = _Durations()
        self._n_workers = 1
        self._n_sent = 0
        self._name = uuid.uuid4().hex
        self._watched = watched or {}
        # What workers told of groups in work: stage, patches done, patches in all, seconds left.
        self._patches: dict[int, tuple[str, int, int, float]] = {}

    def outcomes(self, ready: Ready) -> Iterator[tuple[str, Outcome]]:
        """Yield stage and outcome of each task that has ended for good, in order of arrival.

        Raises:
            ClusterError: The workers are lost.
        """
        from distributed import as_completed

        if self._watched:
            self._client.subscribe_topic(self._topic, self._hear)
        completed = as_completed()
        next_tick_s = time.monotonic()
        self._n_workers = max(len(self._client.nthreads()), 1)
        try:
            while True:
                for future in self._refill(ready):
                    completed.add(future)
                if not self._running and not self._delayed:
                    return
                batch = list(completed.next_batch(block=False))
                if not batch:
                    time.sleep(_POLL_S)
                for future in batch:
                    yield from self._collect(future)
                if time.monotonic() > next_tick_s:
                    yield from self._look_after_workers()
                    self._show_patches()
                    next_tick_s = time.monotonic() + _TICK_S
        finally:
            if self._client.status == "running":
                if self._watched:
                    self._client.unsubscribe_topic(self._topic)
                if self._running:
                    self._client.cancel(list(self._running))

    # -- sending

    def _refill(self, ready: Ready) -> Iterator[Any]:
        """Send due attempts and fresh groups until the window is full, and yield their futures."""
        if self._is_alone and self._running:
            return
        self._is_alone = False
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, group, avoided = heapq.heappop(self._delayed)
            yield self._send(group, avoided)
        while len(self._running) < window_of(self._n_workers):
            stage, indices = ready(self._group_size)
            if not indices:
                break
            yield self._send(_Group(stage, indices))
        if self._to_run_alone and not self._running and not self._delayed:
            self._is_alone = True
            yield self._send(self._to_run_alone.popleft())

    def _group_size(self, stage: str, n_ready: int) -> int:
        return group_size_of(self._durations.mean_s(stage), n_ready, self._n_workers)

    def _send(self, group: _Group, avoided: str = "") -> Any:
        self._n_sent += 1
        others = []
        if avoided:
            tasks = [(group.stage, index) for index in group.indices]
            others = self._workers.others_than(avoided, tasks)
        future = self._client.submit(
            _run_here,
            self._assignment,
            group.stage,
            list(group.indices),
            self._topic if group.stage in self._watched else "",
            # As one collection: only of many tasks of one name does a worker hold no more than it
            # works on.
            key=(f"{group.stage}-{self._name}", self._n_sent),
            pure=False,
            workers=others or None,
            allow_other_workers=bool(others),
        )
        self._running[future] = group
        return future

    def _send_later(self, group: _Group, avoided: str = "") -> None:
        due_s = time.monotonic() + self._retries.pause_s(group.attempt)
        self._n_sent += 1
        heapq.heappush(self._delayed, (due_s, self._n_sent, group, avoided))

    # -- receiving

    def _collect(self, future: Any) -> Iterator[tuple[str, Outcome]]:
        group = self._running.pop(future, None)
        if group is None:
            return  # given up before it came
        self._patches.pop(group.indices[0], None)
        try:
            address, outcomes = future.result(timeout=_ANSWER_S)
        except Exception as error:
            yield from self._handle_error(group, error)
            return
        finally:
            future.release()
        for outcome in outcomes:
            if outcome.device == "failed":
                self._workers.device_failed(address, (group.stage, outcome.index))
            if self._may_help(outcome) and self._retries.allow(group.attempt):
                again = _Group(group.stage, [outcome.index], group.attempt + 1)
                self._tell(again, f"{outcome.error}; it runs again")
                self._send_later(again, address)
                continue
            if not outcome.error:
                self._durations.add(group.stage, outcome.seconds)
            yield group.stage, outcome

    def _may_help(self, outcome: Outcome) -> bool:
        """Return whether another attempt may end otherwise."""
        if outcome.device in ("full", "unable"):
            # Another GPU may be larger, or have more memory free; another processor may have
            # what the engine needs.
            return self._n_workers > 1
        return outcome.is_infrastructure

    def _handle_error(self, group: _Group, error: Exception) -> Iterator[tuple[str, Outcome]]:
        """Deal with a group that came back without outcomes: mostly its worker died or hung.

        Its tasks run again one by one, the last time with nothing beside them.
        """
        from distributed import CancelledError, KilledWorker

        is_lost = isinstance(error, KilledWorker | CancelledError) or is_infrastructure(error)
        if isinstance(error, TimeoutError):
            cause = str(error)
        else:
            worker = getattr(error, "last_worker", None)
            cause = self._workers.cause_of_loss(getattr(worker, "address", ""))
            if cause != UNKNOWN_LOSS:
                group.cause = cause
            # One that is known of a worker before tells more.
            cause = group.cause or cause
        if not is_lost:
            yield from self._fail(group, f"{type(error).__name__}: {error}", is_lost=False)
        elif len(group.indices) > 1:
            self._tell(group, f"{cause}; they run again, one at a time")
            for single in group.each():
                self._send_later(single)
        elif not self._retries.allow(group.attempt):
            yield from self._fail(group, cause, is_lost=True)
        elif self._retries.allow(group.attempt + 1):
            self._tell(group.again(), f"{cause}; it runs again")
            self._send_later(group.again())
        else:
            self._tell(group.again(), f"{cause}; it runs again alone")
            self._to_run_alone.append(group.again())

    def _fail(self, group: _Group, error: str, *, is_lost: bool) -> Iterator[tuple[str, Outcome]]:
        failed = Outcome(0, error=f"{error} (attempt {group.attempt})", is_infrastructure=is_lost)
        for index in group.indices:
            yield group.stage, replace(failed, index=index)

    def _tell(self, group: _Group, text: str) -> None:
        attempt = f"attempt {group.attempt} of {self._retries.n_attempts}"
        self._emit(Notice(f"{group}: {text} ({attempt})"))

    # -- patches of blocks that are in work

    @property
    def _topic(self) -> str:
        return f"megaseg-patches-{self._name}"

    def _hear(self, event: tuple[float, tuple[int, tuple[str, int, int, float]]]) -> None:
        """Keep what a worker told, in the thread of the client."""
        _, (index, told) = event
        self._patches[index] = told

    def _show_patches(self) -> None:
        in_work = {group.indices[0] for group in self._running.values()}
        told = [patches for index, patches in list(self._patches.items()) if index in in_work]
        if not told:
            return
        stage, _, _, left_s = told[0]
        n_done = sum(patches[1] for patches in told)
        n_patches = sum(patches[2] for patches in told)
        is_only = self._watched[stage] == 1
        self._emit(PatchProgress(stage, n_done, n_patches, len(told), left_s if is_only else None))

    # -- workers that hang, and workers that are gone

    def _look_after_workers(self) -> Iterator[tuple[str, Outcome]]:
        if self._client.status != "running":
            raise ClusterError(
                "the connection to the scheduler is lost; run the same command again to resume"
            )
        try:
            threads = self._client.nthreads()
            processing = self._client.processing()
        except OSError as error:
            raise ClusterError(
                f"the scheduler does not answer ({error}); run the same command again"
            ) from error
        self._n_workers = max(self._n_workers, len(threads))
        self._workers.watch(len(threads))
        # A worker works on the groups that it was given first; the rest waits there.
        addresses: dict[Any, str] = {}
        for address, n_threads in threads.items():
            for key in list(processing.get(address, ()))[:n_threads]:
                addresses[key] = address
        now = time.monotonic()
        for future, group in list(self._running.items()):
            if future.key not in addresses:
                continue
            group.since = group.since or now
            elapsed_s = now - group.since
            if elapsed_s > self._deadline_s(group):
                del self._running[future]
                future.cancel()
                _give_up(self._client, addresses[future.key])
                timeout = TimeoutError(f"no result within {elapsed_s:.0f} s")
                yield from self._handle_error(group, timeout)

    def _deadline_s(self, group: _Group) -> float:
        n_tasks = len(group.indices)
        if self._timeout_s:
            return self._timeout_s * n_tasks
        return self._durations.deadline_s(group.stage, n_tasks)


def _run_here(assignment: Assigned, stage: str, indices: list[int], topic: str = "") -> Any:
    """Run a group on this worker; return the worker's address, and the outcomes.

    Those who subscribe to ``topic`` are told of its patches.
    """
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()

    def tell(*patches: float) -> None:
        worker.log_event(topic, (indices[0], (stage, *patches)))

    with telling(tell) if topic else nullcontext():
        outcomes = run_tasks(assignment, stage, indices)
    if any(outcome.device == "failed" for outcome in outcomes):
        # It takes no further task: the client ends its process when it has this answer.
        worker.loop.add_callback(setattr, worker, "status", Status.paused)
    return worker.address, outcomes


def _give_up(client: Any, address: str) -> None:
    """Restart a worker that hangs; take it from the scheduler if it cannot be restarted."""
    try:
        client.restart_workers([address], timeout=_ANSWER_S, raise_for_error=True)
    except Exception:
        client.run_on_scheduler(_remove_worker, address=address)


async def _remove_worker(address: str, dask_scheduler: Any = None) -> None:
    await dask_scheduler.remove_worker(address, stimulus_id="megaseg-timeout")


class DaskExecutor:
    """Carries out the tasks of a request on Dask workers."""

    def __init__(self, workers: Workers) -> None:
        """Use workers behind a client."""
        self._workers = workers

    @property
    def dashboard(self) -> str | None:
        """Address of Dask's page, which shows nothing without bokeh."""
        return dashboard_of(self._workers.client) if find_spec("bokeh") else None

    @property
    def workers(self) -> Sequence[Joined]:
        """All workers that ever joined."""
        return tuple(self._workers.joined.values())

    def check(self) -> None:
        """Compare versions, and look at the scheduler and at each worker.

        Raises:
            SettingsError: They cannot carry out the plan.
        """
        self._workers.check_workers()

    def ready(self, plan: Plan, options: StoreOptions) -> AbstractContextManager[None]:
        """Give the workers the model and the options of stores, and take it back at the end."""
        if not plan.resolved.predicts():
            return self.ready_without_model(options)
        return self._workers.ready(plan.model, plan.run, options)

    def ready_without_model(self, options: StoreOptions) -> AbstractContextManager[None]:
        """Give the workers the options of stores alone."""
        return self._workers.ready_with(options)

    def prove(self, plan: Plan) -> Certificate | None:
        """Let the engine of a worker prove itself; all others do before their first task.

        Raises:
            Exception: The worker cannot run the engine, died, or does not answer.
        """
        if plan.engine.is_reference:
            return None
        future = self._workers.client.submit(prove_engine, sample_of(plan), pure=False)
        certificate: Certificate | None = future.result(plan.settings.timeout or _PROOF_S)
        return certificate

    def dispatcher(self, plan: Plan, lease_id: str, emit: Emit) -> DaskDispatcher:
        """Return a dispatcher of the tasks of one run."""
        assignment = Assignment(plan.run, plan.fingerprint, lease_id, len(plan.volumes))
        return self.dispatcher_of(assignment, plan.settings, emit, watched_stages(plan))

    def dispatcher_of(
        self,
        assignment: Assigned,
        settings: Settings,
        emit: Emit,
        watched: Mapping[str, int] | None = None,
    ) -> DaskDispatcher:
        """Return a dispatcher of any work; ``watched`` are its stages that show patches."""
        retries = Retries(settings.retries)
        return DaskDispatcher(self._workers, assignment, retries, settings.timeout, emit, watched)


@contextmanager
def open_workers(plan: Needs, client: Any, emit: Emit) -> Iterator[DaskExecutor]:
    """Yield the workers behind a client, or those that the plan's settings ask for.

    Raises:
        SettingsError: A scheduler does not answer, jobs are refused, or no worker comes.
    """
    if client is not None:
        require_client(client)
        yield DaskExecutor(Workers.of(plan, client, emit))
        return
    with connect(plan, emit) as workers:
        yield DaskExecutor(workers)
