"""Reads and writes of the store, bytes of voxels and forward passes of a run: exact, against what is committed.

``MEGASEG_COUNTS=write python -m pytest tests/counts/test_store_counts.py`` writes them anew after such a change.
"""

import json
import os
from pathlib import Path

import pytest
from zarr.storage import LocalStore

from megaseg_dask import inference
from megaseg_dask.engines.pytorch import TorchEngine
from megaseg_dask.ngff.volumes import Volume
from megaseg_dask.settings import parse_settings
from megaseg_dask.single import record_plans, run_tasks
from megaseg_dask.stores import cached_array
from tests.images import blobs, write_image

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
}


@pytest.fixture
def counts(monkeypatch):
    found = dict.fromkeys(("store_reads", "store_writes", "bytes_read", "bytes_written", "forward_passes"), 0)

    def count(cls, method, note):
        original = getattr(cls, method)

        def counted(self, *arguments, **named):
            note(self, *arguments)
            return original(self, *arguments, **named)

        monkeypatch.setattr(cls, method, counted)

    def add(name, n=1):
        found[name] += n

    count(LocalStore, "get", lambda *_: add("store_reads"))
    count(LocalStore, "set", lambda *_: add("store_writes"))
    count(TorchEngine, "__call__", lambda *_: add("forward_passes"))
    count(Volume, "write", lambda _, box, values, *__: add("bytes_written", values.nbytes))
    # Of the array itself: what a codec makes of it differs from version to version.
    count(Volume, "read", lambda self, box: add("bytes_read", box.size * cached_array(self.location).dtype.itemsize))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_asks_its_store_as_often_as_it_did(name, tmp_path, tiny_bundle, counts):
    source = write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))
    settings = parse_settings({"model": str(tiny_bundle), "engine": "torch", "threads": 1, **SCENARIOS[name]})
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    for again in range(1 + (name == "a finished run again")):
        inference.open_engine.cache_clear()
        cached_array.cache_clear()
        counts.update(dict.fromkeys(counts, 0))
        for stage in plan.stages:
            assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures, again
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if os.environ.get("MEGASEG_COUNTS") == "write":
        KEPT.write_text(json.dumps({**kept, name: counts}, indent=1) + "\n")
    else:
        assert counts == kept[name]
