"""Tasks to workers: a bounded window of groups, another attempt where it may help, and an eye on who hangs.

A group is a few tasks of one stage that one worker runs in a row: one where a
task takes seconds, many where it takes milliseconds. The scheduler sees some
hundred groups, however many tasks there are.
"""

import heapq
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaseg_dask.errors import ClusterError
from megaseg_dask.events import Event, Notice
from megaseg_dask.run.cluster.workers import Workers
from megaseg_dask.run.tasks.worker import Outcome, is_infrastructure, run_tasks
from megaseg_dask.stores import Location

# Enough groups in flight that no worker waits for the client, few enough that memory stays flat.
_LEAST_WINDOW, _MOST_WINDOW, _PER_WORKER = 8, 512, 4
# A group of quick tasks lasts about so long, and none holds more than so many.
_GROUP_S, _MOST_IN_GROUP = 0.5, 256
# A group takes client and scheduler some 3 ms; they are to be idle for most of the time (docs/scaling.md).
_GROUP_COST_S = 0.01
_POLL_S, _TICK_S, _ANSWER_S = 0.02, 1.0, 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0

# A task may take so many times the longest of its stage, and at least so long.
_TASK_FACTOR, _TASK_LEAST_S = 20, 300.0

GroupSize = Callable[[str, int], int]
Ready = Callable[[GroupSize], tuple[str, Sequence[int]]]


def window_of(n_workers: int) -> int:
    """Return how many groups may be in flight; of very many workers each still has one, and one to come."""
    return max(min(max(_LEAST_WINDOW, _PER_WORKER * n_workers), _MOST_WINDOW), 2 * n_workers)


def group_size_of(mean_s: float | None, n_ready: int, n_workers: int) -> int:
    """Return how many tasks go together: so many that client and scheduler keep up with all workers."""
    group_s = max(_GROUP_S, _GROUP_COST_S * n_workers)
    by_time = int(group_s / max(_GROUP_S if mean_s is None else mean_s, 1e-6))
    # The last tasks are shared among the workers.
    return max(min(by_time, _MOST_IN_GROUP, n_ready // (2 * n_workers)), 1)


@dataclass(slots=True)
class _Group:
    """Tasks that one worker runs in a row: which attempt it is, and when a worker was first seen to have them."""

    stage: str
    indices: Sequence[int]
    attempt: int = 1
    since: float | None = None


@dataclass
class Dispatcher:
    """Runs tasks of one run on its workers."""

    workers: Workers
    run: Location
    fingerprint: str
    lease_id: str | None
    retries: int
    timeout_s: float | None = None
    emit: Callable[[Event], None] = lambda _: None
    _running: dict[Any, _Group] = field(default_factory=dict)
    # Due time, a number that breaks ties, what to run, and on which worker not to.
    _delayed: list[tuple[float, int, _Group, str]] = field(default_factory=list)
    # What workers died of, to be run with nothing beside it.
    _suspects: deque[_Group] = field(default_factory=deque)
    _is_alone: bool = False
    _mean_s: dict[str, float] = field(default_factory=dict)
    _longest_s: dict[str, float] = field(default_factory=dict)
    _n_workers: int = 0
    _n_sent: int = 0
    _name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def client(self) -> Any:
        """The Dask client."""
        return self.workers.client

    def outcomes(self, ready: Ready) -> Iterator[tuple[str, Outcome]]:
        """Yield stage and outcome of each task that is done, or has failed for good, in order of arrival.

        ``ready(size)`` returns the stage and the indices of tasks that may start now, none of them if there are none
        at the moment; ``size(stage, n)`` tells how many of ``n`` to take. It is asked again after
        each outcome. Raises :class:`ClusterError` if the workers are lost.
        """
        from distributed import as_completed

        completed, next_tick = as_completed(), time.monotonic()
        self._n_workers = max(len(self.client.nthreads()), 1)
        try:
            while True:
                for future in self._refill(ready):
                    completed.add(future)
                if not self._running and not self._delayed:
                    return
                for future in completed.next_batch(block=False) or self._pause():
                    yield from self._collect(future)
                if time.monotonic() > next_tick:
                    yield from self._look_after_workers()
                    next_tick = time.monotonic() + _TICK_S
        finally:
            if self._running and self.client.status == "running":
                self.client.cancel(list(self._running))

    @staticmethod
    def _pause() -> tuple[()]:
        time.sleep(_POLL_S)
        return ()

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
        if self._suspects and not self._running and not self._delayed:
            self._is_alone = True
            yield self._send(self._suspects.popleft())

    def _group_size(self, stage: str, n_ready: int) -> int:
        return group_size_of(self._mean_s.get(stage), n_ready, self._n_workers)

    def _send(self, group: _Group, avoided: str = "") -> Any:
        self._n_sent += 1
        others = (
            [address for address in self.client.nthreads() if address != avoided] if avoided else []
        )
        future = self.client.submit(
            _run_here,
            self.run,
            self.fingerprint,
            self.lease_id,
            group.stage,
            list(group.indices),
            # As one collection: only of many tasks of one name does a worker hold no more than it works on.
            key=(f"{group.stage}-{self._name}", self._n_sent),
            pure=False,
            workers=others or None,
            allow_other_workers=bool(others),
        )
        self._running[future] = group
        return future

    # -- receiving

    def _collect(self, future: Any) -> Iterator[tuple[str, Outcome]]:
        group = self._running.pop(future, None)
        if group is None:
            return  # given up before it came
        try:
            address, outcomes = future.result(timeout=_ANSWER_S)
        except Exception as error:
            yield from self._blame(group, error)
            return
        finally:
            future.release()
        for outcome in outcomes:
            if not outcome.error:
                self._learn(group.stage, outcome.seconds)
            elif outcome.is_infrastructure and group.attempt <= self.retries:
                again = _Group(group.stage, [outcome.index], group.attempt + 1)
                self._tell(again, f"{outcome.error}; it runs again")
                self._try_again(again, address)
                continue
            yield group.stage, outcome

    def _blame(self, group: _Group, error: Exception) -> Iterator[tuple[str, Outcome]]:
        """Deal with a group whose worker died or hung: its tasks run again one by one, the last time with no other."""
        from distributed import CancelledError, KilledWorker

        lost = isinstance(error, KilledWorker | CancelledError) or is_infrastructure(error)
        what = str(error) if isinstance(error, TimeoutError) else "its worker died or hung"
        if len(group.indices) > 1 and lost:
            self._tell(group, f"{what}; they run again, one by one")
            for index in group.indices:
                self._try_again(_Group(group.stage, [index], group.attempt))
        elif lost and group.attempt <= self.retries:
            again = _Group(group.stage, group.indices, group.attempt + 1)
            is_last = again.attempt > self.retries
            self._tell(
                again, f"{what}; it runs again{', with nothing beside it' if is_last else ''}"
            )
            if is_last:
                self._suspects.append(again)
            else:
                self._try_again(again)
        else:
            text = what if lost else f"{type(error).__name__}: {error}"
            for index in group.indices:
                yield (
                    group.stage,
                    Outcome(
                        index, error=f"{text} (attempt {group.attempt})", is_infrastructure=lost
                    ),
                )

    def _tell(self, group: _Group, what: str) -> None:
        first, last = group.indices[0], group.indices[-1]
        tasks = f"{group.stage} {first}" if first == last else f"{group.stage} {first} to {last}"
        self.emit(Notice(f"{tasks}: {what} (attempt {group.attempt} of {self.retries + 1})"))

    def _try_again(self, group: _Group, avoided: str = "") -> None:
        pause = min(_FIRST_PAUSE_S * 2 ** (group.attempt - 2), _LONGEST_PAUSE_S)
        self._n_sent += 1
        heapq.heappush(self._delayed, (time.monotonic() + pause, self._n_sent, group, avoided))

    def _learn(self, stage: str, seconds: float) -> None:
        mean = self._mean_s.setdefault(stage, seconds)
        self._mean_s[stage] = mean + (seconds - mean) / 8
        self._longest_s[stage] = max(self._longest_s.get(stage, 0.0), seconds)

    # -- workers that hang, and workers that are gone

    def _look_after_workers(self) -> Iterator[tuple[str, Outcome]]:
        if self.client.status != "running":
            raise ClusterError("the scheduler is gone; run the same command again to go on")
        try:
            threads, processing = self.client.nthreads(), self.client.processing()
        except OSError as error:
            raise ClusterError(
                f"the scheduler does not answer ({error}); run the same command again"
            ) from error
        self._n_workers = max(self._n_workers, len(threads))
        self.workers.look(len(threads))
        # What a worker was given first it works on; the rest waits there.
        places = {
            key: address
            for address, n in threads.items()
            for key in list(processing.get(address, ()))[:n]
        }
        now = time.monotonic()
        for future, group in list(self._running.items()):
            if future.key not in places:
                continue
            group.since = group.since or now
            if now - group.since > self._deadline_s(group):
                del self._running[future]
                future.cancel()
                _give_up(self.client, places[future.key])
                yield from self._blame(
                    group, TimeoutError(f"no result within {now - group.since:.0f} s")
                )

    def _deadline_s(self, group: _Group) -> float:
        if self.timeout_s:
            return self.timeout_s * len(group.indices)
        if group.stage not in self._longest_s:
            return float("inf")
        return max(_TASK_LEAST_S, _TASK_FACTOR * self._longest_s[group.stage] * len(group.indices))


def _run_here(
    run: Location, fingerprint: str, lease_id: str | None, stage: str, indices: list[int]
) -> Any:
    """Run a group on this worker, and tell which worker it is."""
    from distributed import get_worker

    return get_worker().address, run_tasks(run, fingerprint, lease_id, stage, indices)


def _give_up(client: Any, address: str) -> None:
    """Restart a worker that hangs, or take it from the scheduler if nobody can restart it."""
    try:
        client.restart_workers([address], timeout=_ANSWER_S, raise_for_error=True)
    except Exception:
        client.run_on_scheduler(_remove_worker, address=address)


async def _remove_worker(address: str, dask_scheduler: Any = None) -> None:
    await dask_scheduler.remove_worker(address, stimulus_id="megaseg-timeout")
