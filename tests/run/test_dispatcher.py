"""Groups and window as workers become many; and the simulation that says what they should be."""

import time
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks.scaling import Load, Machine, simulate
from megaseg_dask.events import PatchProgress
from megaseg_dask.inference import block
from megaseg_dask.run import dispatcher
from megaseg_dask.run.dispatcher import DaskDispatcher, group_size_of, window_of
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.state import TaskSummary


@pytest.mark.parametrize("n_workers", [1, 2, 8, 64, 512, 1024, 4096])
def test_every_worker_has_a_group_in_hand_and_one_to_come(n_workers):
    assert window_of(n_workers) >= 2 * n_workers
    assert window_of(n_workers) >= 8


def test_groups_last_longer_where_workers_are_many_and_end_together():
    assert group_size_of(None, 10**6, 2) == 1
    assert group_size_of(0.5, 10**6, 2) == 1
    assert group_size_of(0.5, 10**6, 1024) == 20
    assert group_size_of(0.001, 10**6, 1024) == 256
    assert group_size_of(0.001, 100, 2) == 25
    assert group_size_of(0.001, 3, 1024) == 1


def test_with_nothing_shared_all_workers_are_busy():
    found = simulate([Load("a", 960, 1.0)], 64, Machine(0.0, jitter=0.0))
    assert (found["wall_s"], found["efficiency"], found["workers_busy"]) == (15.0, 1.0, 1.0)


def test_a_stage_waits_for_the_one_before():
    found = simulate([Load("a", 65, 1.0), Load("b", 1, 3.0)], 64, Machine(0.0, jitter=0.0))
    assert found["stage_s"] == {"a": 2.0, "b": 3.0}


def test_the_scheduler_limits_tasks_that_go_one_by_one():
    with (
        mock.patch.object(dispatcher, "_GROUP_S", 0.0),
        mock.patch.object(dispatcher, "_GROUP_COST_S", 0.0),
    ):
        found = simulate([Load("a", 2000, 0.01)], 256, Machine(0.003, jitter=0.0))
    assert found["wall_s"] == pytest.approx(6.0, abs=0.1)
    assert found["scheduler_busy"] > 0.95


def test_the_store_limits_what_is_moved():
    machine = Machine(0.0, store_bytes_per_s=1e9, worker_bytes_per_s=1e9, jitter=0.0)
    found = simulate([Load("a", 640, 0.1, n_bytes=1e8)], 64, machine)
    assert found["wall_s"] == pytest.approx(64, abs=0.5)
    assert found["store_gb_per_s"] == pytest.approx(1, abs=0.01)


def test_workers_tell_the_patches_of_blocks_in_work(client, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatcher, "_TICK_S", 0.01)
    seen = tmp_path / "seen"

    # As values: workers cannot import this module.
    class Work:
        tasks_at_once = 1

        def open_work(self):
            return self

        def prepare(self, stage):
            pass

        def run_task(self, stage, index):
            block._TELL.get()(3, 12, 4.5)
            end_s = time.monotonic() + 60
            while not seen.exists() and time.monotonic() < end_s:
                time.sleep(0.01)
            return TaskSummary()

    events = []

    def emit(event):
        events.append(event)
        seen.touch()

    workers = SimpleNamespace(client=client, watch=lambda n_workers: None)
    tasks = [("segment", [7]), ("", [])]
    sent = DaskDispatcher(workers, Work(), Retries(1), None, emit, {"segment": 1})
    [(_, outcome)] = sent.outcomes(lambda size: tasks.pop(0) if tasks else ("", []))
    assert (outcome.index, outcome.error) == (7, "")
    assert set(events) == {PatchProgress("segment", 3, 12, 1, 4.5)}
