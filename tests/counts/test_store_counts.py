"""Requests to stores, bytes of voxels and forward passes of a run: exactly as committed.

Small objects are counted as a location asks for them: plan, lease, journal, state
and metadata. Chunks are counted in zarr's stores. Leases do not beat here, and the
journal is written at the end of a stage, so no count depends on a clock.

``MEGASEG_COUNTS=write python -m pytest tests/counts/test_store_counts.py`` writes the
counts again after a change of them.
"""

import json
import os
from pathlib import Path

import pytest
from zarr.storage import LocalStore, ObjectStore

from megaseg_dask.inference.engine import close_engine
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import journal, lease
from megaseg_dask.run.job_array import record_plans, run_tasks
from megaseg_dask.stores import Location, cached_array, clear_array_cache
from megaseg_dask.stores.zarr_stores import ZarrObjects
from tests.fixtures.images import blobs, write_image

KEPT = Path(__file__).parent / "counts.json"

SCENARIOS = {
    "one task": {"block": "24,64,96"},
    "staged": {"block": "24,32,48"},
    "staged, otsu, measurements": {
        "block": "24,32,48",
        "threshold": "otsu",
        "outputs": "labels,scores,mask,measurements",
    },
    "a finished run again": {"block": "24,32,48"},
    "a plate of four fields": {"outputs": "labels,scores,measurements"},
    "staged, in a bucket": {"block": "24,32,48"},
}


# The requests of a location, by what they ask for.
REQUESTS = {
    "get": "object_reads",
    "get_range": "object_reads",
    "put": "object_writes",
    "create": "object_writes",
    "delete": "object_removals",
    "remove": "object_removals",
    "size": "object_looks",
    "exists": "object_looks",
    "is_folder": "object_looks",
    "keys": "object_lists",
    "children": "object_lists",
    "entries": "object_lists",
}
COUNTED = (
    *sorted(set(REQUESTS.values())),
    "store_reads",
    "store_writes",
    "bytes_read",
    "bytes_written",
    "forward_passes",
)


class CountingBackend:
    """A folder of a store that counts what it is asked for."""

    def __init__(self, backend, add):
        self._backend = backend
        self._add = add

    def __getattr__(self, name):
        if name in REQUESTS:
            self._add(REQUESTS[name])
        return getattr(self._backend, name)


@pytest.fixture
def counts(monkeypatch):
    found = dict.fromkeys(COUNTED, 0)
    open_backend = Location.backend
    monkeypatch.setattr(
        Location,
        "backend",
        lambda self, **options: CountingBackend(open_backend(self, **options), add),
    )
    monkeypatch.setattr(lease.Timing, "beat_of", lambda *_: 3600.0)
    monkeypatch.setattr(journal, "_MIN_SEGMENT_S", 3600.0)
    monkeypatch.setattr(journal, "_MAX_SEGMENT_S", 3600.0)

    def count(cls, method, note):
        original = getattr(cls, method)

        def counted(self, *arguments, **named):
            note(self, *arguments)
            return original(self, *arguments, **named)

        monkeypatch.setattr(cls, method, counted)

    def add(name, n=1):
        found[name] += n

    for store in (LocalStore, ObjectStore):
        count(store, "get", lambda *_: add("store_reads"))
    for store in (LocalStore, ZarrObjects):
        count(store, "set", lambda *_: add("store_writes"))
    count(TorchEngine, "__call__", lambda *_: add("forward_passes"))
    count(Volume, "write", lambda _, box, values, *__: add("bytes_written", values.nbytes))
    # Of the array itself: what a codec makes of it differs from version to version.
    count(
        Volume,
        "read",
        lambda self, box: add("bytes_read", box.size * cached_array(self.location).dtype.itemsize),
    )
    return found


def write_source(name: str, where: Path) -> Path:
    if "plate" not in name:
        return write_image(where / "image.zarr", blobs((24, 64, 96)))
    fields = tuple(Field(row, "1", field) for row in "AB" for field in "01")
    write_plate(
        Location.of(where / "plate.zarr"), Plate("0.5", "screen", ("A", "B"), ("1",), fields), "0.5"
    )
    for n, field in enumerate(fields):
        write_image(where / "plate.zarr" / field.path, blobs((24, 40, 48), seed=n))
    return where / "plate.zarr"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_asks_its_store_as_often_as_it_did(name, tmp_path, tiny_bundle, counts, request):
    source, target = write_source(name, tmp_path), str(tmp_path / "out.zarr")
    if "bucket" in name:
        request.getfixturevalue("s3")
        target = f"{request.getfixturevalue('bucket_folder')}/out.zarr"
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, **SCENARIOS[name]}
    )
    [plan] = record_plans(str(source), target, settings)
    for again in range(1 + (name == "a finished run again")):
        close_engine()
        clear_array_cache()
        counts.update(dict.fromkeys(counts, 0))
        for stage in plan.stages:
            assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures, again
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if os.environ.get("MEGASEG_COUNTS") == "write":
        KEPT.write_text(json.dumps({**kept, name: counts}, indent=1) + "\n")
    else:
        assert counts == kept[name]
