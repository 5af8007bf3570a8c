"""One client at a time: the second is refused by name, one that is gone is taken over."""

import os
import threading
import time

import pytest
import zarr

from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import lease
from megaseg_dask.run.lease import Lease, held
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image


@pytest.fixture
def run(tmp_path, monkeypatch) -> Location:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    return Location.of(tmp_path / "out.zarr.run/megaseg")


def test_a_second_client_is_refused_by_name_and_the_first_is_not_disturbed(run):
    with held(run) as first:
        with pytest.raises(TargetError, match=f"process {os.getpid()}"), held(run):
            pass
        first.require()
    assert lease.read(run) is None
    with held(run):
        pass


def test_a_client_of_this_machine_that_died_is_taken_over_at_once(run, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 60.0)  # who watches it sleeps as long
    started = time.monotonic()
    run.put(lease.KEY, lease._encode(Lease("dead", os.uname().nodename, 2**22 + 1)))
    with held(run):
        assert lease.read(run).pid == os.getpid()
    assert time.monotonic() - started < 20


def test_a_client_of_another_machine_is_taken_over_when_its_beat_stands_still(run):
    run.put(lease.KEY, lease._encode(Lease("gone", "node17", 1)))
    with held(run):
        assert lease.read(run).host != "node17"


def test_a_client_that_stood_still_and_was_replaced_stops(run):
    with held(run) as first:
        run.put(lease.KEY, lease._encode(Lease("other", "node17", 1)))
        first._heart.join(5)
        with pytest.raises(StoreError, match="another client took over"):
            first.require()
    assert lease.read(run).id == "other", "a lost lease is not ours to remove"


def test_a_client_that_wakes_up_looks_before_its_heart_beats(run, monkeypatch):
    monkeypatch.setattr(lease.Held, "_beat", lambda _: None)
    with held(run) as first:
        run.put(lease.KEY, lease._encode(Lease("other", "node17", 1)))
        first.require()
        first._looked -= 3600
        with pytest.raises(StoreError, match="another client took over"):
            first.require()


def test_a_client_that_wakes_up_records_nothing_in_its_successors_run(
    tmp_path, tiny_bundle, client, monkeypatch
):
    # Its heart has not beaten yet, and it looks each time.
    monkeypatch.setattr(lease.Held, "_beat", lambda _: None)
    monkeypatch.setattr(lease, "_PATIENCE", 0)
    source = write_image(tmp_path / "image.zarr", blobs((40, 40, 100)))
    run, recorded = Location.of(tmp_path / "out.zarr.run"), []

    def take_over(event):
        if event.kind == "progress" and event.stage == "label" and not recorded:
            recorded.extend(run.keys("megaseg"))
            run.put(lease.KEY, lease._encode(Lease("other", "node17", 1)))

    settings = parse_settings(
        {"model": str(tiny_bundle), "threads": 1, "block": "20,40,50", "overlap": 0}
    )
    with pytest.raises(StoreError, match="another client took over"):
        segment(str(source), str(tmp_path / "out.zarr"), settings, client=client, emit=take_over)
    assert [k for k in run.keys("megaseg") if "/journal/" in k] == [
        k for k in recorded if "/journal/" in k
    ]
    assert not zarr.open_group(tmp_path / "out.zarr", mode="r").attrs.get("ome")


def test_of_many_clients_one_succeeds(run):
    wins = []
    threads = [
        threading.Thread(
            target=lambda i=i: wins.append(i) if run.create("key", b"%d" % i) else None
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert run.get("key") == b"%d" % wins[0]


def test_a_run_that_goes_on_refuses_another_client_even_with_overwrite(
    tmp_path, tiny_bundle, client
):
    source = write_image(tmp_path / "image.zarr", blobs((40, 40, 100)))
    target = tmp_path / "out.zarr"
    options = {"model": str(tiny_bundle), "threads": 1, "block": "20,40,50", "overlap": 0}
    refused = []

    def intrude(event):
        if event.kind == "progress" and event.stage == "label" and not refused:
            for overwrite in (False, True):
                settings = parse_settings({**options, "overwrite": overwrite})
                with pytest.raises(TargetError, match="is being written by process"):
                    segment(str(source), str(target), settings, client=client)
                refused.append(overwrite)

    assert (
        segment(
            str(source), str(target), parse_settings(options), client=client, emit=intrude
        ).status
        == "done"
    )
    assert refused == [False, True]
