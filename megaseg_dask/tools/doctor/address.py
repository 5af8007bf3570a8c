"""Checks of an address: its store, the image there, write access, and speed.

Nothing is written beside an image that is not ours. Where a run could write,
small objects are created and removed again.
"""

import itertools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError, SourceError
from megaseg_dask.messages import count, size_text
from megaseg_dask.models.cards import MEGASEG_VOXEL_SIZE_UM
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.choice import channel_text
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.plan.voxel_size import VolumeForm, is_far, times_text
from megaseg_dask.plan.voxel_size import size_text as size_text_um
from megaseg_dask.stores import Location

T = TypeVar("T")

# A speed is measured on this many voxels, or on a few objects of this size.
_READ_SHAPE = (64, 256, 256)
_OBJECT_BYTES = 4 * 2**20
_MAX_WRITES = 3
_MAX_WRITE_S = 5.0
_MIN_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check; ``advice`` if something is wrong, ``is_fatal`` if it stops a run."""

    name: str
    text: str
    advice: str = ""
    is_fatal: bool = False


def check_disk(path: Path, where: str) -> Finding:
    """Return how much room the disk of a path has."""
    free = shutil.disk_usage(path).free
    advice = ""
    if free < _MIN_DISK_BYTES:
        needs = "a run writes about 3 bytes per voxel, and needs 8 while it runs"
        advice = f"choose a target on a larger disk: {needs}"
    return Finding("disk", f"{size_text(free)} free {where}", advice)


def check_address(address: str) -> Iterator[Finding]:
    """Yield findings about an address, up to the first that stops a run; never raises for them."""
    try:
        location = Location.of(address)
        yield from _check_location(location)
    except MegasegError as error:
        yield Finding(address, "cannot be used", str(error), is_fatal=True)


def _check_location(location: Location) -> Iterator[Finding]:
    exists, answer_s = _timed(location.probe)
    state = "exists" if exists else "does not exist yet"
    yield Finding(location.url, f"{state}; the store answered in {answer_s * 1000:.0f} ms")
    has_run = location.is_listable and runs_folder(location).exists()
    if exists:
        yield from _check_image(location, has_run)
    if has_run or not exists:
        yield from _check_writing(location)
    else:
        yield Finding("", "write access not tested")


def _check_image(location: Location, has_run: bool) -> Iterator[Finding]:
    """Yield what image or plate this is, and how fast a part of its finest level is read."""
    try:
        plate = read_plate(location) if is_plate(location) else None
        first, image = _read_first(location, plate)
    except MegasegError as error:
        if not has_run:
            raise
        # A run writes the metadata at its end.
        advice = f"megaseg status {location}; no image yet: {error}"
        yield Finding("", "a run of megaseg that is not finished", advice)
        return
    subject = "image"
    if plate:
        subject = f"plate of {count(len(plate.fields), 'field')}; the first field that can be read"
    yield _describe_image(image, subject)
    if image.kind == "image":
        yield _compare_voxels(image)
    volume = Volume.of(first, image)
    values, read_s = _timed(lambda: volume.read(Box.centered(_READ_SHAPE, image.volume_shape())))
    yield Finding("", f"can be read: {_speed_text(values.nbytes, read_s)} of voxels")
    if values.size and (values == values.flat[0]).all():
        advice = "the image may be empty"
        advice = f"{advice}; look at it with megaseg view"
        yield Finding("", f"all voxels in the middle have the value {values.flat[0]}", advice)


def _read_first(location: Location, plate: Plate | None) -> tuple[Location, Image]:
    """Return the first field of a plate that can be read, or the image that is there."""
    fields = plate.fields if plate else ()
    for field in fields[:-1]:
        with suppress(SourceError):
            return location / field.path, read_image(location / field.path)
    last = location / fields[-1].path if fields else location
    return last, read_image(last)


def _describe_image(image: Image, subject: str) -> Finding:
    axes = ", ".join(f"{name} {image.extent(name)}" for name in image.axis_names)
    levels = count(len(image.levels), "level")
    spacing = " × ".join(f"{size:.3g}" for size in image.spacing_um)
    reason = image.unknown_size
    unit = "" if reason else " µm"
    advice = ""
    if reason:
        advice = f"the voxel size is unknown ({reason}), so measurements have no columns in µm"
    content = f"{axes}; {image.dtype}, {levels}, voxels of {spacing}{unit} (z, y, x)"
    if "c" in image.axis_names:
        channels = map(channel_text, itertools.count(), image.channels)
        content += f"; channels {', '.join(channels)}"
    return Finding("", f"OME-Zarr {image.version} {subject}: {content}", advice)


def _compare_voxels(image: Image) -> Finding:
    """Return how far the voxels of an image are from those that the published models know."""
    form = VolumeForm.of(image)
    model = size_text_um(MEGASEG_VOXEL_SIZE_UM)
    times = form.times(MEGASEG_VOXEL_SIZE_UM)
    if times is None:
        advice = "write the size into the metadata, to use --voxel-size"
        return Finding("", f"whether its voxels are those of MegaSeg ({model}) is unknown", advice)
    advice = ""
    if is_far(times):
        advice = "--voxel-size model resamples it; it comes back on its own voxels"
    return Finding(
        "", f"its voxels are {times_text(times)} times those of MegaSeg ({model})", advice
    )


def _check_writing(location: Location) -> Iterator[Finding]:
    """Yield whether a run could write here, and how fast an object is written."""
    location.require_writable()
    if location.is_local:
        existing = location.path
        while not existing.exists():
            existing = existing.parent
        yield Finding("", "can be written")
        yield check_disk(existing, f"at {existing}")
        return
    speed = _speed_text(_OBJECT_BYTES, _write_s(location))
    promise = "the store protects a run from a second one"
    yield Finding("", f"can be written: {speed}; {promise}")


def _write_s(location: Location) -> float:
    """Return the median seconds to write an object beside ``location``; none is left behind."""
    folder = location.parent
    key = f"{location.basename}.megaseg-probe-{uuid.uuid4().hex[:8]}"
    data = os.urandom(_OBJECT_BYTES)
    seconds: list[float] = []
    try:
        while len(seconds) < _MAX_WRITES and sum(seconds) < _MAX_WRITE_S:
            _, write_s = _timed(lambda: folder.put(key, data))
            seconds.append(write_s)
    finally:
        folder.delete(key)
    return median(seconds)


def _speed_text(n_bytes: int, seconds: float) -> str:
    return f"{size_text(n_bytes / max(seconds, 1e-6))}/s"


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    result = function()
    return result, time.monotonic() - began
