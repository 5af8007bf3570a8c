"""Facts of bundles without torch: a record is kept of each bundle that was read.

A record belongs to the bytes of the bundle's files and to their names, by SHA-256, never to a path
or a date: a bundle whose bytes changed is another bundle, and is read. Weights are read where a
network is built, and their digest is compared there.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import BundleFacts
from megaseg_dask.models.cytodl.files import files_of
from megaseg_dask.models.cytodl.read import bundle_name, load_bundle
from megaseg_dask.models.cytodl.safe_loading import MAX_BYTES
from megaseg_dask.models.home import home, sha256_of, write_whole

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Raised when bundles are read in another way, so that what an older one recorded is not used.
_RULES = 2
# The starter's, so that it needs no first reading.
SHIPPED_RECORD = Path(__file__).parent / "starter" / "facts.json"


@dataclass(frozen=True, slots=True)
class FactsRecord:
    """The facts of one bundle, and the key of the bytes that they were read from."""

    key: str
    facts: BundleFacts


def read_facts(path: str | Path, checkpoint: str | None = None) -> BundleFacts:
    """Return the facts of a bundle that a run can take, from a record if there is one.

    Without a record the bundle is loaded once, with torch, and recorded for the next process.

    Raises:
        BundleError: As for `load_bundle`.

    """
    path = Path(path)
    key = _key_of(path, checkpoint)
    record = _read_record(home() / "facts" / f"{key}.json", key) if key else None
    if key and record is None:
        record = _read_record(SHIPPED_RECORD, key)
    if record:
        # The same bytes may lie in a folder of another name.
        return replace(record.facts, name=bundle_name(path))
    facts = load_bundle(path, checkpoint).facts
    # Bytes that changed while they were read belong to neither key.
    if key and key == _key_of(path, checkpoint):
        with suppress(OSError):
            write_record(FactsRecord(key, facts), home() / "facts" / f"{key}.json")
    return facts


def record_of(path: Path) -> FactsRecord:
    """Load a bundle and return the record of it; raises `BundleError` if it is none."""
    facts = load_bundle(path).facts
    key = _key_of(path, None)
    assert key is not None
    return FactsRecord(key, facts)


def write_record(record: FactsRecord, path: Path) -> None:
    """Write a record whole; raises `OSError` where that is not possible."""
    write_whole(path, _records().dump_json(record, indent=1) + b"\n")


def _read_record(path: Path, key: str) -> FactsRecord | None:
    try:
        record = _records().validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if record.key == key else None


@cache
def _records() -> "TypeAdapter[FactsRecord]":
    from pydantic import TypeAdapter

    return TypeAdapter(FactsRecord)


def _key_of(path: Path, checkpoint: str | None) -> str | None:
    """Return the SHA-256 of all that facts follow from; None for what are no files of a bundle."""
    try:
        files, reason = files_of(path, checkpoint)
        if any(not file.is_file() or file.stat().st_size > MAX_BYTES for file in files):
            return None
        digests = [(file.name, sha256_of(file)) for file in files]
    except (BundleError, OSError):
        # Loading it says what is wrong.
        return None
    stated = [_RULES, checkpoint, reason, digests]
    return sha256(json.dumps(stated).encode()).hexdigest()
