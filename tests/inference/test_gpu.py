"""GPUs of a machine and of a process, as pretended drivers and libraries tell of them."""

import os

import pytest
import torch

from megaseg_dask.errors import EngineError
from megaseg_dask.inference import calibration, gpu
from megaseg_dask.inference.engine import EngineSpec, resolve_engine
from megaseg_dask.inference.ensemble import BundleRef, ModelRef
from tests.fixtures.gpus import BUSY, DEAD, NO_ENGINE, Gpu

INSTANCES = (Gpu("MIG-a"), Gpu("MIG-b"))
TWO = (Gpu("GPU-a"), Gpu("GPU-b"))


@pytest.mark.parametrize(
    ("names", "gpus", "expected"),
    [
        (None, TWO, ["0", "1"]),
        ("", TWO, []),
        ("-1", TWO, []),
        ("1,0", TWO, ["1", "0"]),
        ("0,0", TWO, []),
        ("0,-1,1", TWO, ["0"]),
        ("GPU-b, GPU-a", TWO, ["GPU-b", "GPU-a"]),
        ("NoDevFiles", TWO, []),
        ("MIG-a,MIG-b", INSTANCES, ["MIG-a", "MIG-b"]),
        ("MIG-b", INSTANCES, ["MIG-b"]),
        ("MIG-c", INSTANCES, []),
    ],
)
def test_each_device_that_is_named_is_one(names, gpus, expected, machine, monkeypatch):
    machine.has(*gpus)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert gpu.visible_devices() == expected
    assert resolve_engine("torch").device == ("cuda" if expected else "cpu")
    # A context would take memory of the device, and all of it where it serves one process.
    assert machine.noted("context") == {}


def test_a_machine_without_a_driver_has_no_gpu():
    assert gpu.installed_devices() == []
    assert gpu.open_device("fp16").problem


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (Gpu("GPU-a"), ""),
        (Gpu("GPU-a", fails="convolution"), DEAD.partition("\n")[0]),
        (Gpu("GPU-a", has_bf16=False), "it has no bfloat16: plan with --precision fp16 or fp32"),
    ],
)
def test_a_device_is_believed_after_a_convolution(device, problem, machine):
    machine.has(device)
    found = gpu.open_device("bf16")
    assert (found.uuid, found.problem) == ("GPU-a", problem)
    assert found.free_bytes == (0 if "CUDA error" in problem else device.free_bytes)


def test_a_device_that_another_process_holds_alone_is_no_device(machine):
    machine.has(Gpu("GPU-a", is_exclusive=True))
    # The first process of a machine is always there.
    (machine.folder / "owner-GPU-a").write_text("1")
    assert gpu.open_device("fp16").problem == BUSY.partition("\n")[0]


def test_the_first_convolution_is_a_real_one():
    gpu.convolve("cpu")


FULL = {
    "of the allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "of the driver": torch.AcceleratorError("CUDA error: out of memory"),
    "of cuDNN": RuntimeError(NO_ENGINE),
    "of its search": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "of its handle": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "of cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
}
FAILED = {
    "of the device": torch.AcceleratorError(DEAD),
    "of a held device": torch.AcceleratorError(BUSY),
    "of older PyTorch": RuntimeError("CUDA error: unspecified launch failure"),
    "of cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "of Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}
OTHER = {
    "a bug": ZeroDivisionError("a bug"),
    "shapes": RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    "ours": EngineError("the network returned NaN or infinity"),
    "the host": MemoryError("out of memory"),
}


@pytest.mark.parametrize("errors", [FULL, FAILED, OTHER], ids=["full", "failed", "other"])
def test_errors_of_a_device_are_known_by_what_helps(errors):
    for name, error in errors.items():
        assert gpu.is_out_of_memory(error) == (errors is FULL), name
        assert gpu.is_device_error(error) == (errors is FAILED), name


# -- timing


@pytest.fixture
def model(tiny_bundle) -> ModelRef:
    from megaseg_dask.models.registry import load

    _, bundle = load(str(tiny_bundle))
    ref = BundleRef(str(tiny_bundle), "tiny", bundle.digest)
    return ModelRef((ref,), "gaussian", 1, ("seg",), ())


ON_GPU = EngineSpec("torch", "cuda", "fp32", 1)
PATCH = (16, 32, 32)


def test_a_gpu_is_measured_once_in_a_process_that_ends(machine, model):
    machine.has(Gpu("GPU-a", max_batch=2, face="cuDNN"))
    assert calibration.quickest_batch(model, ON_GPU, PATCH) in (1, 2)
    assert calibration.quickest_batch(model, ON_GPU, PATCH) in (1, 2)
    # Not by this process, whose context would stay.
    [(process, opened)] = machine.noted("context").items()
    assert process != os.getpid()
    assert set(opened) == {"GPU-a"}


def test_a_machine_that_cannot_measure_plans_for_others(machine, model):
    machine.has()
    assert calibration.quickest_batch(model, ON_GPU, PATCH) == calibration.DEFAULT_GPU_BATCH
    with pytest.raises(EngineError, match="this machine has no GPU"):
        calibration.measure_patch_s(model, ON_GPU, 4, PATCH)
    machine.has(Gpu("GPU-a", fails="convolution"))
    with pytest.raises(EngineError, match="could not be measured: CUDA error: an illegal memory"):
        calibration.measure_patch_s(model, ON_GPU, 4, PATCH)
