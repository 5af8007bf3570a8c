"""One client at a time: the second is refused by name, one that is gone is taken over."""

import os
import threading
import time

import pytest
import zarr

from megaseg_dask.errors import StoreError, TargetError, TaskError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import lease, runner
from megaseg_dask.run.lease import Lease, Leases, Permit, Timing
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

NEVER_S = 3600.0


@pytest.fixture
def run(tmp_path) -> Location:
    return Location.of(tmp_path / "out.zarr.run/megaseg")


@pytest.fixture
def leases(run) -> Leases:
    return Leases(run, Timing(beat_s=0.1))


def test_a_second_client_is_refused_by_name_and_the_first_is_not_disturbed(leases):
    with leases.hold() as first:
        with pytest.raises(TargetError, match=f"process {os.getpid()}"), leases.hold():
            pass
        first.require()
    assert leases.read() is None
    with leases.hold():
        pass


def test_a_client_of_this_machine_that_died_is_taken_over_at_once(run):
    leases = Leases(run, Timing(beat_s=60.0))  # a client that watches it sleeps as long
    started = time.monotonic()
    run.put(lease.KEY, Lease("dead", os.uname().nodename, 2**22 + 1).to_json())
    with leases.hold():
        assert leases.read().pid == os.getpid()
    assert time.monotonic() - started < 60


def test_a_client_of_another_machine_is_taken_over_when_its_beat_stands_still(run, leases):
    run.put(lease.KEY, Lease("gone", "node17", 1).to_json())
    with leases.hold():
        assert leases.read().host != "node17"


def test_a_client_that_stood_still_and_was_replaced_stops(run, leases):
    with leases.hold() as first:
        run.put(lease.KEY, Lease("other", "node17", 1).to_json())
        time.sleep(1.0)  # ten beats
        with pytest.raises(StoreError, match="another client took over"):
            first.require()
    assert leases.read().id == "other", "a lost lease is not ours to remove"


def test_a_client_that_wakes_up_looks_before_its_heart_beats(run, monkeypatch):
    with Leases(run, Timing(beat_s=NEVER_S)).hold() as first:
        run.put(lease.KEY, Lease("other", "node17", 1).to_json())
        first.require()
        later = time.time() + 6 * NEVER_S
        monkeypatch.setattr(time, "time", lambda: later)
        with pytest.raises(StoreError, match="another client took over"):
            first.require()


def test_a_worker_that_wakes_up_writes_nothing_for_a_client_that_is_gone(run, monkeypatch):
    leases = Leases(run, Timing(beat_s=NEVER_S))
    with leases.hold() as first:
        permit = Permit(leases, first.id)
        permit.require()
        run.put(lease.KEY, Lease("other", "node17", 1).to_json())
        permit.require()  # the last answer is younger than a beat
        with pytest.raises(TaskError, match="no longer the run of the client"):
            permit.renew()
        later = time.time() + 2 * NEVER_S
        monkeypatch.setattr(time, "time", lambda: later)
        with pytest.raises(TaskError, match="no longer the run of the client"):
            permit.require()


def test_a_client_that_wakes_up_records_nothing_in_its_successors_run(
    tmp_path, tiny_bundle, client, monkeypatch
):
    # Its heart has not beaten yet, and it looks each time.
    monkeypatch.setattr(runner, "LEASE_TIMING", Timing(beat_s=NEVER_S, patience=0))
    source = write_image(tmp_path / "image.zarr", blobs((40, 40, 100)))
    run, recorded = Location.of(tmp_path / "out.zarr.run"), []

    def take_over(event):
        if event.kind == "progress" and event.stage == "label" and not recorded:
            recorded.extend(run.keys("megaseg"))
            run.put(lease.KEY, Lease("other", "node17", 1).to_json())

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
