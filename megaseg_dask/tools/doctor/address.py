"""What an address is good for: does its store answer, is there an image, may one write, and how fast.

Where something stands that is not ours, nothing is written; where a run could
write, small objects come and go.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import numpy as np

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError
from megaseg_dask.messages import size_text
from megaseg_dask.ngff.image import SPATIAL, read_image
from megaseg_dask.ngff.plate import is_plate, read_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.stores import Location

T = TypeVar("T")

# What is read, and written, to tell a speed; and how long that may take.
_READ_SHAPE, _WRITTEN_BYTES, _MOST_S = (64, 256, 256), 4 * 2**20, 5.0
_LITTLE_DISK = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what was found; ``advice`` is there if something is wrong, ``is_fatal`` if no run can do with it."""

    name: str
    found: str
    advice: str = ""
    is_fatal: bool = False


def disk_finding(path: str | os.PathLike[str], where: str) -> Finding:
    """Tell how much room a disk has."""
    free = shutil.disk_usage(path).free
    advice = (
        "choose a target on a larger disk: a run needs about 3 bytes per voxel, 8 while it works"
    )
    return Finding("disk", f"{size_text(free)} free {where}", advice if free < _LITTLE_DISK else "")


def examine_address(address: str) -> Iterator[Finding]:
    """Yield what is found at an address, until something is wrong there; never raises for what it finds."""
    try:
        location = Location.of(address)
        yield from _examine(location)
    except MegasegError as error:
        yield Finding(address, "cannot be used", str(error), is_fatal=True)


def _examine(location: Location) -> Iterator[Finding]:
    is_there, took_s = _timed(lambda: location.probe())
    state = "there" if is_there else "nothing there yet"
    yield Finding(location.url, f"{state}; its store answered after {took_s * 1000:.0f} ms")
    has_run = location.is_listable and runs_folder(location).exists()
    if is_there:
        yield from _read(location, is_own=has_run)
    if has_run or not is_there:
        yield from _write(location)
    else:
        yield Finding("", "nothing was written: no run of megaseg is recorded beside it")


def _read(location: Location, *, is_own: bool) -> Iterator[Finding]:
    """Say what image or plate it is, and how fast a part of its finest level comes."""
    try:
        fields = read_plate(location).fields if is_plate(location) else None
        place = location / fields[0].path if fields else location
        image = read_image(place)
    except MegasegError as error:
        if not is_own:
            raise
        # The metadata come at the end of a run.
        yield Finding(
            "",
            "a run of megaseg that is not finished",
            f"megaseg status {location}; no image yet: {error}",
        )
        return
    axes = ", ".join(f"{name} {image.extent(name)}" for name in image.axis_names)
    what = f"plate of {len(fields)} fields, the first" if fields else "image"
    levels, spacing = len(image.levels), " × ".join(f"{size:.3g}" for size in image.spacing_um)
    is_in_um = all(axis.is_in_um for axis in image.axes if axis.name in SPATIAL)
    advice = "its metadata name no unit of length: sizes in µm will be sizes in voxels"
    yield Finding(
        "",
        f"OME-Zarr {image.version} {what}: {axes}; {image.dtype}, {levels} "
        f"{'level' if levels == 1 else 'levels'}, voxels of {spacing}{' µm' * is_in_um} (z, y, x)",
        "" if is_in_um else advice,
    )
    box = Box.centered(_READ_SHAPE, image.volume_shape())
    volume = Volume(place / image.levels[0].path, image.axis_names)
    values, took_s = _timed(lambda: volume.read(box))
    yield Finding("", f"can be read: {size_text(values.nbytes / max(took_s, 1e-6))}/s of voxels")
    if values.size and (values == values.flat[0]).all():
        advice = "look at it, for example with megaseg view; a constant image has no meaning for the model"
        yield Finding("", f"all voxels in its middle are {values.flat[0]}", advice)


def _write(location: Location) -> Iterator[Finding]:
    """Say whether a run could write here, and how fast an object goes there."""
    location.require_writable()
    if location.is_local:
        there = next(p for p in (location.path, *location.path.parents) if p.exists())
        yield Finding("", "can be written")
        yield disk_finding(there, f"at {there}")
        return
    name, data = (
        f"{location.basename}.megaseg-probe-{uuid.uuid4().hex[:8]}",
        os.urandom(_WRITTEN_BYTES),
    )
    try:
        speeds = [
            _timed(lambda: location.parent.put(name, data))[1]
            for _ in takewhile(_within(_MOST_S), range(3))
        ]
    finally:
        location.parent.delete(name)
    yield Finding(
        "",
        f"can be written: {size_text(len(data) / max(float(np.median(speeds)), 1e-6))}/s; objects are "
        "created only where there is none, which keeps two runs apart",
    )


def _within(seconds: float) -> Callable[[object], bool]:
    until = time.monotonic() + seconds
    return lambda _: time.monotonic() < until


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return function(), time.monotonic() - began
