"""Blocks that stay on their device, and what a worker does beside its forward passes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.algorithms.geometry import BlockGrid, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import EngineError
from megaseg_dask.inference import calibration, engine
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec, close_engine
from megaseg_dask.inference.ensemble import Averaged, BundleRef, ModelRef
from megaseg_dask.inference.pytorch import DeviceEngine, DeviceOutputs, TorchEngine
from megaseg_dask.models import load_bundle
from megaseg_dask.models.cytodl.transforms import Step
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.memory import IDLE_BYTES
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from megaseg_dask.run.tasks import worker
from megaseg_dask.run.workspace import Workspace
from tests.fixtures.bundles import write_checkpoint
from tests.fixtures.images import blobs, write_image

GRID = PatchGrid((24, 40, 50), (16, 32, 32), (0.5,) * 3)
SPEC = EngineSpec("torch", "cpu", "fp32", threads=1)


@pytest.mark.parametrize("dtype", ["uint16", "int8", "float32"])
@pytest.mark.parametrize("steps", [("zscore",), ("zscore", "clip")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_on_its_device_is_that_of_the_reference(dtype, steps, batch, tiny_bundle):
    values = blobs(GRID.volume_shape).astype(dtype)[None]
    made = tuple(Step(name, (-1.0, 1.0)) if name == "clip" else Step(name) for name in steps)
    prepare = Preparation(made, (Normalization(float(values.mean()), float(values.std())),))
    on_host, on_device = (
        cls(load_bundle(tiny_bundle), SPEC) for cls in (TorchEngine, DeviceEngine)
    )
    patches = Patches(GRID, batch=batch)
    for core in BlockGrid(GRID.volume_shape, (24, 20, 50)):
        block = Block(core, values[:, *GRID.read_box(core).slices], patches, prepare)
        (expected,) = on_host.predict_block(block)
        (found,) = on_device.predict_block(block)
        assert_array_equal(found.logits(), expected.logits())
        scores = sigmoid(expected.logits())
        assert_array_equal(expected.scores("float32"), scores)
        assert_array_equal(expected.scores("uint8"), np.rint(scores * np.float32(255)))
        assert_array_equal(expected.mask(0.6), scores > np.float32(0.6))
        assert_allclose(found.scores("float32"), scores, atol=1e-6)
        steps_off = found.scores("uint8").astype(int) - expected.scores("uint8")
        assert np.abs(steps_off).max() <= 1
        # Where sigmoids differ in the last bit, a score may pass the threshold by just that.
        clear = np.abs(scores - 0.6) > 1e-6
        assert_array_equal(found.mask(0.6)[clear], expected.mask(0.6)[clear])


@pytest.mark.parametrize("kind", [TorchEngine, DeviceEngine])
def test_a_voxel_that_is_background_by_request_is_so_in_all_outputs(kind, tiny_bundle):
    values = blobs(GRID.volume_shape, dtype="float32")[None]
    (core,) = BlockGrid(GRID.volume_shape, GRID.volume_shape)
    prepare = Preparation((Step("zscore"),), (Normalization(100.0, 20.0),))
    background = np.zeros(core.shape, bool)
    background[3:9, :20, 7] = True
    network = kind(load_bundle(tiny_bundle), SPEC)
    (whole,) = network.predict_block(Block(core, values, Patches(GRID), prepare))
    (output,) = network.predict_block(Block(core, values, Patches(GRID), prepare, background))
    for read in (lambda o: o.scores("float32"), lambda o: o.scores("uint8"), lambda o: o.mask(0.2)):
        assert not read(output)[background].any()
        assert_array_equal(read(output)[~background], read(whole)[~background])
    assert np.isnan(output.logits()[background]).all()
    assert_array_equal(output.logits()[~background], whole.logits()[~background])


def test_a_batch_leaves_the_settings_of_pytorch_as_they_were(tiny_bundle):
    settings = {
        torch.get_num_threads: lambda: torch.set_num_threads(3),
        torch.get_float32_matmul_precision: lambda: torch.set_float32_matmul_precision("medium"),
    }
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        for change in settings.values():
            change()
        network = TorchEngine(load_bundle(tiny_bundle), SPEC)
        network(np.zeros((1, 1, 16, 32, 32), np.float32))
        assert [read() for read in settings] == [3, "medium"]
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def test_logits_that_are_no_numbers_fail_on_the_device_too(tiny_bundle):
    network = DeviceEngine(load_bundle(tiny_bundle), SPEC)
    grid = PatchGrid((16, 32, 32), (16, 32, 32), (0.5,) * 3)
    (core,) = BlockGrid(grid.volume_shape, grid.volume_shape)
    prepare = Preparation((Step("zscore"),), (Normalization(0.0, 1e-45),))
    block = Block(core, np.ones((1, 16, 32, 32), np.uint16), Patches(grid), prepare)
    with pytest.raises(EngineError, match="NaN or infinity"):
        network.predict_block(block)


BF16 = EngineSpec("torch", "cpu", "bf16", threads=1)


def whole(values, batch=1):
    grid = PatchGrid(values.shape[1:], (16, 32, 32), (0.5,) * 3)
    (core,) = BlockGrid(grid.volume_shape, grid.volume_shape)
    prepare = Preparation(
        (Step("zscore"),), (Normalization(float(values.mean()), float(values.std())),)
    )
    return Block(core, values, Patches(grid, batch=batch), prepare)


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_averages_are_blended_on_the_device_as_on_the_host(
    is_mirrored, batch, tiny_bundle, tmp_path
):
    other = write_checkpoint(tmp_path / "other.ckpt", seed=1)
    bundles = [load_bundle(path) for path in (tiny_bundle, other)]
    host, device = (
        Averaged([kind(bundle, SPEC) for bundle in bundles], is_mirrored=is_mirrored)
        for kind in (TorchEngine, DeviceEngine)
    )
    block = whole(blobs((16, 40, 32))[None], batch)
    (expected,) = host.predict_block(block)
    (found,) = device.predict_block(block)
    assert isinstance(found, DeviceOutputs)
    assert_allclose(found.logits(), expected.logits(), atol=1e-5)


def test_half_precision_runs_fused_and_falls_back_to_the_network_as_it_is_written(tiny_bundle):
    engine = DeviceEngine(load_bundle(tiny_bundle), BF16)
    block = whole(blobs((16, 40, 32))[None], batch=2)
    (exact,) = DeviceEngine(load_bundle(tiny_bundle), SPEC).predict_block(block)
    assert engine.identity == "fused"
    (fused,) = engine.predict_block(block)
    assert engine.fall_back()
    assert engine.identity == ""
    assert not engine.fall_back()
    (written,) = engine.predict_block(block)
    for output in (fused, written):
        scores = output.scores("float32")
        assert 0 < np.abs(scores - exact.scores("float32")).max() < 0.1
    assert (fused.logits() != written.logits()).any()


@pytest.mark.parametrize("is_averaged", [False, True])
def test_a_block_without_numbers_in_half_precision_is_predicted_again_in_float32(
    is_averaged, tiny_bundle, monkeypatch
):
    engine = DeviceEngine(load_bundle(tiny_bundle), BF16)
    network = Averaged([engine], is_mirrored=True) if is_averaged else engine
    exact = DeviceEngine(load_bundle(tiny_bundle), SPEC)
    expected = Averaged([exact], is_mirrored=True) if is_averaged else exact
    block = whole(blobs((16, 32, 32))[None])
    original = engine._fused
    engine._fused = lambda patches: original(patches) * torch.inf
    (found,) = network.predict_block(block)
    # Layouts differ, and with them the order of sums.
    assert_allclose(found.logits(), expected.predict_block(block)[0].logits(), atol=1e-4)
    assert network.n_repeated == 1
    engine._fused = original
    network.predict_block(block)
    assert network.n_repeated == 1


def test_one_thread_launches_whoever_asks(tiny_bundle, monkeypatch):
    engine = DeviceEngine(load_bundle(tiny_bundle), SPEC)
    seen = set()

    def forward(self, patches, original=TorchEngine._forward):
        seen.add(threading.current_thread().name)
        return original(self, patches)

    monkeypatch.setattr(TorchEngine, "_forward", forward)
    block = whole(blobs((16, 32, 32))[None])
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(engine.predict_block, [block] * 3))
    engine(np.zeros((1, 1, 16, 32, 32), np.float32))
    assert seen == {"launcher_0"}


def test_a_worker_reads_the_next_volume_and_writes_the_last_one_while_it_computes(
    tmp_path, tiny_bundle, monkeypatch
):
    """By order: a forward pass waits until the next volume is read.

    Also the last one's writing waits for that pass.
    """
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
    close_engine()
    process = worker.Worker(worker.RunWork(Workspace(plan)))
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda t: process.attempt("volume", t), range(n)))
    assert [(outcome.index, outcome.error) for outcome in outcomes] == [(t, "") for t in range(n)]


def test_a_gpu_worker_is_planned_with_the_memory_of_all_it_has_in_hand(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "block": "16,16,32"}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    on_gpu = plan.model_copy(
        update={"resolved": replace(plan.resolved, engine=replace(plan.engine, device="cuda"))}
    )
    on_gpu = Plan.model_construct(**dict(on_gpu))
    idle = IDLE_BYTES + 4 * plan.n_parameters
    for stage in ("label", "relabel", "downsample"):
        assert on_gpu.projected_bytes[stage] - idle == 3 * (plan.projected_bytes[stage] - idle)


class Paced:
    """An engine that takes so long for a patch at each batch, by a clock of its own."""

    def __init__(self, seconds, fits):
        self.seconds, self.fits, self.now = seconds, fits, 0.0
        self.largest_batch = None

    def __call__(self, patches):
        batch = len(patches)
        self.now += batch * self.seconds[batch]
        if batch > self.fits:
            self.largest_batch = self.fits

    def prepare_pass(self, shape):
        return lambda: self(np.zeros(shape, np.uint8))

    def close(self):
        pass


@pytest.mark.parametrize(
    ("seconds", "fits", "expected"),
    [((1, 0.6, 0.59, 0.1), 8, 2), ((4, 3, 2, 1), 8, 8), ((4, 3, 2, 1), 2, 2)],
)
def test_the_batch_is_the_quickest_that_fits_and_the_engine_is_opened_once(
    seconds, fits, expected, monkeypatch
):
    paced = Paced(dict(zip((1, 2, 4, 8), seconds, strict=True)), fits)
    opened = []
    monkeypatch.setattr(engine, "_open_bundle", lambda ref, spec: opened.append(ref) or paced)
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: paced.now))
    bundle = BundleRef("a", "a", "0")
    model = ModelRef((bundle,), "gaussian", 1, ("seg",), ())
    spec = EngineSpec("torch", "cuda", "bf16", 1)
    assert calibration._Passes(model, spec, (16, 32, 32)).measure() == expected
    assert opened == [bundle]


FACES = {
    "the allocator's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuDNN's": RuntimeError("GET was unable to find an engine to execute this computation"),
}


class Small(DeviceEngine):
    """A device whose memory holds so many patches, and then says so in one of several ways."""

    holds = 1
    face: Exception

    def _forward(self, patches):
        if len(patches) > self.holds:
            raise self.face
        return super()._forward(patches)


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_each_face_of_a_full_device_makes_the_batch_smaller(face, tiny_bundle):
    engine = Small(load_bundle(tiny_bundle), SPEC)
    engine.face = face
    patches = np.zeros((3, 1, 16, 32, 32), np.float32)
    expected = TorchEngine(load_bundle(tiny_bundle), SPEC)(patches)
    assert_allclose(engine(patches), expected, atol=1e-4)
    assert engine.largest_batch == 1
    engine.holds = 0
    with pytest.raises(EngineError, match=r"one patch .* does not fit in the memory"):
        engine(patches)


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<u2"])
def test_any_byte_order_and_memory_that_is_read_only_go_to_a_device(dtype, tiny_bundle):
    values = blobs(GRID.volume_shape).astype(dtype)[None]
    values.flags.writeable = False
    engine = DeviceEngine(load_bundle(tiny_bundle), SPEC)
    assert_array_equal(engine._upload(values).numpy(), values)
