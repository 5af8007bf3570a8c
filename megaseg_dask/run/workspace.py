"""Where the data of a run are: the record in its folder, and the arrays that its tasks work on.

A :class:`RunFolder` holds the plan, the journal, the log, the states of
volumes and the intermediate data of one run. A :class:`Workspace` is what tasks
read and write: outputs at the target, and all else in the run folder. It
writes only while the client that sent a task holds the run.
"""

import io
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.checksums import Checksums
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import TargetError, TaskError
from megaseg_dask.ngff.image import SPATIAL, Axis, Image, Level
from megaseg_dask.ngff.volume import Absent, Volume, is_array_of, restore_array
from megaseg_dask.plan.plan import Output, Plan, run_names, runs_folder
from megaseg_dask.run import journal
from megaseg_dask.run.lease import Permit
from megaseg_dask.run.state import OutputState, VolumeState
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.stores import Location

Array = NDArray[Any]
Rows = NDArray[np.uint64]

_PLAN = "plan.json"
_WORK = "work"
_VOLUMES = "volumes"
_SUMS = "sums"
_KEPT = "kept"
_KEPT_DTYPE = "float32"
_ROW_BYTES = 8


class Readable(Protocol):
    """A volume that can be read, wherever it is."""

    def read(self, box: Box) -> Array:
        """Return the voxels of a box, ``(z, y, x)``."""
        ...


class Source(Readable, Protocol):
    """A channel of the source."""

    def count_absent(self, box: Box, values: Array | None = None) -> Absent:
        """Return what that begins in ``box`` is absent."""
        ...


class _DamagedPlanError(TargetError):
    """The record of a plan is lost, or cannot be understood."""


_WRITE_IT_AGAIN = (
    "run the same megaseg segment command again (of a job array, the same megaseg plan … "
    "--record), which writes it again if the target is of that run"
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run: what is recorded of it, and what its tasks leave for each other."""

    location: Location

    @classmethod
    def plans(
        cls, target: Location, label_name: str | None = None, *, skip_damaged: bool = False
    ) -> list[Plan]:
        """Return the plans of the runs at a target, of one label name or of all.

        A plate may take several runs; those of one label name are in the order of their numbers.
        A command that can write a damaged plan anew may skip it.

        Raises:
            TargetError: One cannot be read.
        """
        runs = runs_folder(target)
        names = sorted(runs.children(), key=_by_label_and_number)
        if label_name is None:
            # Leases lie beside the folders of runs.
            names = [name for name in names if not name.startswith("+")]
        else:
            names = list(filter(run_names(label_name).fullmatch, names))
        plans = map_threaded(lambda name: cls(runs / name)._find(skip_damaged), names)
        return [plan for plan in plans if plan is not None]

    # -- the record

    def find_plan(self) -> Plan | None:
        """Return the recorded plan, if there is one, with the addresses where it is found.

        Raises:
            TargetError: It cannot be read, or is that of another run.
        """
        data = self.location.get(_PLAN)
        if data is None:
            # A plan is recorded before, and removed after all else.
            if (self.location / journal.FOLDER).is_folder():
                raise _DamagedPlanError(
                    f"{self.location}/{_PLAN} does not exist any more; {_WRITE_IT_AGAIN}"
                )
            return None
        try:
            plan = Plan.model_validate_json(data)
        except ValueError as error:
            raise _DamagedPlanError(
                f"{self.location}/{_PLAN} is damaged, or was written by another version of "
                f"megaseg; {_WRITE_IT_AGAIN}"
            ) from error
        name = plan.resolved.label_name
        if not run_names(name).fullmatch(self.location.basename):
            raise TargetError(
                f"{self.location}/{_PLAN} belongs to a run named {name}, not to this folder; move "
                "it back"
            )
        return plan.found_in(self.location)

    def _find(self, skip_damaged: bool) -> Plan | None:
        try:
            return self.find_plan()
        except _DamagedPlanError:
            if not skip_damaged:
                raise
            return None

    def read_plan(self) -> Plan:
        """Return the recorded plan.

        Raises:
            TargetError: There is none, or it cannot be read.
        """
        plan = self.find_plan()
        if plan is None:
            raise TargetError(
                f"no run is recorded at {self.location}; "
                "record one with megaseg plan SOURCE TARGET --record"
            )
        return plan

    def record(self, plan: Plan) -> None:
        """Record the plan of the run."""
        self.location.put(_PLAN, plan.model_dump_json(indent=1).encode(), durable=True)

    def restore(self, plan: Plan) -> None:
        """Record the plan again if its record is lost or damaged."""
        if self._find(skip_damaged=True) is None:
            self.record(plan)

    def clear(self) -> None:
        """Remove all that an earlier run left here, but its plan and its log."""
        for name in (journal.FOLDER, _WORK, _VOLUMES, _SUMS, _KEPT):
            (self.location / name).remove()

    def remove(self) -> None:
        """Remove the record: the plan last, for a journal without a plan is one that lost it."""
        self.clear()
        self.location.remove()

    def remove_work(self) -> None:
        """Remove intermediate data.

        The plan, the journal, the states of volumes and the sums of objects stay: tables that are
        lost are made of them again.
        """
        self.all_work.remove()

    @property
    def all_work(self) -> Location:
        """The folder of the intermediate data of all volumes."""
        return self.location / _WORK

    @property
    def sums(self) -> Location:
        """The folder of what tables are made of."""
        return self.location / _SUMS

    @property
    def kept(self) -> Location:
        """The folder of arrays that stay: logits, for runs that label them again."""
        return self.location / _KEPT

    def kept_array(self, kind: str, output: Output) -> Volume:
        """Return an array that stays."""
        where = self.kept / str(output.volume) / str(output.number)
        return Volume(where / kind, SPATIAL)

    def work(self, volume: int) -> Location:
        """Return the folder of the intermediate data of one volume."""
        return self.all_work / str(volume)

    # -- volumes

    def read_state(self, volume: int) -> VolumeState:
        """Return what is known of a whole volume.

        Raises:
            TaskError: Nothing is known of it yet.
        """
        key = f"{_VOLUMES}/{volume}.json"
        data = self.location.get(key)
        if data is None:
            raise TaskError(f"{self.location}/{key} is missing; run the earlier stages first")
        return VolumeState.from_json(json.loads(data))

    def write_state(self, volume: int, state: VolumeState) -> None:
        """Write what is known of a whole volume; only the client of the run does."""
        self.location.put(f"{_VOLUMES}/{volume}.json", json.dumps(state.to_json()).encode())

    def read_sums(self, output: Output) -> dict[str, Array] | None:
        """Return the sums of an output's objects, if they were written."""
        data = self.location.get(_sums_key(output))
        return None if data is None else unpack(data)

    def write_sums(self, output: Output, sums: Mapping[str, Array]) -> None:
        """Write the sums of an output's objects, of which tables are made."""
        self.location.put(_sums_key(output), pack(sums))


def _by_label_and_number(name: str) -> tuple[str, int]:
    label, _, number = name.partition("+")
    return label, int(number) if re.fullmatch(r"\d+", number, re.ASCII) else 0


def _sums_key(output: Output) -> str:
    return f"{_SUMS}/{output.volume}-{output.number}.npz"


class Workspace:
    """What the tasks of a run read and write."""

    # Whether each voxel of the source is read once for all stages.
    reads_once = False

    def __init__(self, plan: Plan, permit: Permit | None = None) -> None:
        """Work on the run of a plan; with a ``permit``, write only while it holds."""
        self.plan = plan
        self.folder = RunFolder(plan.run)
        self.target = Target(plan)
        self._permit = permit

    def begin_task(self) -> None:
        """Ask whether the client that sent the task still holds the run.

        Raises:
            TaskError: It does not.
        """
        if self._permit is not None:
            self._permit.renew()

    def _require_permit(self) -> None:
        if self._permit is not None:
            self._permit.require()

    # -- arrays

    @property
    def first_mask(self) -> str:
        """The kind that thresholding writes: the mask, or what it is before holes are filled."""
        return "unfilled" if self.plan.resolved.fill_holes else "mask"

    def sources(self, volume: int, level: int = 0) -> list[Source]:
        """Return the channels of one volume of the source.

        ``level`` is counted from the level that is segmented.
        """
        return self._channels(volume, self.plan.volumes[volume].channels, level)

    def measured_sources(self, volume: int) -> list[Source]:
        """Return the channels of a volume that are measured, the first one that is segmented."""
        measured = self.plan.measured_channels(self.plan.volumes[volume])
        return [self.sources(volume)[0], *self._channels(volume, measured[1:])]

    def regions(self, volume: int) -> Readable | None:
        """Return the ids of the regions of a volume, if there are some."""
        planned = self.plan.volumes[volume]
        companion = self.plan.images[planned.image].regions
        if companion is None:
            return None
        regions = companion.volume(self.plan.source / planned.image, planned.t)
        return replace(regions, expected_shape=self.plan.source_image.volume_shape())

    def _channels(self, volume: int, channels: Iterable[int], level: int = 0) -> list[Source]:
        plan = self.plan
        planned = plan.volumes[volume]
        field = plan.source / planned.image
        image = plan.source_image
        volumes = [Volume.of(field, image, level=level, t=planned.t, c=c) for c in channels]
        needs_chunks = plan.resolved.missing_chunks == "error"
        shape = image.volume_shape(level)
        return [
            replace(
                volume,
                needs_chunks=needs_chunks,
                expected_shape=shape,
                expected_dtype=image.dtype,
            )
            for volume in volumes
        ]

    def array(
        self, kind: str, output: Output, level: int = 0, *, is_whole: bool = True
    ) -> Readable:
        """Return an output's array; intermediate data, if its kind is not an output of the run.

        With ``is_whole``, a chunk that is absent is a lost one, and no background.
        """
        return replace(self._volume(kind, output, level), is_whole=is_whole)

    def basis(self, output: Output) -> Volume:
        """Return the stored scores or logits that are labelled again."""
        basis = self.plan.resolved.basis
        assert basis is not None
        if basis.kind == "logits":
            stored = RunFolder(self.plan.basis_run).kept_array("logits", output)
        else:
            stored = self.target.array("scores", output)
        return replace(stored, is_whole=True)

    def write(self, kind: str, output: Output, box: Box, values: Array, level: int = 0) -> None:
        """Write a box of an output's array; the task owns the write units that the box covers."""
        self._require_permit()
        self._volume(kind, output, level).write(box, values)

    def _volume(self, kind: str, output: Output, level: int) -> Volume:
        if kind in self.plan.arrays:
            return self.target.array(kind, output, level)
        if kind in self.plan.kept:
            return self.folder.kept_array(kind, output)
        return Volume(self._output_folder(output) / kind, SPATIAL)

    def _output_folder(self, output: Output) -> Location:
        return self.folder.work(output.volume) / str(output.number)

    # -- intermediate data of a volume

    def create_work(self, volume: int) -> None:
        """Create the arrays of a volume's intermediate data, or what is lost of their metadata."""
        for array, dtype in self._iter_work(volume):
            self._create(array, dtype)

    def create_kept(self) -> None:
        """Create the arrays of all volumes that stay, or what is lost of their metadata."""
        map_threaded(lambda array: self._create(array, _KEPT_DTYPE), list(self._iter_kept()))

    def find_lost_kept(self) -> Location | None:
        """Return an array that stays whose metadata are not as they were written, if one is so."""
        image = self._form(_KEPT_DTYPE)

        def find(array: Location) -> Location | None:
            is_there = is_array_of(array, image, 0, _KEPT_DTYPE, self.plan.layout(0))
            return None if is_there else array

        return next(filter(None, map_threaded(find, list(self._iter_kept()))), None)

    def _iter_kept(self) -> Iterator[Location]:
        for volume in range(len(self.plan.volumes)):
            for output in self.plan.outputs_of(volume):
                for kind in self.plan.kept:
                    yield self.folder.kept_array(kind, output).location

    def _create(self, array: Location, dtype: str) -> None:
        restore_array(array, self._form(dtype), 0, dtype, self.plan.layout(0))

    def _form(self, dtype: str) -> Image:
        """Return the metadata of an image that has an array beside those of the target."""
        level = Level("0", self.plan.volume_shape, (), ())
        axes = tuple(map(Axis, SPATIAL))
        return Image(self.plan.target_image.version, "", axes, (level,), dtype)

    def has_work(self, volume: int) -> bool:
        """Return whether there are arrays for the intermediate data of a volume."""
        return all(array.exists() for array, _ in self._iter_work(volume))

    def _iter_work(self, volume: int) -> Iterator[tuple[Location, str]]:
        for output in self.plan.outputs_of(volume):
            for kind, dtype in self.plan.intermediates.items():
                yield self._output_folder(output) / kind, dtype

    # -- small objects

    def state(self, volume: int) -> VolumeState:
        """Return what is known of a whole volume."""
        return self.folder.read_state(volume)

    def output_state(self, output: Output) -> OutputState:
        """Return what is known of one output of a whole volume."""
        return self.state(output.volume).output(output.number)

    def present_blocks(self, output: Output) -> list[int]:
        """Return the numbers of the blocks of a volume that are not missing."""
        return self.state(output.volume).present(len(self.plan.block_grid()))

    def save(self, output: Output, name: str, arrays: Mapping[str, Array]) -> None:
        """Write arrays by name as one object of an output."""
        self._put(output, name, pack(arrays))

    def load(self, output: Output, name: str) -> dict[str, Array]:
        """Return the arrays that :meth:`save` wrote.

        Raises:
            TaskError: They are not there.
        """
        return unpack(_get(self._output_folder(output), name))

    def save_rows(self, output: Output, name: str, rows: Rows) -> None:
        """Write rows of numbers, ``(n_rows, n)``, as bytes alone.

        The size of the object then tells how many there are.
        """
        self._put(output, name, np.ascontiguousarray(rows, "<u8").tobytes())

    def load_rows(self, output: Output, name: str, n_rows: int) -> Rows:
        """Return the rows that :meth:`save_rows` wrote, ``(n_rows, n)``.

        Raises:
            TaskError: They are not there.
        """
        data = np.frombuffer(_get(self._output_folder(output), name), "<u8")
        return data.reshape(n_rows, -1).astype(np.uint64, copy=False)

    def count_rows(self, output: Output, name: str, n_rows: int) -> int:
        """Return the length of the rows that :meth:`save_rows` wrote, without reading them."""
        return (self._output_folder(output).size(name) or 0) // (_ROW_BYTES * n_rows)

    def save_checksums(self, volume: int, number: int, checksums: Checksums) -> None:
        """Write the checksums of the voxels that a task measured."""
        self._require_permit()
        self.folder.work(volume).put(_seen_key(number), checksums.astype("<u4").tobytes())

    def load_checksums(self, volume: int, number: int) -> Checksums:
        """Return the checksums that :meth:`save_checksums` wrote, in one row.

        Raises:
            TaskError: They are not there.
        """
        data = _get(self.folder.work(volume), _seen_key(number))
        return np.frombuffer(data, "<u4").astype(np.uint32)

    def save_sums(self, output: Output, sums: Mapping[str, Array]) -> None:
        """Write the sums of an output's objects, from which tables are made at the end."""
        self._require_permit()
        self.folder.write_sums(output, sums)

    def _put(self, output: Output, name: str, data: bytes) -> None:
        self._require_permit()
        self._output_folder(output).put(name, data)


def _get(folder: Location, name: str) -> bytes:
    data = folder.get(name)
    if data is None:
        raise TaskError(f"{folder}/{name} is missing; run the earlier stages first")
    return data


def _seen_key(number: int) -> str:
    return f"source/{number}"


@dataclass(slots=True)
class _ArrayInMemory:
    """A volume whose voxels are in memory."""

    values: Array

    def read(self, box: Box) -> Array:
        return self.values[box.slices]


class _SourceInMemory:
    """A channel of the source, of which one box is read once, when it is asked for, and kept."""

    def __init__(self, channel: Source, box: Box) -> None:
        self._channel = channel
        self._box = box

    @cached_property
    def _values(self) -> Array:
        return self._channel.read(self._box)

    def read(self, box: Box) -> Array:
        return self._values[box.within(self._box).slices]

    def count_absent(self, box: Box, values: Array | None = None) -> Absent:
        return self._channel.count_absent(box, values)


class MemoryWorkspace(Workspace):
    """The workspace of a volume of one block: its source is read once, its outputs are kept.

    Outputs are written to the target as well; intermediate data are in memory alone.
    """

    reads_once = True

    def __init__(self, workspace: Workspace) -> None:
        """Work beside another workspace of the run, with its permit."""
        super().__init__(workspace.plan, workspace._permit)
        self._sources: dict[tuple[int, int], list[Source]] = {}
        self._arrays: dict[tuple[str, Output, int], Array] = {}
        self._objects: dict[tuple[Output, str], Mapping[str, Array]] = {}
        self._rows: dict[tuple[Output, str], Rows] = {}
        self._state = VolumeState()

    def set_state(self, state: VolumeState) -> None:
        """Set what is known of the volume."""
        self._state = state

    def drop(self, kind: str, output: Output) -> None:
        """Free the memory of an intermediate array."""
        if kind not in self.plan.arrays:
            self._arrays.pop((kind, output, 0), None)

    def forget(self, output: Output) -> None:
        """Free the memory of an output that is finished."""
        self._arrays = {key: array for key, array in self._arrays.items() if key[1] != output}
        self._objects.clear()
        self._rows.clear()

    def state(self, volume: int) -> VolumeState:
        """Return what is known of the volume."""
        return self._state

    def sources(self, volume: int, level: int = 0) -> list[Source]:
        """Return the channels of the volume, read when they are first asked for."""
        key = (volume, level)
        if key not in self._sources:
            box = Box.of(self.plan.source_image.volume_shape(level))
            if level == 0:
                box = self.plan.patch_grid.read_box(self.plan.region)
            channels = super().sources(volume, level)
            self._sources[key] = [_SourceInMemory(channel, box) for channel in channels]
        return self._sources[key]

    def array(
        self, kind: str, output: Output, level: int = 0, *, is_whole: bool = True
    ) -> Readable:
        """Return an output's array in memory."""
        return _ArrayInMemory(self._arrays[kind, output, level])

    def write(self, kind: str, output: Output, box: Box, values: Array, level: int = 0) -> None:
        """Keep a box of an output's array, and write it if its kind is an output of the run."""
        if kind in (*self.plan.arrays, *self.plan.kept):
            super().write(kind, output, box, values, level)
        shape = self.plan.target_image.volume_shape(level)
        if box == Box.of(shape):
            self._arrays[kind, output, level] = values
            return
        key = (kind, output, level)
        if key not in self._arrays:
            self._arrays[key] = np.empty(shape, values.dtype)
        self._arrays[key][box.slices] = values

    def save(self, output: Output, name: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays by name as one object of an output."""
        self._objects[output, name] = arrays

    def load(self, output: Output, name: str) -> dict[str, Array]:
        """Return the arrays that :meth:`save` kept."""
        return dict(self._objects[output, name])

    def save_rows(self, output: Output, name: str, rows: Rows) -> None:
        """Keep rows of numbers, ``(n_rows, n)``."""
        self._rows[output, name] = rows

    def load_rows(self, output: Output, name: str, n_rows: int) -> Rows:
        """Return the rows that :meth:`save_rows` kept, ``(n_rows, n)``."""
        return self._rows[output, name].reshape(n_rows, -1)

    def count_rows(self, output: Output, name: str, n_rows: int) -> int:
        """Return the length of the rows that :meth:`save_rows` kept."""
        return self._rows[output, name].size // n_rows


def pack(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays and their names as one object."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


# NumPy reads a header as Python's grammar does, which Python 3.11 cannot do in two threads (its
# issue 106905).
_UNPACKING = threading.Lock()


def unpack(data: bytes) -> dict[str, Array]:
    """Return the arrays that :func:`pack` put together; many threads may ask."""
    with _UNPACKING, np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)
