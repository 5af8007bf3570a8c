"""One field, each engine against MONAI eager, which is what cyto-dl runs: the same network, the same windows.

Ours is the whole job, from Zarr to scores, labels and pyramid; MONAI's is the
forward passes and blending alone, in a process with the system's defaults.
Beside the wall time stand processor seconds, of all processes: on a machine
that others use too, only those compare.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity

from benchmarks.machine import describe, keep
from megaseg_dask.demo import write_sample
from megaseg_dask.inference import measure_patch_s, open_engine
from megaseg_dask.models import build_network
from megaseg_dask.models.zoo import load
from megaseg_dask.plan import Plan
from megaseg_dask.run import plan_runs, segment
from megaseg_dask.settings import parse_settings
from megaseg_dask.simulation import simulate
from megaseg_dask.stores import Location

PUBLISHED_SHAPE = (65, 624, 924)

CASES: dict[str, dict[str, str]] = {
    "torch": {"engine": "torch"},
    "openvino": {"engine": "openvino"},
    "openvino, bf16": {"engine": "openvino", "precision": "bf16"},
    "openvino, patch auto": {"engine": "openvino", "patch": "auto"},
}


def measure(shape: tuple[int, ...] = PUBLISHED_SHAPE, model: str = "starter") -> dict[str, Any]:
    """Return seconds of MONAI and of each case, their ratios, and how far the scores are apart."""
    from megaseg_dask.engines.openvino import has_bfloat16

    machine = describe()
    made = simulate(0, shape)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "field.zarr"
        write_sample(Location.of(source), made.image, made.mask.astype(np.uint16))
        [(plan, _)] = plan_runs(str(source), f"{folder}/none.zarr", parse_settings({"model": model}))
        before = cpu_s()
        monai_s, expected = predict_by_monai(made.image, model, plan.patch_grid.patch_shape, plan.patch_grid.overlap)
        monai_cpu_s = cpu_s() - before
        for name, options in CASES.items():
            if options.get("precision") != "bf16" or has_bfloat16():
                found[name] = _run(source, Path(folder) / f"{name}.zarr", {"model": model, **options}, expected)
    for case in found.values():
        case["ratio"] = round(monai_s / case["wall_s"], 2)
        case["ratio_cpu"] = round(monai_cpu_s / case["cpu_s"], 2)
    return {
        "machine": machine,
        "shape": shape,
        "model": model,
        "windows": len(plan.patch_grid),
        "monai_s": round(monai_s, 1),
        "monai_cpu_s": round(monai_cpu_s, 1),
        "ours": found,
    }


def _run(source: Path, target: Path, options: dict[str, str], expected: np.ndarray) -> dict[str, Any]:
    settings = parse_settings({**options, "scores_dtype": "float32"})
    [(plan, _)] = plan_runs(str(source), str(target), settings)
    # The worker finds the converted network where this leaves it, as from the second run on.
    patch_s = measure_patch_s(plan.model, plan.engine, plan.patch_grid.patch_shape)
    patch_cpu_s = measure_patch_cpu_s(plan)
    before, started = cpu_s(), time.perf_counter()
    result = segment(str(source), str(target), settings)
    wall_s, spent_s = time.perf_counter() - started, cpu_s() - before
    scores = np.asarray((Location.of(target) / "0").open_array()[...])
    one, other = scores > 0.5, expected > 0.5
    task_s = result.wall_s
    return {
        "wall_s": round(wall_s, 1),
        "without_start_of_workers_s": round(task_s, 1),
        "cpu_s": round(spent_s, 1),
        "patch_s": round(patch_s, 3),
        "patch_cpu_s": round(patch_cpu_s, 3),
        "patches": len(plan.patch_grid),
        "patch_shape": plan.patch_grid.patch_shape,
        # Of the pace of single passes, just before: on a busy machine it may even be negative.
        "share_not_inference": round(1 - patch_s * len(plan.patch_grid) / task_s, 3),
        # This one holds the start of the worker too: imports, and the compilation of the network.
        "share_not_inference_cpu": round(1 - patch_cpu_s * len(plan.patch_grid) / spent_s, 3),
        "largest_difference": float(np.abs(scores - expected).max()),
        "dice_with_monai": round(float(2 * (one & other).sum() / max(one.sum() + other.sum(), 1)), 6),
        "projected_bytes": plan.projected_bytes,
        "peak_bytes": result.peak_bytes,
    }


def cpu_s() -> float:
    """Return processor seconds of this process and of all that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure_patch_cpu_s(plan: Plan) -> float:
    """Return processor seconds of the cheapest of three forward passes."""
    engine = open_engine(plan.model, plan.engine)
    patches = np.zeros((plan.engine.batch, plan.model.in_channels, *plan.patch_grid.patch_shape), np.float32)
    passes = []
    for _ in range(3):
        before = time.process_time()
        engine(patches)
        passes.append(time.process_time() - before)
    return min(passes) / plan.engine.batch


def predict_by_monai(image: np.ndarray, model: str, patch_shape: Any, overlap: Any) -> tuple[float, np.ndarray]:
    """Return the seconds and the scores of MONAI's own loop over the whole volume."""
    network = build_network(load(model)[1])
    started = time.perf_counter()
    normalised = NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32))
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.as_tensor(np.asarray(normalised))[None], patch_shape, 1, network, overlap=overlap, mode="gaussian"
        )
        scores = torch.sigmoid(logits)[0, 0].numpy()
    return time.perf_counter() - started, scores


def main() -> None:
    """Measure one shape and model, and keep the result under a name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=",".join(map(str, PUBLISHED_SHAPE)))
    parser.add_argument("--model", default="starter")
    parser.add_argument("--name", default="field")
    options = parser.parse_args()
    keep(options.name, measure(tuple(map(int, options.shape.split(","))), options.model))


if __name__ == "__main__":
    main()
