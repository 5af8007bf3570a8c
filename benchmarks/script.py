"""The whole job against an honest afternoon's script.

The script uses dask's ``map_overlap``, the same network, dask-image and ome-zarr.

The script does what a good user of these libraries would: statistics of the
whole image, blocks with an overlap, MONAI's sliding window in each, scores
written once, labels stitched by dask-image. Its patches belong to the blocks,
so its scores are not those of the unsplit volume; how far they are off is
part of the result.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch
import zarr
from dask_image.ndmeasure import label
from monai.inferers import sliding_window_inference
from ome_zarr.writer import write_image, write_labels
from skimage.measure import label as label_whole

from benchmarks.field import PUBLISHED_SHAPE, predict_by_monai
from benchmarks.machine import describe
from megaseg_dask.models.build import build_network
from megaseg_dask.models.registry import load
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location, open_array
from megaseg_dask.tools.sample import write_sample
from starter.simulation import simulate

PATCH = (64, 128, 128)
OVERLAP = 0.25
DEPTH = (0, 32, 32)


def run_script(source: Path, target: Path, model: str, block: tuple[int, ...]) -> None:
    """What the user writes."""
    network = build_network(load(model)[1])
    image = da.from_zarr(str(source / "0")).rechunk(block).astype("float32")
    mean, std = dask.compute(image.mean(), image.std())

    def predict(values: np.ndarray) -> np.ndarray:
        patch = torch.as_tensor((values - mean) / std)[None, None]
        with torch.inference_mode():
            logits = sliding_window_inference(
                patch, PATCH, 1, network, overlap=OVERLAP, mode="gaussian"
            )
        return torch.sigmoid(logits)[0, 0].numpy()

    scores = image.map_overlap(
        predict, depth=DEPTH, boundary="reflect", dtype="float32", meta=np.empty((0, 0, 0), "f4")
    )
    group = zarr.open_group(target, mode="w")
    # One block at a time: each forward pass takes all cores.
    with dask.config.set(scheduler="single-threaded"):
        write_image(scores, group, axes="zyx", storage_options={"chunks": (65, 128, 128)})
    labels, n = label(da.from_zarr(str(target / _finest(group))) > 0.5)
    write_labels(
        labels.astype("uint32"),
        group,
        "cells",
        axes="zyx",
        storage_options={"chunks": (65, 128, 128)},
    )
    int(n)


def _finest(group: zarr.Group) -> str:
    """Return the name of the finest level, which differs between versions of ome-zarr."""
    return "0" if "0" in group else "s0"


def measure(shape: tuple[int, ...] = PUBLISHED_SHAPE, model: str = "starter") -> dict[str, Any]:
    """Return seconds of both, and how far the scores and objects are from the unsplit volume's."""
    machine = describe()
    made = simulate(0, shape)
    block = (shape[0], -(-shape[1] // 2), -(-shape[2] // 2))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "field.zarr"
        ours = Path(folder) / "ours.zarr"
        theirs = Path(folder) / "theirs.zarr"
        write_sample(Location.of(source), made.image, made.mask.astype(np.uint16))
        options = {
            "model": model,
            "scores_dtype": "float32",
            "patch": PATCH,
            "overlap": OVERLAP,
            "block": block,
        }
        settings = parse_settings(options)
        [(plan, _)] = plan_runs(str(source), str(ours), settings)
        _, expected = predict_by_monai(made.image, model, PATCH, OVERLAP)
        started = time.perf_counter()
        segment(str(source), str(ours), settings)
        ours_s = time.perf_counter() - started
        started = time.perf_counter()
        run_script(source, theirs, model, block)
        theirs_s = time.perf_counter() - started
        group = zarr.open_group(theirs, mode="r")
        found = {
            "ours": np.asarray(open_array(Location.of(ours) / "0")[...]),
            "script": np.asarray(group[_finest(group)][...]),
        }
    n_true = int(label_whole(expected > 0.5, connectivity=1).max())
    return {
        "machine": machine,
        "shape": shape,
        "model": model,
        "block": block,
        "engine": plan.engine.engine,
        "ours_s": round(ours_s, 1),
        "script_s": round(theirs_s, 1),
        "ratio": round(theirs_s / ours_s, 2),
        "objects_unsplit": n_true,
        **{
            f"objects_{name}": int(label_whole(s > 0.5, connectivity=1).max())
            for name, s in found.items()
        },
        **{
            f"largest_difference_{name}": float(np.abs(s - expected).max())
            for name, s in found.items()
        },
        **{
            f"voxels_differ_{name}": int(((s > 0.5) != (expected > 0.5)).sum())
            for name, s in found.items()
        },
    }
