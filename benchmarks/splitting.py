"""What ``--split distance`` gains on labelled stacks, and what it costs with many objects.

    python -m benchmarks.splitting quality [--data FOLDER] [--synthetic FOLDER]
    python -m benchmarks.splitting cost

``quality`` is the table of docs/objects.md: panoptic quality and average precision (at IoU 0.5)
of objects of 50 voxels and more, for each mask and depth. ``cost`` runs whole runs in this
process, with an engine that costs nothing, and keeps processor seconds and memory of each stage.

Expected of the cost, before it was run: an object that comes apart takes about 3 ms for 1000
voxels of its box, so 5000 pairs of 2000 voxels take half a minute, several times as long as
labelling. Tiny objects cannot hold a maximum of the depth, which their boxes tell: the stage
``split`` then takes less than a tenth of labelling. No stage needs more than was projected.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from skimage.measure import label

from benchmarks.labelled import Labelled, add_folders, iter_stacks
from benchmarks.machine import describe, keep
from benchmarks.prediction import predict, starter
from megaseg_dask.algorithms.geometry import PatchGrid
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.algorithms.splitting import split_object
from megaseg_dask.inference import certificate
from megaseg_dask.inference.openvino import OpenVinoEngine
from megaseg_dask.models.registry import load
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location
from megaseg_dask.tools.sample import write_sample
from starter.thresholds import otsu_smoothed

DEPTHS_UM = (None, 0.25, 0.5, 0.75, 1.0, 1.5)
MIN_SIZE = 50

Mask = NDArray[np.bool_]


# -- quality


def label_objects(
    mask: Mask, spacing_um: tuple[float, ...], depth_um: float | None
) -> NDArray[np.int64]:
    """Return the components of a mask, each taken apart if a depth is given."""
    whole = np.asarray(label(mask, connectivity=1), np.int64)
    if depth_um is None:
        return whole
    parts = whole.copy()
    n_parts = int(whole.max())
    for number, place in enumerate(find_objects(whole), 1):
        of_object = whole[place] == number
        at_end = [
            (side.start == 0, side.stop == extent)
            for side, extent in zip(place, mask.shape, strict=True)
        ]
        found = split_object(of_object, at_end, spacing_um, depth_um)
        if found is not None:
            parts[place][of_object] = n_parts + found[of_object]
            n_parts += int(found.max())
    return parts


def drop_small(labels: NDArray[Any]) -> NDArray[Any]:
    """Return labels without objects of a few voxels."""
    is_kept = np.bincount(labels.ravel().astype(np.int64)) >= MIN_SIZE
    is_kept[0] = False
    return np.where(is_kept[labels], labels, 0)


def measure_quality(stacks: Iterator[Labelled]) -> dict[str, Any]:
    """Return panoptic quality and average precision of each stack, mask and depth."""
    bundle = load("starter")[1]
    found: dict[str, Any] = {"machine": describe(), "min_size": MIN_SIZE}
    means: dict[str, list[float]] = defaultdict(list)
    with starter() as engine:
        for stack in stacks:
            grid = PatchGrid(stack.image.shape, bundle.patch_shape, bundle.overlap)
            masks = {
                "labels": stack.truth > 0,
                "starter": predict(engine, stack.image, grid) > 0,
                "otsu": otsu_smoothed(stack.image),
            }
            truth = drop_small(stack.truth.astype(np.int64))
            for name, mask in masks.items():
                row = {}
                for depth_um in DEPTHS_UM:
                    labels = drop_small(label_objects(mask, stack.spacing_um, depth_um))
                    result = evaluate(labels, truth)
                    row[str(depth_um)] = {
                        "pq": round(result.panoptic_quality, 2),
                        "ap50": round(result.matchings[0].average_precision, 2),
                        "objects": result.n_predicted,
                    }
                    means[str(depth_um)].append(result.panoptic_quality)
                found[f"{stack.name} ({len(np.unique(truth)) - 1} objects), {name}"] = row
                print(stack.name, name, {depth: each["pq"] for depth, each in row.items()})
    found["mean pq"] = {depth: round(float(np.mean(values)), 2) for depth, values in means.items()}
    return found


# -- cost


def pairs_of_balls(shape: tuple[int, ...], spacing: int, radius: int) -> NDArray[np.uint16]:
    """Return pairs of balls that touch, on a grid: as many as fit."""
    image = np.zeros(shape, np.uint16)
    cell = np.zeros((spacing, spacing, 2 * spacing), np.uint16)
    z, y, x = np.ogrid[tuple(slice(0, extent) for extent in cell.shape)]
    for center in (spacing - radius, spacing + radius - 1):
        middle = spacing // 2
        cell[(z - middle) ** 2 + (y - middle) ** 2 + (x - center) ** 2 <= radius**2] = 1000
    fitting = [extent // n for extent, n in zip(shape, cell.shape, strict=True)]
    filled = np.tile(cell, fitting)
    image[tuple(slice(extent) for extent in filled.shape)] = filled
    return image


def tiny_balls(shape: tuple[int, ...], n_balls: int) -> NDArray[np.uint16]:
    """Return balls of 5 voxels across at random places, which touch at times."""
    rng = np.random.default_rng(0)
    image = np.zeros(shape, np.uint16)
    centers = np.stack([rng.integers(2, extent - 2, n_balls) for extent in shape], axis=1)
    reach = np.arange(-2, 3)
    offsets = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), -1).reshape(-1, 3)
    for offset in offsets[(offsets**2).sum(axis=1) <= 5]:
        image[tuple((centers + offset).T)] = 1000
    return image


def measure_run(image: NDArray[np.uint16], spacing_um: tuple[float, ...]) -> dict[str, Any]:
    """Return processor seconds, peak and projected memory of the stages of a run."""
    spent_s: dict[str, float] = defaultdict(float)
    run_task = worker.run_task

    def timed(workspace: Any, stage: str, index: int) -> Any:
        began = time.process_time()
        try:
            return run_task(workspace, stage, index)
        finally:
            spent_s[stage] += time.process_time() - began

    worker.run_task = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "image.zarr")
            write_sample(Location.of(source), image, image, spacing_um)
            target = str(Path(folder, "out.zarr"))
            options = {"model": "starter", "workers": 0, "overlap": 0, "outputs": "labels"}
            settings = parse_settings({**options, "split": "distance", "memory": "2GB"})
            [(plan, _)] = plan_runs(str(source), target, settings)
            result = segment(str(source), target, settings)
    finally:
        worker.run_task = run_task
    rows = {}
    for stage, seconds in spent_s.items():
        rows[stage] = {
            "cpu_s": round(seconds, 1),
            "peak_mb": round(result.peak_bytes[stage] / 1e6),
            "projected_mb": round(plan.projected(plan.stage(stage)) / 1e6),
        }
    return {
        "shape": image.shape,
        "block": plan.block_shape,
        "components": int(label(image > 0, connectivity=1).max()),
        "objects": result.n_objects,
        "warnings": result.warnings,
        "stages": rows,
    }


def measure_cost(extent: int) -> dict[str, Any]:
    """Return the cost with 10^4 objects, and in a volume of tiny ones."""
    # Logits without a network: bright is foreground.
    OpenVinoEngine.__call__ = lambda self, patches: patches - 1  # type: ignore[method-assign]
    certificate.MIN_DICE = 0
    certificate.MAX_DIFFERENCE = dict.fromkeys(certificate.MAX_DIFFERENCE, np.inf)
    spacing_um = (0.29, 0.26, 0.26)
    field = pairs_of_balls((64, 800, 880), 16, 6)
    found = {"machine": describe(), "field of 10^4 objects": measure_run(field, spacing_um)}
    del field
    # As dense as 10^6 balls in 1024³.
    tiny = tiny_balls((extent,) * 3, 10**6 * extent**3 // 1024**3)
    found[f"tiny objects, {extent}³"] = measure_run(tiny, spacing_um)
    return found


def main() -> None:
    """Measure one of the two, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "cost"))
    parser.add_argument("--extent", type=int, default=512, help="of the volume of tiny objects")
    add_folders(parser)
    options = parser.parse_args()
    if options.what == "quality":
        keep("splitting", measure_quality(iter_stacks(options.data, options.synthetic)))
    else:
        keep("splitting_cost", measure_cost(options.extent))


if __name__ == "__main__":
    main()
