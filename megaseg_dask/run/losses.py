"""What is ours is written whole and recorded; what is absent, short or replaced by now is a loss.

Each task records the objects that it wrote. Before a run goes on, and before
anything is published, listings are compared with that, and the tasks whose
objects differ run again. They write what they wrote before, so nothing that was
computed from it has to be done again: a task that needs what is lost fails.
"""

from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import PurePosixPath
from typing import Protocol

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.journal import Journal, Record
from megaseg_dask.run.state import Wrote
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import METADATA, Entry, Location, Note, checksum_of
from megaseg_dask.stores.failures import is_denied

# Of an object, a digest of its name, size and stamp, and one of its name, size and bytes: a stamp
# differs also in a copy, or if a task that was given up ends after all.
_DIGEST_BYTES = 6
_Task = tuple[str, int]
# An object and the folder where it is.
_Listed = tuple[Location, Entry]


class Recorded(Protocol):
    """The plan of a run, or of an import."""

    @property
    def run(self) -> Location:
        """Where it is recorded."""
        ...

    @property
    def target(self) -> Location:
        """Where it writes."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells it from other plans."""
        ...


def wrote(plan: Recorded, notes: Mapping[str, Note]) -> Wrote:
    """Return the record of what a task wrote: what stays, and intermediate data."""
    names = _Names(plan)
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

    def __init__(self, plan: Recorded) -> None:
        self._folders = {"run": f"{plan.run.key}/", "target": f"{plan.target.key}/"}
        self._work = f"{RunFolder(plan.run).all_work.key}/"

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

    @cached_property
    def wrote(self) -> dict[_Task, Wrote]:
        """What each task wrote last."""
        return {}

    def replay(self, record: Record) -> None:
        match record:
            case {"stage": stage, "index": index, "summary": {"wrote": wrote}}:
                self.wrote[stage, index] = Wrote(*wrote)


def find_lost_tasks(plan: Plan, journal: Journal) -> list[tuple[str, int]]:
    """Return the tasks of a finished run of which something is lost that they wrote.

    Raises:
        StoreError: The store failed.
    """
    volumes = range(len(plan.volumes))
    return _find_losses(plan, journal, _list(plan, volumes), volumes)


def find_lost_volumes(plan: Plan, journal: Journal) -> set[int]:
    """Return the finished volumes, of a run that may have failed, that lack what they wrote.

    Raises:
        StoreError: The store failed.
    """
    finished = {volume for volume in range(len(plan.volumes)) if journal.is_complete(volume)}
    lost = _find_losses(plan, journal, _list(plan, finished), finished)
    return {plan.split_index(*task)[0] for task in lost}


def undo_losses(plan: Plan, journal: Journal) -> int:
    """Take back what is recorded as done, and is not there or was made of other chunks.

    Returns the number of tasks that are lost, and of volumes whose source is another.

    Raises:
        StoreError: The store failed.
    """
    Target(plan).restore()
    changed = _find_changed(plan, journal)
    for volume in changed:
        journal.undo([stage.name for stage in plan.stages], volume)
    for volume in others_of_groups(plan, changed):
        journal.undo([stage.name for stage in plan.stages[1:]], volume)
    finished = {volume for volume in range(len(plan.volumes)) if journal.is_complete(volume)}
    lost = _find_losses(plan, journal, _list(plan, finished), finished)
    harmed = {plan.split_index(*task)[0] for task in lost}
    if not plan.is_one_task and not harmed.isdisjoint(finished):
        # What tasks of finished volumes read was removed, and is needed again.
        finished -= harmed
        lost = _find_losses(plan, journal, _list(plan, finished), finished)
    levels = {(plan.split_index(stage, i)[0], plan.stage(stage).level) for stage, i in lost}
    for volume, level in levels:
        if level:
            # Coarser levels may have been computed after the loss.
            journal.undo([stage.name for stage in plan.stages if stage.level > level], volume)
    journal.lose(lost)
    return len(lost) + len(changed)


def others_of_groups(plan: Plan, changed: Collection[int]) -> list[int]:
    """Return the volumes whose normalization is also that of volumes that changed."""
    if not plan.resolved.pools_statistics():
        return []
    groups = {plan.group_of(volume) for volume in changed}
    members = chain.from_iterable(plan.groups[group] for group in groups)
    return sorted(set(members) - set(changed))


def _find_changed(plan: Plan, journal: Journal) -> list[int]:
    """Return the volumes of which chunks of the source were absent, and other ones are by now."""
    counted: dict[str, list[_Absence]] = defaultdict(list)
    for absence in _iter_absences(plan, journal):
        counted[plan.volumes[absence.volume].image].append(absence)

    def changed_in(image: str) -> set[int]:
        place = plan.source / image
        try:
            listed = set((place / plan.source_image.levels[0].path).keys(""))
        except StoreError as error:
            # Who may read a store may not always list it.
            if is_denied(error):
                return set()
            raise
        # Chunks of an array that is gone may have been removed before it was read.
        is_there = not listed.isdisjoint(METADATA)
        changed = set()
        for absence in counted[image]:
            t = plan.volumes[absence.volume].t
            channels = [Volume.of(place, plan.source_image, t=t, c=c) for c in absence.channels]
            n_absent = sum(channel.count_unlisted(absence.box, listed) for channel in channels)
            if not is_there or absence.n_absent != n_absent:
                changed.add(absence.volume)
        return changed

    # A web server lists nothing.
    images: Collection[str] = counted if plan.source.is_listable else ()
    return sorted(chain.from_iterable(map_threaded(changed_in, images)))


@dataclass(frozen=True, slots=True)
class _Absence:
    """How many chunks of some channels of a volume were absent in a box when they were read."""

    volume: int
    channels: Collection[int]
    box: Box
    n_absent: int


def _iter_absences(plan: Plan, journal: Journal) -> Iterator[_Absence]:
    """Yield what was absent where all was read: what is segmented, and what is only measured."""
    box = plan.region
    if plan.measure_level == 0:
        box = Box.of(plan.source_image.volume_shape())
    names = [stage.name for stage in plan.stages]
    for name in names[:2]:
        for volume, planned in enumerate(plan.volumes):
            n_absent = sum(told.absent for told in journal.summaries(name, volume))
            if n_absent and journal.is_stage_complete(name, volume):
                yield _Absence(volume, planned.channels, box, n_absent)
    if not plan.resolved.measures_objects():
        return
    name = names[0] if plan.is_one_task else "measurements"
    for volume in range(len(plan.volumes)):
        output, *_ = plan.outputs_of(volume)
        told = journal.summaries(name, volume)
        n_absent = sum(summary.absent_measured.objects for summary in told)
        if n_absent and journal.is_stage_complete(name, volume):
            channels = plan.counted_when_measured(output).values()
            yield _Absence(volume, channels, plan.region, n_absent)


def _find_losses(
    plan: Plan, journal: Journal, entries: Iterable[_Listed], finished: Collection[int]
) -> list[_Task]:
    """Return the tasks that are done, and whose objects are not listed as they were written.

    Intermediate data of ``finished`` volumes are not needed any more.
    """
    journal.flush()
    expected: dict[_Task, list[tuple[bytes, bytes]]] = {}
    for (stage, index), recorded in _Audit.read(plan).wrote.items():
        if journal.done(stage)[index]:
            digests = list(_iter_digests(recorded.kept))
            if plan.split_index(stage, index)[0] not in finished:
                digests += _iter_digests(recorded.work)
            expected[stage, index] = digests
    return _not_as_written(plan, expected, entries)


def find_lost(plan: Recorded, journal: Journal, images: Sequence[Location]) -> list[_Task]:
    """Return the tasks of an import that are done, and whose objects are not as they were written.

    Raises:
        StoreError: The store failed.
    """
    audit = _Audit(plan.run, plan.fingerprint, journal.stages).replayed()
    expected = {
        (stage, index): list(_iter_digests(recorded.kept))
        for (stage, index), recorded in audit.wrote.items()
        if journal.done(stage)[index]
    }
    return _not_as_written(plan, expected, _list_folders(images))


def _not_as_written(
    plan: Recorded, expected: Mapping[_Task, list[tuple[bytes, bytes]]], entries: Iterable[_Listed]
) -> list[_Task]:
    """Return the tasks of which an object is not listed; one that was copied is read."""
    names = _Names(plan)
    listed = {names.stamped(entry): (folder, entry) for folder, entry in entries}
    missing = {}
    for task, digests in expected.items():
        of_task = [content for stamp, content in digests if stamp not in listed]
        if of_task:
            missing[task] = of_task
    if not missing:
        return []
    claimed = {stamp for digests in expected.values() for stamp, _ in digests}
    unclaimed = [
        place
        for stamp, place in listed.items()
        if stamp not in claimed and PurePosixPath(place[1].key).name not in METADATA
    ]

    def check(place: _Listed) -> bytes:
        folder, entry = place
        data = folder.get(entry.key.removeprefix(f"{folder.key}/"))
        return names.checked(entry, checksum_of(data or b""))

    found = set(map_threaded(check, unclaimed))
    return [task for task, contents in missing.items() if not found.issuperset(contents)]


def _list(plan: Plan, finished: Collection[int]) -> list[_Listed]:
    """Return all objects that a run may have written, with the folders where they are."""
    run = RunFolder(plan.run)
    target = Target(plan)
    if target.is_in_place:
        folders = [group.location for group in target.iter_groups()]
    else:
        folders = [image.location for image in target.images]
    folders += [run.sums, run.kept]
    if not plan.is_one_task:
        folders += [run.work(v) for v in range(len(plan.volumes)) if v not in finished]
    return _list_folders(folders)


def _list_folders(folders: Sequence[Location]) -> list[_Listed]:
    listings = map_threaded(Location.entries, folders)
    listed: list[_Listed] = []
    for folder, entries in zip(folders, listings, strict=True):
        listed += [(folder, entry) for entry in entries]
    return listed
