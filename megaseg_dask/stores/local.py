"""A folder of a file system, and what only a disk needs: to be flushed, swept and tried."""

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

# zarr 3.1's LocalStore writes here and renames: the name without its last suffix, a UUID and this.
_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of a file system, a :class:`Backend`; objects appear in it whole, by renaming."""

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
        # A file in the place of a folder holds no objects either.
        if not self.path.is_dir():
            return None
        try:
            return bytes(obstore.get(LocalStore(prefix=self.path), key).bytes())
        except FileNotFoundError:
            return None

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
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
        entries = obstore.list(LocalStore(prefix=self.path), prefix).collect()
        return sorted(str(entry["path"]) for entry in entries)

    def children(self) -> list[str]:
        if not self.path.exists():
            return []
        return sorted(child.name for child in self.path.iterdir())

    def exists(self) -> bool:
        return self.path.exists()

    def is_folder(self) -> bool:
        return self.path.is_dir()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=not self.path.exists())

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        return zarr.storage.LocalStore(self.path, read_only=read_only)


def require_writable(path: Path) -> None:
    """Require that files can be created in a folder and beside it.

    Raises:
        TargetError: They cannot.
    """
    folders = {_nearest_existing([*path.parents, path])}
    if path.is_dir():
        folders.add(path)
    for folder in folders:
        probe = folder / f".{path.name}.megaseg-probe"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TargetError(
                f"{path} cannot be written: {error.strerror} in {folder}; choose another "
                "target or fix its permissions"
            ) from error


def sync(path: Path) -> None:
    """Flush the file system that holds a folder.

    Raises:
        OSError: The file system could not keep what was written.
    """
    flush = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if flush is None:
        os.sync()
        return
    descriptor = os.open(_nearest_existing([path, *path.parents]), os.O_RDONLY)
    try:
        if flush(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def _nearest_existing(paths: list[Path]) -> Path:
    return next(path for path in paths if path.exists())


def sweep_partial(path: Path) -> int:
    """Remove the files of writers that were killed below a folder; return their number."""
    n = 0
    for folder, _, names in os.walk(path):
        for name in filter(_PARTIAL.fullmatch, names):
            (Path(folder) / name).unlink(missing_ok=True)
            n += 1
    return n
