"""Checks of this machine: its parts, what ``auto`` would choose and why, and the usual troubles.

No worker is started. Nothing is written but the probes at an address to which a
run could write.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megaseg_dask.errors import BundleError
from megaseg_dask.inference.engine import resolve_engine
from megaseg_dask.inference.gpu import cuda_version, device_names
from megaseg_dask.inference.machine import memory_bytes, n_cores
from megaseg_dask.messages import install_command, size_text, version_of
from megaseg_dask.models.registry import PUBLISHED, find
from megaseg_dask.plan.planner import default_memory_bytes
from megaseg_dask.tools.doctor.address import Finding, check_address, check_disk

_PACKAGES = (
    "megaseg-dask",
    "torch",
    "monai",
    "dask",
    "distributed",
    "zarr",
    "ome-zarr-models",
    "numpy",
)
_MIN_MEMORY_BYTES = 4 * 10**9
# First Linux driver for each CUDA, from NVIDIA's page on CUDA compatibility.
_MIN_DRIVER = {"11": 450, "12": 525, "13": 580}
_DRIVER_TIMEOUT_S = 20
_PYTORCH_PAGE = "https://pytorch.org/get-started"


def examine(addresses: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield findings about this machine, most basic first; then those about addresses."""
    yield _check_platform()
    yield _check_packages()
    yield _check_memory()
    yield check_disk(Path.cwd(), "here")
    yield check_gpu()
    yield _check_engine()
    yield _check_dashboard()
    for name in (*PUBLISHED, "starter"):
        yield _check_model(name)
    for address in addresses:
        yield from check_address(address)


def _check_platform() -> Finding:
    python = f"Python {platform.python_version()}"
    return Finding("machine", f"{python}, {platform.platform()}, {n_cores()} cores")


def _check_packages() -> Finding:
    versions = {name: version_of(name) for name in _PACKAGES}
    installed = [f"{name} {text}" for name, text in versions.items() if text != "missing"]
    return Finding("packages", ", ".join(installed))


def _check_memory() -> Finding:
    total = memory_bytes()
    available = min(psutil.virtual_memory().available, total)
    free = f"{size_text(available)} free of {size_text(total)}"
    budget = f"a worker may use {size_text(default_memory_bytes(1))} (--memory)"
    advice = ""
    if available < _MIN_MEMORY_BYTES:
        advice = "too little for most models: close other programs, or use a smaller --patch"
    return Finding("memory", f"{free}; {budget}", advice)


def check_gpu() -> Finding:
    """Return which GPUs can be used, or why one that is there cannot."""
    devices = device_names()
    if devices:
        return Finding("GPU", f"{', '.join(devices)}: one worker each")
    program = shutil.which("nvidia-smi")
    if program is None and not Path("/dev/nvidia0").exists():
        return Finding("GPU", "none")
    cuda = cuda_version()
    if cuda is None:
        advice = f"install a CUDA build of PyTorch ({_PYTORCH_PAGE})"
        return Finding("GPU", "found, but this PyTorch is built without CUDA", advice)
    driver = _driver_version(program) if program else None
    text = f"found, but PyTorch (CUDA {cuda}) cannot use it"
    return Finding("GPU", text, _gpu_advice(driver, cuda))


def _driver_version(program: str) -> str | None:
    """Return the version of the NVIDIA driver; ``None`` if its own program cannot tell."""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip().partition("\n")[0]


def _gpu_advice(driver: str | None, cuda: str) -> str:
    """Return why a GPU that is there cannot be used, and the next step."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPU: unset it, or set it to a GPU"
    if not driver:
        return (
            "the driver does not answer: run nvidia-smi; start a container with its GPUs (--gpus "
            "all, --nv)"
        )
    minimum = _MIN_DRIVER.get(cuda.partition(".")[0], 0)
    major = driver.partition(".")[0]
    if major.isdecimal() and int(major) < minimum:
        return (
            f"driver {driver} is too old for CUDA {cuda}, which needs {minimum} or newer: "
            f"update the driver, or install a PyTorch for an older CUDA ({_PYTORCH_PAGE})"
        )
    test = "python -c 'import torch; torch.zeros(1).cuda()'"
    return f"driver {driver} is new enough for CUDA {cuda}: run {test} to see the error"


def _check_engine() -> Finding:
    """Return the engine that ``auto`` chooses here, and why."""
    spec = resolve_engine()
    reason = "PyTorch finds a GPU" if spec.device == "cuda" else "no usable GPU"
    engine = f"engine {spec.engine} {spec.precision} on {spec.device} ({reason})"
    advice = ""
    if spec.engine == "torch" and spec.device == "cpu":
        advice = f"OpenVINO is several times faster on a CPU: {install_command('openvino')}"
    return Finding("auto", f"{engine}, {spec.threads} threads per forward pass", advice)


def _check_dashboard() -> Finding:
    # Dask's dashboard is drawn by bokeh.
    if importlib.util.find_spec("bokeh"):
        return Finding("dashboard", "available")
    advice = f"to see the workers in a browser: {install_command('dashboard')}"
    return Finding("dashboard", "not available", advice)


def _check_model(name: str) -> Finding:
    try:
        path = find(name)
    except BundleError as error:
        return Finding(f"model {name}", "damaged", str(error))
    if path:
        return Finding(f"model {name}", str(path))
    advice = f"megaseg models fetch {name}, or megaseg models import if you have the file"
    return Finding(f"model {name}", "not in the cache", advice)
