"""What this machine has, what ``auto`` would choose on it and why, and the usual troubles.

No worker is started, and nothing is written but the probes at an address that
a run could write to.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from megaseg_dask.errors import BundleError
from megaseg_dask.inference.engine import n_cores, resolve_engine
from megaseg_dask.models.registry import PUBLISHED, find
from megaseg_dask.plan.planner import default_memory_bytes
from megaseg_dask.tools.doctor.address import Finding, disk_finding, examine_address

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
_LITTLE_MEMORY = 4 * 10**9
# The first drivers that programs built with a CUDA of this number run on (NVIDIA, CUDA compatibility, Linux).
_LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}
_PATIENCE_S = 20


def examine(addresses: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield what is found, good and bad, most basic first; last what some addresses are good for."""
    yield from (
        _platform(),
        *_packages(),
        _memory(),
        disk_finding(Path.cwd(), "here"),
        *_gpu(),
        _choice(),
        _dashboard(),
    )
    yield from _models()
    for address in addresses:
        yield from examine_address(address)


def _platform() -> Finding:
    return Finding(
        "machine", f"Python {platform.python_version()}, {platform.platform()}, {n_cores()} cores"
    )


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
    text = (
        f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}; a worker may use "
        f"{default_memory_bytes(1) / 1e9:.1f} GB (--memory)"
    )
    return Finding("memory", text, advice if memory.available < _LITTLE_MEMORY else "")


def _gpu() -> list[Finding]:
    from megaseg_dask.inference.pytorch import cuda_devices, cuda_version

    devices = cuda_devices()
    if devices:
        return [Finding("GPU", f"{', '.join(devices)}: one worker each")]
    driver = _driver()
    if driver is None and not Path("/dev/nvidia0").exists():
        return [Finding("GPU", "none")]
    built_with = cuda_version()
    if built_with is None:
        return [
            Finding(
                "GPU",
                "there, but this PyTorch is built without CUDA",
                "install a CUDA build of PyTorch (https://pytorch.org/get-started)",
            )
        ]
    return [
        Finding(
            "GPU", f"there, but PyTorch (CUDA {built_with}) cannot use it", _why(driver, built_with)
        )
    ]


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, empty if its own program cannot tell; ``None`` if that is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().partition("\n")[0]


def _why(driver: str | None, built_with: str) -> str:
    """Return why a GPU that is there cannot be used."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\d|GPU-|MIG-", hidden):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset that, or name a GPU"
    if not driver:
        return "the driver does not answer: run nvidia-smi; in a container, start it with its GPUs (--gpus all, --nv)"
    least = _LEAST_DRIVER.get(built_with.partition(".")[0], 0)
    if re.match(r"\d+", driver) and int(driver.partition(".")[0]) < least:
        return (
            f"driver {driver} is too old for CUDA {built_with}, which needs {least} or newer: update the driver, "
            "or install a PyTorch for an older CUDA (https://pytorch.org/get-started)"
        )
    return f"driver {driver} should do for CUDA {built_with}: try python -c 'import torch; torch.zeros(1).cuda()'"


def _choice() -> Finding:
    spec = resolve_engine()
    why = "PyTorch sees a GPU" if spec.device == "cuda" else "no usable GPU"
    advice = "OpenVINO is several times faster on a CPU: pip install 'megaseg-dask[openvino]'"
    text = f"engine {spec.engine} {spec.precision} on {spec.device} ({why}), {spec.threads} threads per forward pass"
    return Finding("auto", text, advice if (spec.engine, spec.device) == ("torch", "cpu") else "")


def _dashboard() -> Finding:
    there = importlib.util.find_spec("bokeh") is not None
    advice = "to watch workers in a browser: pip install 'megaseg-dask[dashboard]'"
    return Finding(
        "dashboard", "can be shown" if there else "cannot be shown", "" if there else advice
    )


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
