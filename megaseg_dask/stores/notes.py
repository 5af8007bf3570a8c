"""What a task writes: each object is noted as it is put, so nothing has to be asked again."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a store as a listing shows it.

    ``key`` is a path, or the key in its bucket; ``stamp`` is the time of the last change of a
    file, or the etag of an object.
    """

    key: str
    size: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Note:
    """An object that was written, and a checksum of its bytes."""

    entry: Entry
    checksum: int


# Threads and coroutines that work for a task take it over.
_NOTES: ContextVar[dict[str, Note] | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[dict[str, Note]]:
    """Yield what is written until the end of the block, by its key: what was put last."""
    notes: dict[str, Note] = {}
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def note(key: str, data: Any, stamp: str) -> None:
    """Note an object that was written, for whoever asked for notes."""
    notes = _NOTES.get()
    if notes is not None:
        size = memoryview(data).nbytes
        notes[key] = Note(Entry(key, size, stamp), checksum_of(data))


def checksum_of(data: Any) -> int:
    """Return the checksum of an object's bytes that notes hold."""
    return zlib.crc32(data)
