"""Which tasks of a plan are done: an append-only record in the run folder, tied to one plan.

Object stores cannot append, so the record is a row of numbered segments, each
written once, that names its plan and carries a digest of itself. A task is
recorded after its data are written and flushed to the disk, and the record is
flushed too, so what the journal says is true, also after a power loss. What it
does not say, or says of another plan, is computed again. So is all that was
recorded after a segment that is damaged or lost: that one may have taken back
what stands in later ones. In memory a finished task is one byte, so a million
blocks weigh a megabyte.

Processes of a job array write at the same time. Each has one segment with its
own name, which it writes whole each time, so there are as many as processes.
A segment's number is above all those that its writer had read, so what began
after another had ended is replayed after it.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError
from megaseg_dask.events import Failure, Joined
from megaseg_dask.inference.certificate import Certificate
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.run.state import Ending, Session, TaskSummary
from megaseg_dask.stores import NO_TRAFFIC, Location, Traffic, stop_waiting, take_traffic

FOLDER = "journal"
_SEGMENT = re.compile(rf"{FOLDER}/(\d+)(-[0-9a-f]+)?\.jsonl")
# Segments that are in memory, or on their way, at a time.
_MAX_SEGMENTS_AT_ONCE = 256
# A kill loses the tasks since the last segment: a second of work at first, ten at most, so a
# night has a few thousand segments.
_MIN_SEGMENT_S = 1.0
_MAX_SEGMENT_S = 10.0
_SEGMENTS_PER_AGE = 300

Record = Mapping[str, Any]
# What reading a record raises that no journal of this version writes.
_UNSOUND = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass
class Timing:
    """The finished tasks of a stage together: number, seconds, and largest peak of a worker.

    ``traffic`` is what workers asked of stores until these tasks were done.
    """

    n_tasks: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0
    traffic: Traffic = NO_TRAFFIC


class TaskRecord:
    """Finished and failed tasks by stage and index, in memory."""

    def __init__(self, stages: Sequence[PlannedStage]) -> None:
        """Begin with no task done."""
        self.stages = tuple(stages)
        # The last failure of each task that has not succeeded since.
        self.failed: dict[tuple[str, int], Failure] = {}
        # Tasks whose objects are gone. What was computed from them holds.
        self.lost: set[tuple[str, int]] = set()
        self.timings = {stage.name: Timing() for stage in self.stages}
        # Clients that worked on the run; one that was killed left none.
        self.sessions: list[Session] = []
        # Of the engines that proved themselves, one for each client whose figures were others.
        self.certificates: list[Certificate] = []
        self.result: Ending | None = None
        self._measuring = {s.name for s in self.stages if "statistics" in s.declared.tells}
        self._done = {stage.name: np.zeros(stage.n_tasks, bool) for stage in self.stages}
        # As JSON text, which takes a tenth of the memory of its objects.
        self._summaries: dict[str, dict[int, str]] = {stage.name: {} for stage in self.stages}

    def grow(self, stages: Sequence[PlannedStage]) -> None:
        """Go on with a plan that has the same stages, and more volumes after the earlier ones."""
        for stage in stages:
            done = np.zeros(stage.n_tasks, bool)
            before = self._done[stage.name]
            done[: before.size] = before
            self._done[stage.name] = done
        n_before = sum(stage.n_tasks for stage in self.stages)
        if sum(stage.n_tasks for stage in stages) > n_before:
            self.result = None
        self.stages = tuple(stages)

    def done(self, stage: str) -> NDArray[np.bool_]:
        """Return which tasks of a stage are finished, one bool each."""
        return self._done[stage]

    def summaries(self, stage: str, volume: int | None = None) -> list[TaskSummary]:
        """Return the summaries of a stage, of one volume or of all, in the order of tasks."""
        kept = self._summaries[stage]
        indices = sorted(kept) if volume is None else self._tasks_of(stage, volume)
        return [_read_summary(kept[index]) for index in indices if index in kept]

    def by_index(self, stage: str) -> list[TaskSummary | None]:
        """Return the summary of every task of a stage, ``None`` where it is not finished."""
        kept = self._summaries[stage]
        return [
            _read_summary(kept.get(index, "{}")) if is_done else None
            for index, is_done in enumerate(self._done[stage].tolist())
        ]

    @property
    def traffic(self) -> Traffic:
        """What all clients and workers asked of stores, as far as it is recorded."""
        each = [timing.traffic for timing in self.timings.values()]
        each += [session.traffic for session in self.sessions]
        return sum(each, NO_TRAFFIC)

    @property
    def n_done(self) -> int:
        """Number of finished tasks."""
        return sum(int(done.sum()) for done in self._done.values())

    def is_complete(self, volume: int) -> bool:
        """Return whether all tasks of a volume are finished."""
        return all(self.is_stage_complete(stage.name, volume) for stage in self.stages)

    def is_stage_complete(self, stage: str, volume: int) -> bool:
        """Return whether all tasks of a stage of a volume are finished."""
        tasks = self._tasks_of(stage, volume)
        return bool(self._done[stage][tasks.start : tasks.stop].all())

    def has_begun(self, stage: str, volume: int) -> bool:
        """Return whether a task of a stage of a volume is finished."""
        tasks = self._tasks_of(stage, volume)
        return bool(self._done[stage][tasks.start : tasks.stop].any())

    def require_sound(self, record: Record) -> None:
        """Check a record that was read.

        Raises:
            ValueError: It is none that this journal could have written, as several other errors
                tell too.
        """
        match record:
            case {"result": result}:
                Ending.from_json(result)
            case {"reopened": True}:
                pass
            case {"session": session}:
                Session.from_json(session)
            case {"certificate": certificate}:
                Certificate.from_json(certificate)
            case {"lose": stage, "index": index}:
                self._require_among(index, self._done[stage].size)
            case {"undo": stage, "volume": volume}:
                self._require_among(volume, self._n_volumes)
                self._done[stage]
            case {"stage": stage, "index": index, "failure": failure}:
                self._require_among(index, self._done[stage].size)
                if Failure(**failure).index != index:
                    raise ValueError("a failure of another task")
            case {"stage": stage, "index": index, "s": float() | int(), "peak": int()}:
                self._require_among(index, self._done[stage].size)
                Traffic.from_json(record.get("io", ()))
                summary = TaskSummary.from_json(record.get("summary", {}))
                if stage in self._measuring and not (summary.parts or summary.statistics):
                    raise ValueError("no statistics, which the stage tells")
            case _:
                raise ValueError("a record of no known kind")

    @staticmethod
    def _require_among(index: object, n: int) -> None:
        if type(index) is not int or not 0 <= index < n:
            raise ValueError(f"index {index} of {n}")

    def replay(self, record: Record) -> None:
        """Take over one record of the journal."""
        match record:
            case {"result": result}:
                # A run ends once: not before its tasks, and not after one was taken back.
                if all(done.all() for done in self._done.values()):
                    self.result = Ending.from_json(result)
            case {"reopened": True}:
                self.result = None
            case {"session": session}:
                self.sessions.append(Session.from_json(session))
            case {"certificate": certificate}:
                self.certificates.append(Certificate.from_json(certificate))
            case {"lose": stage, "index": index}:
                self.result = None
                self._done[stage][index] = False
                self.lost.add((stage, index))
            case {"undo": stage, "volume": volume}:
                self._undo(stage, volume)
            case {"stage": stage, "index": index, "failure": failure}:
                # Of two processes that tried it at once, one may have succeeded.
                if not self._done[stage][index]:
                    self.failed[stage, index] = Failure(**failure)
            case {"stage": stage, "index": index}:
                self._finish(stage, index, record)

    def _finish(self, stage: str, index: int, record: Record) -> None:
        self._done[stage][index] = True
        self.failed.pop((stage, index), None)
        self.lost.discard((stage, index))
        # What a million tasks wrote is read again where it is needed.
        told = {key: value for key, value in record.get("summary", {}).items() if key != "wrote"}
        if told:
            self._summaries[stage][index] = json.dumps(told)
        timing = self.timings[stage]
        timing.n_tasks += 1
        timing.seconds += record["s"]
        timing.peak_bytes = max(timing.peak_bytes, record["peak"])
        timing.device_peak_bytes = max(timing.device_peak_bytes, record.get("gpu", 0))
        timing.traffic += Traffic.from_json(record.get("io", ()))

    def _undo(self, stage: str, volume: int) -> None:
        tasks = self._tasks_of(stage, volume)
        self.result = None
        self._done[stage][tasks.start : tasks.stop] = False
        for index in tasks:
            self._summaries[stage].pop(index, None)
            self.failed.pop((stage, index), None)
            self.lost.discard((stage, index))

    @property
    def _n_volumes(self) -> int:
        first = self.stages[0]
        return first.n_tasks // first.per_volume

    def _tasks_of(self, stage: str, volume: int) -> range:
        per_volume = self._done[stage].size // self._n_volumes
        return range(volume * per_volume, (volume + 1) * per_volume)


class Journal(TaskRecord):
    """The record of a plan's tasks, whose changes are written to the run folder in segments."""

    def __init__(
        self,
        run: Location,
        fingerprint: str,
        stages: Sequence[PlannedStage],
        writer: str = "",
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin an empty journal.

        ``writer`` (hexadecimal) names one of several processes that write at the same time; a
        client, which is alone, has none. ``sync`` is called before a segment is written: it makes
        the data durable that the segment speaks of.
        """
        super().__init__(stages)
        self._run = run
        self._fingerprint = fingerprint
        self._writer = writer
        self._sync = sync
        self._pending: list[Record] = []
        # Of the pending records, those that one of several processes wrote already.
        self._n_written = 0
        self._n_segments = 0
        # Segments that are damaged, or follow a damaged or lost one.
        self.discarded: list[str] = []
        self._began_s = time.monotonic()
        self._last_write_s = self._began_s

    @classmethod
    def of(cls, plan: Plan, writer: str = "", sync: Callable[[], None] = lambda: None) -> Self:
        """Return the empty journal of a plan."""
        return cls(plan.run, plan.identity, plan.stages, writer, sync)

    @classmethod
    def read(cls, plan: Plan, writer: str = "", sync: Callable[[], None] = lambda: None) -> Self:
        """Read what earlier runs of the same plan recorded."""
        return cls.of(plan, writer, sync).replayed()

    # -- reading

    def replayed(self) -> Self:
        """Read all segments of this plan into the journal, and return it."""
        numbers: dict[str, int] = {}
        for key in self._run.keys(FOLDER):
            match = _SEGMENT.fullmatch(key)
            if match:
                numbers[key] = int(match[1])
        keys = sorted(numbers, key=lambda key: (numbers[key], key))
        for first in range(0, len(keys), _MAX_SEGMENTS_AT_ONCE):
            some = keys[first : first + _MAX_SEGMENTS_AT_ONCE]
            for key, data in zip(some, map_threaded(self._run.get, some), strict=True):
                follows = numbers[key] <= self._n_segments
                if not follows or not self._read_segment(data or b""):
                    self.discarded = keys[keys.index(key) :]
                    return self
                self._n_segments = numbers[key] + 1
        return self

    def _read_segment(self, data: bytes) -> bool:
        """Replay a segment, if it is of this plan; return whether it is undamaged."""
        first_line, _, lines = data.partition(b"\n")
        try:
            head = json.loads(first_line)
            if head["digest"] != _digest(lines):
                return False
            if head["plan"] != self._fingerprint:
                return True
            records = [json.loads(line) for line in lines.splitlines()]
            for record in records:
                self.require_sound(record)
        except _UNSOUND:
            return False
        for record in records:
            self.replay(record)
        return True

    def restart(self) -> None:
        """Begin again at the first segment, now that all were removed."""
        self._n_segments = 0
        self.discarded = []

    def discard_damaged(self) -> None:
        """Remove the segments that do not count, for what follows them would not count either.

        Raises:
            StoreError: The store failed.
        """
        for key in self.discarded:
            self._run.delete(key)
        self.discarded = []

    # -- writing

    def add(
        self,
        stage: str,
        index: int,
        summary: TaskSummary,
        seconds: float = 0.0,
        peak_bytes: int = 0,
        device_peak_bytes: int = 0,
        traffic: Traffic = NO_TRAFFIC,
    ) -> None:
        """Record a task whose data are written.

        The record reaches the store within seconds, or at :meth:`flush`.
        """
        record: dict[str, Any] = {"stage": stage, "index": index, "s": seconds, "peak": peak_bytes}
        if device_peak_bytes:
            record["gpu"] = device_peak_bytes
        if traffic.n_requests:
            record["io"] = traffic.to_json()
        fields = summary.to_json()
        if fields:
            record["summary"] = fields
        self._append(record)
        if time.monotonic() - self._last_write_s > self._segment_s():
            self.flush()

    def _segment_s(self) -> float:
        """Return the seconds between two segments."""
        if self._writer:
            # A thousand processes write segments: each may lose little.
            return _MAX_SEGMENT_S
        by_age = (time.monotonic() - self._began_s) / _SEGMENTS_PER_AGE
        return min(max(_MIN_SEGMENT_S, by_age), _MAX_SEGMENT_S)

    def add_failure(self, failure: Failure) -> None:
        """Record a task that failed for good in this run; a later run tries it again."""
        task = {"stage": failure.stage, "index": failure.index}
        self._append({**task, "failure": asdict(failure)})

    def undo(self, stages: Iterable[str], volume: int) -> None:
        """Record that stages of a volume have to be done again, before any task of them is."""
        for stage in stages:
            self._append({"undo": stage, "volume": volume})
        self.flush()

    def lose(self, tasks: Iterable[tuple[str, int]]) -> None:
        """Record tasks whose objects are gone: they run again, and nothing else for that."""
        for stage, index in tasks:
            self._append({"lose": stage, "index": index})
        self.flush()

    def certify(self, certificate: Certificate | None) -> None:
        """Record the certificate of an engine that needs one, unless it is recorded."""
        if certificate is not None and certificate not in self.certificates:
            self._append({"certificate": asdict(certificate)})

    def finish(self, result: Ending) -> None:
        """Record that the run is complete."""
        self._append({"result": asdict(result)})
        self.flush()

    def reopen(self) -> None:
        """Record, with the next segment, that the run is not complete any more."""
        self._append({"reopened": True})

    def _append(self, record: Record) -> None:
        self.replay(record)
        self._pending.append(record)

    def flush(self) -> None:
        """Write the records since the last segment; one of several processes, all its records.

        When it returns, they survive a power loss.

        Raises:
            StoreError: The store failed; the records are kept for the next try.
        """
        if len(self._pending) > self._n_written:
            lines = "\n".join(
                json.dumps(record, sort_keys=True) for record in self._pending
            ).encode()
            head = json.dumps({"plan": self._fingerprint, "digest": _digest(lines)}).encode()
            data = head + b"\n" + lines
            self._sync()
            if self._writer:
                key = f"{FOLDER}/{self._n_segments:08d}-{self._writer}.jsonl"
                self._run.put(key, data, durable=True)
                self._n_written = len(self._pending)
            else:
                self._create_segment(data)
                self._pending.clear()
        self._last_write_s = time.monotonic()

    def _create_segment(self, data: bytes) -> None:
        """Take the next number that is free.

        A client that was stopped for a while must not write over its successor's segment.
        """
        self.discard_damaged()
        is_created = False
        while not is_created:
            key = f"{FOLDER}/{self._n_segments:08d}.jsonl"
            is_created = self._run.create(key, data, durable=True)
            self._n_segments += 1

    @contextmanager
    def session(self, workers: Callable[[], Iterable[Joined]] = tuple) -> Iterator[None]:
        """Record when this client worked on the run, and on which ``workers``."""
        began = round(time.time())
        started = time.monotonic()
        try:
            yield
        finally:
            wall_s = round(time.monotonic() - started, 3)
            session = Session(began, wall_s, tuple(workers()), take_traffic())
            self._append({"session": session.to_json()})

    @contextmanager
    def flushed(self) -> Iterator[Self]:
        """Flush at the end, also of an interrupted run, which keeps its finished tasks."""
        try:
            yield self
        except StoreError:
            # The store was waited for already: the last requests need not wait for it again.
            stop_waiting()
            raise
        finally:
            try:
                self.flush()
            except StoreError:
                stop_waiting()
                raise


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_summary(text: str) -> TaskSummary:
    return TaskSummary.from_json(json.loads(text))
