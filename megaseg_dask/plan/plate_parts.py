"""Parts of a request, one for each plan: an image, or fields of a plate that have one form.

A plate is done in parts, each by its own run in one target. A field stays in the part
in which it was planned. Fields of another form, and fields that are chosen or become
readable later, make new parts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import (
    DataError,
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate, select_fields
from megaseg_dask.plan.choice import Choice, choose
from megaseg_dask.plan.companion import Companion, find_companion
from megaseg_dask.plan.plan import Plan, iter_run_folders
from megaseg_dask.plan.resolved import where_of
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.where import PlannedMask, find_mask
from megaseg_dask.stores import Location
from megaseg_dask.stores.failures import is_of_object

# Reasons that a message lists.
_MAX_REASONS = 3


@dataclass(frozen=True, slots=True)
class Part:
    """An image, or fields of one form, of which the settings choose the same.

    ``run`` is the folder of its run, and ``fields`` are its images by their paths. ``recorded`` is
    the plan of an earlier run of this part, and ``others`` are the plans of other parts of the
    target.
    """

    run: Location
    fields: dict[str, "Readable"]
    plate: Plate | None = None
    recorded: Plan | None = None
    others: tuple[Plan, ...] = ()

    @property
    def first(self) -> "Readable":
        """The first of its images."""
        return next(iter(self.fields.values()))


@dataclass(frozen=True, slots=True)
class Readable:
    """An image that can be segmented, what the settings choose in it, its regions and its mask."""

    image: Image
    choice: Choice
    regions: Companion | None = None
    mask: PlannedMask | None = None

    @classmethod
    def at(
        cls, location: Location, settings: Settings, field: str = "", *, is_only: bool = True
    ) -> "Readable":
        """Read the metadata of an image, and its mask.

        ``field`` is its path in its plate, of which it ``is_only`` if no other field is chosen.

        Raises:
            SourceError: It cannot be read or segmented.
            SettingsError: It lacks what is chosen.
            DataError: Its mask cannot be read.
            StoreError: The store failed.
        """
        image = read_image(location)
        choice = choose(image, settings, location)
        segmented = image.from_level(settings.level)
        regions = None
        if settings.regions is not None:
            regions = find_companion(
                location,
                segmented,
                settings.regions,
                "--regions",
                field,
                is_only=is_only,
                is_unmarked=settings.unmarked,
            )
        mask = None
        where = where_of(settings)
        if where is not None:
            chosen = (choice.times, choice.channels)
            mask = find_mask(
                location,
                segmented,
                where,
                *chosen,
                field,
                is_only=is_only,
                is_unmarked=settings.unmarked,
            )
        return cls(image, choice, regions, mask)

    @property
    def form(self) -> "Readable":
        """What the fields of one part have in common: all but their names and places."""
        choice = self.choice
        levels = tuple(replace(level, translation=()) for level in self.image.levels)
        image = replace(self.image, name="", levels=levels, channel_names=(), translation=())
        # The name of an only channel changes nothing: no label image is named after it.
        names = choice.channel_names if len(choice.channels) > 1 else ()
        return Readable(image, replace(choice, channel_names=names))


def read_parts(
    source: Location, target: Location, settings: Settings, recorded: Sequence[Plan]
) -> list[Part]:
    """Return the parts of a request, those of ``recorded`` runs first; reads metadata alone.

    Raises:
        SourceError: The source cannot be read.
        SettingsError: What is chosen is not there.
        TargetError: Only some fields of a recorded part are chosen: a run is done as a whole.
        StoreError: The store failed.
    """
    if not is_plate(source):
        return [_read_image_part(source, target, settings, recorded)]
    fields = _read_fields(source, settings)
    runs = _Runs.of(recorded, fields, settings)
    for plan in runs.resumed:
        _require_all(plan, fields, target)
    folders = iter_run_folders(target, settings.label_name)
    parts = [*_resumed_parts(runs, fields, target), *_new_parts(runs, fields, folders)]
    # Fields that cannot be read are told by the last part, which stays unfinished until they can.
    *before, last = parts
    assert last.plate is not None
    return [*before, replace(last, plate=replace(last.plate, missing=fields.plate.missing))]


def _read_image_part(
    source: Location, target: Location, settings: Settings, recorded: Sequence[Plan]
) -> Part:
    readable = Readable.at(source, settings)
    if _chooses_fields(settings):
        raise SettingsError(
            f"{source} is not a plate; --wells, --fields and --acquisition are only for plates"
        )
    run = next(iter_run_folders(target, settings.label_name))
    earlier = None if settings.overwrite else next(iter(recorded), None)
    return Part(run, {"": readable}, recorded=earlier)


def _chooses_fields(settings: Settings) -> bool:
    return bool(settings.wells or settings.fields) or settings.acquisition is not None


# -- the fields


@dataclass(frozen=True, slots=True)
class _Fields:
    """The chosen fields of a plate by their paths: those that can be segmented, and the others."""

    source: Location
    plate: Plate
    readable: dict[str, Readable]
    refused: dict[str, MegasegError]

    def of_plan(self, plan: Plan) -> list[str]:
        """Return the paths of a run's fields.

        A run on an image, where a plate is now, takes the place of all fields.
        """
        if plan.plate is None:
            return list(self.readable)
        return [field.path for field in plan.plate.fields]

    def part(
        self,
        run: Location,
        paths: Sequence[str],
        recorded: Plan | None,
        others: tuple[Plan, ...],
    ) -> Part:
        """Return the part of some fields, in this order."""
        fields = {field.path: field for field in self.plate.fields}
        plate = replace(self.plate, fields=tuple(fields[path] for path in paths), missing=())
        readable = {path: self.readable[path] for path in paths}
        return Part(run, readable, plate, recorded, others)


def _read_fields(source: Location, settings: Settings) -> _Fields:
    plate = select_fields(
        read_plate(source),
        wells=settings.wells,
        fields=settings.fields,
        acquisition=settings.acquisition,
    )
    if not plate.fields:
        listed = "; ".join(f"{path}: {reason}" for path, reason in plate.missing[:_MAX_REASONS])
        raise SourceError(f"{source} has no field that can be read ({listed})")
    readable: dict[str, Readable] = {}
    refused: dict[str, MegasegError] = {}
    is_only = len(plate.fields) == 1
    results = map_threaded(
        lambda field: _try_field(source, field.path, settings, is_only=is_only), plate.fields
    )
    for field, result in zip(plate.fields, results, strict=True):
        if isinstance(result, Readable):
            readable[field.path] = result
        else:
            refused[field.path] = result
    if not readable:
        raise first_refusal(refused.values())
    unread = [(path, str(error)) for path, error in refused.items()]
    return _Fields(source, replace(plate, missing=(*plate.missing, *unread)), readable, refused)


def _try_field(
    source: Location, path: str, settings: Settings, *, is_only: bool
) -> Readable | MegasegError:
    location = source / path
    try:
        return Readable.at(location, settings, path, is_only=is_only)
    except StoreError as error:
        if not is_of_object(location.url, error):
            raise
        return error
    except (SettingsError, SourceError, DataError) as error:
        return error


def first_refusal(errors: Iterable[MegasegError]) -> MegasegError:
    """Return the error to raise where nothing can be done: a wrong request before damaged data."""
    return min(errors, key=lambda error: not isinstance(error, SettingsError))


# -- the runs of a target


@dataclass(frozen=True, slots=True)
class _Runs:
    """The recorded runs of a target, by what becomes of them.

    ``resumed`` are the runs of the chosen fields, ``others`` those of other fields, and
    ``staying`` those of the chosen fields that stay: resumed ones, and overwritten ones of which
    only some fields are chosen.
    """

    resumed: tuple[Plan, ...]
    others: tuple[Plan, ...]
    staying: tuple[Plan, ...]

    @classmethod
    def of(cls, recorded: Sequence[Plan], fields: _Fields, settings: Settings) -> "_Runs":
        chosen = []
        others = []
        for plan in recorded:
            if fields.readable.keys().isdisjoint(fields.of_plan(plan)):
                others.append(plan)
            else:
                chosen.append(plan)
        if not settings.overwrite:
            return cls(tuple(chosen), tuple(others), tuple(chosen))
        staying = []
        if _chooses_fields(settings):
            staying = [p for p in chosen if set(fields.of_plan(p)) - fields.readable.keys()]
        return cls((), tuple(others), tuple(staying))


def _resumed_parts(runs: _Runs, fields: _Fields, target: Location) -> Iterator[Part]:
    for plan in runs.resumed:
        paths = fields.of_plan(plan)
        _require_one_form(paths, fields, target)
        yield fields.part(plan.run, paths, plan, runs.others)


def _new_parts(runs: _Runs, fields: _Fields, folders: Iterator[Location]) -> Iterator[Part]:
    """Yield a part for each form of the fields that no run has."""
    begun = set(chain.from_iterable(map(fields.of_plan, runs.resumed)))
    by_form: dict[Readable, list[str]] = {}
    for path, readable in fields.readable.items():
        if path not in begun:
            by_form.setdefault(readable.form, []).append(path)
    taken = {plan.run for plan in (*runs.resumed, *runs.others)}
    free = (folder for folder in folders if folder not in taken)
    beside = (*runs.others, *runs.staying)
    for paths in by_form.values():
        yield fields.part(next(free), paths, None, beside)


def _require_one_form(paths: Sequence[str], fields: _Fields, target: Location) -> None:
    form = fields.readable[paths[0]].form
    for path in paths:
        if fields.readable[path].form != form:
            raise TargetError(
                f"{fields.source}: field {path} has another shape, voxel size, dtype or order of "
                f"channels than when the run at {target} began; choose another target, or replace "
                "it with --overwrite"
            )


def _require_all(plan: Plan, fields: _Fields, target: Location) -> None:
    """Raise :class:`TargetError` if a field of a run is not chosen, or cannot be read now.

    A store that failed is raised as it is: the same command goes on.
    """
    paths = fields.of_plan(plan)
    absent = next((path for path in paths if path not in fields.readable), None)
    if absent is None:
        return
    error = fields.refused.get(absent)
    if isinstance(error, StoreError):
        raise error
    reason = _reason_of(absent, fields.plate)
    told = f"cannot be read now ({reason})" if reason else "is not chosen"
    raise TargetError(
        f"{target} belongs to a run on {len(paths)} fields, and {absent} {told}; choose all of "
        "them with --wells and --fields, choose another target, or replace it with --overwrite"
    )


def _reason_of(field: str, plate: Plate) -> str | None:
    """Return why a field, or its well, cannot be read."""
    for path, reason in plate.missing:
        if field == path or field.startswith(f"{path}/"):
            return reason
    return None
