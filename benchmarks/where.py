"""What ``--where`` saves: predictions and time, for blobs of 64 voxels and for absent chunks.

    python -m benchmarks.where

Blobs fill a tenth of the volume: scattered, or together as in a tissue. Chunks are
absent in 70 % of a volume, around what was imaged.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from benchmarks.machine import describe, keep
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.sample import write_sample

# Of the predictions that are counted, and of those that are timed.
COUNTED = (128, 1024, 1024)
TIMED = (64, 640, 640)
DIAMETER = 64
SHARE = 0.1
# The part of the volume, in y and x, in which the blobs lie.
SPREADS = {"scattered": 1.0, "in a fifth": 0.2, "filled": 0.12}
BLOCK = "64,320,320"


def blobs(shape: tuple[int, ...], spread: float) -> NDArray[np.uint16]:
    """Return balls that fill a tenth of a volume, within ``spread`` of it in y and x together."""
    rng = np.random.default_rng(0)
    radius = DIAMETER // 2
    z, y, x = np.ogrid[-radius:radius, -radius:radius, -radius:radius]
    ball = z**2 + y**2 + x**2 <= radius**2
    side = spread**0.5
    room = np.array([shape[0], side * shape[1], side * shape[2]]).astype(int)
    mask = np.zeros(shape, np.uint16)
    n_voxels = 0
    while n_voxels < SHARE * mask.size:
        start = rng.integers(0, np.maximum(room - DIAMETER, 0) + 1)
        box = tuple(slice(a, a + DIAMETER) for a in start)
        n_voxels += int((ball & (mask[box] == 0)).sum())
        mask[box] |= ball
    return mask


def measure() -> dict[str, Any]:
    """Return predictions and seconds with and without a mask, and of what was imaged alone."""
    found: dict[str, Any] = {"machine": describe(), "counted": {}, "timed": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, spread in SPREADS.items():
            source = Path(folder, f"{name}.zarr")
            mask = blobs(COUNTED, spread)
            write_sample(Location.of(source), np.zeros(COUNTED, np.uint16), mask)
            for patch in (None, "32,64,64"):
                options = {"model": "starter", "where": "truth", "patch": patch}
                [(plan, _)] = plan_runs(str(source), f"{folder}/out.zarr", parse_settings(options))
                told: Any = summarize(plan)["where"]
                everywhere = told["predictions"] + told["predictions_left_out"]
                found["counted"][f"{name}, patch {patch or 'of the model'}"] = {
                    "share_of_voxels": told["voxels"],
                    "share_of_predictions": round(told["predictions"] / everywhere, 3),
                    "blocks_left_out": f"{told['blocks_left_out']} of {told['blocks']}",
                }
        found["timed"] = _timed(Path(folder))
    return found


def _timed(folder: Path) -> dict[str, Any]:
    """Return seconds of runs everywhere, where a mask is, and where chunks are."""
    source = folder / "timed.zarr"
    image = np.random.default_rng(1).normal(1000, 200, TIMED).clip(0).astype(np.uint16)
    write_sample(Location.of(source), image, blobs(TIMED, SPREADS["filled"]))
    # Chunks are stored one by one, as light-sheet programs write them.
    zarr.create_array(source / "0", data=image, chunks=(64, 128, 128), overwrite=True)
    rows = {}
    for name, where in (("everywhere", None), ("mask", "truth")):
        rows[name] = _run(source, folder / f"{name}.zarr", where)
    keys = sorted(path for path in (source / "0" / "c").rglob("*") if path.is_file())
    for path in keys[round(0.3 * len(keys)) :]:
        path.unlink()
    rows["70 % of chunks absent, everywhere"] = _run(source, folder / "absent.zarr", None)
    rows["70 % of chunks absent, data"] = _run(source, folder / "data.zarr", "data")
    return rows


def _run(source: Path, target: Path, where: str | None) -> dict[str, Any]:
    options = {"model": "starter", "where": where, "workers": 0, "block": BLOCK}
    settings = parse_settings(options)
    [(plan, _)] = plan_runs(str(source), str(target), settings)
    began = time.perf_counter()
    result = segment(str(source), str(target), settings)
    assert not result.failures
    return {"predictions": plan.n_predicted, "s": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    keep("where", measure())
