"""What is done: an append-only record beside the target, tied to one plan.

Object stores cannot append, so the record is a row of numbered segments, each
written once, that names its plan. A task is recorded after its data are
written and flushed to the disk, so what the journal says is true, also after a
power loss; what it does not say, or says of another plan, is computed again.
In memory a finished task is one byte, so a million blocks weigh a megabyte.

Processes of a job array write at the same time. Each has one segment of its
own name, which it writes whole each time, so there are as many as processes.
A segment's number is above all those that its writer had read, so what began
after another had ended is replayed after it.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError
from megaseg_dask.plan.plan import Plan, Stage
from megaseg_dask.stores import Location, lose_patience

FOLDER = "journal"
_SEGMENT = re.compile(rf"{FOLDER}/(\d+)(-[0-9a-f]+)?\.jsonl")
# Segments that are in memory, or on their way, at a time.
_AT_ONCE = 256
# A kill loses what the last segment lacks: a second of work at first, ten at most, so a night has a few thousand.
_SEGMENT_S = 1.0
_LONGEST_SEGMENT_S = 10.0
_SEGMENTS_PER_AGE = 300

Summary = Mapping[str, Any]


@dataclass
class Timing:
    """What the finished tasks of a stage took together: number, seconds, and the largest peak of a worker."""

    n_tasks: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Journal:
    """Finished tasks by stage and index; and what failed last and was not mended since."""

    run: Location
    fingerprint: str
    stages: tuple[Stage, ...]
    # The name of one of several processes that write at the same time; none of a client, which is alone.
    writer: str = ""
    failed: dict[tuple[str, int], Summary] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    result: Summary | None = None
    # When each client began that worked on the run, and how long it did; one that was killed left none.
    sessions: list[Summary] = field(default_factory=list)
    # Called before a segment is written: makes the data durable that it speaks of.
    sync: Callable[[], None] = lambda: None
    _done: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    # As text, which is a tenth of the objects that it stands for.
    _summaries: dict[str, dict[int, str]] = field(default_factory=dict)
    _pending: list[dict[str, object]] = field(default_factory=list)
    # Of the pending records, those that one of several processes wrote already.
    _n_written: int = 0
    _n_segments: int = 0
    _began: float = field(default_factory=time.monotonic)
    _last_write: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for stage in self.stages:
            self._done[stage.name] = np.zeros(stage.n_tasks, bool)
            self._summaries[stage.name] = {}
            self.timings[stage.name] = Timing()

    @classmethod
    def of(cls, plan: Plan, writer: str = "") -> "Journal":
        """Return the empty journal of a plan."""
        return cls(plan.run, plan.fingerprint, plan.stages, writer)

    @classmethod
    def read(cls, plan: Plan, writer: str = "") -> "Journal":
        """Read what earlier runs of the same plan recorded; ``writer`` names one of several processes (hexadecimal)."""
        return cls.of(plan, writer).replayed()

    def replayed(self) -> "Journal":
        """Read all segments of this plan into the journal, and return it."""
        numbers = {
            key: int(found[1])
            for key in self.run.keys(FOLDER)
            if (found := _SEGMENT.fullmatch(key))
        }
        self._n_segments = max(numbers.values(), default=-1) + 1
        keys = sorted(numbers, key=lambda key: (numbers[key], key))
        for i in range(0, len(keys), _AT_ONCE):
            for data in map_threaded(self.run.get, keys[i : i + _AT_ONCE]):
                self._read_segment(data or b"")
        return self

    def _read_segment(self, data: bytes) -> None:
        """Replay a segment of this plan; of one torn by a power loss nothing counts, and its tasks run again."""
        try:
            head, *records = map(json.loads, data.splitlines())
        except ValueError:
            return
        if head == {"plan": self.fingerprint}:
            for record in records:
                self._replay(record)

    def _replay(self, record: Mapping[str, Any]) -> None:
        match record:
            case {"result": result}:
                self.result = result
            case {"session": session}:
                self.sessions.append(session)
            case {"undo": stage, "volume": volume}:
                self._undo(stage, volume)
            case {"stage": stage, "index": index, "failure": failure}:
                # Of two processes that tried it at once, one may have succeeded.
                if not self._done[stage][index]:
                    self.failed[stage, index] = failure
            case {"stage": stage, "index": index}:
                self._done[stage][index] = True
                self.failed.pop((stage, index), None)
                if summary := record.get("summary"):
                    self._summaries[stage][index] = json.dumps(summary)
                timing = self.timings[stage]
                timing.n_tasks += 1
                timing.seconds += record.get("s", 0.0)
                timing.peak_bytes = max(timing.peak_bytes, record.get("peak", 0))

    def _undo(self, stage: str, volume: int) -> None:
        per_volume = self._done[stage].size // self._n_volumes
        first, stop = volume * per_volume, (volume + 1) * per_volume
        self._done[stage][first:stop] = False
        for index in [i for i in self._summaries[stage] if first <= i < stop]:
            del self._summaries[stage][index]
        for key in [(s, i) for s, i in self.failed if s == stage and first <= i < stop]:
            del self.failed[key]

    @property
    def _n_volumes(self) -> int:
        return self.stages[0].n_tasks // self.stages[0].per_volume

    # -- what is known

    def done(self, stage: str) -> NDArray[np.bool_]:
        """Return which tasks of a stage are finished, one bool each."""
        return self._done[stage]

    def summaries(self, stage: str, volume: int | None = None) -> list[Summary]:
        """Return the summaries of a stage, of one volume or of all, in the order of task indices."""
        kept = self._summaries[stage]
        if volume is None:
            return [json.loads(kept[index]) for index in sorted(kept)]
        per_volume = self._done[stage].size // self._n_volumes
        indices = range(volume * per_volume, (volume + 1) * per_volume)
        return [json.loads(kept[index]) for index in indices if index in kept]

    def by_index(self, stage: str) -> list[Summary]:
        """Return the summary of every task of a stage, empty where it is not finished."""
        kept = self._summaries[stage]
        return [json.loads(kept[i]) if i in kept else {} for i in range(self._done[stage].size)]

    @property
    def n_done(self) -> int:
        """Number of finished tasks."""
        return sum(int(done.sum()) for done in self._done.values())

    def is_complete(self, volume: int) -> bool:
        """Tell whether all tasks of a volume are finished."""
        return all(
            self._done[s.name][volume * s.per_volume : (volume + 1) * s.per_volume].all()
            for s in self.stages
        )

    # -- what happens

    def add(
        self, stage: str, index: int, summary: Summary, seconds: float = 0.0, peak_bytes: int = 0
    ) -> None:
        """Record a task whose data are written; it reaches the store within seconds, or at :meth:`flush`."""
        record = {"stage": stage, "index": index, "s": seconds, "peak": peak_bytes}
        self._append({**record, "summary": summary} if summary else record)
        now = time.monotonic()
        # Of a thousand processes each needs no more than to lose little.
        age = _LONGEST_SEGMENT_S if self.writer else (now - self._began) / _SEGMENTS_PER_AGE
        if now - self._last_write > min(max(_SEGMENT_S, age), _LONGEST_SEGMENT_S):
            self.flush()

    def add_failure(self, stage: str, index: int, failure: Summary) -> None:
        """Record a task that failed for good in this run; a later run tries it again."""
        self._append({"stage": stage, "index": index, "failure": failure})

    def undo(self, stages: Iterable[str], volume: int) -> None:
        """Record that stages of a volume have to be done again, before anything of them is."""
        for stage in stages:
            self._append({"undo": stage, "volume": volume})
        self.flush()

    def finish(self, result: Summary) -> None:
        """Record that the run is complete."""
        self._append({"result": result})
        self.flush()

    def _append(self, record: dict[str, object]) -> None:
        self._replay(record)
        self._pending.append(record)

    def flush(self) -> None:
        """Write what was added since the last segment; one of several processes, all that it added."""
        if len(self._pending) > self._n_written:
            records = [{"plan": self.fingerprint}, *self._pending]
            data = "\n".join(json.dumps(record, sort_keys=True) for record in records).encode()
            self.sync()
            if self.writer:
                self.run.put(f"{FOLDER}/{self._n_segments:08d}-{self.writer}.jsonl", data)
                self._n_written = len(self._pending)
            else:
                # A client that stood still must not write over its successor's segment.
                while not self.run.create(f"{FOLDER}/{self._n_segments:08d}.jsonl", data):
                    self._n_segments += 1
                self._n_segments += 1
                self._pending.clear()
        self._last_write = time.monotonic()

    @contextmanager
    def session(self, more: Callable[[], Summary] = dict) -> Iterator[None]:
        """Record when this client began to work on the run, in seconds since 1970, how long it did, and ``more``."""
        began, started = time.time(), time.monotonic()
        try:
            yield
        finally:
            wall_s = round(time.monotonic() - started, 3)
            self._append({"session": {"began": round(began), "wall_s": wall_s, **more()}})

    @contextmanager
    def flushed(self) -> Iterator["Journal"]:
        """Flush at the end, however it comes: an interrupted run keeps what it finished."""
        try:
            yield self
        except StoreError:
            # It was waited for already, and will not be for each of the last things.
            lose_patience()
            raise
        finally:
            try:
                self.flush()
            except StoreError:
                lose_patience()
                raise
