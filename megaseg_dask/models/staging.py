"""Copies of bundles beside a run: each worker elsewhere fetches one once, to its own disk.

A path of the client may mean nothing to a worker on another machine, or be read over a network by
all of them for every task. The target's store is what all of them reach.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.errors import BundleError
from megaseg_dask.models.cytodl.files import folder_around, read_parts
from megaseg_dask.models.home import write_whole
from megaseg_dask.stores import Location

FOLDER = "bundles"


@dataclass(frozen=True, slots=True)
class Copies:
    """Where copies are, and on this worker the folder to fetch them to."""

    url: str
    scratch: str

    def fetch(self, digest: str) -> Path:
        """Return the copy of a bundle on this machine, fetched unless it was.

        Raises:
            BundleError: There is no copy.
        """
        copy = Location(self.url) / digest
        folder = Path(self.scratch) / f"megaseg-{digest}"
        names = [key.removeprefix(f"{digest}/") for key in Location(self.url).keys(digest)]
        if not names:
            raise BundleError(f"{copy} is missing: the run that sent this task has ended")
        for name in names:
            if not (folder / name).exists():
                write_whole(folder / name, copy.get(name) or b"")
        # A single file is a zip or a checkpoint, which is loaded as it is; the rest is a folder.
        is_file = len(names) == 1 and "/" not in names[0]
        return folder / names[0] if is_file else folder


_current: Copies | None = None
_lock = threading.Lock()


def use(copies: Copies | None) -> None:
    """Let this process load bundles from copies, or again from where the plan found them."""
    global _current
    _current = copies


def path_of(path: str, digest: str) -> Path:
    """Return where this process loads a bundle from: its copy, or where the plan found it."""
    if _current is None:
        return Path(path)
    with _lock:
        return _current.fetch(digest)


def put(path: str, digest: str, folder: Location, checkpoint: str | None = None) -> None:
    """Write what is needed of a bundle, or of one of its checkpoints, where workers fetch it from.

    Raises:
        BundleError: There is no such bundle any more.
        StoreError: The folder cannot be written.
    """
    file = Path(path)
    copy = folder / digest
    if file.is_file() and folder_around(file) is None:
        copy.put(file.name, file.read_bytes())
        return
    for name, data in read_parts(file, checkpoint):
        copy.put(name, data)
