"""What a run reads and others wrote, as listings show it: nothing of it may change meanwhile.

A volume that is read while its chunks are replaced is made of two sources. Cells of
the source are compared where they are read twice. For all else that is read, names, sizes
and times (or etags) of the chunks are listed before the tasks and after them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import DataError, SourceError, StoreError
from megaseg_dask.events import Failure
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.losses import others_of_groups
from megaseg_dask.run.tasks.worker import volume_name
from megaseg_dask.stores import METADATA, Location
from megaseg_dask.stores.failures import is_denied

_DIGEST_BYTES = 16
_OF_MEASUREMENTS = ("measurements", "table")


@dataclass(frozen=True, slots=True)
class Listed:
    """Of some chunks, a digest of their names and sizes, and one of their times (or etags)."""

    form: bytes
    stamp: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """What is listed of the chunks that each volume is made of; ``None`` where nobody can tell."""

    volumes: tuple[Listed | None, ...]

    @property
    def text(self) -> str:
        """Digests of all volumes together: of names and sizes, and of times; empty if unknown."""
        known = [listed for listed in self.volumes if listed is not None]
        if len(known) < len(self.volumes):
            return ""
        forms = hashlib.sha256(b"".join(listed.form for listed in known))
        stamps = hashlib.sha256(b"".join(listed.stamp for listed in known))
        return f"{forms.hexdigest()} {stamps.hexdigest()}"

    def changed(self, now: "Listing") -> list[int]:
        """Return the volumes that another listing shows otherwise."""
        pairs = enumerate(zip(self.volumes, now.volumes, strict=True))
        return [volume for volume, (old, new) in pairs if old and new and old != new]

    def completed(self, now: "Listing") -> "Listing":
        """Return this listing with what another one knows in addition."""
        pairs = zip(self.volumes, now.volumes, strict=True)
        return Listing(tuple(old or new for old, new in pairs))

    def refreshed(self, now: "Listing", volumes: Container[int]) -> "Listing":
        """Return this listing with some volumes as another one shows them."""
        pairs = enumerate(zip(self.volumes, now.volumes, strict=True))
        return Listing(tuple(new if volume in volumes else old for volume, (old, new) in pairs))


@dataclass(frozen=True, slots=True)
class _Read:
    """An array of others that a volume of the plan is made of."""

    volume: int
    array: Volume
    shape: Shape


def list_reads(plan: Plan, *, is_needed: bool) -> Listing:
    """Return a listing of all chunks that a run reads of other data: a request for 1000 of them.

    Unless it ``is_needed``, volumes of which it fails are not known. Nor are those whose store
    lists nothing, and those of which an array is gone: the tasks that read it name that.

    Raises:
        StoreError: The store failed.
    """
    by_array: dict[Location, list[_Read]] = defaultdict(list)
    for read in _iter_reads(plan):
        by_array[read.array.location].append(read)

    def look(array: Location) -> list[Listed] | None:
        try:
            return _look(array, by_array[array])
        except (DataError, SourceError, StoreError) as error:
            # Who may read a store may not always list it.
            if is_needed and isinstance(error, StoreError) and not is_denied(error):
                raise
            return None

    arrays = list(by_array)
    of_volumes: list[list[Listed | None]] = [[] for _ in plan.volumes]
    for array, looked in zip(arrays, map_threaded(look, arrays), strict=True):
        reads = by_array[array]
        for number, read in enumerate(reads):
            of_volumes[read.volume].append(looked[number] if looked is not None else None)
    return Listing(tuple(map(_together, of_volumes)))


def _together(parts: Sequence[Listed | None]) -> Listed | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    form = hashlib.blake2b(b"".join(part.form for part in known), digest_size=_DIGEST_BYTES)
    stamp = hashlib.blake2b(b"".join(part.stamp for part in known), digest_size=_DIGEST_BYTES)
    return Listed(form.digest(), stamp.digest())


def _iter_reads(plan: Plan) -> Iterator[_Read]:
    image = plan.source_image
    for volume, planned in enumerate(plan.volumes):
        place = plan.source / planned.image
        if plan.resolved.predicts():
            for level in sorted({0, plan.measure_level or 0}):
                for c in planned.channels:
                    array = Volume.of(place, image, level=level, t=planned.t, c=c)
                    yield _Read(volume, array, image.volume_shape(level))
        if plan.resolved.measures_objects():
            for c in plan.measured_channels(planned):
                array = Volume.of(place, image, t=planned.t, c=c)
                yield _Read(volume, array, image.volume_shape())
            regions = plan.images[planned.image].regions
            if regions is not None:
                yield _Read(volume, regions.volume(place, planned.t), image.volume_shape())
        mask = plan.images[planned.image].mask
        if mask is not None and not mask.is_data and plan.resolved.predicts():
            yield _Read(volume, mask.volume(place, planned.t), mask.shape)


def _look(array: Location, reads: Sequence[_Read]) -> list[Listed] | None:
    """Return what is listed of the chunks of each volume that an array is read for.

    It is ``None`` if that cannot be known.
    """
    if not array.is_listable:
        return None
    prefix = array.key
    if array.packed is not None:
        # Keys of a zip begin in the zip. Its directory, which was read before, may be another one.
        _, prefix = array.packed
        array.probe()
    listed = {entry.key.removeprefix(prefix).lstrip("/"): entry for entry in array.entries()}
    if listed.keys().isdisjoint(METADATA):
        return None
    found = []
    for read in reads:
        forms = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        stamps = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for key in read.array.iter_keys(Box.of(read.shape)):
            entry = listed.get(key)
            forms.update(f"{key}\0{entry.size if entry else 'absent'}\n".encode())
            stamps.update(f"{entry.stamp if entry else ''}\n".encode())
        found.append(Listed(forms.digest(), stamps.digest()))
    return found


# -- what follows from a change


def take_back_changed(
    plan: Plan, journal: Journal, before: Listing, after: Listing
) -> list[Failure]:
    """Take back what was made of chunks that changed in between, and return the reason.

    The next run reads them again. Of a volume whose tasks failed already, what was compared with
    what was measured stays.

    Raises:
        StoreError: The store failed.
    """
    failed = {plan.split_index(stage, index)[0] for stage, index in journal.failed}
    names = [stage.name for stage in plan.stages]
    is_compared = plan.measure_level == 0 and not plan.is_one_task
    not_compared = [name for name in names if name in _OF_MEASUREMENTS] if is_compared else names
    failures = []
    changed = before.changed(after)
    anew = [volume for volume in changed if volume not in failed]
    for volume in others_of_groups(plan, anew):
        # Their statistics are also those of what changed.
        journal.undo(names[1:], volume)
    for volume in changed:
        if volume in failed:
            # Their failures stay, to be told.
            journal.lose(_done_of(plan, journal, not_compared, volume))
            continue
        journal.undo(names, volume)
        failures.append(
            Failure(
                names[0],
                volume * plan.stages[0].per_volume,
                volume_name(plan.volumes[volume]),
                str(plan.region),
                f"{plan.source}: chunks that were read changed during the run (their names, sizes "
                "or times differ); run the same command again to read them again",
            )
        )
    return failures


def _done_of(
    plan: Plan, journal: Journal, stages: Iterable[str], volume: int
) -> Iterator[tuple[str, int]]:
    """Yield the finished tasks of some stages of a volume."""
    for name in stages:
        per_volume = plan.stage(name).per_volume
        for index in range(volume * per_volume, (volume + 1) * per_volume):
            if journal.done(name)[index]:
                yield name, index
