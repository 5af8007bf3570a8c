"""What tasks read and write: products at the target, intermediate data and the state of a volume in the run folder.

A task writes only while the client that sent it holds the run: one that was
given up, and wakes up late, finds another client's plan in its place.
"""

import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import TaskError
from megaseg_dask.ngff.image import SPATIAL, Axis, Image, Level
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.plan.plan import Output, Plan, runs_folder
from megaseg_dask.run.lease import Leases
from megaseg_dask.run.state import OutputState, VolumeState
from megaseg_dask.stores import Location

Array = NDArray[Any]

WORK = "work"
VOLUMES = "volumes"
SUMS = "sums"


# The id of the lease under which this process works for a client; none in a process that works by itself.
_holder: ContextVar[str | None] = ContextVar("holder", default=None)


# -- volumes


def sources(plan: Plan, volume: int, level: int = 0) -> list[Volume]:
    """Return the channels of one volume of the source, at a level counted from the one that is segmented."""
    planned = plan.volumes[volume]
    location = plan.source / planned.image / plan.source_image.levels[level].path
    return [
        Volume(location, plan.source_image.axis_names, t=planned.t, c=c) for c in planned.channels
    ]


def product(plan: Plan, kind: str, output: Output, level: int = 0) -> Volume:
    """Return an output's scores, mask or labels, or intermediate data if nobody asked for them."""
    if kind not in plan.arrays:
        return Volume(output_folder(plan, output) / kind, SPATIAL)
    planned, c = plan.volumes[output.volume], plan.target_channel(output)
    group = Group(kind, planned.image, plan.suffixes[c] if kind != "scores" else "")
    image = plan.target_image if kind == "scores" else plan.label_image
    return Volume(group.location(plan) / str(level), image.axis_names, t=planned.target_t, c=c)


@dataclass(frozen=True, slots=True)
class Group:
    """An image or label image at the target: of one field, and of one channel of the target if it is labels."""

    kind: str
    image: str = ""
    suffix: str = ""

    def name(self, plan: Plan) -> str:
        """Return the name of a label image."""
        return plan.options.label_name + self.suffix + ("_mask" if self.kind == "mask" else "")

    def parent(self, plan: Plan) -> Location:
        """Return the image that it is, or belongs to."""
        return plan.target / self.image

    def location(self, plan: Plan) -> Location:
        """Return where its levels are."""
        return (
            self.parent(plan)
            if self.kind == "scores"
            else self.parent(plan) / f"labels/{self.name(plan)}"
        )


def images(plan: Plan) -> list[str]:
    """Return the paths of all images of a plan: the fields of a plate, or the one that is the target itself."""
    return list(dict.fromkeys(volume.image for volume in plan.volumes))


def groups(plan: Plan) -> Iterator[Group]:
    """Yield all that a run writes at its target, image by image, labels before the scores they belong to."""
    for image in images(plan):
        yield from groups_of(plan, image)


def groups_of(plan: Plan, image: str) -> list[Group]:
    """Return what a run writes of one image."""
    kinds = sorted(plan.arrays, key=("mask", "labels", "scores").index)
    return [
        Group(kind, image, suffix)
        for kind in kinds
        for suffix in (plan.suffixes if kind != "scores" else ("",))
    ]


def places(plan: Plan, image: str) -> list[Location]:
    """Return the groups and arrays that a run makes of one image."""
    groups_ = [group.location(plan) for group in groups_of(plan, image)]
    arrays = [
        place / str(level) for place in groups_ for level in range(len(plan.target_image.levels))
    ]
    has_labels = any(kind != "scores" for kind in plan.arrays)
    return groups_ + arrays + [plan.target / image / "labels"] * has_labels


def first_mask(plan: Plan) -> str:
    """Return the kind of what thresholding writes: the mask, or what it is before holes are filled."""
    return "unfilled" if plan.options.fill_holes else "mask"


def work_folder(plan: Plan, volume: int) -> Location:
    """Return where the intermediate data of one volume live."""
    return plan.run / f"{WORK}/{volume}"


def output_folder(plan: Plan, output: Output) -> Location:
    """Return where the intermediate data of one output of a volume live."""
    return work_folder(plan, output.volume) / str(output.number)


def save_sums(plan: Plan, output: Output, data: bytes) -> None:
    """Write the sums of an output's objects where they wait for the tables that they become."""
    require_holder(plan)
    plan.run.put(_sums_key(output), data)


def read_sums(plan: Plan, output: Output) -> bytes | None:
    """Read what :func:`save_sums` wrote, if it did."""
    return plan.run.get(_sums_key(output))


def _sums_key(output: Output) -> str:
    return f"{SUMS}/{output.volume}-{output.number}.npz"


def create_work(plan: Plan, volume: int) -> None:
    """Create the empty arrays of a volume's intermediate data."""
    shape = plan.volume_shape
    image = Image(
        plan.target_image.version, "", tuple(map(Axis, SPATIAL)), (Level("0", shape, (), ()),), ""
    )
    for location, dtype in _work_arrays(plan, volume):
        create_array(location, replace(image, dtype=dtype), 0, dtype, plan.layout(0), image.version)


def has_work(plan: Plan, volume: int) -> bool:
    """Tell whether the intermediate data of a volume are there: a missing array would read as background."""
    return all(location.exists() for location, _ in _work_arrays(plan, volume))


def _work_arrays(plan: Plan, volume: int) -> Iterator[tuple[Location, str]]:
    for output in plan.outputs_of(volume):
        for kind, dtype in plan.intermediates.items():
            yield output_folder(plan, output) / kind, dtype


# -- small objects


def save(plan: Plan, output: Output, name: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name to an output's intermediate data."""
    require_holder(plan)
    output_folder(plan, output).put(name, pack(arrays))


def load(plan: Plan, output: Output, name: str) -> dict[str, Array]:
    """Read what :func:`save` wrote; raises :class:`TaskError` if it is not there."""
    return unpack(_get(plan, output, name))


def pack(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays and their names as one object."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, Array]:
    """Return the arrays that :func:`pack` put together; many threads may ask."""
    # NumPy reads a header as Python's grammar does, which Python 3.11 cannot do in two threads (its issue 106905).
    with _UNPACKING, np.load(io.BytesIO(data), allow_pickle=False) as found:
        return dict(found)


_UNPACKING = threading.Lock()


def save_rows(plan: Plan, output: Output, name: str, rows: NDArray[np.uint64]) -> None:
    """Write rows of numbers as bytes alone, so that the size of the object tells how many there are."""
    require_holder(plan)
    output_folder(plan, output).put(name, np.ascontiguousarray(rows, "<u8").tobytes())


def load_rows(plan: Plan, output: Output, name: str, n_rows: int) -> NDArray[np.uint64]:
    """Read what :func:`save_rows` wrote, ``(n_rows, n)``; raises :class:`TaskError` if it is not there."""
    return (
        np.frombuffer(_get(plan, output, name), "<u8")
        .reshape(n_rows, -1)
        .astype(np.uint64, copy=False)
    )


def _get(plan: Plan, output: Output, name: str) -> bytes:
    folder = output_folder(plan, output)
    data = folder.get(name)
    if data is None:
        raise TaskError(f"{folder}/{name} is missing; an earlier stage has to run first")
    return data


def read_state(plan: Plan, volume: int) -> VolumeState:
    """Return what is known of a whole volume: of its channels, its outputs, its missing blocks."""
    data = plan.run.get(f"{VOLUMES}/{volume}.json")
    if data is None:
        raise TaskError(
            f"{plan.run}/{VOLUMES}/{volume}.json is missing; an earlier stage has to run first"
        )
    return VolumeState.from_json(json.loads(data))


def read_known(plan: Plan, output: Output) -> OutputState:
    """Return what is known of one output of a whole volume: extremes of its logits, and its threshold."""
    by_output = read_state(plan, output.volume).by_output
    return by_output[output.number] if by_output else OutputState()


def write_state(plan: Plan, volume: int, state: VolumeState) -> None:
    """Write what is known of a whole volume; only the client of the run does."""
    plan.run.put(f"{VOLUMES}/{volume}.json", json.dumps(state.to_json()).encode())


# -- writing


def write(plan: Plan, kind: str, output: Output, box: Box, values: Array, level: int = 0) -> None:
    """Write a box of a product; a task owns the write units it covers."""
    require_holder(plan)
    product(plan, kind, output, level).write(box, values)


@contextmanager
def holding(lease_id: str | None) -> Iterator[None]:
    """Work for the client that holds this lease, and write nothing once it is another's."""
    token = _holder.set(lease_id)
    try:
        yield
    finally:
        _holder.reset(token)


def require_holder(plan: Plan) -> None:
    """Raise :class:`TaskError` if the client that sent this task does not hold the run any more."""
    expected = _holder.get()
    if expected is not None:
        found = Leases(runs_folder(plan.target)).read(expected)
        if found is None or found.id != expected:
            raise TaskError(
                f"{plan.run} is no longer the run of the client that sent this task; nothing was written"
            )
