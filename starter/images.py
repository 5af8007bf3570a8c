"""Write simulated images and their masks, and the manifest that `megaseg train` takes.

    python -m starter.images FOLDER --n 340 --first-seed 1 [--idr0062 FOLDER]

Each image is a function of its number and the first seed. Every kind of structure comes
in turn, hard images more often than easy ones; nuclei and dense networks come more often.
Thin structures often lie over strong light of other planes. Some detectors count photons,
without noise of their own. Some images hold structure in a small part only: a loss of
overlap counts a wrong speck there, and not in images without any structure. Some images are
changed as files are on their way to a user: resampled, smoothed, with another gamma, or
filled up with empty planes. The last eighth validates. With `--idr0062`, parts of that
labelled stack train too, a third as many.
"""

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tifffile import imwrite

from starter.microscope import to_16_bits
from starter.real import draw_part, read_stack
from starter.simulation import KINDS, NOISE, THIN, simulate
from starter.space import Floats, Mask, on_grid

# A little more than a patch, so that patches differ from epoch to epoch.
SHAPE = (64, 144, 144)
# An image that validates is as large as a patch: one forward pass each.
VALIDATION_SHAPE = (64, 128, 128)
# Large objects are the hardest to fill, dense networks the hardest to take apart.
_KINDS = (*KINDS, *["nuclei"] * 6, *["reticulum"] * 2, "tubes", "filaments", "network", NOISE)
_SHARE_OF_SPARSE = 0.25
_SHARE_OF_COUNTING = 0.15
# Of thin structures: light of other planes, in units of the structure's mean.
_SHARE_OF_HAZY = 0.3
_STRONG_HAZE = (1.0, 3.0)
_SHARE_OF_VALIDATION = 1 / 8
_SHARE_OF_REAL = 1 / 3
# What happens to an image on its way to a user, and how often.
_CHANGES = {"none": 0.4, "finer": 0.2, "gamma": 0.15, "smoothed": 0.15, "few planes": 0.1}
# Seeds of images that are given up because they hold nothing lie between those of two images.
_SEEDS_PER_IMAGE = 1000
_MIN_SHARE = 0.003

Row = tuple[str, str, str]


def write_images(folder: Path, n: int, first_seed: int, idr0062: Path | None = None) -> Path:
    """Write n pairs of OME-TIFF files, and those of a real stack, and return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write, folder, n, first_seed)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write, range(n)))
        if idr0062 is not None:
            write_part = partial(_write_part, folder, *read_stack(idr0062), first_seed)
            rows += pool.map(write_part, range(round(n * _SHARE_OF_REAL)))
    manifest = folder / "images.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("raw", "seg", "split"), *rows])
    return manifest


def _write(folder: Path, n: int, first_seed: int, number: int) -> Row:
    """Write one image and its mask, and return its row."""
    trains = number < round(n * (1 - _SHARE_OF_VALIDATION))
    shape = SHAPE if trains else VALIDATION_SHAPE
    rng = np.random.default_rng([first_seed, number])
    kind = _KINDS[number % len(_KINDS)]
    image, mask = _simulated(first_seed * 10**6 + number * _SEEDS_PER_IMAGE, shape, kind, rng)
    return _write_pair(folder, f"{number:03d}", image, mask, "train" if trains else "val")


def _write_part(folder: Path, image: Floats, mask: Mask, first_seed: int, number: int) -> Row:
    """Write a part of a real stack and its mask, and return its row."""
    rng = np.random.default_rng([first_seed, number, 1])
    return _write_pair(folder, f"real_{number:03d}", *draw_part(image, mask, SHAPE, rng), "train")


def _write_pair(folder: Path, name: str, image: NDArray[Any], mask: Mask, split: str) -> Row:
    raw = f"{name}_raw.ome.tif"
    seg = f"{name}_seg.ome.tif"
    for file, values in ((raw, image), (seg, mask.astype(np.uint8))):
        imwrite(folder / file, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    return raw, seg, split


def _simulated(
    first_seed: int, shape: tuple[int, int, int], kind: str, rng: np.random.Generator
) -> tuple[NDArray[np.uint16] | NDArray[np.uint8], Mask]:
    """Return the first image from `first_seed` on that holds enough, changed as files are."""
    difficulty = rng.uniform(0, 1) ** 0.6
    is_hazy = kind in THIN and rng.random() < _SHARE_OF_HAZY
    haze = rng.uniform(*_STRONG_HAZE) if is_hazy else None
    read_noise = 0.0 if rng.random() < _SHARE_OF_COUNTING else None
    is_sparse = rng.random() < _SHARE_OF_SPARSE
    change = rng.choice(list(_CHANGES), p=list(_CHANGES.values()))
    finer = rng.uniform(1.2, 2.6, 3) if change == "finer" else np.ones(3)
    planes = int(rng.integers(12, 48)) if change == "few planes" else shape[0]
    z, y, x = np.ceil(np.array((planes, *shape[1:])) / finer).astype(int)
    for seed in count(first_seed):
        made = simulate(
            seed,
            (int(z), int(y), int(x)),
            kind,
            difficulty,
            haze=haze,
            read_noise=read_noise,
            sparse=is_sparse,
        )
        if kind == NOISE or is_sparse or made.mask.mean() > _MIN_SHARE:
            break
    if change == "finer":
        return resampled(made.image, made.mask, shape)
    if change == "few planes":
        return with_empty_planes(made.image, made.mask, shape[0])
    image = made.image.astype(np.float32)
    if change == "gamma":
        low = image.min()
        span = max(float(image.max() - low), 1.0)
        return to_16_bits(((image - low) / span) ** rng.uniform(0.6, 1.5)), made.mask
    if change == "smoothed":
        # More would hide a thin structure, whose mask stays as it is.
        max_sigma = 0.9 if kind in THIN else 1.5
        smooth = ndimage.gaussian_filter(image, rng.uniform(0, max_sigma, 3), truncate=3)
        return to_16_bits(smooth / max(float(smooth.max()), 1.0)), made.mask
    return made.image, made.mask


def resampled(
    image: NDArray[np.uint16] | NDArray[np.uint8], mask: Mask, shape: tuple[int, int, int]
) -> tuple[NDArray[np.uint16], Mask]:
    """Return an image and its mask on a finer grid of `shape`, linearly between voxels."""
    return np.rint(on_grid(image, shape)).astype(np.uint16), on_grid(mask, shape) >= 0.5


def with_empty_planes(
    image: NDArray[np.uint16] | NDArray[np.uint8], mask: Mask, n_planes: int
) -> tuple[NDArray[np.uint16] | NDArray[np.uint8], Mask]:
    """Return a stack between planes of its mean, as prediction fills a small one up to a patch."""
    missing = n_planes - len(image)
    around = ((missing // 2, missing - missing // 2), (0, 0), (0, 0))
    return np.pad(image, around, constant_values=round(float(image.mean()))), np.pad(mask, around)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=340)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--idr0062", type=Path, help="the folder of the labelled stack of idr0062")
    args = parser.parse_args()
    write_images(args.folder, args.n, args.first_seed, args.idr0062)
