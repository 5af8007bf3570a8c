"""What a measurement ran on, and where it is kept."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions of this machine."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "monai", "numpy", "zarr", "distributed")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    return path.read_text().splitlines()


def keep(name: str, result: dict[str, Any]) -> None:
    """Print a result and write it to ``benchmarks/results``."""
    text = json.dumps(result, indent=1)
    print(text)
    (RESULTS / f"{name}.json").write_text(text + "\n")
