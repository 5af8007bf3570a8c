"""One field, ours against MONAI eager, which is what cyto-dl runs: the same network, the same windows.

Ours is the whole job, from Zarr to scores, labels and pyramid; MONAI's is the
forward passes and blending alone, in a process with the system's defaults.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity

from benchmarks.machine import describe
from megaseg_dask.demo import write_sample
from megaseg_dask.models import build_network, load_bundle
from megaseg_dask.models.zoo import locate
from megaseg_dask.run import plan_runs, segment
from megaseg_dask.settings import parse_settings
from megaseg_dask.simulation import simulate
from megaseg_dask.stores import Location

PUBLISHED_SHAPE = (65, 624, 924)


def measure(shape: tuple[int, ...] = PUBLISHED_SHAPE, model: str = "starter") -> dict[str, Any]:
    """Return seconds of both, their ratio, and how far the scores are apart."""
    machine = describe()
    made = simulate(0, shape)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "field.zarr", Path(folder) / "out.zarr"
        write_sample(Location.of(source), made.image, made.mask.astype(np.uint16))
        settings = parse_settings({"model": model, "scores_dtype": "float32"})
        [(plan, _)] = plan_runs(str(source), str(target), settings)
        started = time.perf_counter()
        result = segment(str(source), str(target), settings)
        ours_s = time.perf_counter() - started
        scores = np.asarray((Location.of(target) / "0").open_array()[...])
    theirs_s, expected = _monai(made.image, model, plan.patch_grid.patch_shape, plan.patch_grid.overlap)
    return {
        "machine": machine,
        "shape": shape,
        "model": model,
        "patches": len(plan.patch_grid),
        "ours_s": round(ours_s, 1),
        "ours_without_workers_s": round(result.wall_s, 1),
        "monai_s": round(theirs_s, 1),
        "ratio": round(theirs_s / ours_s, 2),
        "largest_difference": float(np.abs(scores - expected).max()),
        "projected_bytes": plan.projected_bytes,
        "peak_bytes": result.peak_bytes,
    }


def _monai(image: np.ndarray, model: str, patch_shape: Any, overlap: Any) -> tuple[float, np.ndarray]:
    network = build_network(load_bundle(locate(model)))
    started = time.perf_counter()
    normalised = NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32))
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.as_tensor(np.asarray(normalised))[None], patch_shape, 1, network, overlap=overlap, mode="gaussian"
        )
        scores = torch.sigmoid(logits)[0, 0].numpy()
    return time.perf_counter() - started, scores
