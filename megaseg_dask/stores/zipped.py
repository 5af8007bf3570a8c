"""An image in a zip file, as RFC-9 of OME-Zarr describes it: read where it is, never unpacked.

The directory of a file is read once a process, and again at the first look of a command. Each
read compares the file with the one that the directory is of: a file that changes between them is
an error.
"""

import io
import os
import struct
import threading
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import obstore

from megaseg_dask.errors import DataError, SourceError
from megaseg_dask.stores.access import Client, StoreOptions
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import require_bucket
from megaseg_dask.stores.notes import Entry
from megaseg_dask.stores.patience import Patience
from megaseg_dask.stores.traffic import count_get
from megaseg_dask.stores.zip_entries import danger_of

if TYPE_CHECKING:
    from zarr.storage import StoreLike

_READ_ONLY = "a zip file can only be read; write to a folder"
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# Most directories lie within; it is also the farthest that a zip's end can be from the file's.
_TAIL_BYTES = 2**18
_MAX_DIRECTORY_BYTES = 2**30
_MAX_OPEN = 16
# What begins each entry: its signature, and the sizes of its name and its extra field.
_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\3\4"
# Extra fields that only the header of an entry has are shorter than this, as a rule.
_SLACK_BYTES = 64
# Finder of macOS adds a second folder of its own.
_NO_DATA = "__MACOSX/"


# -- the file


@dataclass(frozen=True, slots=True)
class State:
    """What tells a file from a later one: its size, and its time of change or etag."""

    size: int
    stamp: str


class PackedFile(Protocol):
    """A file that is read by ranges."""

    def state(self) -> State:
        """Return the state of the file; raises :class:`FileNotFoundError` if it is absent."""

    def read(self, start: int, stop: int) -> tuple[bytes, State]:
        """Read bytes ``start:stop``, which lie in the file, and the state that they are of."""

    def read_all(self) -> tuple[bytes, State]:
        """Read the whole file, and the state that it is of."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of a file system, a :class:`PackedFile`."""

    path: Path

    def state(self) -> State:
        count_get()
        return _state_of(self.path.stat())

    def read(self, start: int, stop: int) -> tuple[bytes, State]:
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
            count_get(len(data))
            return data, _state_of(os.fstat(file.fileno()))

    def read_all(self) -> tuple[bytes, State]:
        return self.read(0, self.state().size)


def _state_of(found: os.stat_result) -> State:
    return State(found.st_size, str(found.st_mtime_ns))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """An object of a bucket or of a web server, a :class:`PackedFile`."""

    client: Client
    key: str
    patience: Patience

    def state(self) -> State:
        count_get()
        return _state_in(self.patience.ask(lambda: obstore.head(self.client, self.key)))

    def read(self, start: int, stop: int) -> tuple[bytes, State]:
        data, state = self.patience.ask(lambda: self._read(start, stop))
        count_get(len(data))
        return data, state

    def read_all(self) -> tuple[bytes, State]:
        # Servers answer a range that is all of a file as if no range was asked for.
        data, state = self.patience.ask(self._read_all)
        count_get(len(data))
        return data, state

    def _read(self, start: int, stop: int) -> tuple[bytes, State]:
        result = obstore.get(self.client, self.key, options={"range": (start, stop)})
        return bytes(result.bytes()), _state_in(result.meta)

    def _read_all(self) -> tuple[bytes, State]:
        result = obstore.get(self.client, self.key)
        return bytes(result.bytes()), _state_in(result.meta)


def _state_in(meta: "obstore.ObjectMeta") -> State:
    return State(meta["size"], meta["e_tag"] or str(meta["last_modified"]))


# -- its directory


@dataclass(frozen=True, slots=True)
class _Member:
    """Where an entry lies in the file; ``n_named`` are the bytes of its name and extra field."""

    start: int
    n_named: int
    n_packed: int
    size: int
    checksum: int
    is_deflated: bool


@dataclass(slots=True)
class _Archive:
    """A zip file and its directory, by the keys of the image in it."""

    url: str
    file: PackedFile
    state: State
    members: Mapping[str, _Member]
    keys: list[str] = field(init=False)
    # Of deflated entries only the whole can be read: parts of one are asked for in a row.
    _inflated: tuple[str, bytes] = ("", b"")
    _starts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = sorted(self.members)

    @classmethod
    def of(cls, url: str, file: PackedFile) -> "_Archive":
        """Read the directory of a zip file.

        Raises:
            SourceError: It is no whole zip file, or not a safe one.
        """
        state = file.state()
        try:
            with zipfile.ZipFile(_Tail(file, state)) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                n_bytes = archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise SourceError(
                f"{url} is not a whole zip file ({error}); copy or pack it again"
            ) from error
        _require_safe(url, entries, n_bytes)
        # Of entries of one name the last counts, as for all readers: zarr appends changed metadata.
        members = {entry.filename: _member_of(entry) for entry in entries}
        return cls(url, file, state, _below_root(members))

    def below(self, prefix: str) -> list[str]:
        """Return all keys below a folder, sorted; all of the image for an empty one."""
        if not prefix:
            return self.keys
        # "0" is the character after "/".
        return self.keys[
            bisect_left(self.keys, f"{prefix}/") : bisect_left(self.keys, f"{prefix}0")
        ]

    def read(self, key: str) -> bytes:
        """Read an entry.

        Raises:
            DataError: It is damaged, or the file changed.
        """
        member = self.members[key]
        stop = member.start + _HEADER.size + member.n_named + _SLACK_BYTES + member.n_packed
        head = self._bytes(member.start, min(stop, self.state.size))
        begin = self._data_start(key, head) - member.start
        packed = head[begin : begin + member.n_packed]
        if len(packed) < member.n_packed:
            packed = self._bytes(member.start + begin, member.start + begin + member.n_packed)
        data = packed
        if member.is_deflated:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                # Never more than the directory says, whatever is in the file.
                data = inflater.decompress(packed, member.size + 1)
            except zlib.error as error:
                raise self._damaged(key) from error
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise self._damaged(key)
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Read a part of an entry, less at its end; raises as :meth:`read`."""
        member = self.members[key]
        stop = min(stop, member.size)
        if start >= stop:
            return b""
        if member.is_deflated:
            inflated = self._inflated
            if inflated[0] != key:
                inflated = (key, self.read(key))
                self._inflated = inflated
            return inflated[1][start:stop]
        if key not in self._starts:
            head = self._bytes(member.start, member.start + _HEADER.size)
            self._starts[key] = self._data_start(key, head)
        begin = self._starts[key]
        return self._bytes(begin + start, begin + stop)

    def _data_start(self, key: str, head: bytes) -> int:
        """Return where the data of an entry begin, of which the first bytes were read."""
        member = self.members[key]
        signature, n_name, n_extra = _HEADER.unpack_from(head.ljust(_HEADER.size, b"\0"))
        start = member.start + _HEADER.size + int(n_name) + int(n_extra)
        if signature != _SIGNATURE or start + member.n_packed > self.state.size:
            raise self._damaged(key)
        return start

    def _bytes(self, start: int, stop: int) -> bytes:
        data, state = self.file.read(start, stop)
        if state != self.state:
            raise DataError(
                f"{self.url} changed while it was read; let its writer finish, and run the same "
                "command again"
            )
        return data

    def _damaged(self, key: str) -> DataError:
        return DataError(
            f"{self.url}: its entry {key} is damaged; copy or pack the file again, and run the "
            "same command again"
        )


def _require_safe(url: str, entries: list[zipfile.ZipInfo], n_bytes: int) -> None:
    names: dict[str, str] = {}
    for entry in entries:
        problem = danger_of(entry)
        if entry.compress_type not in _METHODS:
            problem = f"is compressed by method {entry.compress_type}, not stored or deflated"
        # Only some file systems tell them apart.
        if names.setdefault(entry.filename.casefold(), entry.filename) != entry.filename:
            problem = "is there twice, in capitals and not"
        if not 0 <= entry.header_offset < n_bytes:
            problem = "lies outside the file"
        if problem:
            raise SourceError(
                f"{url}: its entry {entry.filename!r} {problem}, so it was not read; pack the "
                "image again, from its folder"
            )
    n_packed = sum(entry.compress_size for entry in entries)
    if n_packed > n_bytes:
        raise SourceError(
            f"{url}: its entries overlap ({n_packed} bytes in {n_bytes}), so it was not read; pack "
            "the image again, from its folder"
        )


def _member_of(entry: zipfile.ZipInfo) -> _Member:
    return _Member(
        start=entry.header_offset,
        n_named=len(entry.orig_filename.encode()) + len(entry.extra),
        n_packed=entry.compress_size,
        size=entry.file_size,
        checksum=entry.CRC,
        is_deflated=entry.compress_type == zipfile.ZIP_DEFLATED,
    )


def _below_root(members: dict[str, _Member]) -> dict[str, _Member]:
    """Return entries by their keys in the image, which may lie in a single folder."""
    if any(name in members for name in METADATA):
        return members
    kept = {name: member for name, member in members.items() if not name.startswith(_NO_DATA)}
    tops = {name.partition("/")[0] for name in kept}
    if len(tops) != 1 or not any(f"{top}/{name}" in kept for top in tops for name in METADATA):
        return members
    return {name.partition("/")[2]: member for name, member in kept.items()}


class _Tail(io.RawIOBase):
    """A file whose end is read at once: there its directory lies."""

    def __init__(self, file: PackedFile, state: State) -> None:
        self._file = file
        self._size = state.size
        self._position = 0
        self._start = max(0, state.size - _TAIL_BYTES)
        self._data = file.read(self._start, state.size)[0] if self._start else file.read_all()[0]

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        position = origins[whence] + offset
        if position < 0:
            raise zipfile.BadZipFile("it is too short")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        stop = self._size if size < 0 else min(start + size, self._size)
        if stop - start > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {stop - start} bytes")
        if start >= stop:
            return b""
        self._position = stop
        # What lies before the tail is read together with what lies in it, once.
        if start < self._start:
            self._data = self._file.read(start, self._start)[0] + self._data
            self._start = start
        return self._data[start - self._start : stop - self._start]


# -- the folder

_open: dict[tuple[str, StoreOptions], _Archive] = {}
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class ZipFolder:
    """A folder in a zip file, a :class:`Backend` that is only read.

    One that ``looks_again`` asks first whether the file is still the one whose directory is known.
    """

    url: str
    options: StoreOptions
    file: PackedFile
    prefix: str
    looks_again: bool = False

    def _archive(self) -> _Archive:
        place = (self.url, self.options)
        # Of the threads that read the fields of a plate, one reads the directory.
        with _opening:
            known = _open.get(place)
            try:
                if known and not (self.looks_again and known.state != self.file.state()):
                    return known
                archive = _Archive.of(self.url, self.file)
            except FileNotFoundError as error:
                require_bucket(error)
                return _Archive(self.url, self.file, State(0, ""), {})
            while len(_open) >= _MAX_OPEN:
                _open.pop(next(iter(_open)))
            _open[place] = archive
            return archive

    def get(self, key: str) -> bytes | None:
        archive = self._archive()
        name = self._key(key)
        return archive.read(name) if name in archive.members else None

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        archive = self._archive()
        name = self._key(key)
        return archive.read_range(name, start, stop) if name in archive.members else None

    def size(self, key: str) -> int | None:
        member = self._archive().members.get(self._key(key))
        return None if member is None else member.size

    def keys(self, prefix: str) -> list[str]:
        return [self._relative(name) for name in self._archive().below(self._key(prefix))]

    def entries(self) -> list[Entry]:
        archive = self._archive()
        members = [(name, archive.members[name]) for name in archive.below(self.prefix)]
        return [Entry(name, member.size, f"{member.checksum:08x}") for name, member in members]

    def children(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.keys("")})

    def exists(self) -> bool:
        return self.is_folder() or self.size("") is not None

    def is_folder(self) -> bool:
        return bool(self._archive().below(self.prefix))

    def arrays(self, *, read_only: bool) -> "StoreLike":
        from megaseg_dask.stores.zarr_stores import ZippedObjects

        if not read_only:
            self._refuse_to_write()
        return ZippedObjects(self)

    def _key(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def _relative(self, name: str) -> str:
        return name.removeprefix(self.prefix).lstrip("/")

    def _refuse_to_write(self, *_: object, **_options: object) -> NoReturn:
        raise io.UnsupportedOperation(_READ_ONLY)

    put = create = delete = remove = _refuse_to_write


def forget_archives() -> None:
    """Forget the directories of zip files: others may have taken their places."""
    with _opening:
        _open.clear()
