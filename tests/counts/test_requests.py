"""Requests and bytes of a run: counted as a server sees them, and projected before."""

from collections import Counter
from pathlib import Path

import pytest

from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.requests import project_traffic
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.stages import STAGES, WHOLE_VOLUME
from megaseg_dask.run import journal, lease
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.status import recorded_plans, status
from megaseg_dask.stores import Location, Traffic, clear_store_caches, take_traffic
from tests.fixtures.images import blobs, write_image
from tests.fixtures.relay import relay_to
from tests.fixtures.runs import segment_here

SETTINGS = {"engine": "torch", "threads": 1}
# Source, and options; a plate has that many fields.
SHARDS = {"chunks": (12, 16, 24), "shards": (24, 32, 48)}
FAST = {
    "staged": (0, 1, SHARDS, {"block": "24,32,48", "threshold": "otsu"}),
    "plate": (2, 2, {}, {"outputs": "labels,scores,measurements"}),
}
SLOW = {
    "one task": (0, 1, {}, {"block": "24,64,96"}),
    "one task, no scores": (0, 1, {}, {"block": "24,64,96", "outputs": "labels"}),
    "0.4": (0, 2, {}, {"block": "24,64,96", "ome_zarr": "0.4"}),
    "holes": (0, 1, {}, {"block": "24,32,48", "fill_holes": 50}),
    "all": (0, 2, {}, {"block": "24,32,48", "outputs": "labels,scores,mask,measurements"}),
    "logits": (0, 1, {}, {"block": "24,32,48", "keep_logits": True, "connectivity": 3}),
    "region": (0, 1, {}, {"block": "24,32,48", "roi": "0:24,16:64,32:96"}),
    "given statistics": (0, 1, {}, {"block": "24,32,48", "normalization": "100,20"}),
    "plate of four": (4, 1, {}, {"outputs": "labels,scores,mask"}),
    "staged plate": (2, 1, {}, {"block": "24,32,48"}),
}


def levels_of(n_levels, seed=0):
    levels = [blobs((24, 64, 96), seed=seed)]
    for _ in range(1, n_levels):
        levels.append(levels[-1][:, ::2, ::2])
    return levels


def write_source(folder, n_fields, n_levels, stored):
    if not n_fields:
        return write_image(folder / "image.zarr", *levels_of(n_levels), **stored)
    path = folder / "plate.zarr"
    fields = tuple(Field("A", "1", str(number)) for number in range(n_fields))
    write_plate(Location.of(path), Plate("0.5", "screen", ("A",), ("1",), fields), "0.5")
    for number, field in enumerate(fields):
        write_image(path / field.path, *levels_of(n_levels, number), **stored)
    return path


@pytest.fixture
def no_clock(monkeypatch):
    """No lease beats, and no part of the journal is written because time went by."""
    monkeypatch.setattr(lease.Timing, "beat_of", lambda *_: 3600.0)
    monkeypatch.setattr(journal, "_MIN_SEGMENT_S", 3600.0)
    monkeypatch.setattr(journal, "_MAX_SEGMENT_S", 3600.0)


def served(relay) -> Traffic:
    """Return what a server was asked for."""
    counts = Counter()
    for method, path, _ in relay.requests:
        counts["LIST" if method == "GET" and "list-type" in path else method] += 1
    n_get = counts["GET"] + counts["HEAD"]
    return Traffic(counts["PUT"], n_get, counts["LIST"], counts["POST"] + counts["DELETE"])


def requests(traffic) -> list[int]:
    return [traffic.n_put, traffic.n_get, traffic.n_list, traffic.n_delete]


@pytest.mark.usefixtures("cheap_engine", "no_clock")
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_requests_are_those_that_were_projected(
    name, tmp_path, tiny_bundle, s3, bucket_folder, monkeypatch
):
    n_fields, n_levels, stored, options = {**FAST, **SLOW}[name]
    written = write_source(tmp_path, n_fields, n_levels, stored)
    bucket, _, key = bucket_folder.removeprefix("s3://").partition("/")
    source = s3.upload(written, bucket, f"{key}/source.zarr")
    target = f"{bucket_folder}/out.zarr"
    settings = parse_settings({"model": str(tiny_bundle), **SETTINGS, **options})
    with relay_to(s3.url) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        clear_store_caches()
        result = segment_here(source, target, settings)
        # Each of them is counted once, and none is forgotten.
        assert requests(result.used) == requests(served(relay))
        [plan] = recorded_plans(target)
        recorded = Journal.read(plan).traffic
    # The last requests of a client end its record.
    n_last = result.used.n_requests - recorded.n_requests
    assert 0 < n_last < 8
    projected = requests(project_traffic(plan))
    for n_projected, n_counted in zip(projected, requests(recorded), strict=True):
        assert n_projected == pytest.approx(n_counted, rel=0.02, abs=3)


@pytest.mark.usefixtures("cheap_engine")
def test_what_two_sessions_took_adds_up(tmp_path, tiny_bundle, monkeypatch):
    source = write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))
    target = str(tmp_path / "out.zarr")
    settings = parse_settings({"model": str(tiny_bundle), **SETTINGS, "block": "24,32,48"})
    add = Journal.add

    def stop_at_labels(self, stage, *arguments):
        if stage == "label":
            raise KeyboardInterrupt
        add(self, stage, *arguments)

    monkeypatch.setattr(Journal, "add", stop_at_labels)
    with pytest.raises(KeyboardInterrupt):
        segment_here(str(source), target, settings)
    take_traffic()
    [plan] = recorded_plans(target)
    first = Journal.read(plan).traffic
    take_traffic()
    monkeypatch.setattr(Journal, "add", add)
    result = segment_here(str(source), target, settings)
    assert first.n_put > 10
    assert first.bytes_written > 100_000
    # The second session alone wrote less than both, and nothing of the first is counted again.
    again = Journal.read(plan)
    sessions = [session.traffic.n_put for session in again.sessions]
    assert len(sessions) == 2
    assert result.used.n_put >= first.n_put + sessions[1]
    [run] = status(target, counts_kept=True)
    in_files = sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())
    assert run.used.bytes_kept == in_files


def test_each_stage_has_a_projection_of_its_requests():
    from megaseg_dask.plan import requests as projections

    assert {stage.name for stage in (WHOLE_VOLUME, *STAGES)} == set(projections._STAGES)
