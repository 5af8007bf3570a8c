"""The table of a GPU in one command: ``python -m benchmarks.gpu``.

``--tiny`` runs all of it on a CPU in seconds. Measured are the seconds per
field, cold and steady, beside what the card reaches in a large bfloat16 product
and in a copy; agreement with float32; the ten kernels that take longest; and
fields per second from Zarr to Zarr.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.field import PUBLISHED_SHAPE, write_untrained
from benchmarks.machine import describe, keep
from benchmarks.scale import write_series
from megaseg_dask.algorithms.geometry import Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.events import Event, Progress
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.pytorch import DeviceEngine
from megaseg_dask.models import Bundle, NetworkSpec
from megaseg_dask.models.build import build_network
from megaseg_dask.models.cytodl.transforms import Step
from megaseg_dask.models.registry import load
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from starter.simulation import simulate


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    device: str
    field: Shape
    patch: Shape
    filters: tuple[int, ...]
    matmul: int
    copy_bytes: int
    n_fields: int
    precisions: tuple[str, ...]
    batches: tuple[int, ...]


FULL = Size(
    "cuda",
    PUBLISHED_SHAPE,
    (64, 128, 128),
    NetworkSpec().filters,
    8192,
    2**31,
    16,
    ("bf16", "fp16"),
    (1, 2, 4, 8),
)
TINY = Size("cpu", (24, 40, 48), (16, 32, 32), (8, 8, 16, 16, 16), 256, 2**20, 2, ("bf16",), (1, 2))


def measure(size: Size = FULL, *, compiled: bool = False) -> dict[str, Any]:
    """Return all figures of this machine's GPU."""
    peak = measure_peak(size)
    bandwidth = measure_copy(size)
    cases = {}
    jobs = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "MegaSeg_v1's network": str(write_untrained(Path(folder), size.filters)),
            "light": "starter",
        }
        for name, model in models.items():
            bundle = load(model)[1]
            for overlap, precision in product((0.0, 0.25), size.precisions):
                case = measure_field(size, bundle, overlap, precision, compiled)
                case["fraction_of_peak"] = round(case["flop"] / case["steady_s"] / peak, 4)
                cases[f"{name}, overlap {overlap}, {precision}"] = case
            jobs[name] = measure_job(size, model)
    return {
        "machine": describe(),
        "gpu": torch.cuda.get_device_name(0) if size.device == "cuda" else None,
        "shape": size.field,
        "compiled": compiled,
        "bf16_matmul_tflop_per_s": round(peak / 1e12, 3),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "cases": cases,
        "zarr_to_zarr": jobs,
    }


def measure_field(
    size: Size, bundle: Bundle, overlap: float, precision: str, compiled: bool
) -> dict[str, Any]:
    """Return seconds of one field from host to host: the first, and the quickest later one."""
    image = simulate(0, size.field).image[None]
    grid = PatchGrid(size.field, size.patch, (overlap,) * 3)
    core = Box.of(size.field)
    normalization = Normalization(float(image.mean()), float(image.std()))
    prepare = Preparation((Step("zscore"),), (normalization,))

    def run(engine: DeviceEngine, batch: int) -> tuple[np.ndarray, np.ndarray]:
        patches = Patches(grid, batch=batch)
        (output,) = engine.predict_block(Block(core, image, patches, prepare))
        return output.scores("uint8"), output.mask(0.5)

    exact, mask = run(open_engine(bundle, size, "fp32"), 1)
    steady: dict[int, float] = {}
    cold_s = 0.0
    for batch in size.batches:
        started = time.perf_counter()
        engine = open_engine(bundle, size, precision, compiled)
        half, half_mask = run(engine, batch)
        cold_s = cold_s or time.perf_counter() - started
        if engine.largest_batch is None:
            steady[batch] = min(timed(lambda e=engine, b=batch: run(e, b)) for _ in range(3))
    best = min(steady, key=lambda batch: steady[batch])
    engine = open_engine(bundle, size, precision, compiled)
    run(engine, best)
    return {
        "windows": len(grid),
        "flop": len(grid) * count_flop(bundle, size.patch),
        "cold_s": round(cold_s, 3),
        "steady_s": round(steady[best], 4),
        "steady_s_by_batch": {str(batch): round(seconds, 4) for batch, seconds in steady.items()},
        "dice_with_fp32": round(
            float(2 * (mask & half_mask).sum() / max(int(mask.sum()) + half_mask.sum(), 1)), 6
        ),
        "largest_difference_of_255": int(np.abs(exact.astype(int) - half).max()),
        "top_kernels": top_kernels(lambda: run(engine, best), size.device),
    }


class CompiledEngine(DeviceEngine):
    """An engine whose network is compiled for its shapes."""

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        """Build and compile the network."""
        super().__init__(bundle, spec)
        self._network = torch.compile(self._network, dynamic=False)


def open_engine(bundle: Bundle, size: Size, precision: str, compiled: bool = False) -> DeviceEngine:
    """Return an engine whose blocks stay on the device."""
    kind = CompiledEngine if compiled else DeviceEngine
    return kind(bundle, EngineSpec("torch", size.device, precision, threads=1))


def measure_peak(size: Size) -> float:
    """Return what a large product of bfloat16 matrices reaches, in operations a second."""
    a = torch.randn((size.matmul, size.matmul), device=size.device, dtype=torch.bfloat16)
    a @ a
    return 2 * size.matmul**3 / min(timed(lambda: a @ a) for _ in range(5))


def measure_copy(size: Size) -> float:
    """Return what a copy within the device's memory reaches, bytes read and written a second."""
    source = torch.zeros(size.copy_bytes, dtype=torch.uint8, device=size.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size.copy_bytes / min(timed(lambda: target.copy_(source)) for _ in range(5))


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of some work, the device's included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flop(bundle: Bundle, patch: Shape) -> int:
    """Return the floating-point operations of a forward pass.

    They are counted at the smallest patch, and grow with its voxels.
    """
    least = tuple(2 * n for n in bundle.network.patch_multiple)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        build_network(bundle)(torch.zeros((1, bundle.network.in_channels, *least)))
    return counter.get_total_flops() * math.prod(patch) // math.prod(least)


def top_kernels(work: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Return the ten kernels that took longest, with their share of all."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        work()
        synchronize()

    def time_of(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(recorded.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events)) or 1
    return [
        {
            "kernel": event.key[:80],
            "calls": event.count,
            "share": round(time_of(event) / total, 3),
        }
        for event in events[:10]
    ]


def measure_job(size: Size, model: str) -> dict[str, Any]:
    """Return fields per second of a whole job: a timelapse from Zarr to scores, labels and pyramid.

    They are counted between the first and the last field: without the start of the
    worker, and the first field's compilation.
    """
    image = np.broadcast_to(simulate(0, size.field).image, (size.n_fields, 1, *size.field))
    done: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Progress) and event.n_done > len(done):
            done.extend([time.perf_counter()] * (event.n_done - len(done)))

    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder) / "series.zarr", image)
        settings = parse_settings(
            {
                "model": model,
                "device": size.device,
                "engine": "torch",
                "workers": 1,
                "patch": size.patch,
            }
        )
        segment(f"{folder}/series.zarr", f"{folder}/out.zarr", settings, emit=note)
    return {
        "fields": size.n_fields,
        "fields_per_s": round((len(done) - 1) / max(done[-1] - done[0], 1e-9), 3),
    }


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in seconds; nothing is kept")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, whose first field takes minutes"
    )
    options = parser.parse_args()
    if options.tiny:
        print(measure(TINY, compiled=options.compile))
    else:
        name = "gpu-compiled" if options.compile else "gpu"
        keep(name, measure(compiled=options.compile))


if __name__ == "__main__":
    main()
