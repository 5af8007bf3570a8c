"""What this machine has, what ``auto`` would choose on it and why, and the usual troubles.

It only looks: nothing is written, no worker is started.
"""

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from megaseg_dask.errors import BundleError
from megaseg_dask.inference import n_cores, resolve_engine
from megaseg_dask.models.zoo import PUBLISHED, find
from megaseg_dask.planning import default_memory_bytes

_PACKAGES = ("megaseg-dask", "torch", "monai", "dask", "distributed", "zarr", "ome-zarr-models", "numpy", "dask-cuda")
_LITTLE_MEMORY = 4 * 10**9
_LITTLE_DISK = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; ``advice`` is there if something is wrong."""

    name: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Return what was found, good and bad, most basic first."""
    return [_platform(), *_packages(), _memory(), _disk(), *_gpu(), _choice(), *_models()]


def _platform() -> Finding:
    return Finding("machine", f"Python {platform.python_version()}, {platform.platform()}, {n_cores()} cores")


def _packages() -> list[Finding]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return [Finding("packages", ", ".join(found))]


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    advice = "too little for most models: close other programs, or use a smaller --patch"
    text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}; a worker may use " \
           f"{default_memory_bytes(1) / 1e9:.1f} GB (--memory)"  # fmt: skip
    return Finding("memory", text, advice if memory.available < _LITTLE_MEMORY else "")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    advice = "choose a target on a larger disk: a run needs about 3 bytes per voxel, 8 while it works"
    return Finding("disk", f"{free / 1e9:.0f} GB free here", advice if free < _LITTLE_DISK else "")


def _gpu() -> list[Finding]:
    from megaseg_dask.engines.pytorch import cuda_devices, cuda_version

    devices = cuda_devices()
    if devices:
        return [Finding("GPU", ", ".join(devices))]
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        return [Finding("GPU", "none")]
    if cuda_version() is None:
        return [Finding("GPU", "there, but this PyTorch is built without CUDA",
                        "install a CUDA build of PyTorch (https://pytorch.org/get-started)")]  # fmt: skip
    return [Finding("GPU", f"there, but PyTorch (CUDA {cuda_version()}) cannot use it",
                    "the NVIDIA driver may be older than that CUDA: run nvidia-smi")]  # fmt: skip


def _choice() -> Finding:
    spec = resolve_engine()
    why = "PyTorch sees a GPU" if spec.device == "cuda" else "no usable GPU"
    advice = "OpenVINO is several times faster on a CPU: pip install 'megaseg-dask[openvino]'"
    text = f"engine {spec.engine} {spec.precision} on {spec.device} ({why}), {spec.threads} threads per forward pass"
    return Finding("auto", text, advice if (spec.engine, spec.device) == ("torch", "cpu") else "")


def _models() -> list[Finding]:
    findings = []
    for name in (*PUBLISHED, "starter"):
        try:
            path = find(name)
        except BundleError as error:
            findings.append(Finding(f"model {name}", "damaged", str(error)))
            continue
        advice = "" if path else f"megaseg models fetch {name}, or see megaseg models import"
        findings.append(Finding(f"model {name}", str(path or "not in the cache"), advice))
    return findings
