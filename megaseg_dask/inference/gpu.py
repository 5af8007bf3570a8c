"""The GPUs of this machine, as PyTorch sees them.

PyTorch takes seconds to import, so it is asked only where a driver is installed.
"""

import ctypes
import sys
from pathlib import Path

_NVIDIA_DRIVER = "libcuda.so.1"
_AMD_DRIVER = Path("/dev/kfd")


def cuda_devices() -> list[str]:
    """Return the names of the GPUs that PyTorch can use here."""
    if not _may_have_gpu():
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cuda_identity() -> tuple[str, str] | None:
    """Return name and UUID of the GPU that this process computes on, if it sees one."""
    if not _may_have_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, str(properties.uuid)


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
