"""The groups of OME-Zarr: their attributes, and metadata that are repeated above them.

Groups are read and written as JSON objects: one request reads a group, and one
writes it. Consolidated metadata repeat all that lies below a group. Readers
that find them look at nothing else: arrays that were added later do not exist
for them, and removed ones read as background. So they are kept up to date where
another program made them, entry by entry; they are never made here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import DataError, MegasegError, SourceError, StoreError, TargetError
from megaseg_dask.messages import validation_message
from megaseg_dask.ngff.foreign import import_command
from megaseg_dask.ngff.versions import NEXT, VERSIONS, Version, version_of_format
from megaseg_dask.stores import (
    METADATA,
    Location,
    cause_of,
    is_store_failure,
    naming,
    open_array,
    store_error,
    zarr_store,
)
from megaseg_dask.stores.failures import is_denied

if TYPE_CHECKING:
    import zarr

# The key of what this package says of an image or a table that it wrote.
PROVENANCE = "megaseg"
# The folder of the records of a target's runs has its name and this ending.
RUNS = ".run"

_CONSOLIDATED_V3 = "consolidated_metadata"
_GROUP_KEYS = {"zarr_format", "node_type", "attributes", _CONSOLIDATED_V3}
_FIRST_BYTES = {b"II": "TIFF", b"MM": "TIFF", b"PK": "zip"}
# Files of arrays, which no program takes for images of a microscope.
_ARRAY_SUFFIXES = {"npy", "npz", "mat", "h5", "hdf5"}
_MAX_NAMES_SHOWN = 4
# Errors of a disk that are about what is there; all others are failures to see it.
_ERRORS_OF_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

# What is wrong with a value, by pydantic's name of it.
_PROBLEMS = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "sequence_str": "must be a list",
    "dict_type": "must be an object with keys",
    "model_type": "must be an object with keys",
    "model_attributes_type": "must be an object with keys",
    "too_short": "has too few entries",
    "too_long": "has too many entries",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
}

# OME metadata that state their version themselves in a group without the key "ome".
_VERSIONED_PARTS = ("multiscales", "image-label", "plate", "well")
# OME metadata that say what is in a group.
_OWNERS = {"multiscales", "plate", "well", "labels"}


# -- reading


def open_group(location: Location) -> "zarr.Group":
    """Open the group at a location for reading.

    Raises:
        StoreError: The store failed. What zarr raises of the metadata is raised as it is.
    """
    import zarr

    # Consolidated metadata may be older than the attributes they repeat.
    with naming(location, "open"):
        store = zarr_store(location, read_only=True)
        return zarr.open_group(store, mode="r", use_consolidated=False)


def read_attributes(location: Location) -> dict[str, Any]:
    """Return all attributes of the group at a location; raises what zarr raises."""
    return cast(dict[str, Any], open_group(location).attrs.asdict())


def find_attributes(location: Location) -> dict[str, Any] | None:
    """Return all attributes of the group at a location, ``None`` if there is no group.

    Raises:
        TargetError: Its metadata are damaged.
        StoreError: The store failed.
    """
    for version in VERSIONS.values():
        document = _read_json(location, version.group_file)
        if not _is_group(document, version):
            continue
        if version.attributes_file != version.group_file:
            document = _read_json(location, version.attributes_file)
        return attributes_in(document, version)
    return None


def _is_group(document: Mapping[str, Any], version: Version) -> bool:
    """Return whether the parsed ``group_file`` of a version is that of a group."""
    is_of_format = document.get("zarr_format") == version.zarr_format
    return is_of_format and (version.zarr_format == 2 or document.get("node_type") == "group")


def ome_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the OME metadata among a group's attributes: those under ``ome``, else all."""
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, Mapping):
        return {}
    return dict(ome)


def open_ome_group(location: Location, expected: str) -> tuple[int, dict[str, Any]]:
    """Return the Zarr format of the group at ``location``, and its OME metadata.

    Raises:
        SourceError, StoreError: As :func:`open_attributes`.
    """
    zarr_format, attributes = open_attributes(location, expected)
    return zarr_format, ome_of(attributes)


def open_attributes(location: Location, expected: str) -> tuple[int, Mapping[str, Any]]:
    """Return the Zarr format of the group at ``location``, and its attributes.

    Raises:
        SourceError: There is no group; it says what is there instead of the
            ``expected``, such as "OME-Zarr image".
        StoreError: The store failed.
    """
    # A first request without patience: it names a wrong address or key at once, in the store's
    # own words.
    location.require_readable()
    try:
        return _read_group(location)
    except StoreError:
        raise
    except Exception as error:
        is_of_place = location.is_local and isinstance(error, _ERRORS_OF_PLACE)
        if is_store_failure(error) and not is_of_place:
            raise store_error(location, "read", error) from error
        raise SourceError(
            f"{location} is {_describe_place(location, error)}, not an {expected}"
        ) from error


def _read_group(location: Location) -> tuple[int, Mapping[str, Any]]:
    """Return the format and the attributes of a group; raises what zarr and stores raise."""
    # One request reads a usual group, where zarr makes four. It decides about all others.
    try:
        document = _parse(location.backend().get("zarr.json"))
    except Exception as error:
        # A store that may not be listed denies absent objects: zarr asks for all files of a group.
        if not is_denied(error):
            raise
        document = {}
    attributes = document.get("attributes", {})
    is_group = document.get("zarr_format") == 3 and document.get("node_type") == "group"
    if is_group and isinstance(attributes, dict) and document.keys() <= _GROUP_KEYS:
        return 3, attributes
    group = open_group(location)
    return group.metadata.zarr_format, group.attrs.asdict()


def require_known_version(
    location: Location, zarr_format: int, ome: Mapping[str, Any], part: Mapping[str, Any]
) -> str:
    """Return the version of a group's OME metadata, which all of them state or their main ``part``.

    Those of 0.6 have the version whose form they are reduced to.

    Raises:
        SourceError: It is another than those that can be read.
    """
    stated = ome.get("version") or part.get("version")
    version = str(stated or version_of_format(zarr_format).name)
    # What SpatialData adds to the metadata is not read.
    version = version.removesuffix("-dev-spatialdata")
    if zarr_format == NEXT.zarr_format and version.startswith("0.6"):
        return NEXT.name
    if version not in VERSIONS:
        raise SourceError(
            f"{location} is OME-Zarr {version}; megaseg reads {', '.join(VERSIONS)} and 0.6: "
            "write it again, with ome-zarr-py for instance"
        )
    return version


def first_problem(error: ValidationError, *parents: str) -> str:
    """Return what is wrong with metadata: the path of the key below ``parents``, and a message."""
    problem = error.errors()[0]
    # Of a value that may have several forms, the path also names the form that was tried.
    parts = [
        str(part) for part in problem["loc"] if re.fullmatch("[a-z0-9][A-Za-z0-9]*", str(part))
    ]
    path = ".".join((*parents, *parts))
    words = _PROBLEMS.get(problem["type"])
    if words is None:
        return f"{path}: {validation_message(problem)}".removeprefix(": ")
    return f"{path} {words}".strip()


def find_owner(location: Location) -> Location | None:
    """Return the nearest folder above that is an array, or whose OME metadata list its members.

    Other Zarr groups may hold anything. Folders that may not be read are passed over.

    Raises:
        StoreError: The store failed.
    """
    folder = Location.of(location.path.resolve()) if location.is_local else location
    above = []
    while folder.parent != folder:
        folder = folder.parent
        above.append(folder)
    owners = map_threaded(_owns_its_members, above)
    return next((folder for folder, owns in zip(above, owners, strict=True) if owns), None)


def _owns_its_members(folder: Location) -> bool:
    try:
        v3, v2_attributes, v2_array = [
            _parse(folder.get(name)) for name in ("zarr.json", ".zattrs", ".zarray")
        ]
    except StoreError as error:
        if not is_denied(error):
            raise
        return False
    listings = {**v2_attributes, **ome_of(v3.get("attributes") or {})}
    return "shape" in {**v3, **v2_array} or not _OWNERS.isdisjoint(listings)


def lies_below(path: str) -> bool:
    """Return whether a path from elsewhere, as of metadata, names something below a folder."""
    return not {"", ".", ".."} & set(path.split("/")) and not {"\\", "\0"} & set(path)


def describe_group(location: Location, ome: Mapping[str, Any]) -> str:
    """Return what a group is, and where an image of it would be, as the end of a sentence."""
    match ome:
        case {"multiscales": [_, *_]}:
            return "an OME-Zarr image"
        case {"plate": {"wells": [{"path": str(well)}, *_]}}:
            field = _first_field(location / well)
            return f"an HCS plate (give one image in it, such as {location / well / field})"
        case {"plate": _}:
            return "an HCS plate (give one image in it)"
        case {"well": {"images": [{"path": str(field)}, *_]}}:
            one = f"one image in it, such as {location / field}"
            well = f"{location.parent.basename}/{location.basename}"
            plate = location.parent.parent
            if well in _listed_wells(plate):
                return f"a well of a plate (give the plate, {plate} --wells {well}, or {one})"
            return f"a well of a plate (give {one})"
        case {"well": _}:
            return "a well of a plate (give one image in it)"
        case {"labels": _}:
            return f"a labels group (give the image that it belongs to, {location.parent})"
        case {"scene": _}:
            return "a scene, which places several images (give one image in it)"
        case {"bioformats2raw.layout": _}:
            return f"a bioformats2raw collection (give one image in it, such as {location}/0)"
    if is_unfinished_target(location):
        return (
            "the target of a run that is not finished (run the same megaseg segment command again "
            "to resume)"
        )
    return _describe_row(location) or "a Zarr group without multiscales metadata"


def _first_field(well: Location) -> str:
    """Return the name of the first field of a well; the usual one if the well cannot be read."""
    with suppress(MegasegError):
        match ome_of(find_attributes(well) or {}):
            case {"well": {"images": [{"path": str(field)}, *_]}}:
                return field
    return "0"


def is_unfinished_target(location: Location) -> bool:
    """Return whether a run is recorded beside a folder; only a finished one has metadata there."""
    with suppress(MegasegError):
        return location.is_listable and location.sibling(RUNS).is_folder()
    return False


def _describe_row(location: Location) -> str:
    """Return what the folder of a row of a plate is; empty for any other."""
    row = f"{location.basename}/"
    if any(well.startswith(row) for well in _listed_wells(location.parent)):
        return f"a row of a plate (give the plate, {location.parent} --wells '{row}*')"
    return ""


def _listed_wells(plate: Location) -> list[str]:
    """Return the paths of the wells that a plate lists; empty if it is none that can be read."""
    with suppress(TargetError, StoreError):
        match ome_of(find_attributes(plate) or {}):
            case {"plate": {"wells": [*wells]}}:
                return [str(well["path"]) for well in wells if isinstance(well, dict)]
    return []


def _describe_place(location: Location, error: Exception) -> str:
    """Return what is where no Zarr group could be opened."""
    if not location.is_folder():
        return _describe_file(location)
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        open_array(location)
        return f"a single Zarr array (give the folder of its image, perhaps {location.parent})"
    kind = _other_format(location)
    if kind:
        return f"{kind} (convert it to OME-Zarr, for example with tensorstore in Python)"
    names = _names_in(location)
    if any(version.group_file in names for version in VERSIONS.values()):
        return f"a Zarr group whose metadata cannot be read ({cause_of(error)})"
    row = _describe_row(location)
    if row:
        return row
    if not names:
        return "an empty folder"
    shown = names[:_MAX_NAMES_SHOWN]
    if len(names) > len(shown):
        shown.append("…")
    return f"a folder with {', '.join(shown)}"


def _other_format(location: Location) -> str | None:
    """Return what is in a folder of chunks of another format than Zarr."""
    if {"n5", "dataType", "multiScale"} & _json_at(location, "attributes.json").keys():
        return "an N5 container"
    if "scales" in _json_at(location, "info"):
        return "a precomputed volume of Neuroglancer"
    return None


def _json_at(location: Location, key: str) -> dict[str, Any]:
    try:
        return _parse(location.get(key))
    except MegasegError:
        return {}


def _describe_file(location: Location) -> str:
    try:
        first_bytes = location.head("", 2) or b""
    except DataError:
        return "a device, a pipe or a socket"
    suffix = PurePosixPath(location.basename).suffix.removeprefix(".")
    kind = _FIRST_BYTES.get(first_bytes, suffix)
    file = f"a {kind} file" if kind else "a file"
    command = import_command(location.url) if location.is_local else None
    if command is not None:
        return f"{file} (import it with: {command})"
    if kind == "zip":
        return f"{file} (give a zipped image a name that ends in .ozx or .zarr.zip, or unpack it)"
    if suffix in _ARRAY_SUFFIXES:
        return f"{file} (write its array as OME-Zarr, with ome-zarr-py for instance)"
    return f"{file} (convert it, with bioformats2raw for instance)"


def _names_in(location: Location) -> list[str]:
    if location.is_listable:
        return location.children()
    # A web server lists nothing.
    return [name for name in METADATA if location.size(name) is not None]


# -- writing


def ome_attributes(parts: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return the attributes of a group that hold OME metadata, where their version keeps them."""
    if VERSIONS[version].has_ome_key:
        return {"ome": {"version": version, **parts}}
    return {name: _with_version(name, part, version) for name, part in parts.items()}


def _with_version(name: str, part: Any, version: str) -> Any:
    if name not in _VERSIONED_PARTS:
        return part
    if isinstance(part, list):
        return [{**entry, "version": version} for entry in part]
    return {**part, "version": version}


def require_version(location: Location, version: str) -> None:
    """Require that no group of another Zarr format is at a location.

    Raises:
        TargetError: There is one; each reader would see half of the two.
        StoreError: The store failed.
    """
    ours = VERSIONS[version]
    for other in VERSIONS.values():
        is_other = other.zarr_format != ours.zarr_format
        if is_other and location.size(other.group_file) is not None:
            raise TargetError(
                f"{location} is a Zarr v{other.zarr_format} group, but OME-Zarr {version} needs "
                f"v{ours.zarr_format}; choose another target, or the other version with --ome-zarr"
            )


def write_group(
    location: Location, version: str, attributes: Mapping[str, object], *, replace: bool = False
) -> None:
    """Create the group if it does not exist, and set attributes; ``replace`` removes all others.

    Raises:
        TargetError: An array or a group of another Zarr format is there, or damaged metadata.
        StoreError: The store failed.
    """
    require_version(location, version)
    if VERSIONS[version].zarr_format == 2:
        _write_v2(location, attributes, replace=replace)
    else:
        _write_v3(location, attributes, replace=replace)


def write_ome(location: Location, version: str, parts: Mapping[str, Any]) -> None:
    """Create the group if it does not exist, and set OME metadata; all others stay.

    Raises:
        TargetError: An array or a group of another Zarr format is there, or damaged metadata.
        StoreError: The store failed.
    """
    attributes = ome_attributes(parts, version)
    if VERSIONS[version].has_ome_key:
        stored = _stored_attributes(location, version).get("ome")
        kept = stored if isinstance(stored, dict) else {}
        attributes = {"ome": {**kept, **attributes["ome"]}}
    write_group(location, version, attributes)


def read_written_ome(location: Location, version: str) -> dict[str, Any]:
    """Return the OME metadata of a group that is stored in a version; empty if it does not exist.

    Raises:
        TargetError: The metadata are damaged.
        StoreError: The store failed.
    """
    return ome_of(_stored_attributes(location, version))


def is_damaged(location: Location, names: Sequence[str]) -> bool:
    """Return whether a metadata file of a group is no JSON object, as after a power cut.

    ``names`` are those of all that lies in the group.

    Raises:
        StoreError: The store failed.
    """
    files = {version.group_file for version in VERSIONS.values()}
    files |= {version.attributes_file for version in VERSIONS.values()}
    return any(map(_is_no_object, map(location.get, files & set(names))))


def _is_no_object(data: bytes | None) -> bool:
    if data is None:
        return False
    try:
        return not isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return True


def remove_damaged_group(location: Location, version: str) -> None:
    """Remove the metadata of a group of ours that no program can read.

    Raises:
        StoreError: The store failed.
    """
    stored = VERSIONS[version]
    for key in {stored.group_file, stored.attributes_file}:
        data = location.get(key)
        document = _parse(data)
        is_sound = bool(document)
        if key == stored.group_file:
            is_sound = _is_group(document, stored) and document.keys() <= _GROUP_KEYS
        if data is not None and not is_sound:
            location.delete(key)


def holds(location: Location, expected: Mapping[str, Any]) -> bool:
    """Return whether a group has these attributes, and these keys in those that are objects.

    Raises:
        TargetError: Its metadata are damaged.
        StoreError: The store failed.
    """
    found = find_attributes(location) or {}
    for name, value in json.loads(json.dumps(expected)).items():
        stored = found.get(name)
        if isinstance(value, dict) and isinstance(stored, dict):
            stored = {key: stored[key] for key in value if key in stored}
        if stored != value:
            return False
    return True


def _write_v2(location: Location, attributes: Mapping[str, object], *, replace: bool) -> None:
    if location.size(".zgroup") is None:
        _put_json(location, ".zgroup", {"zarr_format": 2})
    stored = _read_json(location, ".zattrs")
    kept = {} if replace else stored
    updated = {**kept, **attributes}
    if updated != stored:
        _put_json(location, ".zattrs", updated)


def _write_v3(location: Location, attributes: Mapping[str, object], *, replace: bool) -> None:
    stored = _read_json(location, "zarr.json")
    if stored.get("node_type") == "array":
        raise TargetError(f"{location} is an array, not a group; choose another target")
    kept = {} if replace else stored.get("attributes") or {}
    group = {"zarr_format": 3, "node_type": "group"}
    updated = {**group, **stored, "attributes": {**kept, **attributes}}
    if updated != stored:
        _put_json(location, "zarr.json", updated)


def _stored_attributes(location: Location, version: str) -> dict[str, Any]:
    stored = VERSIONS[version]
    return attributes_in(_read_json(location, stored.attributes_file), stored)


def attributes_in(document: object, version: Version) -> dict[str, Any]:
    """Return the attributes in the parsed ``attributes_file`` of a group; empty if it has none."""
    attributes = document
    if isinstance(document, dict) and version.zarr_format == 3:
        attributes = document.get("attributes")
    if not isinstance(attributes, dict):
        return {}
    return attributes


def _read_json(location: Location, key: str) -> dict[str, Any]:
    """Return a metadata file, empty if there is none; :class:`TargetError` if it is damaged."""
    try:
        document = json.loads(location.get(key) or b"{}")
    except (ValueError, RecursionError) as error:
        raise TargetError(
            f"{location}/{key} is damaged ({error}); fix it, or choose another target"
        ) from error
    return document if isinstance(document, dict) else {}


def _put_json(location: Location, key: str, document: Mapping[str, object]) -> None:
    # It may hold what others wrote, and nobody could write that again after a power loss.
    location.put(key, json.dumps(document, indent=1).encode(), durable=True)


# -- consolidated metadata


def update_consolidated(group: Location, paths: Sequence[str]) -> None:
    """Update what the consolidated metadata of a group, if it has some, say of ``paths`` in it.

    The path ``""`` is the group itself.

    Raises:
        StoreError: The store failed.
    """
    _refresh_v3(group, [path for path in paths if path])
    _refresh_v2(group, paths)


def _refresh_v3(group: Location, paths: Sequence[str]) -> None:
    document = _parse(group.get("zarr.json"))
    record = document.get(_CONSOLIDATED_V3) or {}
    # Entries are named by the path of the node.
    names = {f"{path}/zarr.json": path for path in paths}
    if _update_entries(group, record, names):
        group.put("zarr.json", json.dumps(document).encode(), durable=True)


def _refresh_v2(group: Location, paths: Sequence[str]) -> None:
    document = _parse(group.get(".zmetadata"))
    folders = [f"{path}/" if path else "" for path in paths]
    keys = [folder + name for folder, name in product(folders, METADATA[1:])]
    # Entries are named by the path of the file.
    if _update_entries(group, document, {key: key for key in keys}):
        group.put(".zmetadata", json.dumps(document).encode(), durable=True)


def _update_entries(group: Location, record: dict[str, Any], names: Mapping[str, str]) -> bool:
    """Read the keys of ``names`` into the entries of a record; return whether it has entries."""
    entries = record.get("metadata")
    if not isinstance(entries, dict):
        return False
    for name, data in zip(names.values(), map_threaded(group.get, names), strict=True):
        entries.pop(name, None)
        if data is not None:
            # What a node repeats of the nodes below it is not repeated again.
            node = _parse(data)
            node.pop(_CONSOLIDATED_V3, None)
            entries[name] = node
    # zarr 3.1 loses members of a group that do not follow each other.
    record["metadata"] = dict(sorted(entries.items(), key=lambda entry: entry[0].split("/")))
    return True


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        document = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        # No reader can use it, and it is not ours to fix.
        return {}
    return document if isinstance(document, dict) else {}
