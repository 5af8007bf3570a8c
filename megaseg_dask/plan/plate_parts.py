"""What each plan is about: an image, or those fields of a plate that are of one form and were planned together.

A plate is done in parts, each by a run of its own in one target. A field stays in
the part in which it was planned; fields of another form, and those that are chosen
or can be read only later, make new parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate, select_fields
from megaseg_dask.plan.plan import Plan, iter_run_folders
from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import Location


@dataclass(frozen=True, slots=True)
class Part:
    """An image, or fields of one form, whose image is what they have in common.

    ``run`` is where its plan is recorded, or will be; ``recorded`` that of an
    earlier run of this part; ``others`` those of other parts of the target.
    """

    run: Location
    image: Image
    plate: Plate | None = None
    recorded: Plan | None = None
    others: tuple[Plan, ...] = ()


def read_parts(
    source: Location, target: Location, settings: Settings, recorded: Sequence[Plan]
) -> list[Part]:
    """Return the parts of what is asked for, those that ``recorded`` holds first; reads metadata alone.

    Raises :class:`SourceError` and :class:`SettingsError`, and :class:`TargetError` if only some fields of a
    recorded part are asked for: a run is done as a whole.
    """
    folders = iter_run_folders(target, settings.label_name)
    if not is_plate(source):
        image = read_image(source)
        if _is_choice(settings):
            raise SettingsError(
                f"{source} is no plate: --wells, --fields and --acquisition choose among its images"
            )
        earlier = None if settings.overwrite else next(iter(recorded), None)
        return [Part(next(folders), image, recorded=earlier)]
    plate, images = _read_fields(source, settings)
    # A run on an image stands for all that its target holds.
    known = {
        plan.run: [f.path for f in plan.plate.fields] if plan.plate else list(images)
        for plan in recorded
    }
    mine = [plan for plan in recorded if not images.keys().isdisjoint(known[plan.run])]
    others = tuple(plan for plan in recorded if plan not in mine)
    chosen: list[tuple[Location, list[str], Plan | None]] = []
    if not settings.overwrite:
        for plan in mine:
            _require_all(known[plan.run], images, plate, target)
            chosen.append((plan.run, known[plan.run], plan))
    begun = {path for _, paths, _ in chosen for path in paths}
    forms: dict[Image, list[str]] = {}
    for path in images:
        if path not in begun:
            forms.setdefault(_form(images[path]), []).append(path)
    taken = {plan.run for plan in (others if settings.overwrite else recorded)}
    free = (folder for folder in folders if folder not in taken)
    chosen += [(next(free), paths, None) for paths in forms.values()]
    fields = {field.path: field for field in plate.fields}
    # What is made anew replaces a run as a whole, unless only some of its fields are chosen: then the others stay.
    staying = [
        p
        for p in mine
        if not settings.overwrite or (_is_choice(settings) and set(known[p.run]) - images.keys())
    ]
    parts = []
    for number, (run, paths, earlier) in enumerate(chosen):
        first = images[paths[0]]
        if changed := next((path for path in paths if _form(images[path]) != _form(first)), None):
            raise TargetError(
                f"{source}: field {changed} has another shape, voxel size or dtype than when the run at {target} "
                "began; choose another target, or start anew with --overwrite"
            )
        # What cannot be read is told by the last of them, which stays unfinished until it is mended.
        missing = plate.missing if number == len(chosen) - 1 else ()
        its = replace(plate, fields=tuple(fields[path] for path in paths), missing=missing)
        beside = others if earlier else (*others, *staying)
        parts.append(Part(run, replace(first, name=plate.name), its, earlier, beside))
    return parts


def _is_choice(settings: Settings) -> bool:
    return bool(settings.wells or settings.fields) or settings.acquisition is not None


def _read_fields(source: Location, settings: Settings) -> tuple[Plate, dict[str, Image]]:
    """Return the chosen part of a plate, and the images of the fields that can be read."""
    plate = select_fields(
        read_plate(source),
        wells=settings.wells,
        fields=settings.fields,
        acquisition=settings.acquisition,
    )
    if not plate.fields:
        listed = "; ".join(f"{path}: {reason}" for path, reason in plate.missing[:3])
        raise SourceError(f"{source} has no field that can be read ({listed})")
    found = map_threaded(lambda field: _try_image(source / field.path), plate.fields)
    images = {f.path: i for f, i in zip(plate.fields, found, strict=True) if isinstance(i, Image)}
    broken = tuple(
        (f.path, str(i))
        for f, i in zip(plate.fields, found, strict=True)
        if isinstance(i, SourceError)
    )
    if not images:
        raise SourceError(broken[0][1])
    return replace(plate, missing=(*plate.missing, *broken)), images


def _try_image(location: Location) -> Image | SourceError:
    try:
        return read_image(location)
    except SourceError as error:
        return error


def _form(image: Image) -> Image:
    """Return what the fields of one part have in common: all but their names and places."""
    levels = tuple(replace(v, translation=()) for v in image.levels)
    return replace(image, name="", levels=levels, channel_names=())


def _require_all(
    paths: Sequence[str], images: dict[str, Image], plate: Plate, target: Location
) -> None:
    absent = next((path for path in paths if path not in images), None)
    if absent is None:
        return
    reason = next(
        (why for path, why in plate.missing if absent == path or absent.startswith(f"{path}/")),
        None,
    )
    told = f"cannot be read now ({reason})" if reason else "is not chosen"
    raise TargetError(
        f"{target} belongs to a run on {len(paths)} fields, of which {absent} {told}; choose all of them with --wells "
        "and --fields, choose another target, or start anew with --overwrite"
    )
