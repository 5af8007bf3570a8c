"""One client at a time: the second is refused by name, one that is gone is taken over."""

import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import pytest
import zarr

from megaseg_dask.errors import StoreError, TargetError, TaskError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import lease, runner
from megaseg_dask.run.lease import Lease, Leases, Permit, Timing
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location, local
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

NEVER_S = 3600.0


def key(number: int) -> str:
    return f"+lease/{number:08d}.json"


def put(run: Location, number: int, holder: Lease) -> None:
    """Write the lease of another client."""
    run.put(key(number), holder.to_json())


@pytest.fixture
def run(tmp_path) -> Location:
    return Location.of(tmp_path / "out.zarr.run/megaseg")


@pytest.fixture
def leases(run) -> Leases:
    return Leases(run, Timing(beat_s=0.1))


@pytest.fixture
def watchful(run) -> Leases:
    """Leases for tests in which the other client lives: its heart may miss beats for a minute.

    One beat is enough to see that it lives, so this costs no time.
    """
    return Leases(run, Timing(beat_s=0.1, patience=600))


def test_a_second_client_is_refused_by_name_and_the_first_is_not_disturbed(watchful):
    leases = watchful
    with leases.hold() as first:
        with pytest.raises(TargetError, match=f"process {os.getpid()}"), leases.hold():
            pass
        first.require()
    with leases.hold():
        pass


def test_a_client_of_this_machine_that_died_is_taken_over_at_once(run):
    leases = Leases(run, Timing(beat_s=60.0))  # a client that watches it sleeps as long
    started = time.monotonic()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    boot, namespace = lease._place()
    put(run, 1, Lease("dead", os.uname().nodename, dead.pid, boot, namespace))
    with leases.hold():
        _, last = leases.last()
        assert last.pid == os.getpid()
    assert time.monotonic() - started < 60


def test_a_client_of_another_machine_is_taken_over_when_its_beat_stands_still(run, leases):
    put(run, 7, Lease("gone", "node17", 1))
    with leases.hold():
        number, last = leases.last()
        assert (number, last.host) == (8, os.uname().nodename)
        assert run.keys("+lease") == [key(8)]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"id": "a"}', b"null"])
def test_a_lease_that_was_torn_is_taken_over(data, run, leases):
    run.put(key(1), data)
    with leases.hold():
        assert leases.last_number() == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_refused_with_the_next_step(
    number, run, leases, monkeypatch
):
    """Tests may run as root, whom no permission stops."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local, "_write_new", refuse)
    words = f"{run} cannot be written: {os.strerror(number)}; change its permissions, or copy it"
    for entering in (leases.hold(), leases.share("megaseg", "segment")):
        with pytest.raises(TargetError, match=words), entering:
            pass


@contextmanager
def beating(run: Location, holder: Lease) -> Iterator[None]:
    """Beat in the lease of another client, which is written by hand."""
    stopped = threading.Event()

    def beat() -> None:
        n = 0
        while not stopped.wait(0.05):
            n += 1
            put(run, 1, lease.replace(holder, beat=n))

    put(run, 1, holder)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    "other", [{"boot": ""}, {"boot": "of another machine"}, {"namespace": "pid:[1]"}]
)
def test_a_process_id_is_believed_in_its_own_namespace_alone(other, run, watchful):
    boot, namespace = lease._place()
    boot = other.get("boot", boot)
    namespace = other.get("namespace", namespace)
    # No process of this machine has the number; the host name is the same in many containers.
    live = Lease("live", os.uname().nodename, 2**22 + 1, boot, namespace)
    with beating(run, live), pytest.raises(TargetError, match="is being written"), watchful.hold():
        pass
    assert watchful.last_number() == 1


_HOLD = """
import sys, time
from megaseg_dask.run.lease import Leases, Timing
from megaseg_dask.stores import Location

with Leases(Location.of(sys.argv[1]), Timing(beat_s=0.1)).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_client_in_another_container_keeps_its_live_lease(run, watchful):
    leases = watchful
    unshare = ["unshare", "--map-root-user", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("PID namespaces cannot be made here")
    command = [*unshare, sys.executable, "-c", _HOLD, run.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        _, last = leases.last()
        assert (last.host, last.pid) == (os.uname().nodename, 1)
        with pytest.raises(TargetError, match="is being written"), leases.hold():
            pass
        other.communicate("")
    with leases.hold():
        pass


def test_a_client_that_stood_still_and_was_replaced_stops(run, leases):
    with leases.hold() as first:
        put(run, 2, Lease("other", "node17", 1))
        time.sleep(1.0)  # ten beats
        with pytest.raises(StoreError, match="another megaseg process took over"):
            first.require()
    _, last = leases.last()
    assert (last.id, last.is_over) == ("other", False), "a lost lease is not ours to give back"


def test_a_late_request_of_a_client_that_was_replaced_changes_nothing(run, leases):
    put(run, 1, Lease("gone", "node17", 1))
    with leases.hold() as second:
        put(run, 1, Lease("gone", "node17", 1, beat=9))
        second.require()
        assert leases.holds(second.id)
        assert not leases.holds("gone")


def test_a_client_whose_number_others_passed_long_ago_does_not_hold(run, leases, monkeypatch):
    put(run, 5, Lease("last", "node17", 1, is_over=True))
    # It had looked before the numbers up to 5 came and went.
    looks = iter([(1, Lease("first", "node17", 1, is_over=True))])
    look = leases.last
    monkeypatch.setattr(leases, "last", lambda: next(looks, None) or look())
    with leases.hold():
        assert run.keys("+lease") == [key(6)]


def test_a_client_that_wakes_up_looks_before_its_heart_beats(run, monkeypatch):
    with Leases(run, Timing(beat_s=NEVER_S)).hold() as first:
        first.require()
        put(run, 2, Lease("other", "node17", 1))
        first.require()
        later = lease.clock_s() + 6 * NEVER_S
        monkeypatch.setattr(lease, "clock_s", lambda: later)
        with pytest.raises(StoreError, match="another megaseg process took over"):
            first.require()


def test_a_client_that_woke_up_before_it_held_looks_first(run, monkeypatch):
    with Leases(run, Timing(beat_s=NEVER_S)).hold() as first:
        put(run, 2, Lease("other", "node17", 1))
        with pytest.raises(StoreError, match="another megaseg process took over"):
            first.require()


def test_a_worker_that_wakes_up_writes_nothing_for_a_client_that_is_gone(run, monkeypatch):
    leases = Leases(run, Timing(beat_s=NEVER_S))
    with leases.hold() as first:
        permit = Permit(leases, first.id)
        permit.require()
        put(run, 2, Lease("other", "node17", 1))
        permit.require()  # the last answer is younger than a beat
        with pytest.raises(TaskError, match="now belongs to another megaseg process"):
            permit.renew()
        later = lease.clock_s() + 2 * NEVER_S
        monkeypatch.setattr(lease, "clock_s", lambda: later)
        with pytest.raises(TaskError, match="now belongs to another megaseg process"):
            permit.require()


def test_a_task_of_a_job_array_writes_nothing_after_a_client_came(run):
    leases = Leases(run, Timing(beat_s=NEVER_S))
    with leases.share("megaseg", "segment") as first:
        permit = Permit(leases, first.id)
        permit.renew()
        put(run, 1, Lease("other", "node17", 1))
        # Its own lease is there again, or still.
        with pytest.raises(TaskError, match="now belongs to another megaseg process"):
            permit.renew()


def test_tasks_of_a_job_array_end_the_lease_of_a_client_that_is_gone(run, leases):
    put(run, 1, Lease("gone", "node17", 1))

    def share(_: int) -> None:
        with leases.share("megaseg", "segment") as held:
            held.require()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(share, range(4)))
    # If it wakes up, it finds a higher number.
    assert not leases.holds("gone")


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
            put(run, 2, Lease("other", "node17", 1))

    settings = parse_settings(
        {"model": str(tiny_bundle), "threads": 1, "block": "20,40,50", "overlap": 0}
    )
    with pytest.raises(StoreError, match="another megaseg process took over"):
        segment(str(source), str(tmp_path / "out.zarr"), settings, client=client, emit=take_over)
    assert [k for k in run.keys("megaseg") if "/journal/" in k] == [
        k for k in recorded if "/journal/" in k
    ]
    assert not zarr.open_group(tmp_path / "out.zarr", mode="r").attrs.get("ome")


def without_links(monkeypatch) -> None:
    """Make of the disk a file system without hard links, such as that of memory cards."""

    def link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def test_without_hard_links_one_of_many_creates_an_object(monkeypatch, run):
    without_links(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: run.create("key", b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert run.get("key") == b"%d" % won.index(True)


def test_a_file_system_without_hard_links_holds_a_target(monkeypatch, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((20, 40, 50)))
    options = {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "overlap": 0}
    settings = parse_settings(options)
    without_links(monkeypatch)
    assert segment_here(str(source), str(tmp_path / "out.zarr"), settings).status == "done"


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


# -- many clients at once


@dataclass
class Trial:
    """What one client did: the numbers that it held, and its writes."""

    numbers: list[int] = field(default_factory=list)
    # Number, end, and duration from the look to the end, in seconds of one clock.
    writes: list[tuple[int, float, float]] = field(default_factory=list)


def take_part(
    folder: Location,
    timing: Timing,
    writes_for_s: float,
    may_end: Callable[[], bool] = lambda: True,
) -> Trial:
    """Try to hold the lease, and write for a while if that succeeds."""
    trial = Trial()
    leases = Leases(folder, timing)
    with suppress(TargetError, StoreError), leases.hold() as held:
        # Another may have followed by now.
        number = int(held._key.removesuffix(".json").rpartition("/")[2])
        trial.numbers.append(number)
        ends = time.monotonic() + writes_for_s
        while time.monotonic() < ends or not may_end():
            began = lease.clock_s()
            held.require()
            ended = lease.clock_s()
            trial.writes.append((number, ended, ended - began))
            time.sleep(0.002)
    return trial


def require_one_writer(trials: Sequence[Trial], timing: Timing) -> int:
    """Require that no client writes after its successor did; return the number of late writes.

    A client that is stopped between its look and its write is late, which no lease can prevent.
    """
    in_time_s = timing.grace_s - timing.trust_of("client")
    writes = sorted((write for trial in trials for write in trial.writes), key=lambda w: w[1])
    quick = [number for number, _, took_s in writes if took_s < in_time_s]
    assert quick == sorted(quick), "a client wrote after its successor"
    return len(writes) - len(quick)


def test_of_many_clients_that_find_a_dead_lease_one_holds(run):
    # A thread may stand still for most of a second.
    timing = Timing(beat_s=0.05, patience=40)
    put(run, 1, Lease("gone", "node17", 1))
    n_clients = 8
    refused = []

    def come(_: int) -> Trial:
        # Who comes late finds the holder still there.
        trial = take_part(run, timing, 0.2, lambda: len(refused) == n_clients - 1)
        if not trial.numbers:
            refused.append(trial)
        return trial

    with ThreadPoolExecutor(n_clients) as pool:
        trials = list(pool.map(come, range(n_clients)))
    assert sum(len(trial.numbers) for trial in trials) == 1
    require_one_writer(trials, timing)


def serve(connection: Connection) -> None:
    """Take part in one trial after the other, in a process of its own."""
    while True:
        environment, *arguments = connection.recv()
        os.environ.update(environment)
        connection.send(take_part(*arguments))


@pytest.fixture(scope="module")
def clients() -> Iterator[list[tuple[multiprocessing.Process, Connection]]]:
    context = multiprocessing.get_context("spawn")
    started = []
    for _ in range(8):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there,), daemon=True)
        process.start()
        started.append((process, here))
    yield started
    for process, _ in started:
        process.kill()
        process.join()


def stop_at_random(pids: Sequence[int], rng: random.Random, for_s: float) -> None:
    """Stop processes and let them go on, at any moment."""
    ends = time.monotonic() + for_s
    stopped: set[int] = set()
    while time.monotonic() < ends:
        time.sleep(rng.uniform(0, 0.1))
        pid = rng.choice(pids)
        if pid in stopped:
            os.kill(pid, signal.SIGCONT)
            stopped.remove(pid)
        else:
            os.kill(pid, signal.SIGSTOP)
            stopped.add(pid)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


N_TRIALS = int(os.environ.get("MEGASEG_LEASE_TRIALS", "10"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("is_disturbed", [False, True])
@pytest.mark.parametrize("store", ["disk", "s3"])
def test_never_two_clients_write(store, is_disturbed, clients, tmp_path, request):
    folder = Location.of(tmp_path)
    if store == "s3":
        request.getfixturevalue("s3")
        folder = Location.of(request.getfixturevalue("bucket_folder"))
    timing = Timing(beat_s=0.1)
    rng = random.Random(f"{store} {is_disturbed}")
    n_holders = n_writes = n_late = 0
    for n in range(N_TRIALS):
        run = folder / f"trial{n}"
        put(run, 1, Lease("gone", "node17", 1))
        # Each holds for long enough that all others are refused, or not even for a beat.
        writes_for_s = rng.uniform(0.05, 1.0) if is_disturbed else 1.5
        for _, connection in clients:
            connection.send((dict(os.environ), run, timing, writes_for_s))
        if is_disturbed:
            stop_at_random([process.pid for process, _ in clients], rng, 2.0)
        trials = [connection.recv() for _, connection in clients]
        holders = [number for trial in trials for number in trial.numbers]
        assert len(set(holders)) == len(holders), "two clients held one number"
        assert holders
        n_late += require_one_writer(trials, timing)
        n_holders += len(holders)
        n_writes += sum(len(trial.writes) for trial in trials)
    logging.getLogger(__name__).info(
        "%s trials, %s holders, %s writes, %s late", N_TRIALS, n_holders, n_writes, n_late
    )
