"""The GPUs of this machine and of this process, and how they fail.

PyTorch takes seconds to import, so it is asked only where a driver is installed. A client
counts devices and reads their memory by the driver's own library: a context of CUDA takes
half a gigabyte of a GPU, and all of one that serves one process at a time.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.errors import SettingsError

_NVIDIA_DRIVER = "libcuda.so.1"
_NVIDIA_MANAGEMENT = "libnvidia-ml.so.1"
_AMD_DRIVER = Path("/dev/kfd")

# One instance of a GPU that is divided (MIG).
_INSTANCE = "MIG-"

# cuDNN keeps an error of the allocator to itself, and says that no engine is left, or that its
# own allocation failed.
_OUT_OF_MEMORY = (
    "out of memory",
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# After one of these each later call of the process fails too.
_DEVICE_FAILED = (
    "CUDA error",
    "HIP error",
    "Triton Error [CUDA]",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
)


# -- of this machine, without a context


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them.

    Instances of a divided GPU count like GPUs.
    """
    if not _may_have_gpu():
        return []
    import torch

    # A batch system may have given us some of the machine's.
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    n_devices = torch.cuda.device_count()
    if n_devices and names and all(name.startswith(_INSTANCE) for name in names):
        # CUDA shows a process one of them, however many are listed.
        return names
    return names[:n_devices] or [str(i) for i in range(n_devices)]


def require_devices() -> list[str]:
    """Return the GPUs that this process may use.

    Raises:
        SettingsError: There is none.
    """
    devices = visible_devices()
    if not devices:
        raise SettingsError(
            "--device cuda: PyTorch finds no GPU here; run megaseg doctor to see why, or use "
            "--device cpu"
        )
    return devices


@dataclass(frozen=True, slots=True)
class Installed:
    """A GPU of this machine, as its driver tells it."""

    name: str
    uuid: str
    free_bytes: int


def installed_devices() -> list[Installed]:
    """Return the GPUs of this machine; none where the driver's library is not there."""
    with suppress(OSError, AttributeError):
        return list(_iter_installed())
    return []


def _iter_installed() -> Iterator[Installed]:
    library = ctypes.CDLL(_NVIDIA_MANAGEMENT)
    n_devices = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(n_devices)):
        return
    for i in range(n_devices.value):
        device = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)):
            continue
        # Of all, free and used.
        memory = (ctypes.c_ulonglong * 3)()
        library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        name = _text(library.nvmlDeviceGetName, device)
        uuid = _text(library.nvmlDeviceGetUUID, device)
        yield Installed(name, uuid, memory[1])


def _text(function: Callable[..., int], device: ctypes.c_void_p) -> str:
    text = ctypes.create_string_buffer(96)
    function(device, text, ctypes.c_uint(len(text)))
    return text.value.decode()


def device_names() -> list[str]:
    """Return the names of the GPUs that PyTorch can use here; it opens them."""
    if not _may_have_gpu():
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cuda_version() -> str | None:
    """Return the CUDA version that PyTorch was built with, if any."""
    import torch

    return torch.version.cuda


def _may_have_gpu() -> bool:
    if sys.platform != "linux" or _AMD_DRIVER.exists():
        return True
    try:
        ctypes.CDLL(_NVIDIA_DRIVER)
    except OSError:
        return False
    return True


# -- of this process


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that this process computes on; ``problem`` says why it cannot.

    ``free_bytes`` and ``total_bytes`` are of its memory. Beside what is free, this process may
    use what it holds already.
    """

    name: str | None = None
    uuid: str | None = None
    free_bytes: int = 0
    total_bytes: int = 0
    problem: str = ""


def open_device(precision: str) -> Device:
    """Return the GPU of this process, after a first convolution on it.

    That a GPU is listed proves nothing: the build of PyTorch may lack its architecture, another
    process may hold it alone, or it may have failed.
    """
    if not _may_have_gpu():
        return Device(problem="there is no driver of a GPU")
    import torch

    if not torch.cuda.is_available():
        return Device(problem=f"PyTorch {torch.__version__} sees no GPU")
    name = uuid = None
    try:
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        uuid = str(properties.uuid)
        convolve("cuda")
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
    except Exception as error:
        return Device(name, uuid, problem=first_line(error))
    return Device(name, uuid, free + held, total, precision_problem(precision))


def convolve(device: str) -> None:
    """Run a first convolution on a device.

    Raises:
        RuntimeError: It fails, or gives another result than that of a CPU.
    """
    import torch

    ones = torch.ones((1, 1, 4, 4, 4), device=device)
    total = torch.nn.functional.conv3d(ones, ones).item()
    if total != ones.numel():
        raise RuntimeError(f"a convolution that sums {ones.numel()} ones gives {total}")


def precision_problem(precision: str) -> str:
    """Return why the GPU of this process cannot compute in a precision; empty if it can."""
    import torch

    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "it has no bfloat16: plan with --precision fp16 or fp32"
    return ""


def peak_bytes() -> int:
    """Return the most memory of its GPU that this process held since :func:`reset_peak`.

    It is 0 in a process that computes on none.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


def reset_peak() -> None:
    """Start a new measurement of :func:`peak_bytes`."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


# -- how they fail


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether a GPU has too little memory for what was asked; less may fit."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _has_mark(error, _OUT_OF_MEMORY)


def is_device_error(error: BaseException | None) -> bool:
    """Return whether a GPU failed under this process, which can compute nothing on it any more."""
    if error is None or is_out_of_memory(error):
        return False
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and _has_mark(error, _DEVICE_FAILED)


def _has_mark(error: BaseException, marks: tuple[str, ...]) -> bool:
    text = str(error)
    return any(mark in text for mark in marks)


def first_line(error: BaseException) -> str:
    """Return what a library says of an error, without its advice to programmers."""
    return str(error).partition("\n")[0].strip() or type(error).__name__
