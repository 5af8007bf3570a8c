"""A folder of a file system; and what only a disk needs: to be flushed, swept and tried before it is relied on."""

import ctypes
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import obstore
import obstore.exceptions
import zarr.storage
from obstore.store import LocalStore

from megaseg_dask.errors import TargetError
from megaseg_dask.stores.backend import Folder

# zarr 3.1's LocalStore writes here and renames: the name without its last suffix, a UUID and this ending.
_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")


def open_disk(path: Path) -> Folder:
    """Return a folder of a file system; objects appear in it whole, by renaming."""
    return _Disk(path)


@dataclass(frozen=True, slots=True)
class _Disk:
    """A folder of a file system; objects appear whole, by renaming."""

    path: Path

    def put(self, key: str, data: bytes) -> None:
        obstore.put(LocalStore(prefix=self.path, mkdir=True), key, data)

    def create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(LocalStore(prefix=self.path, mkdir=True), key, data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def get(self, key: str) -> bytes | None:
        if not self.path.exists():
            return None
        try:
            return bytes(obstore.get(LocalStore(prefix=self.path), key).bytes())
        except FileNotFoundError:
            return None

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            with (self.path / key).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        if not self.path.exists():
            return None
        try:
            return obstore.head(LocalStore(prefix=self.path), key)["size"]
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def keys(self, prefix: str) -> list[str]:
        if not self.path.exists():
            return []
        return sorted(
            str(entry["path"])
            for entry in obstore.list(LocalStore(prefix=self.path), prefix).collect()
        )

    def children(self) -> list[str]:
        return sorted(child.name for child in self.path.iterdir()) if self.path.exists() else []

    def exists(self) -> bool:
        return self.path.exists()

    def is_folder(self) -> bool:
        return self.path.is_dir()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=not self.path.exists())

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        return zarr.storage.LocalStore(self.path, read_only=read_only)


def require_writable(path: Path) -> None:
    """Raise :class:`TargetError` if nothing could be created in a folder and beside it."""
    beside = next(p for p in (*path.parents, path) if p.exists())
    for folder in {beside, path} if path.is_dir() else {beside}:
        probe = folder / f".{path.name}.megaseg-probe"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TargetError(
                f"{path} cannot be written: {error.strerror} in {folder}; choose another "
                "target or mend its permissions"
            ) from error


def sync(path: Path) -> None:
    """Flush the file system that holds a folder; raises :class:`OSError` if it could not keep what was written."""
    there = next(p for p in (path, *path.parents) if p.exists())
    flush = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if flush is None:
        os.sync()
        return
    descriptor = os.open(there, os.O_RDONLY)
    try:
        if flush(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def sweep_partial(path: Path) -> int:
    """Remove objects that were being written when their writer was killed; return how many there were."""
    n = 0
    for folder, _, names in os.walk(path):
        for name in filter(_PARTIAL.fullmatch, names):
            (Path(folder) / name).unlink(missing_ok=True)
            n += 1
    return n
