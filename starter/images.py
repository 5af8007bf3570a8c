"""Write simulated images and their masks, and the manifest that `megaseg train` takes.

    python starter/images.py FOLDER --n 44 --first-seed 1 [--idr0062 ../shared/data/idr0062_6001240_level1]

Each image is a function of its seed. Every kind of structure comes in turn, at
any difficulty; the last quarter validates. Of the labelled stack of idr0062
(CC BY 4.0), the first half along z trains and 64 planes after it validate; the
rest is what is judged.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from tifffile import imread, imwrite

from megaseg_dask.simulation import KINDS, simulate

SHAPE = (64, 160, 160)
# One real stack among many simulations: so many random patches of it in each epoch.
_TIMES_REAL = {"train": 8, "val": 3}
_PLANES = {"train": slice(0, 118), "val": slice(118, 182)}


def write_images(
    folder: Path, n: int, first_seed: int, shape: tuple[int, ...] = SHAPE, idr0062: Path | None = None
) -> Path:
    """Write n pairs of OME-TIFF files and return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    rng = np.random.default_rng(first_seed)
    for i in range(n):
        made = simulate(first_seed + i, shape, KINDS[i % len(KINDS)], difficulty=rng.uniform(0, 1))
        files = [f"{i:03d}_{name}.ome.tif" for name in ("raw", "seg")]
        for file, values in zip(files, (made.image, made.mask.astype(np.uint8)), strict=True):
            imwrite(folder / file, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
        rows.append([*files, "train" if i < 0.75 * n else "val"])
    if idr0062 is not None:
        for split, times in _TIMES_REAL.items():
            rows += [[*_write_part(folder, idr0062, split), split]] * times
    manifest = folder / "images.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "seg", "split"], *rows])
    return manifest


def _write_part(folder: Path, idr0062: Path, split: str) -> list[str]:
    files = [f"idr0062_{split}_{name}.ome.tif" for name in ("raw", "seg")]
    for file, name in zip(files, ("DAPI", "labels_GT61"), strict=True):
        values = imread(idr0062 / f"6001240_L1_{name}.ome.tif")[_PLANES[split]]
        values = values if name == "DAPI" else (values > 0).astype(np.uint8)
        imwrite(folder / file, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=44)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--idr0062", type=Path, help="folder of the labelled stack of idr0062, to train on half of it")
    args = parser.parse_args()
    write_images(args.folder, args.n, args.first_seed, tuple(args.shape), args.idr0062)
