"""What is ours is written whole and recorded; what is absent, short or replaced by now is a loss.

Each task records the objects that it wrote. Before a run goes on, and before
anything is published, listings are compared with that, and the tasks whose
objects differ run again. They write what they wrote before, so nothing that was
computed from it has to be done again.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import PurePosixPath

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.journal import Journal, Record
from megaseg_dask.run.state import Wrote
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.workspace import Workspace
from megaseg_dask.stores import METADATA, Entry, Location, Note, checksum_of

# Of an object, a digest of its name, size and stamp, and one of its name, size and bytes: a stamp
# differs also in a copy, or if a task that was given up ends after all.
_DIGEST_BYTES = 6
_Task = tuple[str, int]


def wrote(workspace: Workspace, notes: Mapping[str, Note]) -> Wrote:
    """Return the record of what a task wrote: what stays, and intermediate data."""
    names = _Names(workspace.plan)
    kept: list[bytes] = []
    work: list[bytes] = []
    for note in notes.values():
        is_work = names.is_work(note.entry.key)
        digests = names.stamped(note.entry) + names.checked(note.entry, note.checksum)
        (work if is_work else kept).append(digests)
    return Wrote(_to_text(kept), _to_text(work))


def _to_text(digests: Iterable[bytes]) -> str:
    return b64encode(b"".join(sorted(digests))).decode()


def _iter_digests(text: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two digests of each object in a record."""
    data = b64decode(text)
    for first in range(0, len(data), 2 * _DIGEST_BYTES):
        middle = first + _DIGEST_BYTES
        yield data[first:middle], data[middle : middle + _DIGEST_BYTES]


class _Names:
    """Names of objects that stay the same where target and run folder are moved to."""

    def __init__(self, plan: Plan) -> None:
        self._folders = {"run": f"{plan.run.key}/", "target": f"{plan.target.key}/"}
        self._work = f"{Workspace(plan).folder.all_work.key}/"

    def is_work(self, key: str) -> bool:
        return key.startswith(self._work)

    def stamped(self, entry: Entry) -> bytes:
        return self._digest(entry, entry.stamp)

    def checked(self, entry: Entry, checksum: int) -> bytes:
        return self._digest(entry, f"{checksum:08x}")

    def _digest(self, entry: Entry, text: str) -> bytes:
        name = entry.key
        for folder, prefix in self._folders.items():
            if name.startswith(prefix):
                name = f"{folder}/{name.removeprefix(prefix)}"
        whole = f"{name}\0{entry.size}\0{text}".encode()
        return blake2b(whole, digest_size=_DIGEST_BYTES).digest()


class _Audit(Journal):
    """The records of a run, read again for what its tasks wrote."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.wrote: dict[_Task, Wrote] = {}

    def replay(self, record: Record) -> None:
        match record:
            case {"stage": stage, "index": index, "summary": {"wrote": wrote}}:
                self.wrote[stage, index] = Wrote(*wrote)


def undo_losses(plan: Plan, journal: Journal) -> int:
    """Take back what is recorded as done and is not there; return the number of tasks.

    Raises:
        StoreError: The store failed.
    """
    Target(plan).restore()
    lost = _find_losses(plan, journal)
    workspace = Workspace(plan)
    for volume in {plan.split_index(*task)[0] for task in lost}:
        tasks = [task for task in lost if plan.split_index(*task)[0] == volume]
        reads_work = any(not plan.stage(stage).level for stage, _ in tasks)
        if not plan.is_one_task and reads_work and not workspace.has_work(volume):
            # Of a finished volume, what its tasks read is not there any more.
            journal.undo([stage.name for stage in plan.stages], volume)
        else:
            journal.lose(tasks)
    return len(lost)


def _find_losses(plan: Plan, journal: Journal) -> list[_Task]:
    """Return the tasks that are done, and whose objects are not as they were written."""
    journal.flush()
    recorded = _Audit.read(plan).wrote
    tasks = [task for task in recorded if journal.done(task[0])[task[1]]]
    expected = {task: _expected(plan, journal, task, recorded[task]) for task in tasks}
    names = _Names(plan)
    entries = _list(plan, journal)
    listed = {names.stamped(entry) for _, entry in entries}
    missing = {}
    for task, digests in expected.items():
        of_task = [content for stamp, content in digests if stamp not in listed]
        if of_task:
            missing[task] = of_task
    if not missing:
        return []
    claimed = {stamp for digests in expected.values() for stamp, _ in digests}
    unclaimed = [
        (folder, entry) for folder, entry in entries if names.stamped(entry) not in claimed
    ]

    def check(place: tuple[Location, Entry]) -> bytes:
        folder, entry = place
        data = folder.get(entry.key.removeprefix(f"{folder.key}/"))
        return names.checked(entry, checksum_of(data or b""))

    found = set(map_threaded(check, unclaimed))
    return [task for task, contents in missing.items() if not found.issuperset(contents)]


def _expected(
    plan: Plan, journal: Journal, task: _Task, recorded: Wrote
) -> list[tuple[bytes, bytes]]:
    """Return the digests of what a task wrote, without what was removed since."""
    digests = list(_iter_digests(recorded.kept))
    volume, _ = plan.split_index(*task)
    if not journal.is_complete(volume):
        digests += _iter_digests(recorded.work)
    return digests


def _list(plan: Plan, journal: Journal) -> list[tuple[Location, Entry]]:
    """Return all objects that tasks may have written, with the folders where they are."""
    workspace = Workspace(plan)
    folders = [*workspace.target.arrays(), workspace.folder.sums]
    if not plan.is_one_task:
        volumes = range(len(plan.volumes))
        folders += [workspace.folder.work(v) for v in volumes if not journal.is_complete(v)]
    listings = map_threaded(Location.entries, folders)
    return [
        (folder, entry)
        for folder, entries in zip(folders, listings, strict=True)
        for entry in entries
        if PurePosixPath(entry.key).name not in METADATA
    ]
