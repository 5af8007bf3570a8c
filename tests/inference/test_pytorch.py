"""Blocks that stay on their device, and what a worker does beside its forward passes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms.blending import sigmoid, window
from megaseg_dask.algorithms.geometry import BlockGrid, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import EngineError
from megaseg_dask.inference import engine
from megaseg_dask.inference.engine import Preparation, predict_block
from megaseg_dask.inference.pytorch import DeviceEngine, TorchEngine
from megaseg_dask.models import load_bundle
from megaseg_dask.models.cytodl.transforms import Step
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.memory import IDLE_BYTES
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from megaseg_dask.run.tasks import worker
from megaseg_dask.run.tasks.scores import as_stored
from tests.fixtures.images import blobs, write_image

GRID = PatchGrid((24, 40, 50), (16, 32, 32), (0.5,) * 3)


@pytest.mark.parametrize("dtype", ["uint16", "int8", "float32"])
@pytest.mark.parametrize("steps", [("zscore",), ("zscore", "clip")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_on_its_device_is_that_of_the_reference(dtype, steps, batch, tiny_bundle):
    values = blobs(GRID.volume_shape).astype(dtype)[None]
    made = tuple(Step(name, (-1.0, 1.0)) if name == "clip" else Step(name) for name in steps)
    prepare = Preparation(made, (Normalization(float(values.mean()), float(values.std())),))
    options = {"device": "cpu", "precision": "fp32", "threads": 1}
    engine, on_device = (
        cls(load_bundle(tiny_bundle), **options) for cls in (TorchEngine, DeviceEngine)
    )
    weights = window(GRID.patch_shape)
    for core in BlockGrid(GRID.volume_shape, (24, 20, 50)):
        inputs = values[:, *GRID.read_box(core).slices]
        (expected,) = predict_block(inputs, core, GRID, prepare, engine, batch=batch)
        (found,) = on_device.predict_block(inputs, core, GRID, prepare, batch, weights)
        assert_array_equal(found.logits(), expected)
        scores = sigmoid(expected)
        assert_allclose(found.stored("float32"), scores, atol=1e-6)
        steps_off = found.stored("uint8").astype(int) - as_stored(scores, "uint8")
        assert np.abs(steps_off).max() <= 1
        # Where sigmoids differ in the last bit, a score may pass the threshold by just that.
        clear = np.abs(scores - 0.6) > 1e-6
        assert_array_equal(
            found.above(0.6)[clear], (scores > np.float32(0.6)).astype(np.uint8)[clear]
        )


def test_logits_that_are_no_numbers_fail_on_the_device_too(tiny_bundle):
    engine = DeviceEngine(load_bundle(tiny_bundle), device="cpu", precision="fp32", threads=1)
    grid = PatchGrid((16, 32, 32), (16, 32, 32), (0.5,) * 3)
    (core,) = BlockGrid(grid.volume_shape, grid.volume_shape)
    prepare = Preparation((Step("zscore"),), (Normalization(0.0, 1e-45),))
    with pytest.raises(EngineError, match="NaN or infinity"):
        engine.predict_block(
            np.ones((1, 16, 32, 32), np.uint16), core, grid, prepare, 1, window(grid.patch_shape)
        )


def test_a_worker_reads_the_next_volume_and_writes_the_last_one_while_it_computes(
    tmp_path, tiny_bundle, monkeypatch
):
    """By order: a forward pass waits until the next volume is read, and the last one's writing waits for that pass."""
    n = 4
    source = write_image(
        tmp_path / "image.zarr", np.stack([blobs((16, 32, 32), t) for t in range(n)]), axes="tzyx"
    )
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "outputs": "scores"}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    monkeypatch.setattr(Plan, "tasks_at_once", property(lambda _: 3))
    changed, read, computed, writing, mine = threading.Condition(), [], [], [], threading.local()

    def happened(events, t):
        with changed:
            events.append(t)
            changed.notify_all()

    def wait_for(condition):
        with changed:
            assert changed.wait_for(condition, timeout=60), (read, computed, writing)

    def reads(self, box, original=Volume.read):
        mine.t = self.t
        values = original(self, box)
        happened(read, self.t)
        return values

    def computes(self, patches, original=TorchEngine.__call__):
        happened(computed, mine.t)
        place = len(computed)
        wait_for(lambda: len(read) >= min(place + 1, n))
        wait_for(lambda: place == 1 or computed[place - 2] in writing)
        return original(self, patches)

    def writes(self, box, values, original=Volume.write):
        happened(writing, self.t)
        place = computed.index(self.t)
        wait_for(lambda: place == n - 1 or len(computed) > place + 1)
        original(self, box, values)

    monkeypatch.setattr(Volume, "read", reads)
    monkeypatch.setattr(Volume, "write", writes)
    monkeypatch.setattr(TorchEngine, "__call__", computes)
    engine.open_engine.cache_clear()
    with ThreadPoolExecutor(3) as pool:
        groups = [
            pool.submit(worker.run_tasks, plan.run, plan.fingerprint, None, "volume", [t])
            for t in range(n)
        ]
        outcomes = [outcome for group in groups for outcome in group.result()]
    assert [(outcome.index, outcome.error) for outcome in outcomes] == [(t, "") for t in range(n)]


def test_a_gpu_worker_is_planned_with_the_memory_of_all_it_has_in_hand(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "block": "16,16,32"}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    on_gpu = plan.model_copy(update={"engine": replace(plan.engine, device="cuda")})
    on_gpu = Plan.model_construct(**dict(on_gpu))
    idle = IDLE_BYTES + 4 * plan.n_parameters
    for stage in ("label", "relabel", "downsample"):
        assert on_gpu.projected_bytes[stage] - idle == 3 * (plan.projected_bytes[stage] - idle)


@pytest.mark.parametrize(
    ("seconds", "fits", "expected"),
    [((1, 0.6, 0.59, 0.1), 8, 2), ((4, 3, 2, 1), 8, 8), ((4, 3, 2, 1), 2, 2)],
)
def test_the_batch_is_the_quickest_that_fits(seconds, fits, expected, monkeypatch):
    spec = engine.EngineSpec("torch", "cuda", "bf16", 1, 1)
    pace = dict(zip((1, 2, 4, 8), seconds, strict=True))
    monkeypatch.setattr(engine, "measure_patch_s", lambda model, spec, shape: pace[spec.batch])
    monkeypatch.setattr(
        engine,
        "open_engine",
        lambda _, spec: SimpleNamespace(largest_batch=fits if spec.batch > fits else None),
    )
    assert engine.with_quickest_batch(None, spec, (16, 32, 32)).batch == expected
