"""A source that is still written: which timepoints and fields of it are there.

A timepoint is there when all its chunks of the level that is segmented are, or when it
has begun and the writer is at a later one. Timepoints are taken in their order, so those of
an image that are done are its first ones. No clock of another machine is believed: that a chunk
did not change for a while is what this process saw.
"""

import hashlib
import posixpath
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import (
    DataError,
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate, select_fields
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan, iter_run_folders
from megaseg_dask.plan.plate_parts import Part, Readable
from megaseg_dask.plan.resolved import OfGroup, OfLevel, normalization_of
from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import Entry, Location, clear_array_cache
from megaseg_dask.stores.failures import is_of_object

# How long a chunk must not have changed where nobody says: files may be seen before they are
# whole, and what holds several timepoints, or is a shard on a disk, is filled bit by bit.
_SETTLE_ON_DISK_S = 1.0
_SETTLE_SHARED_S = 10.0
# A writer that adds one timepoint after the other is at most this many ahead of its chunks.
_MAX_AHEAD_OF_APPENDER = 1


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a source has at a moment.

    ``fields`` are the images that can be read, by their paths, in the order of the plate; the path
    is ``""`` in no plate. ``n_there`` and ``n_begun`` are how many of their chosen timepoints are
    complete, and have a chunk; ``n_announced`` how many their metadata have.
    """

    plate: Plate | None
    fields: dict[str, Readable]
    n_there: dict[str, int]
    n_begun: dict[str, int]
    n_announced: dict[str, int]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def total_there(self) -> int:
        """Timepoints of all fields that are complete."""
        return sum(self.n_there.values())

    @property
    def total_announced(self) -> int:
        """Timepoints of all fields that the metadata have."""
        return sum(self.n_announced.values())

    @property
    def is_complete(self) -> bool:
        """Whether all that the metadata have is there."""
        return not self.missing and self.n_there == self.n_announced

    @property
    def extents(self) -> dict[str, int]:
        """How much the metadata list: wells of the plate, fields of each well, timepoints."""
        listed = dict(self.n_announced)
        if self.plate is not None:
            listed["plate"] = len(self.plate.wells)
            for place in self.plate.fields:
                well = f"well {place.well}"
                listed[well] = listed.get(well, 0) + 1
        return listed

    @property
    def is_ahead(self) -> bool:
        """Whether the metadata list more than a writer would that adds one after the other."""
        n_absent = self.total_announced - sum(self.n_begun.values()) + len(self.missing)
        return n_absent > _MAX_AHEAD_OF_APPENDER


def require_followable(source: Location, target: Location, settings: Settings) -> None:
    """Check that a source can be followed with these settings.

    Raises:
        SettingsError: It cannot.
    """
    refused: list[tuple[bool, str]] = [
        (
            isinstance(normalization_of(settings), OfGroup),
            f"--normalization {settings.normalization} needs all volumes of its group, and "
            "--follow begins before they are there; use --normalization MEAN,STD or level:N, or "
            "run without --follow when the source is finished",
        ),
        (
            settings.where is not None,
            "--where needs the finished source; leave it or --follow out",
        ),
        (
            settings.regions is not None,
            "--regions needs the finished source; leave it or --follow out",
        ),
        (
            source.is_same(target),
            "--follow needs another TARGET than SOURCE: two programs would change the metadata of "
            "the source at once",
        ),
        (
            source.packed is not None or not source.is_listable,
            f"--follow: {source} is a zip or on a web server, where no new chunks can be listed; "
            "give the folder or the bucket that is written",
        ),
    ]
    for is_refused, reason in refused:
        if is_refused:
            raise SettingsError(reason)


class Watcher:
    """Looks at a source again and again."""

    def __init__(
        self,
        source: Location,
        settings: Settings,
        known: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look at nothing yet; ``known`` are the timepoints of each field that were taken before.

        Those are not looked at again.
        """
        self._source = source
        self._settings = settings
        self._known = dict(known)
        self._clock = clock
        # Of what is not taken yet, a digest of its chunks, and since when it is that.
        self._seen: dict[tuple[str, int], tuple[str, float]] = {}
        # Fields without timepoints that are there do not change any more.
        self._finished: dict[str, Readable] = {}
        self._extents: dict[str, int] = {}
        # What was seen to happen in the source, as a number that changes.
        self.n_changes = 0
        # Whether the metadata tell when the source is complete.
        self.is_announced = False
        self._has_grown = False

    def read(self) -> Arrived:
        """Read the metadata alone, and take all that they have as there.

        Raises:
            SourceError: The source cannot be read.
            SettingsError: What is chosen is not there.
            StoreError: The store failed.
        """
        plate, fields, missing = self._read_fields()
        announced = {}
        for path, readable in fields.items():
            first, stop = readable.choice.times
            announced[path] = stop - first
        return Arrived(plate, fields, announced, announced, announced, missing)

    def look(self) -> Arrived:
        """Look at the metadata, and at the chunks of what was not there before.

        Raises:
            SourceError: The source cannot be read, or not yet.
            SettingsError: What is chosen is not there, or not yet.
            StoreError: The store failed.
        """
        # The writer may have changed them.
        clear_array_cache()
        plate, fields, missing = self._read_fields()
        scans = map_threaded(self._scan, fields.items())
        there: dict[str, int] = {}
        begun: dict[str, int] = {}
        announced: dict[str, int] = {}
        for (path, readable), (n_there, n_begun) in zip(fields.items(), scans, strict=True):
            first, stop = readable.choice.times
            there[path] = n_there
            begun[path] = n_begun
            announced[path] = stop - first
            if n_there and "t" not in readable.image.axis_names:
                self._finished[path] = readable
        arrived = Arrived(plate, fields, there, begun, announced, missing)
        self._compare(arrived)
        return arrived

    def _compare(self, arrived: Arrived) -> None:
        """Learn from what the metadata list, now and before."""
        extents = arrived.extents
        if not self._extents:
            self.is_announced = self.is_announced or arrived.is_ahead
        elif any(extents.get(name, 0) > n for name, n in self._extents.items()):
            self._has_grown = True
        if extents != self._extents:
            self.n_changes += 1
        self._extents = extents
        self._known |= arrived.n_there

    def _n_known(self, path: str) -> int:
        return self._known.get(path, 0)

    def is_over(self, arrived: Arrived) -> bool:
        """Return whether nothing more is to come, as far as the metadata or ``--time`` tell."""
        if not arrived.is_complete:
            return False
        first, stop = self._settings.time or (0, None)
        if stop is not None and arrived.plate is None:
            return arrived.total_there == stop - first
        return self.knows_the_end

    @property
    def knows_the_end(self) -> bool:
        """Whether the metadata listed more than there was at the first look, and did not grow."""
        return self.is_announced and not self._has_grown

    @property
    def source(self) -> Location:
        """The image or plate that is looked at."""
        return self._source

    # -- metadata

    def _read_fields(self) -> tuple[Plate | None, dict[str, Readable], dict[str, str]]:
        if not is_plate(self._source):
            return None, {"": Readable.at(self._source, self._settings)}, {}
        plate = self._read_plate()
        results = map_threaded(lambda each: self._read_field(each.path), plate.fields)
        fields: dict[str, Readable] = {}
        missing = dict(plate.missing)
        for place, result in zip(plate.fields, results, strict=True):
            if isinstance(result, Readable):
                fields[place.path] = result
            else:
                missing[place.path] = str(result)
        refused = [result for result in results if isinstance(result, SettingsError)]
        if refused and not fields:
            raise refused[0]
        return plate, fields, missing

    def _read_plate(self) -> Plate:
        settings = self._settings
        plate = read_plate(self._source)
        try:
            return select_fields(
                plate,
                wells=settings.wells,
                fields=settings.fields,
                acquisition=settings.acquisition,
            )
        except SettingsError as error:
            if not settings.follow:
                raise
            # A plate that is written may list them later.
            raise SourceError(str(error)) from error

    def _read_field(self, path: str) -> Readable | MegasegError:
        if path in self._finished:
            return self._finished[path]
        location = self._source / path
        try:
            return Readable.at(location, self._settings, path)
        except StoreError as error:
            if not is_of_object(location.url, error):
                raise
            return error
        except (SettingsError, SourceError, DataError) as error:
            return error

    # -- chunks

    def _scan(self, item: tuple[str, Readable]) -> tuple[int, int]:
        """Return how many timepoints of a field are there, and how many have begun."""
        path, readable = item
        first, stop = readable.choice.times
        n_there = min(self._n_known(path), stop - first)
        if path in self._finished or first + n_there == stop:
            return n_there, n_there
        chunks = _Chunks(self._source / path, readable, self._settings)
        while first + n_there < stop and self._is_there(path, chunks, first + n_there, stop):
            n_there += 1
        n_begun = n_there
        while first + n_begun < stop and chunks.present(first + n_begun):
            n_begun += 1
        return n_there, n_begun

    def _is_there(self, path: str, chunks: "_Chunks", t: int, stop: int) -> bool:
        present = chunks.present(t)
        is_settled = self._is_settled(path, t, present, chunks)
        if not present:
            return False
        is_whole = len(present) == chunks.count(t)
        may_lack = self._settings.missing_chunks == "fill"
        if self._settings.settle:
            return is_settled and (is_whole or may_lack)
        later = chunks.first_after(t)
        if later < stop and chunks.present(later):
            return is_whole or may_lack
        return is_whole and is_settled

    def _is_settled(self, path: str, t: int, present: Sequence[Entry], chunks: "_Chunks") -> bool:
        """Return whether this process saw no change of a timepoint for long enough."""
        listed = sorted(f"{entry.key}\0{entry.size}\0{entry.stamp}" for entry in present)
        digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        now_s = self._clock()
        before, since_s = self._seen.get((path, t), ("", now_s))
        if digest != before:
            since_s = now_s
            if present:
                self.n_changes += 1
        self._seen[path, t] = (digest, since_s)
        settle_s = self._settings.settle
        if settle_s is None:
            settle_s = chunks.settle_s
        return now_s - since_s >= settle_s


class _Chunks:
    """The chunks of the timepoints of one image, in all channels and levels that are read."""

    def __init__(self, location: Location, readable: Readable, settings: Settings) -> None:
        choice = readable.choice
        self._channels = dict.fromkeys((*choice.channels, *choice.measured))
        self._location = location
        image = readable.image.from_level(settings.level)
        self._levels: list[tuple[Image, int]] = [(image, 0)]
        match normalization_of(settings):
            case OfLevel(level) if level != settings.level:
                self._levels.append((image, level - settings.level))
        self._listings: dict[str, dict[str, Entry]] = {}
        self._is_on_disk = location.is_local
        first = Volume.of(location, image)
        self._n_together = first.n_times_together
        self._is_filled_bit_by_bit = self._n_together > 1 or (self._is_on_disk and first.is_sharded)

    @property
    def settle_s(self) -> float:
        """How long a timepoint must not have changed, if nobody says."""
        if self._is_filled_bit_by_bit:
            return _SETTLE_SHARED_S
        return _SETTLE_ON_DISK_S if self._is_on_disk else 0.0

    def first_after(self, t: int) -> int:
        """Return the first timepoint that shares no stored object with ``t``."""
        return (t // self._n_together + 1) * self._n_together

    def count(self, t: int) -> int:
        """Return how many stored objects a timepoint has when it is whole."""
        return sum(len(self._keys(image, level, t)) for image, level in self._levels)

    def present(self, t: int) -> list[Entry]:
        """Return those that exist, from one listing of the folder that they share."""
        found = []
        for image, level in self._levels:
            array = self._location / image.levels[level].path
            keys = self._keys(image, level, t)
            folders = [posixpath.dirname(key) for key in keys]
            listing = self._listing(array, posixpath.commonpath(folders))
            names = [f"{array.key}/{key}" for key in keys]
            found += [listing[name] for name in names if name in listing]
        return found

    def _keys(self, image: Image, level: int, t: int) -> list[str]:
        """Return the keys of the stored objects of a timepoint in the array of one level."""
        box = Box.of(image.volume_shape(level))
        keys: list[str] = []
        for channel in self._channels:
            volume = Volume.of(self._location, image, level=level, t=t, c=channel)
            keys += volume.iter_keys(box)
        # Channels may share one.
        return list(dict.fromkeys(keys))

    def _listing(self, array: Location, folder: str) -> dict[str, Entry]:
        where = array / folder if folder else array
        if where.url not in self._listings:
            self._listings[where.url] = {entry.key: entry for entry in where.entries()}
        return self._listings[where.url]


# -- plans that grow


def with_new_volumes(
    plan: Plan, recorded: Plan | None, n_taken: Mapping[str, int], *, is_announced: bool
) -> Plan:
    """Return the plan of a part with the volumes that were taken: earlier ones first.

    Raises:
        SourceError: The source lacks a volume that was there.
    """
    earlier = recorded.volumes if recorded else ()
    lacking = set(earlier) - set(plan.volumes)
    if lacking:
        first = min(lacking, key=lambda volume: (volume.image, volume.t))
        raise SourceError(
            f"{plan.source / first.image} lacks timepoint {first.t}, which {plan.target} "
            "contains; restore it, or choose another target"
        )
    known = set(earlier)
    new = [
        volume
        for volume in plan.volumes
        if volume not in known and volume.target_t < n_taken[volume.image]
    ]
    began_as = recorded.began_as if recorded else plan.fingerprint
    return plan.followed((*earlier, *new), began_as, is_announced=is_announced)


def followed_parts(
    arrived: Arrived,
    n_taken: Mapping[str, int],
    target: Location,
    label_name: str,
    recorded: Sequence[Plan],
    *,
    names_missing: bool,
) -> list[Part]:
    """Return the parts of a request about a source that is written, those of ``recorded`` first.

    A part has all fields of one form, whatever number of timepoints they have by now. What cannot
    be read is told by the last part if ``names_missing``.

    Raises:
        TargetError: A recorded run did not follow, or its fields have several forms by now.
        SourceError: A field of a recorded run cannot be read now, or nothing is taken.
    """
    forms = {path: growing_form(field) for path, field in arrived.fields.items()}
    free = {path for path, n_times in n_taken.items() if n_times}
    groups: list[tuple[Location, Plan | None, set[str]]] = []
    for plan in recorded:
        own = set(plan.images)
        _require_going_on(plan, own, arrived, forms)
        groups.append((plan.run, plan, own))
        free -= own
    for _, _, own in groups:
        form = forms[next(iter(own))]
        more = {path for path in free if forms[path] == form}
        own |= more
        free -= more
    taken = {plan.run for plan in recorded}
    folders = (each for each in iter_run_folders(target, label_name) if each not in taken)
    # In the order of the plate.
    for path in forms:
        if path in free:
            alike = {other for other in free if forms[other] == forms[path]}
            groups.append((next(folders), None, alike))
            free -= alike
    if not groups:
        raise SourceError("no timepoint is there yet")
    parts = []
    for run, earlier, paths in groups:
        others = () if earlier else tuple(recorded)
        parts.append(_part(arrived, n_taken, run, paths, earlier, others))
    if names_missing and arrived.missing:
        *before, last = parts
        assert last.plate is not None
        plate = replace(last.plate, missing=tuple(arrived.missing.items()))
        parts = [*before, replace(last, plate=plate)]
    return parts


def _require_going_on(
    plan: Plan, own: set[str], arrived: Arrived, forms: Mapping[str, Readable]
) -> None:
    """Check that a recorded run can go on with what has arrived."""
    if not plan.grows:
        raise TargetError(
            f"{plan.target} belongs to a run without --follow; choose another target, or start "
            "again with --overwrite"
        )
    lost = sorted(own - arrived.fields.keys())
    if lost:
        reason = arrived.missing.get(lost[0], "it is not there, or not chosen")
        raise SourceError(f"{lost[0] or plan.source} cannot be read now: {reason}")
    if len({forms[path] for path in own}) > 1:
        raise TargetError(
            f"{plan.source}: fields of the run at {plan.target} now have different shapes, voxel "
            "sizes, dtypes or orders of channels; choose another target, or replace it with "
            "--overwrite"
        )


def _part(
    arrived: Arrived,
    n_taken: Mapping[str, int],
    run: Location,
    paths: set[str],
    recorded: Plan | None,
    others: tuple[Plan, ...],
) -> Part:
    n_times = max(n_taken.get(path, 0) for path in paths)
    fields = {
        path: with_times(field, n_times) for path, field in arrived.fields.items() if path in paths
    }
    plate = arrived.plate
    if plate is not None:
        listed = tuple(field for field in plate.fields if field.path in paths)
        plate = replace(plate, fields=listed, missing=())
    return Part(run, fields, plate, recorded, others)


def taken_of(plans: Sequence[Plan]) -> dict[str, int]:
    """Return how many timepoints of each image some plans have."""
    return {path: plan.n_times_of(path) for plan in plans for path in plan.images}


def with_times(readable: Readable, n_times: int) -> Readable:
    """Return an image of which the first of the chosen timepoints are chosen."""
    first, _ = readable.choice.times
    return replace(readable, choice=replace(readable.choice, times=(first, first + n_times)))


def growing_form(readable: Readable) -> Readable:
    """Return what fields of one part have in common, whatever number of timepoints they have."""
    at_begin = replace(readable, image=readable.image.with_times(0, 1))
    return with_times(at_begin, 1).form
