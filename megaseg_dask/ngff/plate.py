"""HCS plates: which wells and fields there are, read, chosen and written.

A plate is one listing, and one small object per well that lists its fields;
the fields are images. The names come from whoever wrote the plate: none may lead
out of it, and a well that cannot be read stays in the plate, with the reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from textwrap import shorten
from typing import Any

from pydantic import ValidationError

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.ngff.group import ZARR_FORMAT, ome_of, write_group
from megaseg_dask.ngff.image import describe_group, open_ome_group, require_known_version
from megaseg_dask.stores import Location, cause_of
from megaseg_dask.stores.failures import understand

_METADATA_KEY = {2: ".zattrs", 3: "zarr.json"}
_REASON_LENGTH, _MOST_SHOWN = 300, 12
# Of fields, as OME-Zarr 0.6 has it; 0.4 and 0.5 allow only letters and digits, which Fractal's "0_registered" is not.
_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9][A-Za-z0-9_.-]*")


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

    ``missing`` holds paths of wells or fields that are listed but cannot be read, each with the reason.
    """

    version: str
    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    fields: tuple[Field, ...]
    acquisitions: tuple[Acquisition, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        rows, columns, ids = (
            set(self.rows),
            set(self.columns),
            {None, *(a.id for a in self.acquisitions)},
        )
        for name in (*self.rows, *self.columns, *(field.name for field in self.fields)):
            if not _NAME.fullmatch(name):
                raise SourceError(
                    f"{name!r} is no name of a row, column or field: expected one such as A, 12 or 0"
                )
        for field in self.fields:
            if field.row not in rows or field.column not in columns or field.acquisition not in ids:
                raise SourceError(
                    f"field {field.path!r} is of a row, column or acquisition that the plate has not"
                )
        _require_once("row", self.rows)
        _require_once("column", self.columns)
        _require_once("field", [field.path for field in self.fields])
        _require_once("acquisition", [acquisition.id for acquisition in self.acquisitions])

    @property
    def wells(self) -> tuple[str, ...]:
        """Paths of all wells, those that cannot be read last."""
        return tuple(
            dict.fromkeys(
                [*(f.well for f in self.fields), *(_well_of(path) for path, _ in self.missing)]
            )
        )

    def fields_of(self, acquisition: int) -> list[Field]:
        """Return the fields of an acquisition; what names none belongs to the only one."""
        ids = (acquisition, None) if len(self.acquisitions) == 1 else (acquisition,)
        return [field for field in self.fields if field.acquisition in ids]


def _require_once(kind: str, names: Iterable[object]) -> None:
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise SourceError(f"{kind} {twice[0]!r} is listed more than once")


def _well_of(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _by_well(fields: Iterable[Field]) -> dict[str, list[Field]]:
    wells: dict[str, list[Field]] = {}
    for field in fields:
        wells.setdefault(field.well, []).append(field)
    return wells


# -- reading


def is_plate(location: Location) -> bool:
    """Tell whether a plate is at ``location``; raises :class:`StoreError` if its store does not answer."""
    try:
        return "plate" in open_ome_group(location, "HCS plate")[1]
    except SourceError:
        return False


def read_plate(location: Location) -> Plate:
    """Read and check the metadata of the plate at ``location`` and of its wells; no image is opened.

    Raises :class:`SourceError` that says what is there instead, or which name is none of a plate, and
    :class:`StoreError` if the store does not answer.
    """
    group, ome = open_ome_group(location, "HCS plate")
    if "plate" not in ome:
        raise SourceError(f"{location} is {describe_group(location, ome)}, not an HCS plate")
    listing = ome["plate"] if isinstance(ome["plate"], dict) else {}
    version = require_known_version(location, group, ome, listing)
    read = partial(_read_well, location, _METADATA_KEY[group.metadata.zarr_format])
    try:
        plate, wells = _parse_listing(version, str(listing.get("name") or location.name), listing)
        found = list(zip(wells, map_threaded(read, wells), strict=True))
        fields = tuple(
            field for _, of_well in found if not isinstance(of_well, str) for field in of_well
        )
        missing = tuple((well, reason) for well, reason in found if isinstance(reason, str))
        # Not every writer lists the acquisitions that its wells name.
        others = {f.acquisition for f in fields if f.acquisition is not None} - {
            a.id for a in plate.acquisitions
        }
        acquisitions = (*plate.acquisitions, *map(Acquisition, sorted(others)))
        return replace(plate, fields=fields, acquisitions=acquisitions, missing=missing)
    except SourceError as error:
        raise SourceError(
            f"{location}: its OME-Zarr {version} plate is invalid: {error}"
        ) from error


def _parse_listing(version: str, name: str, listing: dict[str, Any]) -> tuple[Plate, list[str]]:
    """Return the plate without its fields, and the paths of its wells."""
    # Nothing else is read, so nothing else may be in the way, such as a time that is no number.
    part = {"version": version} | _only(listing, "rows", "columns", "wells", "acquisitions")
    if isinstance(part.get("acquisitions"), list):
        part["acquisitions"] = [_only(entry, "id", "name") for entry in part["acquisitions"]]
    try:
        found = _model(version).model_validate(part, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        message = (
            problem["msg"]
            .removeprefix("Value error, ")
            .removeprefix("Error validating plate metadata:")
        )
        where = "".join(f"{part}." for part in problem["loc"])[:-1]
        raise SourceError(
            shorten(f"{where}: {message}" if where else message, _REASON_LENGTH)
        ) from error
    wells = [well.path for well in found.wells]
    _require_once("well", wells)
    if not wells:
        raise SourceError("it lists no wells")
    rows, columns = (
        tuple(entry.name for entry in entries) for entries in (found.rows, found.columns)
    )
    for well in found.wells:
        # In range, the numbers may still contradict the path, as in a published example: then the path counts.
        if not (0 <= well.rowIndex < len(rows) and 0 <= well.columnIndex < len(columns)):
            raise SourceError(
                f"well {well.path!r} has rowIndex {well.rowIndex} and columnIndex {well.columnIndex}, "
                f"but there are {len(rows)} rows and {len(columns)} columns"
            )
    acquisitions = tuple(Acquisition(a.id, a.name) for a in found.acquisitions or ())
    return Plate(version, name, rows, columns, (), acquisitions), wells


def _only(entry: Any, *keys: str) -> Any:
    return {key: entry[key] for key in keys if key in entry} if isinstance(entry, dict) else entry


def _model(version: str) -> Any:
    from ome_zarr_models import v04, v05

    return {"0.4": v04.plate.Plate, "0.5": v05.plate.Plate}[version]


def _read_well(location: Location, key: str, well: str) -> list[Field] | str:
    """Return the fields of a well, or why there are none."""
    try:
        attributes = _read_attributes(location, f"{well}/{key}")
    except StoreError as error:
        # A store that is lost would lose every well to come: who asks again may find it back.
        if not (location.is_local or understand(error.__cause__ or error).is_of_request):
            raise
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"{well}/{key}: {cause_of(error)}"
    if attributes is None:
        return f"the plate lists this well, but there is no {well}/{key}"
    listing = ome_of(attributes).get("well")
    images = listing.get("images") if isinstance(listing, dict) else None
    if not isinstance(images, list) or not images:
        return f"{well}/{key} lists no fields"
    row, column = well.split("/")
    fields: dict[str, Field] = {}
    for image in images:
        match image:
            case {"path": str(name)} if name not in fields and _is_id(image.get("acquisition")):
                fields[name] = Field(row, column, name, image.get("acquisition"))
            case _:
                return f"{well}/{key} lists {shorten(repr(image), _REASON_LENGTH)}, twice or not as a field is listed"
    return list(fields.values())


def _is_id(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _read_attributes(location: Location, key: str) -> dict[str, Any] | None:
    """Return a group's attributes from its one metadata object; ``None`` if there is none."""
    data = location.get(key)
    if data is None:
        return None
    found = json.loads(data)
    attributes = (
        found.get("attributes") if key.endswith("zarr.json") and isinstance(found, dict) else found
    )
    return attributes if isinstance(attributes, dict) else {}


# -- choosing


def select_fields(
    plate: Plate,
    *,
    wells: str | Sequence[str] | None = None,
    fields: str | Sequence[str | int] | None = None,
    acquisition: int | None = None,
) -> Plate:
    """Return the plate with only some of its fields, in their order, and with what is missing in their wells.

    ``wells`` are paths in which ``*`` is any row or column: ``A/1,B/*,*/3``. ``fields`` are names or, where
    no field has that name, places in the listings of the wells, from 0. ``None`` is everything.
    Raises :class:`SettingsError` that says what there is, for what does not exist.
    """
    missing = {path for path, _ in plate.missing}
    paths = {field.path for field in plate.fields} | missing

    def in_wells(pattern: str) -> set[str]:
        wanted = re.compile(re.escape(pattern).replace(r"\*", "[^/]+"))
        return {path for path in paths if wanted.fullmatch(_well_of(path))}

    def named_or_at(name: str) -> set[str]:
        place = int(name) if re.fullmatch("[0-9]{1,9}", name) else len(paths)
        named = {field.path for field in plate.fields if field.name == name}
        return named or {
            listed[place].path for listed in _by_well(plate.fields).values() if place < len(listed)
        }

    if wells is not None:
        paths &= _chosen("well", wells, in_wells, plate.wells)
    if fields is not None and plate.fields:
        paths &= (
            _chosen("field", fields, named_or_at, [field.name for field in plate.fields]) | missing
        )
    if acquisition is not None:
        there = {
            str(a.id): {field.path for field in plate.fields_of(a.id)} | missing
            for a in plate.acquisitions
        }
        paths &= _chosen(
            "acquisition", [acquisition], lambda number: there.get(number, set()), list(there)
        )
    if not paths:
        raise SettingsError(
            "no field of the plate is in these wells, of these names and of this acquisition"
        )
    kept = tuple(field for field in plate.fields if field.path in paths)
    return replace(
        plate, fields=kept, missing=tuple(entry for entry in plate.missing if entry[0] in paths)
    )


def _chosen(
    kind: str,
    given: str | Sequence[str | int],
    matching: Callable[[str], set[str]],
    there: Sequence[str],
) -> set[str]:
    chosen = set()
    for name in [
        str(part).strip() for part in (given.split(",") if isinstance(given, str) else given)
    ] or [""]:
        found = matching(name)
        if not found:
            known = list(dict.fromkeys(there))
            shown = ", ".join(known[:_MOST_SHOWN]) + (
                f", … ({len(known)} in all)" if known[_MOST_SHOWN:] else ""
            )
            raise SettingsError(
                f"{kind} {name!r} is not on the plate, which has: {shown or 'none'}"
            )
        chosen |= found
    return chosen


# -- writing


def join_plates(plate: Plate, other: Plate) -> Plate:
    """Return the plate with the fields of another beside its own, well by well; ``missing`` is of neither."""
    rows, columns = (
        tuple(dict.fromkeys(a + b))
        for a, b in ((plate.rows, other.rows), (plate.columns, other.columns))
    )
    acquisitions = {a.id: a for a in (*other.acquisitions, *plate.acquisitions)}
    fields = plate.fields + other.fields
    if plate.fields and other.fields:
        # By length first: 10 comes after 9.
        fields = tuple(
            sorted(
                fields,
                key=lambda f: (rows.index(f.row), columns.index(f.column), len(f.name), f.name),
            )
        )
    return replace(
        plate,
        rows=rows,
        columns=columns,
        fields=fields,
        missing=(),
        acquisitions=tuple(acquisitions[i] for i in sorted(acquisitions)),
    )


def write_plate(location: Location, plate: Plate, version: str) -> None:
    """Write the groups of plate, rows and wells, without the images; what else is in their attributes stays.

    ``missing`` is not written. The listing comes last: no reader finds a well before it is there.
    """
    wells = _by_well(plate.fields)
    if not wells:
        raise SourceError(f"plate {plate.name!r} has no field to write")
    listing = {
        "version": version,
        "name": plate.name,
        "rows": [{"name": name} for name in plate.rows],
        "columns": [{"name": name} for name in plate.columns],
        "wells": [
            {
                "path": well,
                "rowIndex": plate.rows.index(first.row),
                "columnIndex": plate.columns.index(first.column),
            }
            for well, (first, *_) in wells.items()
        ],
        "acquisitions": [
            {
                "id": a.id,
                "name": a.name,
                "maximumfieldcount": _most(_by_well(plate.fields_of(a.id))),
            }
            for a in plate.acquisitions
        ],
        "field_count": _most(wells),
    }
    checked = _model(version).model_validate(listing).model_dump(exclude_none=True)
    rows = dict.fromkeys(field.row for field in plate.fields)
    map_threaded(lambda row: write_group(location / row, version, {}), rows)
    map_threaded(
        lambda well: _write_part(location / well, version, "well", _images(wells[well])), wells
    )
    _write_part(location, version, "plate", checked)


def _most(wells: dict[str, list[Field]]) -> int | None:
    return max(map(len, wells.values()), default=None)


def _images(fields: list[Field]) -> dict[str, Any]:
    images = [{"path": field.name, "acquisition": field.acquisition} for field in fields]
    return {
        "images": [
            {key: value for key, value in image.items() if value is not None} for image in images
        ]
    }


def _write_part(location: Location, version: str, name: str, part: dict[str, Any]) -> None:
    if version == "0.4":
        write_group(location, version, {name: {**part, "version": version}})
    else:
        there = (_read_attributes(location, _METADATA_KEY[ZARR_FORMAT[version]]) or {}).get("ome")
        kept = there if isinstance(there, dict) else {}
        write_group(location, version, {"ome": {**kept, "version": version, name: part}})
