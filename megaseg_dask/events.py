"""What a run tells while it works: small records, for a terminal, a log or a script alike."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    kind: ClassVar[str] = "event"

    def as_dict(self) -> dict[str, object]:
        """Return JSON values, with the kind under ``event``."""
        return {"event": self.kind, **asdict(self)}

    def fields(self) -> dict[str, object]:
        """Return what it was made from."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A run began, or went on from an earlier one."""

    kind: ClassVar[str] = "started"
    target: str
    n_tasks: int
    n_done: int
    dashboard: str | None = None


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """A stage began, or a task of it ended; ``unit`` is what people count: fields, volumes, blocks."""

    kind: ClassVar[str] = "progress"
    stage: str
    n_done: int
    n_tasks: int
    elapsed_s: float
    voxels_per_s: float
    left_s: float | None
    n_failed: int = 0
    unit: str = ""
    units_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fetching(Event):
    """A part of a model was received; ``n_bytes`` counts those that an earlier attempt left."""

    kind: ClassVar[str] = "fetching"
    model: str
    source: str
    n_bytes: int
    total_bytes: int
    elapsed_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Failure(Event):
    """A task failed for good in this run; ``details`` is the traceback of what looks like a bug."""

    kind: ClassVar[str] = "failure"
    stage: str
    index: int
    volume: str
    box: str
    error: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something went wrong that the run deals with by itself: a worker that was lost, a task that is tried again."""

    kind: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True, slots=True)
class Joined(Event):
    """A worker joined the run: where it is and what it has; ``device`` and ``uuid`` if it computes on a GPU."""

    kind: ClassVar[str] = "worker"
    name: str
    address: str
    host: str
    cores: int
    memory_limit: int
    device: str | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Result(Event):
    """How a run ended."""

    kind: ClassVar[str] = "result"
    status: str
    target: str
    n_objects: int | None
    wall_s: float
    already_done: bool = False
    failures: list[dict[str, object]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    run: str = ""
    log: str = ""

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        return 1 if self.failures else 0

    def as_dict(self) -> dict[str, object]:
        """Return JSON values, the exit code among them."""
        return {**Event.as_dict(self), "exit_code": self.exit_code}


def joined(results: Sequence[Result]) -> Result:
    """Return the one result of a request that took several runs; ``run`` and ``log`` are of the first that failed."""
    if len(results) == 1:
        return results[0]
    named = next((result for result in results if result.failures), results[0])
    failures = [failure for result in results for failure in result.failures]
    counts = [result.n_objects for result in results if result.n_objects is not None]
    peaks: dict[str, int] = {}
    for stage, peak in (item for result in results for item in result.peak_bytes.items()):
        peaks[stage] = max(peak, peaks.get(stage, 0))
    return Result(
        status="failed" if failures else "done",
        target=results[0].target,
        n_objects=sum(counts) if len(counts) == len(results) else None,
        wall_s=round(sum(result.wall_s for result in results), 3),
        already_done=all(result.already_done for result in results),
        failures=failures,
        warnings=[warning for result in results for warning in result.warnings],
        peak_bytes=peaks,
        run=named.run,
        log=named.log,
    )


@dataclass(frozen=True, slots=True)
class Epoch(Event):
    """An epoch of a training ended; ``best_epoch`` has the lowest validation loss so far."""

    kind: ClassVar[str] = "epoch"
    epoch: int
    max_epochs: int
    training_loss: float | None
    validation_loss: float | None
    best_epoch: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Trained(Event):
    """How a training ended; ``stopped`` is patience, max_epochs or max_time."""

    kind: ClassVar[str] = "result"
    bundle: str
    digest: str
    n_epochs: int
    best_epoch: int
    best_loss: float
    stopped: str
    wall_s: float
    status: str = "done"
    already_done: bool = False


@dataclass(frozen=True, slots=True)
class RunStatus(Event):
    """How a run stands: finished and planned tasks of each stage, and what failed."""

    kind: ClassVar[str] = "status"
    label_name: str
    done: bool
    stages: dict[str, tuple[int, int]]
    failures: list[dict[str, object]]

    @property
    def exit_code(self) -> int:
        """0 done, 1 something failed, 3 work is pending."""
        return 0 if self.done else 1 if self.failures else 3
