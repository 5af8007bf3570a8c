"""A bundle comes over the network in pieces: an interrupted fetch goes on with the next one.

What was received lies beside a note of the version of the object; of another version nothing is
used. One process at a time fetches a model, others wait for it.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from megaseg_dask.errors import BundleError, StoreError
from megaseg_dask.models.bucket import Bucket, StoredObject
from megaseg_dask.models.home import home, writing

PIECE_BYTES = 4 * 2**20
MAX_BYTES = 8 * 2**30
# A process that fetches, and receives nothing for so long, is not waited for.
WAIT_S = 120.0
_POLL_S = 0.3


def part_of(name: str) -> Path:
    """Return the file in which the bytes of a model are gathered."""
    return home() / "parts" / f"{name}.part"


@contextmanager
def turn(name: str, tell: Callable[[int], None]) -> Iterator[None]:
    """Wait until no other process fetches this model, and keep others waiting meanwhile.

    ``tell`` hears how many bytes there are while waiting.

    Raises:
        StoreError: The other process is stuck, or this file system has no locks.
    """
    part = part_of(name)
    with writing(name):
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = part.with_suffix(".lock").open("a")
    # Closing it lets the next one in. The file stays: if it were removed while another process
    # waits for it, two would be in.
    with lock:
        n_bytes = -1
        changed = time.monotonic()
        while not _is_locked(lock, part.parent):
            n_before = n_bytes
            n_bytes = part.stat().st_size if part.exists() else 0
            if n_bytes != n_before:
                changed = time.monotonic()
                tell(n_bytes)
            if time.monotonic() - changed > WAIT_S:
                raise StoreError(
                    f"{name} is being downloaded by another process, which received nothing for "
                    f"{WAIT_S:.0f} s; stop that process, and run the same command again"
                )
            time.sleep(_POLL_S)
        yield


def _is_locked(lock: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"the file system of {folder} has no locks ({error.strerror}); set MEGASEG_HOME to a "
            "folder on a local disk, or import the model there"
        ) from error
    return True


def download(bucket: Bucket, stored: StoredObject, name: str, tell: Callable[[int], None]) -> Path:
    """Fetch what is not here yet of an object; returns the file, which the caller moves away.

    ``tell`` hears how many bytes are here, now and after each piece.

    Raises:
        BundleError: It is too large.
        StoreError: The store is lost; the same command goes on from there.
    """
    n_total = stored.n_bytes
    if n_total > MAX_BYTES:
        raise BundleError(f"{stored.url} has {n_total} bytes; at most {MAX_BYTES} are fetched")
    part = part_of(name)
    with writing(name):
        n_bytes = _resume(part, stored)
    tell(n_bytes)
    while n_bytes < n_total:
        data = bucket.read(stored, n_bytes, min(n_bytes + PIECE_BYTES, n_total))
        with writing(name), part.open("ab") as file:
            file.write(data)
        n_bytes += len(data)
        tell(n_bytes)
    return part


def _resume(part: Path, stored: StoredObject) -> int:
    """Return how many bytes an earlier attempt left of this version; of another, none stay."""
    note = part.with_suffix(".json")
    expected = json.dumps(asdict(stored))
    # Without a version nobody can tell.
    is_same = stored.version and note.exists() and note.read_text() == expected and part.exists()
    if is_same and part.stat().st_size <= stored.n_bytes:
        return part.stat().st_size
    note.unlink(missing_ok=True)
    part.write_bytes(b"")
    note.write_text(expected)
    return 0


def discard(name: str) -> None:
    """Remove what was received of a model."""
    part = part_of(name)
    part.with_suffix(".json").unlink(missing_ok=True)
    part.unlink(missing_ok=True)
