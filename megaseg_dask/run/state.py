"""What is known of volumes and told by tasks: values that journal and run folder keep as JSON.

Each value has one JSON form, made by ``to_json`` and read by ``from_json``. A
field without a value is left out of it, so the record of a million tasks with
nothing to tell stays small.
"""

from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megaseg_dask.algorithms.doubts import ObjectSizes
from megaseg_dask.algorithms.normalization import Counts, Moments, Statistics
from megaseg_dask.events import Doubt, Joined
from megaseg_dask.ngff.volume import Absent
from megaseg_dask.stores import NO_TRAFFIC, Traffic

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartStatistics:
    """Statistics of one part of the fixed partition of a volume.

    ``place`` is the part's index in grid order.
    """

    place: int
    statistics: Statistics

    def to_json(self) -> list[Any]:
        """Return a list of two: the place, and the fields of the statistics."""
        return [self.place, asdict(self.statistics)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "PartStatistics":
        """Return the value that :meth:`to_json` wrote."""
        place, fields = value
        kind = Counts if "total" in fields else Moments
        _require_numbers({"place": place, **fields})
        return cls(place, kind(**fields))


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Statistics of one channel of a volume.

    Extremes are ``None`` where the settings give mean and std.
    """

    mean: float
    std: float
    minimum: float | None = None
    maximum: float | None = None

    @property
    def is_constant(self) -> bool:
        """Whether all voxels are known to have one value."""
        return self.minimum is not None and self.minimum == self.maximum


@dataclass(frozen=True, slots=True)
class OutputState:
    """What is known of one output of the network, of a block or of a whole volume.

    ``low`` and ``high`` are the extremes of its logits, and ``threshold`` is a
    logit; all are ``None`` where the threshold is given, or where no voxel is a number.
    """

    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    # Scores as a share of two classes, where a threshold was found from them.
    bimodality: float | None = None
    # Voxels above a threshold that is given, and the sum of their intensities.
    n_above: int | None = None
    sum_above: float | None = None
    n_objects: int | None = None
    sizes: ObjectSizes | None = None
    n_fragments: int | None = None
    # Objects that were too large to be split; of the first ones id, start and stop.
    n_whole: int | None = None
    # Stored objects, and chunks of shards, that channels lack which are measured alone.
    n_absent: int | None = None
    n_absent_inner: int | None = None
    whole: tuple[tuple[int, ...], ...] = ()

    def updated(self, other: "OutputState") -> "OutputState":
        """Return this state with the fields that have a value in another one."""
        told = {name: getattr(other, name) for name in other.to_json()}
        return replace(self, **told)

    def to_json(self) -> Json:
        """Return the fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "OutputState":
        """Return the value that :meth:`to_json` wrote."""
        numbers = dict(value)
        whole = tuple(map(tuple, numbers.pop("whole", ())))
        sizes = numbers.pop("sizes", None)
        _require_numbers(numbers)
        _require_numbers(sizes or {})
        for row in whole:
            _require_numbers(dict(enumerate(row)))
        return cls(**numbers, whole=whole, sizes=ObjectSizes(**sizes) if sizes else None)


@dataclass(frozen=True, slots=True)
class Wrote:
    """The objects that a task wrote, as digests: those that stay, and intermediate data."""

    kept: str = ""
    work: str = ""


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """What a finished task tells: most tasks tell nothing else than what they wrote.

    ``parts`` are the statistics of each channel, by parts of the volume;
    ``statistics`` those of each channel of a whole volume. ``absent`` counts
    stored objects that the source lacks, ``absent_inner`` chunks that its shards
    lack. ``batch`` is the batch that a device ran with after it was out of memory.
    ``repeated`` counts the blocks that were predicted again in float32, since half precision gave
    no numbers.
    """

    parts: tuple[tuple[PartStatistics, ...], ...] = ()
    absent: int = 0
    absent_inner: int = 0
    batch: int | None = None
    repeated: int = 0
    statistics: tuple[ChannelStatistics, ...] = ()
    by_output: tuple[OutputState, ...] = ()
    wrote: Wrote = Wrote()

    def output(self, number: int) -> OutputState:
        """Return what is known of one output; nothing if nothing is known of any."""
        return self.by_output[number] if self.by_output else OutputState()

    @property
    def absent_measured(self) -> Absent:
        """What channels lack that are measured alone."""
        first = self.output(0)
        return Absent(first.n_absent or 0, first.n_absent_inner or 0)

    def to_json(self) -> Json:
        """Return the fields that have a value."""
        wrote = [self.wrote.kept, self.wrote.work]
        fields: Json = {
            "wrote": wrote if any(wrote) else [],
            "parts": [list(map(PartStatistics.to_json, parts)) for parts in self.parts],
            "absent": self.absent,
            "absent_inner": self.absent_inner,
            "batch": self.batch,
            "repeated": self.repeated,
            "statistics": [asdict(channel) for channel in self.statistics],
            "by_output": outputs_to_json(self.by_output),
        }
        return {name: value for name, value in fields.items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskSummary":
        """Return the value that :meth:`to_json` wrote."""
        absent = value.get("absent", 0)
        batch = value.get("batch")
        absent_inner = value.get("absent_inner", 0)
        repeated = value.get("repeated", 0)
        counts = {"absent": absent, "absent_inner": absent_inner, "repeated": repeated}
        _require_numbers({**counts, "batch": batch})
        channels = value.get("parts", ())
        if "parts" in value and not (channels and all(channels)):
            raise ValueError("statistics of no channel, or of no part of one")
        return cls(
            parts=tuple(tuple(map(PartStatistics.from_json, parts)) for parts in channels),
            absent=absent,
            absent_inner=absent_inner,
            batch=batch,
            repeated=repeated,
            statistics=statistics_from_json(value),
            by_output=outputs_from_json(value),
            wrote=Wrote(*map(_require_base64, value.get("wrote", ()))),
        )


@dataclass(frozen=True, slots=True)
class VolumeState:
    """What the tasks of a stage have to know of a whole volume.

    ``missing`` are the numbers of the blocks that failed in an earlier stage,
    ``outputs`` the kinds of arrays that the volume will have. Statistics are
    empty until the volume is measured; of a group, while it is ``lacking`` volumes.
    """

    missing: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ()
    statistics: tuple[ChannelStatistics, ...] = ()
    by_output: tuple[OutputState, ...] = ()
    lacking: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Return JSON values."""
        return {
            "missing": list(self.missing),
            "outputs": list(self.outputs),
            "statistics": [asdict(channel) for channel in self.statistics],
            "by_output": outputs_to_json(self.by_output),
            "lacking": list(self.lacking),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "VolumeState":
        """Return the value that :meth:`to_json` wrote."""
        return cls(
            missing=tuple(value["missing"]),
            outputs=tuple(value["outputs"]),
            statistics=statistics_from_json(value),
            by_output=outputs_from_json(value),
            lacking=tuple(value["lacking"]),
        )

    def output(self, number: int) -> OutputState:
        """Return what is known of one output; nothing if nothing is known of any."""
        return self.by_output[number] if self.by_output else OutputState()

    def present(self, n_blocks: int) -> list[int]:
        """Return the numbers of the blocks that are not missing, of ``n_blocks``."""
        missing = set(self.missing)
        return [number for number in range(n_blocks) if number not in missing]


@dataclass(frozen=True, slots=True)
class Session:
    """The work of one client on a run: its begin, in seconds since 1970, and its workers.

    ``traffic`` is what the client itself asked of stores, beside the tasks.
    """

    began: int
    wall_s: float
    workers: tuple[Joined, ...] = ()
    traffic: Traffic = NO_TRAFFIC

    def to_json(self) -> Json:
        """Return JSON values."""
        return {**asdict(self), "traffic": self.traffic.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Session":
        """Return the value that :meth:`to_json` wrote."""
        _require_numbers({"began": value["began"], "wall_s": value["wall_s"]})
        workers = tuple(Joined(**worker) for worker in value["workers"])
        traffic = Traffic.from_json(value.get("traffic", ()))
        return cls(value["began"], value["wall_s"], workers, traffic)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended in which no task failed; ``source`` is a digest of its source's listing."""

    n_objects: int | None = None
    warnings: list[str] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    source: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Ending":
        """Return the value that ``asdict`` made JSON."""
        warnings = list(map(str, value["warnings"]))
        doubts = [Doubt(**doubt) for doubt in value.get("doubts", ())]
        return cls(value["n_objects"], warnings, doubts, str(value.get("source", "")))


def statistics_from_json(value: Mapping[str, Any]) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel of a state or a summary."""
    channels: list[Json] = value.get("statistics", [])
    for channel in channels:
        _require_numbers(channel)
    return tuple(ChannelStatistics(**channel) for channel in channels)


def outputs_from_json(value: Mapping[str, Any]) -> tuple[OutputState, ...]:
    """Return what a state or a summary has of each output, under ``by_output``."""
    return tuple(map(OutputState.from_json, value.get("by_output", ())))


def _require_numbers(fields: Mapping[Any, Any]) -> None:
    for name, value in fields.items():
        if value is not None and type(value) not in (int, float):
            raise TypeError(f"{name} is {value!r}, which is no number")


def _require_base64(text: str) -> str:
    b64decode(text, validate=True)
    return text


def outputs_to_json(outputs: Iterable[OutputState]) -> list[Json]:
    """Return the JSON form of what is known of each output; empty if nothing is known."""
    values = [output.to_json() for output in outputs]
    return values if any(values) else []
