"""The folder of this machine where models are kept, and what may go wrong with it."""

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path

from megaseg_dask.errors import SettingsError, StoreError

HOME = "MEGASEG_HOME"
_WRONG_FOLDER = (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError)


def home() -> Path:
    """Return the folder for models: ``MEGASEG_HOME``, else ``megaseg`` in the user's cache folder.

    Raises:
        SettingsError: The user has no home directory, and no folder was given.

    """
    try:
        if given := os.environ.get(HOME):
            return Path(given).expanduser().absolute()
        if sys.platform == "darwin":
            return Path.home() / "Library/Caches/megaseg"
        if caches := os.environ.get("XDG_CACHE_HOME"):
            return Path(caches) / "megaseg"
        return Path.home() / ".cache/megaseg"
    except RuntimeError as error:
        raise SettingsError(
            f"no home directory is known; set {HOME} to a folder for models"
        ) from error


@contextmanager
def writing(file: str) -> Iterator[None]:
    """Name the folder and the next step where ``file`` cannot be written to it.

    Raises:
        SettingsError: The folder is not one that this user can write.
        StoreError: Writing failed, for instance on a full disk; the same command resumes.

    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        problem = f"{file} cannot be written to {home()}: {error.strerror or error}"
        if isinstance(error, _WRONG_FOLDER):
            raise SettingsError(
                f"{problem}; set {HOME} to a folder that you can write to"
            ) from error
        raise StoreError(
            f"{problem}; free some space there, or set {HOME} to another folder, and run the same "
            "command again"
        ) from error


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that other processes may read at any time; raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    part.write_bytes(data)
    part.replace(file)


def sha256_of(path: Path, algorithm: str = "sha256") -> str:
    """Return the SHA-256 of a file as hex, or another digest by its name in hashlib."""
    with path.open("rb") as file:
        return file_digest(file, algorithm).hexdigest()
