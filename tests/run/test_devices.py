"""What a run does about GPUs: who is left out, what is tried again, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from megaseg_dask.errors import EngineError, SettingsError
from megaseg_dask.events import Joined
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.plan import planner
from megaseg_dask.plan.cluster_spec import Cluster
from megaseg_dask.plan.memory import PRECISION_BYTES
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster.devices import FailedDevices
from megaseg_dask.run.cluster.versions import compare_builds
from megaseg_dask.run.cluster.workers import Workers
from megaseg_dask.run.dispatcher import DaskDispatcher
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.retries import Retries, StoreWatch
from megaseg_dask.run.serial import SerialDispatcher
from megaseg_dask.run.tasks import worker as tasks
from tests.fixtures.gpus import DEAD, NO_ENGINE, Gpu
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here


def test_a_gpu_is_left_out_when_its_second_process_failed():
    failed = FailedDevices()
    failed.add("GPU-a", "tcp://1", ("segment", 3), ("segment", 4))
    assert list(failed.iter_left_out()) == []
    failed.add("GPU-b", "tcp://2", ("segment", 3))
    failed.add("GPU-a", "tcp://3", ("segment", 9))
    assert list(failed.iter_left_out()) == ["GPU-a"]


def test_a_task_that_ends_every_process_is_not_taken_for_a_bad_gpu():
    failed = FailedDevices()
    for process in ("tcp://1", "tcp://2", "tcp://3"):
        failed.add("GPU-a", process, ("segment", 3))
    failed.add("GPU-a", "tcp://1", ("segment", 4))
    assert list(failed.iter_left_out()) == []
    # It fails before any task.
    failed.add("GPU-a", "tcp://4")
    assert list(failed.iter_left_out()) == ["GPU-a"]


def test_a_task_that_failed_on_a_gpu_is_tried_on_another_one():
    addresses = [f"tcp://{n}" for n in range(4)]
    client = SimpleNamespace(nthreads=lambda: addresses, run=lambda *_, **__: None)
    workers = Workers(client, EngineSpec("torch", "cuda", "fp32", 1))
    # The second process on the GPU that failed, and one that is not described yet.
    for address, uuid in zip(addresses, ("GPU-b", "GPU-b", "GPU-a"), strict=False):
        workers.joined[address] = Joined(address, address, "host", 8, 0, "NVIDIA H100", uuid)
    workers.device_failed("tcp://0", ("segment", 3))
    assert workers.others_than("tcp://0", [("segment", 3)]) == ["tcp://2"]
    assert workers.others_than("tcp://0", [("segment", 4)]) == addresses[1:]


@pytest.mark.parametrize(
    ("error", "state", "is_infrastructure"),
    [
        (torch.AcceleratorError(DEAD), "failed", True),
        (RuntimeError(NO_ENGINE), "full", False),
        (ZeroDivisionError("a bug"), "", False),
    ],
)
def test_an_outcome_says_what_its_gpu_did(error, state, is_infrastructure, monkeypatch):
    class Work:
        tasks_at_once = 1

        def prepare(self, stage):
            """No engine."""

        def run_task(self, stage, index):
            raise error

    outcome = tasks.Worker(Work()).attempt("segment", 0)
    assert (outcome.device, outcome.is_infrastructure) == (state, is_infrastructure)
    # One line, without advice to programmers.
    assert "\n" not in outcome.error
    # A failed device is not a lost store.
    watch = StoreWatch([])
    assert not any(watch.is_lost_after(outcome) for _ in range(20))


def test_a_process_that_cannot_run_the_engine_leaves_its_tasks_to_others():
    class Refused:
        tasks_at_once = 1

        def prepare(self, stage):
            raise EngineError("the plan needs bfloat16 arithmetic")

    outcome = tasks.Worker(Refused()).attempt("segment", 3)
    assert (outcome.device, outcome.error) == ("unable", "the plan needs bfloat16 arithmetic")
    dispatcher = DaskDispatcher.__new__(DaskDispatcher)
    for n_workers, may_help in ((1, False), (2, True)):
        dispatcher._n_workers = n_workers
        assert dispatcher._may_help(outcome) is may_help


def test_a_process_whose_gpu_failed_stops_and_names_the_next_step():
    class Failing:
        def attempt(self, stage, index):
            return tasks.Outcome(index, error="the GPU failed", device="failed")

    one = iter([("segment", [0])])
    dispatcher = SerialDispatcher(Failing(), Retries(3))
    with pytest.raises(EngineError, match="the GPU failed; run the same command again"):
        list(dispatcher.outcomes(lambda size: next(one)))


def test_builds_of_pytorch_are_compared_where_they_compute():
    assert list(compare_builds({"a": "2.13.0+cu130", "b": "2.13.0+cu130"})) == []
    [note] = compare_builds({"a": "2.13.0+cu130", "b": "2.13.0+cu126", "c": "2.13.0"})
    assert "a has cu130, b has cu126, c has that of PyPI" in note
    with pytest.raises(SettingsError, match=r"worker b has torch \S+cpu, which is built"):
        list(compare_builds({"a": "2.13.0+cu130", "b": "2.13.0+cpu"}))


# -- planning


@pytest.fixture
def plan_of(machine, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((16, 256, 256)))

    def plan(target="out.zarr", **options):
        options = {"model": str(tiny_bundle), "device": "cuda", **options}
        [(plan, _)] = plan_runs(str(source), str(tmp_path / target), parse_settings(options))
        return plan

    return plan


def test_where_no_gpu_is_the_batch_is_that_of_workers_elsewhere(machine, plan_of, tmp_path):
    machine.has()
    assert plan_of(scheduler="tcp://127.0.0.1:1").batch == 4
    assert plan_of(batch=2).batch == 2
    assert plan_of().batch == 4


def test_the_gpus_of_a_machine_share_its_memory(machine, monkeypatch):
    monkeypatch.setattr(planner, "memory_bytes", lambda: 64 * 10**9)
    machine.has(*(Gpu(f"GPU-{i}") for i in range(8)))

    def budget(**options) -> int:
        return planner.memory_of(parse_settings(options), Cluster(kind="local"), "cuda")

    assert 8 * budget() + planner.CLIENT_BYTES <= 64 * 10**9
    assert budget(workers=0) == planner.DEFAULT_MEMORY_BYTES


def test_a_block_fits_the_memory_of_the_gpu(machine, plan_of):
    large = plan_of(batch=1, precision="fp32")
    assert large.block_shape == (16, 256, 256)
    little = large.project_device((16, 128, 128), 1)
    assert little < large.device_bytes
    machine.has(Gpu("GPU-a", free_bytes=(little + large.device_bytes) // 2))
    small = plan_of("small.zarr", batch=1, precision="fp32")
    assert small.device_bytes <= (little + large.device_bytes) // 2


def test_a_half_precision_takes_half_of_a_pass(machine, plan_of):
    plans = {each: plan_of(batch=8, precision=each) for each in PRECISION_BYTES}
    needed = {precision: plan.device_bytes for precision, plan in plans.items()}
    assert needed["bf16"] == needed["fp16"] < needed["fp32"]


# -- runs in this process


@pytest.mark.parametrize("face", ["allocator", "cuDNN"])
def test_a_full_gpu_halves_the_batch_and_the_run_says_so(face, machine, plan_of, tmp_path):
    machine.has(Gpu("GPU-a", max_batch=1, face=face))
    options = {"device": "cuda", "precision": "fp32", "batch": 4, "overlap": 0}
    plan = plan_of(**options)
    settings = parse_settings({**options, "model": plan.settings.model[0]})
    result = segment_here(plan.source.url, plan.target.url, settings)
    assert result.status == "done", result.failures
    assert result.device_peak_bytes == {"volume": 123_000_000}
    assert "1 task used smaller batches (at least 1 instead of 4)" in result.warnings[0]


def test_bfloat16_is_refused_on_a_gpu_without_it(machine, plan_of):
    machine.has(Gpu("GPU-a", has_bf16=False))
    plan = plan_of(precision="bf16", batch=1)
    settings = parse_settings(
        {"device": "cuda", "precision": "bf16", "batch": 1, "model": plan.settings.model[0]}
    )
    result = segment_here(plan.source.url, plan.target.url, settings)
    assert "it has no bfloat16" in result.failures[0].error
