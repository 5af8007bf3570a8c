"""A bundle comes over the network in pieces, so that whoever is interrupted goes on with the next piece.

What was received stays beside a note of which version of the object it is; of
another version nothing is used. One process at a time fetches a model, others
wait for it.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megaseg_dask.errors import BundleError, StoreError
from megaseg_dask.models.depot import Depot, Entry
from megaseg_dask.models.home import home, sha256_of, writing

PIECE_BYTES = 4 * 2**20
MAX_BYTES = 8 * 2**30
# A process that fetches, and receives nothing for so long, is not waited for.
WAIT_S = 120.0
_POLL_S = 0.3


def part_of(name: str) -> Path:
    """Where the bytes of a model are gathered."""
    return home() / "parts" / f"{name}.part"


@contextmanager
def turn(name: str, tell: Callable[[int], None]) -> Iterator[None]:
    """Wait until no other process fetches this model, and keep others waiting meanwhile.

    ``tell`` hears how many bytes there are while waiting. Raises StoreError if the other is stuck.
    """
    part = part_of(name)
    with writing(name):
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(part.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        before, since = -1, time.monotonic()
        while not _locked(lock, part):
            n_bytes = part.stat().st_size if part.exists() else 0
            if n_bytes != before:
                before, since = n_bytes, time.monotonic()
                tell(n_bytes)
            if time.monotonic() - since > WAIT_S:
                raise StoreError(
                    f"{name} is being fetched by another process, which received nothing for {WAIT_S:.0f} "
                    "s; end that one, and run the same command again"
                )
            time.sleep(_POLL_S)
        yield
    finally:
        # The lock's file stays: who removes one that another waits for lets two in.
        os.close(lock)


def _locked(lock: int, part: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"the file system of {part.parent} has no locks ({error.strerror}); set MEGASEG_HOME to a "
            "folder on a local disk, or import the model there"
        ) from error
    return True


def download(
    depot: Depot, entry: Entry, name: str, tell: Callable[[int], None], sha256: str | None = None
) -> Path:
    """Fetch what is not here yet of an object, and check the whole; returns the file, which the caller moves away.

    ``tell`` hears how many bytes are here, now and after each piece. Raises
    StoreError if the store is lost, which the same command resumes, and
    BundleError for another content than the store's, or than ``sha256``.
    """
    if entry.n_bytes > MAX_BYTES:
        raise BundleError(f"{entry.url} has {entry.n_bytes} bytes; at most {MAX_BYTES} are fetched")
    part = part_of(name)
    with writing(name):
        _begin(part, entry)
        n_bytes = part.stat().st_size
    tell(n_bytes)
    while n_bytes < entry.n_bytes:
        data = depot.read(entry, n_bytes, min(n_bytes + PIECE_BYTES, entry.n_bytes))
        with writing(name), part.open("ab") as file:
            file.write(data)
        n_bytes += len(data)
        tell(n_bytes)
    _require_whole(part, entry, sha256)
    return part


def discard(name: str) -> None:
    """Remove what was received of a model."""
    for file in (part_of(name), part_of(name).with_suffix(".json")):
        file.unlink(missing_ok=True)


def _begin(part: Path, entry: Entry) -> None:
    """Keep the bytes of an earlier attempt if they are of this version of the object."""
    note = part.with_suffix(".json")
    known = {"source": entry.url, "version": entry.version, "n_bytes": entry.n_bytes}
    with suppress(OSError, ValueError):
        # Without a version nobody can tell.
        if (
            entry.version
            and json.loads(note.read_bytes()) == known
            and part.stat().st_size <= entry.n_bytes
        ):
            return
    note.unlink(missing_ok=True)
    part.write_bytes(b"")
    note.write_text(json.dumps(known))


def _require_whole(part: Path, entry: Entry, sha256: str | None) -> None:
    for algorithm, expected, who in (
        ("md5", entry.md5, "the store says"),
        ("sha256", sha256, "--sha256 says"),
    ):
        found = sha256_of(part, algorithm) if expected else None
        if expected and found != expected.lower():
            raise BundleError(
                f"{entry.url}: what was received has {algorithm.upper()} {found}, {who} {expected}; it "
                "was removed, fetch it again"
            )
