"""HCS plates: which wells and fields there are, read, chosen and written.

A plate is one listing, and one small object per well that lists its fields;
the fields are images. The names come from the plate's writer: none may lead
out of it. A well that cannot be read, or a field of another name, is missing with the reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from textwrap import shorten
from typing import Any

from pydantic import ValidationError

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.messages import one_line
from megaseg_dask.ngff.group import (
    attributes_in,
    describe_group,
    first_problem,
    ome_of,
    open_ome_group,
    require_known_version,
    write_group,
    write_ome,
)
from megaseg_dask.ngff.versions import VERSIONS, Version, version_of_format
from megaseg_dask.stores import Location, cause_of
from megaseg_dask.stores.failures import is_of_object

_MAX_REASON_LENGTH = 300
_MAX_NAMES_SHOWN = 12
# Of rows, columns and fields, as OME-Zarr 0.6 has it; 0.4 and 0.5 allow only letters and digits,
# which Fractal's "0_registered" is not.
_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9][A-Za-z0-9_.-]*")
# Of rows and columns, in 0.4 and 0.5.
_LISTED_NAME = re.compile(r"[A-Za-z0-9]+", re.ASCII)
_NO_NAME = (
    "not a valid name of a row, column or field: expected a letter or digit, then letters, digits, "
    "'_', '-' and '.'; rename it, also in the metadata"
)


@dataclass(frozen=True, slots=True)
class Acquisition:
    """One run of the microscope over a plate."""

    id: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """One image of a well."""

    row: str
    column: str
    name: str
    acquisition: int | None = None

    @property
    def well(self) -> str:
        """Path of the well below the plate, such as ``A/1``."""
        return f"{self.row}/{self.column}"

    @property
    def path(self) -> str:
        """Path of the image below the plate, such as ``A/1/0``."""
        return f"{self.well}/{self.name}"


@dataclass(frozen=True, slots=True)
class Plate:
    """A plate: all its rows and columns, and the fields of its wells in the order of the listings.

    ``missing`` holds paths of wells or fields that are listed but cannot be read, each with the
    reason.
    """

    version: str
    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    fields: tuple[Field, ...]
    acquisitions: tuple[Acquisition, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.rows, *self.columns, *(field.name for field in self.fields)):
            if not _NAME.fullmatch(name):
                raise SourceError(f"{name!r}: {_NO_NAME}")
        rows = set(self.rows)
        columns = set(self.columns)
        acquisitions = {None, *(acquisition.id for acquisition in self.acquisitions)}
        for field in self.fields:
            is_placed = field.row in rows and field.column in columns
            if not (is_placed and field.acquisition in acquisitions):
                raise SourceError(
                    f"field {field.path!r} is of a row, column or acquisition "
                    "that the plate does not have"
                )
        _require_once("row", self.rows)
        _require_once("column", self.columns)
        _require_once("field", [field.path for field in self.fields])
        _require_once("acquisition", [acquisition.id for acquisition in self.acquisitions])

    @property
    def wells(self) -> tuple[str, ...]:
        """Paths of all wells, those that cannot be read last."""
        readable = [field.well for field in self.fields]
        missing = [well_of(path) for path, _ in self.missing]
        return tuple(dict.fromkeys(readable + missing))

    def fields_of(self, acquisition: int) -> list[Field]:
        """Return the fields of an acquisition; a field that names none belongs to the only one."""
        ids: set[int | None] = {acquisition}
        if len(self.acquisitions) == 1:
            ids.add(None)
        return [field for field in self.fields if field.acquisition in ids]


def _require_once(kind: str, names: Iterable[object]) -> None:
    for name, n in Counter(names).items():
        if n > 1:
            raise SourceError(f"{kind} {name!r} is listed more than once")


def well_of(path: str) -> str:
    """Return the path of the well of a field."""
    return "/".join(path.split("/")[:2])


def _by_well(fields: Iterable[Field]) -> dict[str, list[Field]]:
    wells: dict[str, list[Field]] = {}
    for field in fields:
        wells.setdefault(field.well, []).append(field)
    return wells


# -- reading


def is_plate(location: Location) -> bool:
    """Return whether a plate is at ``location``.

    Raises:
        StoreError: The store does not answer.
    """
    try:
        _, ome = open_ome_group(location, "HCS plate")
    except SourceError:
        return False
    return "plate" in ome


def read_plate(location: Location) -> Plate:
    """Read and check the metadata of the plate at ``location`` and its wells; no image is opened.

    Raises:
        SourceError: There is no plate, or a name in it is invalid.
        StoreError: The store does not answer.
    """
    zarr_format, ome = open_ome_group(location, "HCS plate")
    if "plate" not in ome:
        raise SourceError(f"{location} is {describe_group(location, ome)}, not an HCS plate")
    listing = ome["plate"]
    if not isinstance(listing, dict):
        listing = {}
    version = require_known_version(location, zarr_format, ome, listing)
    name = str(listing.get("name") or location.name)
    try:
        plate, wells = _parse_listing(version, name, listing)
        stored = version_of_format(zarr_format)
        return _with_fields(plate, location, stored, wells)
    except SourceError as error:
        raise SourceError(f"{location}: the metadata of its plate are invalid: {error}") from error


def _parse_listing(version: str, name: str, listing: Mapping[str, Any]) -> tuple[Plate, list[str]]:
    """Return the plate without its fields, and the paths of its wells."""
    # Nothing else is read, so nothing else may be in the way, such as a time that is no number.
    part = {"version": version} | _only(listing, "rows", "columns", "wells", "acquisitions")
    _require_listed_names("row", part.get("rows"))
    _require_listed_names("column", part.get("columns"))
    if isinstance(part.get("acquisitions"), list):
        part["acquisitions"] = [_only(entry, "id", "name") for entry in part["acquisitions"]]
    try:
        parsed = VERSIONS[version].models.plate.Plate.model_validate(part, strict=True)
    except ValidationError as error:
        problem = first_problem(error).removeprefix("Error validating plate metadata:")
        raise SourceError(shorten(problem, _MAX_REASON_LENGTH)) from error
    rows = tuple(row.name for row in parsed.rows)
    columns = tuple(column.name for column in parsed.columns)
    wells = [well.path for well in parsed.wells]
    _require_once("well", wells)
    if not wells:
        raise SourceError("it lists no wells")
    for well in parsed.wells:
        # In range, the numbers may still contradict the path, as in a published example: then the
        # path counts.
        is_row = 0 <= well.rowIndex < len(rows)
        is_column = 0 <= well.columnIndex < len(columns)
        if not (is_row and is_column):
            raise SourceError(
                f"well {well.path!r} has rowIndex {well.rowIndex} and "
                f"columnIndex {well.columnIndex}, "
                f"but there are {len(rows)} rows and {len(columns)} columns"
            )
    acquisitions = tuple(Acquisition(a.id, a.name) for a in parsed.acquisitions or ())
    return Plate(version, name, rows, columns, (), acquisitions), wells


def _require_listed_names(kind: str, entries: object) -> None:
    """Check the names of rows or columns; what is no list of them is told with the rest."""
    names = []
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"name": str(name)}:
                names.append(name)
    for name in names:
        if not _LISTED_NAME.fullmatch(name):
            raise SourceError(
                f"{kind} {one_line(name)!r}: a name may hold letters and digits alone; rename it, "
                "in the metadata too"
            )
    _require_once(kind, names)


def _only(entry: Any, *keys: str) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {key: entry[key] for key in keys if key in entry}


def _with_fields(plate: Plate, location: Location, version: Version, wells: list[str]) -> Plate:
    """Return the plate with the fields of its wells, and with what is missing."""
    fields: list[Field] = []
    missing: dict[str, str] = {}
    for of_well, reasons in map_threaded(partial(_read_well, location, version), wells):
        fields += of_well
        missing |= reasons
    # Not every writer lists the acquisitions that its wells name.
    ids = {acquisition.id for acquisition in plate.acquisitions}
    unlisted = {field.acquisition for field in fields if field.acquisition is not None} - ids
    return replace(
        plate,
        fields=tuple(fields),
        acquisitions=(*plate.acquisitions, *map(Acquisition, sorted(unlisted))),
        missing=tuple(missing.items()),
    )


def _read_well(
    location: Location, version: Version, well: str
) -> tuple[Iterable[Field], dict[str, str]]:
    """Return the fields of a well, and what is missing in it, by its path with the reason."""
    key = f"{well}/{version.attributes_file}"
    try:
        data = location.get(key)
        if data is None:
            return (), {well: f"the plate lists this well, but {key} is missing"}
        document = json.loads(data)
    except StoreError as error:
        if not is_of_object(location.url, error):
            raise
        return (), {well: str(error)}
    except (ValueError, RecursionError) as error:
        return (), {well: f"{key}: {cause_of(error)}"}
    listing = ome_of(attributes_in(document, version)).get("well")
    images = listing.get("images") if isinstance(listing, dict) else None
    if not isinstance(images, list) or not images:
        return (), {well: f"{key} lists no fields"}
    row, column = well.split("/")
    fields: dict[str, Field] = {}
    missing: dict[str, str] = {}
    for image in images:
        match image:
            case {"path": str(name)} if not _NAME.fullmatch(name):
                # It may hold control characters.
                path = f"{well}/{shorten(repr(name)[1:-1], _MAX_REASON_LENGTH)}"
                missing[path] = f"{path}: {_NO_NAME}"
            case {"path": str(name)} if name not in fields and _is_id(image.get("acquisition")):
                fields[name] = Field(row, column, name, image.get("acquisition"))
            case _:
                shown = shorten(repr(image), _MAX_REASON_LENGTH)
                missing[well] = f"{key} lists {shown} twice, or not in the form of a field"
    return fields.values(), missing


def _is_id(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


# -- choosing


def select_fields(
    plate: Plate,
    *,
    wells: str | Sequence[str] | None = None,
    fields: str | Sequence[str | int] | None = None,
    acquisition: int | None = None,
) -> Plate:
    """Return the plate with only some of its fields, in their order.

    What is missing in their wells stays. ``wells`` are paths in which ``*`` is
    any row or column: ``A/1,B/*,*/3``. ``fields`` are names or, where no field
    has that name, places in the listings of the wells, from 0. ``None`` is
    everything.

    Raises:
        SettingsError: A well, field or acquisition does not exist, or no field
            is in all that is chosen.
    """
    missing = {path for path, _ in plate.missing}
    paths = {field.path for field in plate.fields} | missing
    if wells is not None:
        in_wells = partial(_paths_in_wells, frozenset(paths))
        paths &= _chosen("well", wells, in_wells, plate.wells)
    if fields is not None and plate.fields:
        names = [field.name for field in plate.fields]
        named = _chosen("field", fields, partial(_paths_of_field, plate), names)
        paths &= named | missing
    if acquisition is not None:
        by_id = {str(a.id): _paths(plate.fields_of(a.id)) for a in plate.acquisitions}
        of_acquisition = _chosen(
            "acquisition", [acquisition], lambda number: by_id.get(number, set()), list(by_id)
        )
        paths &= of_acquisition | missing
    if not paths:
        raise SettingsError("no field of the plate matches --wells, --fields and --acquisition")
    return replace(
        plate,
        fields=tuple(field for field in plate.fields if field.path in paths),
        missing=tuple(entry for entry in plate.missing if entry[0] in paths),
    )


def _paths(fields: Iterable[Field]) -> set[str]:
    return {field.path for field in fields}


def _paths_in_wells(paths: Collection[str], pattern: str) -> set[str]:
    well = re.compile(re.escape(pattern).replace(r"\*", "[^/]+"))
    return {path for path in paths if well.fullmatch(well_of(path))}


def _paths_of_field(plate: Plate, name: str) -> set[str]:
    named = _paths(field for field in plate.fields if field.name == name)
    if named or not re.fullmatch("[0-9]{1,9}", name):
        return named
    place = int(name)
    return _paths(f[place] for f in _by_well(plate.fields).values() if place < len(f))


def _chosen(
    kind: str,
    choice: str | Sequence[str | int],
    matching: Callable[[str], set[str]],
    existing: Sequence[str],
) -> set[str]:
    """Return the paths that match any name of a choice; each must match one."""
    names = choice.split(",") if isinstance(choice, str) else choice
    chosen: set[str] = set()
    for name in names or [""]:
        name = str(name).strip()
        paths = matching(name)
        if not paths:
            meant = _well_meant(name, existing) if kind == "well" else ""
            raise SettingsError(
                f"the plate has no {kind} {name!r}{meant}; it has {_shown(existing) or 'none'}"
            )
        chosen |= paths
    return chosen


def _well_meant(name: str, wells: Sequence[str]) -> str:
    """Return advice where a well was named in another way, such as A01 for A/1, or a row alone."""
    by_place = {_place_of_well(well): well for well in wells}
    meant = by_place.get(_place_of_well(name))
    if meant is None and any(well.startswith(f"{name}/") for well in wells):
        meant = f"{name}/*"
    return f" (did you mean {meant}?)" if meant else ""


def _place_of_well(name: str) -> str:
    """Return the letters and numbers of a name, without leading zeros."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])|[^A-Za-z0-9]", "", name).upper()


def _shown(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    shown = ", ".join(distinct[:_MAX_NAMES_SHOWN])
    if len(distinct) > _MAX_NAMES_SHOWN:
        shown += f", … ({len(distinct)} in all)"
    return shown


# -- writing


def join_plates(plate: Plate, other: Plate) -> Plate:
    """Return the plate with the fields of another beside its own, well by well.

    It has the ``missing`` of neither.
    """
    rows = tuple(dict.fromkeys(plate.rows + other.rows))
    columns = tuple(dict.fromkeys(plate.columns + other.columns))
    acquisitions = {a.id: a for a in (*other.acquisitions, *plate.acquisitions)}
    fields = plate.fields + other.fields

    def place(field: Field) -> tuple[int, int, int, str]:
        # By length first: 10 comes after 9.
        name = field.name
        return rows.index(field.row), columns.index(field.column), len(name), name

    if plate.fields and other.fields:
        fields = tuple(sorted(fields, key=place))
    return replace(
        plate,
        rows=rows,
        columns=columns,
        fields=fields,
        missing=(),
        acquisitions=tuple(acquisitions[i] for i in sorted(acquisitions)),
    )


def write_plate(location: Location, plate: Plate, version: str) -> None:
    """Write the groups of plate, rows and wells, without the images; other attributes stay.

    ``missing`` is not written. The listing comes last: no reader finds a well before it exists.

    Raises:
        SourceError: The plate has no field.
        TargetError: A group cannot be written.
        StoreError: The store failed.
    """
    wells = _by_well(plate.fields)
    if not wells:
        raise SourceError(f"plate {plate.name!r} has no field to write")
    listing = _listing(plate, wells, version)

    def write_row(row: str) -> None:
        write_group(location / row, version, {})

    def write_well(well: str) -> None:
        write_ome(location / well, version, {"well": {"images": _images(wells[well])}})

    map_threaded(write_row, dict.fromkeys(field.row for field in plate.fields))
    map_threaded(write_well, wells)
    write_ome(location, version, {"plate": listing})


def require_valid_listing(plate: Plate, version: str) -> None:
    """Require that the metadata of a plate can be written.

    Raises:
        SourceError: They are not valid in this version.
    """
    try:
        _listing(plate, _by_well(plate.fields), version)
    except ValidationError as error:
        raise SourceError(
            f"plate {plate.name!r} would not be valid OME-Zarr {version} ({first_problem(error)}); "
            "correct the metadata of the source"
        ) from error


def _listing(plate: Plate, wells: Mapping[str, list[Field]], version: str) -> dict[str, Any]:
    """Return the metadata of a plate, checked."""
    listed_wells = []
    for well, (field, *_) in wells.items():
        row = plate.rows.index(field.row)
        column = plate.columns.index(field.column)
        listed_wells.append({"path": well, "rowIndex": row, "columnIndex": column})
    listed_acquisitions = []
    for acquisition in plate.acquisitions:
        n_fields = _largest_well(_by_well(plate.fields_of(acquisition.id)))
        listed_acquisitions.append(
            {"id": acquisition.id, "name": acquisition.name, "maximumfieldcount": n_fields}
        )
    listing = {
        "version": version,
        "name": plate.name,
        "rows": [{"name": name} for name in plate.rows],
        "columns": [{"name": name} for name in plate.columns],
        "wells": listed_wells,
        # iohub refuses an empty list.
        "acquisitions": listed_acquisitions or None,
        "field_count": _largest_well(wells),
    }
    checked = VERSIONS[version].models.plate.Plate.model_validate(listing)
    metadata: dict[str, Any] = checked.model_dump(exclude_none=True)
    return metadata


def _largest_well(wells: Mapping[str, list[Field]]) -> int | None:
    return max(map(len, wells.values()), default=None)


def _images(fields: Iterable[Field]) -> list[dict[str, Any]]:
    images = []
    for field in fields:
        image: dict[str, Any] = {"path": field.name}
        if field.acquisition is not None:
            image["acquisition"] = field.acquisition
        images.append(image)
    return images
