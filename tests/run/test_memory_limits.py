"""Memory that workers may not use: told before the run begins, and named when one is lost by it."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import dask
import numpy as np
import pytest
from distributed import CancelledError, Client, LocalCluster

from megaseg_dask.errors import ClusterError, SettingsError
from megaseg_dask.events import ignore
from megaseg_dask.plan import memory, planner
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster import workers as workers_module
from megaseg_dask.run.cluster.workers import UNKNOWN_LOSS, Workers
from megaseg_dask.run.dispatcher import DaskDispatcher, _Group
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.runner import segment
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

GB = 10**9


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))


@pytest.fixture
def options(tiny_bundle):
    return {"model": str(tiny_bundle), "threads": 1, "overlap": 0}


@contextmanager
def client_with(memory_limit: int):
    """A worker that somebody else started, in this process, as Dask watches it by default."""
    watched = {"distributed.worker.memory.pause": 0.8, "distributed.worker.memory.terminate": 0.95}
    with (
        dask.config.set(watched),
        LocalCluster(
            1,
            threads_per_worker=1,
            processes=False,
            memory_limit=memory_limit,
            dashboard_address="127.0.0.1:0",
            protocol="inproc://",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_worker_below_the_plan_is_refused_with_the_numbers(image, tmp_path, options):
    target = tmp_path / "out.zarr"
    with (
        client_with(GB // 2) as client,
        pytest.raises(SettingsError, match=r"uses 0\.40 GB, and the plan needs .* --memory-limit"),
    ):
        segment(str(image), str(target), parse_settings(options), client=client)
    assert not target.exists()


def test_workers_that_are_paused_for_long_end_the_run(image, tmp_path, options, monkeypatch):
    monkeypatch.setattr(workers_module, "_ALL_PAUSED_S", 0.0)
    monkeypatch.setattr(workers_module, "_LOOK_S", 0.0)
    [(plan, _)] = plan_runs(str(image), str(tmp_path / "out.zarr"), parse_settings(options))
    with client_with(1000) as client:
        watched = Workers(client, plan.engine)
        while {w["status"] for w in client.scheduler_info()["workers"].values()} != {"paused"}:
            time.sleep(0.05)
        watched.watch(1)
        with pytest.raises(ClusterError, match=r"paused for .* --memory-limit"):
            watched.watch(1)


def test_a_machine_that_is_too_small_is_told_before_workers_start(
    image, tmp_path, options, monkeypatch
):
    """A plan of a large machine is taken up on a small one."""
    settings = parse_settings({**options, "workers": 2, "memory": "2GB"})
    monkeypatch.setattr(planner, "memory_bytes", lambda: 3 * GB // 2)
    with pytest.raises(SettingsError, match=r"each of 2 workers.* has 1\.50 GB: use fewer --work"):
        segment(str(image), str(tmp_path / "out.zarr"), settings)
    assert segment_here(str(image), str(tmp_path / "out.zarr"), settings).status == "done"


def test_a_join_that_does_not_fit_gets_advice_that_can_work(tmp_path, options, monkeypatch):
    """No block and no patch makes it smaller."""
    monkeypatch.setattr(memory, "join_bytes", lambda n_fragments: GB // 2)
    image = write_image(tmp_path / "image.zarr", np.zeros((96, 256, 384), "uint16"))
    settings = parse_settings({**options, "memory": "1.15GB"})
    with pytest.raises(
        SettingsError,
        match=r"joining .* needs .* raise --memory, or segment parts of the volume with --roi",
    ) as caught:
        plan_runs(str(image), str(tmp_path / "out.zarr"), settings)
    assert "a smaller --patch" not in str(caught.value)


@pytest.mark.parametrize(("total", "n_workers"), [(2 * GB, 1), (4 * GB, 2), (64 * GB, 1)])
def test_what_workers_and_client_plan_with_fits_the_container(monkeypatch, total, n_workers):
    monkeypatch.setattr(planner, "memory_bytes", lambda: total)
    assert planner.default_memory_bytes(n_workers) * n_workers + planner.CLIENT_BYTES <= total


def test_a_worker_that_the_system_killed_for_memory_is_named_so(image, tmp_path, monkeypatch):
    counts = iter([3, 3, 4])
    monkeypatch.setattr(workers_module, "count_killed", lambda: next(counts))
    with client_with(0) as client:
        watched = Workers(client, None, _n_killed=workers_module.count_killed())
        assert watched.cause_of_loss() == "its worker died or hung"
        assert "killed because memory ran out" in watched.cause_of_loss()


def test_a_block_that_workers_died_of_for_memory_says_so_in_the_end():
    """Also if nothing is known of how the last of them ended."""
    causes = ["its worker was killed because memory ran out", UNKNOWN_LOSS, UNKNOWN_LOSS]
    workers = SimpleNamespace(client=None, cause_of_loss=lambda _: causes.pop(0))
    dispatcher = DaskDispatcher(workers, None, Retries(2), None, ignore)
    group = _Group("segment", [1])
    assert not list(dispatcher._handle_error(group, CancelledError()))
    _, _, again, _ = dispatcher._delayed[0]
    assert not list(dispatcher._handle_error(again, CancelledError()))
    [last] = dispatcher._to_run_alone
    [(_, outcome)] = dispatcher._handle_error(last, CancelledError())
    assert outcome.error == "its worker was killed because memory ran out (attempt 3)"
