"""Consolidated metadata: what some groups repeat of all that lies below them.

Readers that find it look at nothing else: arrays that were added later do not
exist for them, and those that were removed read as background. So it is kept
up to date where somebody made it, entry by entry; it is never made here.
"""

import json
from collections.abc import Sequence
from typing import Any

from megaseg_dask.concurrency import at_once
from megaseg_dask.stores import METADATA, Location

_V3 = "consolidated_metadata"


def refresh(group: Location, paths: Sequence[str]) -> None:
    """Let a group that repeats the metadata below it repeat those of ``paths`` as they are now; ``""`` is itself.

    Raises :class:`StoreError` if the store fails.
    """
    for holder, part, names in (
        ("zarr.json", _V3, METADATA[:1]),
        (".zmetadata", None, METADATA[1:]),
    ):
        whole = _parse(group.get(holder))
        record = (whole.get(part) or {}) if part else whole
        entries = record.get("metadata")
        if not isinstance(entries, dict):
            continue
        keys = [
            "/".join(filter(None, (path, name)))
            for path in paths
            if path or not part
            for name in names
        ]
        for key, data in zip(keys, at_once(group.get, keys), strict=True):
            # Of v3, entries are named by node; what a node repeats itself is not repeated again.
            name = key.removesuffix("/zarr.json") if part else key
            entries.pop(name, None)
            if data is not None:
                entries[name] = {k: v for k, v in _parse(data).items() if k != _V3}
        # zarr 3.1 loses members of a group that do not follow each other.
        record["metadata"] = dict(sorted(entries.items(), key=lambda entry: entry[0].split("/")))
        group.put(holder, json.dumps(whole).encode())


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        # Nobody can read it, and it is not ours to mend.
        return {}
    return found if isinstance(found, dict) else {}
