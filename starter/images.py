"""Write simulated images and their masks, and the manifest that `megaseg train` takes.

    python -m starter.images FOLDER --n 56 --first-seed 1 [--idr0062 ../shared/data/idr0062_6001240_level1]

Each image is a function of its seed. Every kind of structure comes in turn, at
any difficulty, and nuclei four times as often; the last seventh validates. Of
the labelled stack of idr0062 (CC BY 4.0), the first half along z trains, each
time distorted in another way, and 64 planes after it validate; the rest is
what is judged.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy import ndimage
from tifffile import imread, imwrite

from starter.simulation import KINDS, simulate

Array = np.ndarray

SHAPE = (64, 160, 160)
# What validates is as large as a patch: one forward pass each.
VALIDATION_SHAPE = (64, 128, 128)
_KINDS = (*KINDS, "nuclei", "nuclei", "nuclei")
# One real stack among many simulations: so many distorted copies of it, and so often what validates.
_TIMES_REAL, _TIMES_VALIDATING = 20, 3
_PLANES = slice(0, 118), slice(118, 182)


def write_images(folder: Path, n: int, first_seed: int, idr0062: Path | None = None) -> Path:
    """Write n pairs of OME-TIFF files, and those of the real stack, and return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    rng = np.random.default_rng(first_seed)
    for i in range(n):
        split = "train" if i < n * 6 / 7 else "val"
        shape = SHAPE if split == "train" else VALIDATION_SHAPE
        made = simulate(
            first_seed + i, shape, _KINDS[i % len(_KINDS)], difficulty=rng.uniform(0, 1)
        )
        rows.append([*_write(folder, f"{i:03d}", made.image, made.mask), split])
    if idr0062 is not None:
        image = imread(idr0062 / "6001240_L1_DAPI.ome.tif")
        mask = imread(idr0062 / "6001240_L1_labels_GT61.ome.tif") > 0
        known, held = ((image[planes], mask[planes]) for planes in _PLANES)
        rows += [
            [*_write(folder, f"idr0062_{i}", *distort(*known, rng)), "train"]
            for i in range(_TIMES_REAL)
        ]
        rows += [[*_write(folder, "idr0062_val", *held), "val"]] * _TIMES_VALIDATING
    manifest = folder / "images.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "seg", "split"], *rows])
    return manifest


def distort(image: Array, mask: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a stack and its mask turned, scaled, and the stack with other grey values, blur and noise."""
    turned = tuple(slice(None, None, int(rng.choice([1, -1]))) for _ in range(3))
    axes = rng.choice([(0, 1, 2), (0, 2, 1)])
    factors = rng.uniform((0.7, 0.8, 0.8), (1.3, 1.4, 1.4))
    values = ndimage.zoom(image[turned].transpose(axes).astype(np.float32), factors, order=1)
    inside = ndimage.zoom(mask[turned].transpose(axes), factors, order=0)
    # At least a patch; what is beyond the stack is its mirror.
    beyond = [
        (0, max(0, least - extent))
        for least, extent in zip(VALIDATION_SHAPE, values.shape, strict=True)
    ]
    values, inside = (np.pad(stack, beyond, "symmetric") for stack in (values, inside))
    low, high = values.min(), values.max()
    values = ((values - low) / (high - low)) ** rng.uniform(0.6, 1.5)
    values = ndimage.gaussian_filter(values, rng.uniform(0, 0.9, 3), truncate=2)
    values += rng.normal(0, rng.uniform(0, 0.03), values.shape)
    return (np.clip(values, 0, 1) * 60000).astype(np.uint16), inside


def _write(folder: Path, name: str, image: Array, mask: Array) -> list[str]:
    files = [f"{name}_{what}.ome.tif" for what in ("raw", "seg")]
    for file, values in zip(files, (image, mask.astype(np.uint8)), strict=True):
        imwrite(folder / file, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=56)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument(
        "--idr0062",
        type=Path,
        help="folder of the labelled stack of idr0062, to train on half of it",
    )
    args = parser.parse_args()
    write_images(args.folder, args.n, args.first_seed, args.idr0062)
