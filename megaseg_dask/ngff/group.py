"""The groups of OME-Zarr: attributes, Zarr format, and metadata that are repeated above them.

Groups are read and written as JSON objects: one request reads a group, and one
writes it. Consolidated metadata repeat all that lies below a group. Readers
that find them look at nothing else: arrays that were added later do not exist
for them, and removed ones read as background. So they are kept up to date where
another program made them, entry by entry; they are never made here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import zarr

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import TargetError
from megaseg_dask.stores import METADATA, Location, zarr_store

# Of each version of OME-Zarr.
ZARR_FORMAT = {"0.4": 2, "0.5": 3}

_CONSOLIDATED_V3 = "consolidated_metadata"


def open_group(location: Location) -> zarr.Group:
    """Open the group at a location for reading; raises what zarr raises."""
    # Consolidated metadata may be older than the attributes they repeat.
    store = zarr_store(location, read_only=True)
    return zarr.open_group(store, mode="r", use_consolidated=False)


def read_attributes(location: Location) -> dict[str, Any]:
    """Return all attributes of the group at a location; raises what zarr raises."""
    return cast(dict[str, Any], open_group(location).attrs.asdict())


def read_ome(location: Location) -> dict[str, Any]:
    """Return the OME metadata of the group at a location; raises what zarr raises."""
    return ome_of(read_attributes(location))


def ome_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the OME metadata among a group's attributes: in 0.5 those under ``ome``, else all."""
    ome = attributes.get("ome", attributes)
    return dict(ome) if isinstance(ome, Mapping) else {}


def require_version(location: Location, version: str) -> None:
    """Require that no group of another Zarr format is at a location.

    Raises:
        TargetError: There is one; each reader would see half of the two.

    """
    zarr_format = ZARR_FORMAT[version]
    other_format, other_file = (2, ".zgroup") if zarr_format == 3 else (3, "zarr.json")
    if location.size(other_file) is not None:
        raise TargetError(
            f"{location} is a Zarr v{other_format} group, and OME-Zarr {version} is stored as "
            f"v{zarr_format}; choose the other version with --ome-zarr"
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
    if ZARR_FORMAT[version] == 2:
        _write_v2(location, attributes, replace=replace)
    else:
        _write_v3(location, attributes, replace=replace)


def _write_v2(location: Location, attributes: Mapping[str, object], *, replace: bool) -> None:
    if location.size(".zgroup") is None:
        location.put(".zgroup", _encode({"zarr_format": 2}))
    stored = _read_json(location, ".zattrs")
    kept = {} if replace else stored
    updated = {**kept, **attributes}
    if updated != stored:
        location.put(".zattrs", _encode(updated))


def _write_v3(location: Location, attributes: Mapping[str, object], *, replace: bool) -> None:
    stored = _read_json(location, "zarr.json")
    if stored.get("node_type") == "array":
        raise TargetError(
            f"{location} is an array, and cannot become a group; choose another target"
        )
    kept = {} if replace else stored.get("attributes") or {}
    group = {"zarr_format": 3, "node_type": "group"}
    updated = {**group, **stored, "attributes": {**kept, **attributes}}
    if updated != stored:
        location.put("zarr.json", _encode(updated))


def _read_json(location: Location, key: str) -> dict[str, Any]:
    """Return a metadata file, empty if there is none; :class:`TargetError` if it is damaged."""
    try:
        document = json.loads(location.get(key) or b"{}")
    except ValueError as error:
        raise TargetError(
            f"{location}/{key} is damaged ({error}); fix it, or choose another target"
        ) from error
    return document if isinstance(document, dict) else {}


def _encode(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, indent=1).encode()


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
        group.put("zarr.json", json.dumps(document).encode())


def _refresh_v2(group: Location, paths: Sequence[str]) -> None:
    document = _parse(group.get(".zmetadata"))
    folders = [f"{path}/" if path else "" for path in paths]
    keys = [folder + name for folder in folders for name in METADATA[1:]]
    # Entries are named by the path of the file.
    if _update_entries(group, document, {key: key for key in keys}):
        group.put(".zmetadata", json.dumps(document).encode())


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
    except ValueError:
        # No reader can use it, and it is not ours to fix.
        return {}
    return document if isinstance(document, dict) else {}
