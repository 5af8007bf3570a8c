"""Records of what a run does: for a terminal, a log or a script alike.

An event is a small frozen value. Who listens chooses by its type; scripts get
its JSON form, in which the key ``event`` holds the kind.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    kind: ClassVar[str] = "event"

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON values, after the kind under ``event``."""
        return {"event": self.kind, **asdict(self)}


Emit: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Step(Event):
    """Work before the first task began, such as reading the image; only displays show it."""

    kind: ClassVar[str] = "step"
    text: str


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A run began, or continues an earlier one; ``channels`` are those that it takes.

    ``fields`` are the paths of the fields of a plate that it is about.
    """

    kind: ClassVar[str] = "started"
    target: str
    n_tasks: int
    n_done: int
    dashboard: str | None = None
    channels: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """A stage began, or one of its tasks ended; ``unit`` is fields, volumes or blocks."""

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

    @property
    def is_over(self) -> bool:
        """Whether every task of the stage has finished or failed."""
        return self.n_done + self.n_failed >= self.n_tasks


@dataclass(frozen=True, slots=True)
class PatchProgress(Event):
    """How many patches of the blocks in work are predicted, of a stage that has few tasks.

    ``n_blocks`` are in work. ``left_s`` is known if no other block is to come. Other events
    count tasks, as ``n_done``.
    """

    kind: ClassVar[str] = "patches"
    stage: str
    n_predicted: int
    n_patches: int
    n_blocks: int = 1
    left_s: float | None = None


@dataclass(frozen=True, slots=True)
class Following(Event):
    """What a source that is followed has: timepoints of all fields that are there, and done.

    ``n_announced`` is how many its metadata list, which may grow. The source was not seen to
    change for ``waited_s``. ``reason`` says why nothing can be taken, if that is so. ``is_over``
    says that no more is waited for.
    """

    kind: ClassVar[str] = "following"
    source: str
    n_there: int
    n_done: int
    n_announced: int
    waited_s: float = 0.0
    reason: str = ""
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Fetching(Event):
    """Bytes of a model were received; ``n_bytes`` includes those of an earlier attempt."""

    kind: ClassVar[str] = "fetching"
    model: str
    source: str
    n_bytes: int
    total_bytes: int
    elapsed_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Failure(Event):
    """A task that this run gives up; ``details`` is the traceback of a probable bug."""

    kind: ClassVar[str] = "failure"
    stage: str
    index: int
    volume: str
    box: str
    error: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """A problem that the run recovers from: a lost worker, a task that is retried."""

    kind: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True, slots=True)
class Doubt(Event):
    """A reason not to believe a result, though nothing failed.

    ``about`` names the reason: ``one object``, ``specks``, ``small objects``, ``threshold``,
    ``no classes``, ``foreground``, ``noise``, ``outlier``, ``voxel size`` or ``constant``.
    ``text`` is about the first of the ``volumes``, of which ten are named; ``advice`` is what to
    try. ``option`` is that of ``relabel`` to try, if there is one.
    """

    kind: ClassVar[str] = "doubt"
    about: str
    text: str
    advice: str
    volumes: list[str]
    n_volumes: int
    option: str = ""


@dataclass(frozen=True, slots=True)
class Joined(Event):
    """A worker joined the run.

    If it computes on a GPU, ``device`` and ``uuid`` are set, and the bytes of its memory.
    """

    kind: ClassVar[str] = "worker"
    name: str
    address: str
    host: str
    cores: int
    memory_limit: int
    device: str | None = None
    uuid: str | None = None
    device_free_bytes: int = 0
    device_total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run takes of workers and stores.

    ``worker_s`` is the time of all workers together, on the ``device`` cpu or cuda. ``n_get``
    counts objects, or parts of them, that are read, and looks at their sizes. Bytes are as they are
    stored; ``bytes_kept`` of the result. What is not known is ``None``.
    """

    worker_s: float | None
    device: str
    n_put: int
    n_get: int
    n_list: int
    n_delete: int
    bytes_read: int
    bytes_written: int
    bytes_kept: int | None = None

    def __add__(self, other: "Usage") -> "Usage":
        known = self.worker_s is not None and other.worker_s is not None
        kept = self.bytes_kept is not None and other.bytes_kept is not None
        return Usage(
            worker_s=(self.worker_s or 0) + (other.worker_s or 0) if known else None,
            device=self.device,
            n_put=self.n_put + other.n_put,
            n_get=self.n_get + other.n_get,
            n_list=self.n_list + other.n_list,
            n_delete=self.n_delete + other.n_delete,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            bytes_kept=(self.bytes_kept or 0) + (other.bytes_kept or 0) if kept else None,
        )

    @property
    def n_requests(self) -> int:
        """Requests of all kinds."""
        return self.n_put + self.n_get + self.n_list + self.n_delete


@dataclass(frozen=True, slots=True)
class Result(Event):
    """How a run ended.

    ``used`` is what all of its sessions took of workers and stores together.
    """

    kind: ClassVar[str] = "result"
    status: str
    target: str
    n_objects: int | None
    wall_s: float
    already_done: bool = False
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    device_peak_bytes: dict[str, int] = field(default_factory=dict)
    run: str = ""
    log: str = ""
    used: Usage | None = None

    def with_warnings(self, warnings: list[str]) -> "Result":
        """Return the same result with more warnings."""
        return replace(self, warnings=[*self.warnings, *warnings])

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 1 if a task failed, else 0."""
        return int(bool(self.failures))

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON values; each failure with its kind, and the exit code."""
        failures = [failure.to_json() for failure in self.failures]
        return {**Event.to_json(self), "failures": failures, "exit_code": self.exit_code}


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
    """Finished and planned tasks of each stage of a run, and its failures.

    ``channels`` are those that it takes, and ``fields`` the paths of its fields of a plate.
    ``command`` started it: ``segment`` or ``relabel``. ``lost`` says what a check of the outputs
    of a finished run found.
    """

    kind: ClassVar[str] = "status"
    label_name: str
    done: bool
    stages: dict[str, tuple[int, int]]
    failures: list[Failure]
    channels: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    command: str = "segment"
    lost: str = ""
    # What all sessions took of workers and stores together, as far as it is recorded.
    used: Usage | None = None
    # Of a source that is followed and can be read: how many are ``there``, and ``done``, of all
    # fields, and how many its metadata have ``announced``.
    timepoints: dict[str, int] | None = None

    @property
    def exit_code(self) -> int:
        """0 if all is done, 1 if something failed, 3 if work is pending."""
        counts = self.timepoints or {"there": 0, "done": 0}
        if self.done and counts["done"] >= counts["there"]:
            return 0
        return 1 if self.failures else 3
