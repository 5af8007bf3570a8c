"""Copies of bundles beside a run: each worker elsewhere fetches one once, to a disk of its own.

A path of the client may mean nothing to a worker on another machine, or be read
over a network by all of them for every task. The target's store is what all of
them reach.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.errors import BundleError
from megaseg_dask.models.cytodl.files import folder_around, read_parts
from megaseg_dask.stores import Location

FOLDER = "bundles"


@dataclass(frozen=True, slots=True)
class Copies:
    """Where copies are, and on this worker the folder to fetch them to."""

    url: str
    scratch: str

    def fetch(self, digest: str) -> Path:
        """Return the copy of a bundle on this machine, fetched unless it was; raises :class:`BundleError`."""
        folder, to = Location(self.url) / digest, Path(self.scratch) / f"megaseg-{digest}"
        names = [key.removeprefix(f"{digest}/") for key in Location(self.url).keys(digest)]
        if not names:
            raise BundleError(f"{folder} is not there: the run that sent this task is over")
        for name in names:
            if not (to / name).exists():
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                part = to / f"{name}.part"
                part.write_bytes(folder.get(name) or b"")
                part.replace(to / name)
        # A file is a zip or a checkpoint, which are loaded as they are; the rest is a folder.
        return to / names[0] if len(names) == 1 and "/" not in names[0] else to


_current: Copies | None = None
_lock = threading.Lock()


def use(copies: Copies | None) -> None:
    """Let this process load bundles from copies, or again from where the plan found them."""
    global _current
    _current = copies


def path_of(path: str, digest: str) -> Path:
    """Return where this process loads a bundle from: its own copy, or where the plan found it."""
    if _current is None:
        return Path(path)
    with _lock:
        return _current.fetch(digest)


def put(path: str, digest: str, to: Location, checkpoint: str | None = None) -> None:
    """Write what is needed of a bundle, or of one of its checkpoints, where workers fetch it from."""
    file = Path(path)
    whole = file.is_file() and folder_around(file) is None
    for name, data in [(file.name, file.read_bytes())] if whole else read_parts(file, checkpoint):
        (to / digest).put(name, data)
