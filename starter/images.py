"""Write simulated images and their masks, and the manifest that `megaseg train` takes.

    python starter/images.py FOLDER --n 44 --first-seed 1

Each image is a function of its seed. Every kind of structure comes in turn, at
any difficulty; the last quarter validates.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from tifffile import imwrite

from megaseg_dask.simulation import KINDS, simulate

SHAPE = (64, 160, 160)


def write_images(folder: Path, n: int, first_seed: int, shape: tuple[int, ...] = SHAPE) -> Path:
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
    manifest = folder / "images.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "seg", "split"], *rows])
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=44)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    args = parser.parse_args()
    write_images(args.folder, args.n, args.first_seed, tuple(args.shape))
