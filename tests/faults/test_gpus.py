"""GPUs that fail, are not there, or are too small: pretended devices, real workers.

What each run did is in the asserts: which devices were opened by which process, what
was said, and that the arrays are those of an undisturbed run.
"""

import os
import sys

import numpy as np
import pytest

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import dispatcher
from megaseg_dask.run.runner import segment
from tests.faults.test_faults import arrays, assert_same
from tests.fixtures.gpus import Gpu
from tests.fixtures.images import blobs, write_image

# Workers that import PyTorch start in half a minute where others work beside them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

N_TIMES = 12


@pytest.fixture
def request_of(tmp_path, tiny_bundle):
    """Twelve timepoints, each of them one task."""
    values = np.stack([blobs((16, 32, 40), t) for t in range(N_TIMES)])
    source = write_image(tmp_path / "image.zarr", values, axes="tzyx")

    def make(target="out.zarr", **options):
        options = {
            "model": str(tiny_bundle),
            "device": "cuda",
            "engine": "torch",
            "precision": "fp32",
            "batch": 2,
            "overlap": 0,
            **options,
        }
        return str(source), str(tmp_path / target), parse_settings(options)

    return make


@pytest.fixture
def run(request_of):
    """Return a function that runs, and returns the result, notices, and the workers that joined."""

    def run(target="out.zarr", *, client=None, tell=lambda event: None, **options):
        events = []

        def note(event):
            events.append(event)
            tell(event)

        source, target, settings = request_of(target, **options)
        result = segment(source, target, settings, client=client, emit=note)
        notices = [event.text for event in events if event.kind == "notice"]
        return result, notices, [event for event in events if event.kind == "worker"]

    return run


@pytest.fixture
def plain(monkeypatch):
    """Workers of this machine are started as without dask-cuda."""
    monkeypatch.setitem(sys.modules, "dask_cuda", None)


def test_one_dead_gpu_of_two_costs_no_volume(machine, plain, run):
    machine.has(Gpu("GPU-a"), Gpu("GPU-b", fails="forward"))
    result, notices, joined = run(workers=2)
    assert result.status == "done", result.failures
    assert {worker.uuid for worker in joined} >= {"GPU-a", "GPU-b"}
    assert any("the GPU of its worker failed: CUDA error" in text for text in notices)
    passes = machine.noted("forward")
    good = [used for used in passes.values() if "GPU-a" in used]
    assert [set(used) for used in good] == [{"GPU-a"}]
    assert len(good[0]) >= N_TIMES
    # A process that failed was not asked again and again: it has three tasks at once.
    assert all(len(used) <= 6 for used in passes.values() if "GPU-b" in used)
    # No process of a client holds a device.
    assert os.getpid() not in machine.noted("context")
    assert result.device_peak_bytes == {"volume": 123_000_000}


def test_a_gpu_that_failed_under_two_processes_gets_no_third(machine, plain, run, monkeypatch):
    left_out = "GPU GPU-b is not used any more: two processes failed on it"
    # All tasks are sent at once: those that wait for the good one leave some to the other.
    monkeypatch.setattr(dispatcher, "_MIN_WINDOW", 2 * N_TIMES)
    # The good one ends no task before that was told, and the other fails only in workers that
    # were seen to join.
    machine.has(
        Gpu("GPU-a", waits_for="left-out"),
        Gpu("GPU-b", fails="forward", waits_for="joined"),
    )

    def of_bad():
        return {pid for pid, used in machine.noted("forward").items() if "GPU-b" in used}

    failed = set()

    def tell(event):
        if event.kind == "worker" and event.uuid == "GPU-b":
            machine.tell("joined")
        elif event.kind == "notice" and event.text == left_out:
            failed.update(of_bad())
            machine.tell("left-out")

    result, notices, joined = run(workers=2, retries=6, tell=tell)
    assert result.status == "done", result.failures
    assert notices.count(left_out) == 1
    assert len([worker for worker in joined if worker.uuid == "GPU-b"]) >= 2
    # What failed there is tried on the other one, so that no task fails in both processes.
    assert len(failed) == 2
    # No process computes on it once it is left out.
    assert of_bad() == failed


@pytest.mark.slow
def test_a_worker_without_a_gpu_that_works_takes_no_task(machine, plain, run):
    """It fails in its first convolution; the other one serves one process, and so no client."""
    machine.has(Gpu("GPU-a", is_exclusive=True), Gpu("GPU-b", fails="convolution"))
    result, notices, joined = run(workers=2)
    assert result.status == "done", result.failures
    assert [worker.uuid for worker in joined] == ["GPU-a"]
    assert (
        "GPU GPU-b is not used any more: CUDA error: an illegal memory access was encountered"
        in notices
    )
    assert {uuid for used in machine.noted("forward").values() for uuid in used} == {"GPU-a"}


def test_without_any_gpu_that_works_nothing_is_written(machine, plain, run, tmp_path):
    machine.has(Gpu("GPU-a", fails="convolution"))
    with pytest.raises(SettingsError, match=r"worker 0 on .*: CUDA error: .*; start workers where"):
        run(workers=1)
    assert not (tmp_path / "out.zarr").exists()


# -- dask-cuda, really: it is told to leave devices alone, of which there are none


@pytest.fixture
def dask_cuda(monkeypatch):
    """Let dask-cuda start its workers without a driver; they are pinned as ever."""
    module = pytest.importorskip("dask_cuda", exc_type=ImportError)
    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return module


def test_the_gpus_of_a_machine_are_those_of_a_local_cuda_cluster(
    machine, dask_cuda, run, monkeypatch
):
    started = []

    class Seen(dask_cuda.LocalCUDACluster):
        def new_worker_spec(self):
            spec = super().new_worker_spec()
            [worker] = spec.values()
            started.append((worker["options"]["env"], worker["options"]["nthreads"]))
            return spec

    monkeypatch.setattr(dask_cuda, "LocalCUDACluster", Seen)
    result, notices, joined = run()
    assert result.status == "done", result.failures
    assert started == [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 3),
    ]
    assert sorted(worker.uuid for worker in joined) == ["GPU-a", "GPU-b"]
    assert sorted({uuid for used in machine.noted("forward").values() for uuid in used}) == [
        "GPU-a",
        "GPU-b",
    ]
    assert not [text for text in notices if "--nthreads" in text]
    expected, _, _ = run("expected.zarr", workers=0)
    assert_same(arrays(result.target), arrays(expected.target))


CUSTOM = """
kind: custom
class: dask_cuda:LocalCUDACluster
device: cuda
workers: 2
options:
  threads_per_worker: 3
  memory_limit: 0
  device_memory_limit: 0
  host: 127.0.0.1
  dashboard_address: null
"""
# Jobs that take whole nodes: one job, and in it a worker for each of its GPUs.
JOB = """
kind: custom
class: dask_jobqueue.local:LocalCluster
device: cuda
workers: 1
wait: 120s
options:
  cores: 3
  processes: 1
  memory: 8GB
  worker_command: dask_cuda.cli
  interface: lo
  scheduler_options: {dashboard_address: null}
  worker_extra_args: ["--nthreads", "3", "--no-dashboard"]
"""


# Fast: any class of clusters in tests/run/test_clusters.py, and the class of dask-cuda above.
@pytest.mark.slow
# The class of jobs that are processes leaves theirs to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", [CUSTOM, JOB], ids=["custom", "dask cuda worker"])
def test_clusters_that_start_workers_of_dask_cuda(file, machine, dask_cuda, run, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(file)
    result, _, joined = run(cluster=str(path))
    assert result.status == "done", result.failures
    assert sorted(worker.uuid for worker in joined) == ["GPU-a", "GPU-b"]
