"""What is done: an append-only record beside the target, tied to one plan.

Object stores cannot append, so the record is a row of numbered segments, each
written once, that names its plan. A task is recorded after its data are
written, so what the journal says is true; what it does not say, or says of
another plan, is computed again.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megaseg_dask.stores import Location

FOLDER = "journal"
_SEGMENT_S = 1.0

Summary = Mapping[str, object]


@dataclass
class Journal:
    """Finished tasks and their summaries, by stage and index; and what failed last and was not mended since."""

    run: Location
    fingerprint: str
    done: dict[str, dict[int, Summary]] = field(default_factory=dict)
    failed: dict[tuple[str, int], Summary] = field(default_factory=dict)
    result: Summary | None = None
    _pending: list[dict[str, object]] = field(default_factory=list)
    _n_segments: int = 0
    _last_write: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, run: Location, fingerprint: str) -> "Journal":
        """Read what earlier runs of the same plan recorded."""
        journal = cls(run, fingerprint)
        for key in run.keys(FOLDER):
            if number := re.fullmatch(rf"{FOLDER}/(\d+)\.jsonl", key):
                journal._n_segments = int(number[1]) + 1
                journal._read_segment(run.get(key) or b"")
        return journal

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
            case {"stage": stage, "index": index, "failure": failure}:
                self.failed[stage, index] = failure
            case {"stage": stage, "index": index, "summary": summary}:
                self.done.setdefault(stage, {})[index] = summary
                self.failed.pop((stage, index), None)

    def summaries(self, stage: str) -> list[Summary]:
        """Return the summaries of a stage in the order of task indices."""
        return [summary for _, summary in sorted(self.done.get(stage, {}).items())]

    def is_done(self, stage: str, index: int) -> bool:
        """Tell whether a task is finished."""
        return index in self.done.get(stage, {})

    @property
    def n_done(self) -> int:
        """Number of finished tasks."""
        return sum(map(len, self.done.values()))

    def add(self, stage: str, index: int, summary: Summary) -> None:
        """Record a task whose data are written; it reaches the store with one a second later, or at :meth:`flush`."""
        self._append({"stage": stage, "index": index, "summary": summary})
        if time.monotonic() - self._last_write > _SEGMENT_S:
            self.flush()

    def add_failure(self, stage: str, index: int, failure: Summary) -> None:
        """Record a task that failed for good in this run; a later run tries it again."""
        self._append({"stage": stage, "index": index, "failure": failure})

    def finish(self, result: Summary) -> None:
        """Record that the run is complete."""
        self._append({"result": result})
        self.flush()

    def _append(self, record: dict[str, object]) -> None:
        self._replay(record)
        self._pending.append(record)

    def flush(self) -> None:
        """Write what was added since the last segment."""
        if self._pending:
            records = [{"plan": self.fingerprint}, *self._pending]
            text = "\n".join(json.dumps(record, sort_keys=True) for record in records)
            # A client that stood still must not write over its successor's segment.
            while not self.run.create(f"{FOLDER}/{self._n_segments:08d}.jsonl", text.encode()):
                self._n_segments += 1
            self._n_segments += 1
            self._pending.clear()
        self._last_write = time.monotonic()

    @contextmanager
    def flushed(self) -> Iterator["Journal"]:
        """Flush at the end, however it comes: an interrupted run keeps what it finished."""
        try:
            yield self
        finally:
            self.flush()
