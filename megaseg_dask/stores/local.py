"""A folder of a file system, and what only a disk needs: to be flushed, swept and tried."""

import ctypes
import errno
import glob
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaseg_dask.errors import DataError, TargetError
from megaseg_dask.stores.notes import Entry, note
from megaseg_dask.stores.traffic import count_delete, count_get, count_list, count_put

if TYPE_CHECKING:
    from zarr.storage import StoreLike

# zarr 3.1's LocalStore writes here and renames: the name without its last suffix, a UUID and this.
# Objects of ours are written in the same way, to names that tell who wrote them.
_PARTIAL = re.compile(r".*\.(megaseg-)?[0-9a-f]{32}\.partial")
_MAX_PASSES = 100
# A file in the place of a folder holds no objects, and a folder is none.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of a file system, a :class:`Backend`; objects appear in it whole, by renaming.

    A file that cannot be asked for is an error, and never taken for an absent one.
    """

    path: Path

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        with self._staged(key, data, durable=durable) as staged:
            staged.replace(self.path / key)
        count_put(len(data))
        note_file(self.path / key, data)

    def create(self, key: str, data: bytes, *, durable: bool = False) -> bool:
        with self._staged(key, data, durable=durable) as staged:
            try:
                _link(staged, self.path / key, data, durable=durable)
            except FileExistsError:
                count_put(0)
                return False
        count_put(len(data))
        return True

    @contextmanager
    def _staged(self, key: str, data: bytes, *, durable: bool) -> Iterator[Path]:
        """Yield a file beside an object that holds its data, and is gone afterwards."""
        target = self.path / key
        standing = _nearest_existing([*target.parents])
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f"{target.name}.megaseg-{uuid.uuid4().hex}.partial")
        try:
            _write_new(staged, data, durable=durable)
            yield staged
        finally:
            staged.unlink(missing_ok=True)
        if durable:
            # The entry of the file, and those of the folders that were made for it.
            for folder in target.parents:
                _sync_folder(folder)
                if folder == standing:
                    break

    def get(self, key: str) -> bytes | None:
        try:
            require_regular(self.path, key)
            data = (self.path / key).read_bytes()
        except ABSENT:
            count_get()
            return None
        count_get(len(data))
        return data

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            require_regular(self.path, key)
            with (self.path / key).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except ABSENT:
            count_get()
            return None
        count_get(len(data))
        return data

    def size(self, key: str) -> int | None:
        found = _look(self.path / key)
        count_get()
        return found.st_size if found and not stat.S_ISDIR(found.st_mode) else None

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)
        count_delete()

    def keys(self, prefix: str) -> list[str]:
        keys = []
        for folder, _, names in os.walk(self.path / prefix, onerror=_raise_unless_absent):
            below = Path(folder).relative_to(self.path)
            keys += [(below / name).as_posix() for name in names if not _PARTIAL.fullmatch(name)]
        count_list(len(keys))
        return sorted(keys)

    def entries(self) -> list[Entry]:
        paths = [self.path / key for key in self.keys("")]
        looks = zip(paths, map(_look, paths), strict=True)
        return [Entry(str(path), found.st_size, _stamp(found)) for path, found in looks if found]

    def children(self) -> list[str]:
        count_list()
        if _look(self.path) is None:
            return []
        return sorted(child.name for child in self.path.iterdir())

    def exists(self) -> bool:
        count_list()
        return _look(self.path) is not None

    def is_folder(self) -> bool:
        found = _look(self.path)
        count_list()
        return found is not None and stat.S_ISDIR(found.st_mode)

    def remove(self) -> None:
        for _ in range(_MAX_PASSES):
            if not self.exists():
                return
            # Another process may remove the same files.
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path)
            count_delete()
        raise OSError(errno.EBUSY, "files in it appear or disappear again and again", self.path)

    def arrays(self, *, read_only: bool) -> "StoreLike":
        from megaseg_dask.stores.zarr_stores import RegularFiles

        return RegularFiles(self.path, read_only=read_only)


def note_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Note a file that was written."""
    with suppress(*ABSENT):
        note(str(path), data, _stamp(path.stat()))


def _stamp(found: os.stat_result) -> str:
    return str(found.st_mtime_ns)


def require_regular(root: Path, key: str) -> None:
    """Require that an object of a folder is a file that lies in the folder.

    A pipe never ends or never answers, a device has no end, and a link may lead to anything that
    its maker wants to have read.

    Raises:
        DataError: It is something else.
        OSError: The system cannot tell; as of an absent file.
    """
    path = root / key
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{path} is not a regular file but a {_kind_of(mode)}; replace it with the data and "
            "run the same command again"
        )
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise DataError(
            f"{path} is a link to {real} outside the image, and is not followed; replace it with a "
            "copy and run the same command again"
        )


def _kind_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _write_new(path: Path, data: bytes, *, durable: bool) -> None:
    with path.open("xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _link(staged: Path, path: Path, data: bytes, *, durable: bool) -> None:
    """Give a staged file its name, unless that exists."""
    try:
        path.hardlink_to(staged)
    except FileExistsError:
        raise
    except OSError:
        # Memory cards and some network file systems have no hard links. An object that is torn
        # there by a kill is one that its readers have to tell.
        _write_new(path, data, durable=durable)


def _look(path: Path) -> os.stat_result | None:
    """Return what is at a path, ``None`` if nothing is; any other failure is raised."""
    try:
        return path.stat()
    except ABSENT:
        return None


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, ABSENT):
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    return next(path for path in paths if _look(path) is not None)


def sweep_partial(path: Path) -> int:
    """Remove the files of writers that were killed below a folder; return their number."""
    n = 0
    for folder, _, names in os.walk(path):
        for name in filter(_PARTIAL.fullmatch, names):
            (Path(folder) / name).unlink(missing_ok=True)
            n += 1
    return n


def sweep_staged(path: Path, names: Iterable[str]) -> None:
    """Remove the files of killed writers of ours of some objects in a folder of others."""
    for name in names:
        for left in path.glob(f"{glob.escape(name)}.megaseg-*.partial"):
            left.unlink(missing_ok=True)
