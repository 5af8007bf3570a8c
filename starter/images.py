"""Write simulated images and their masks, and the manifest that `megaseg train` takes.

    python -m starter.images FOLDER --n 56 --first-seed 1 [--idr0062 FOLDER]

Each image is a function of its seed. Every kind of structure comes in turn, at
any difficulty, and nuclei four times as often; the last seventh validates. Of
the labelled stack of idr0062 (CC BY 4.0), the first half along z trains, each
time distorted in another way, and 64 planes after it validate; the model is
judged on the rest.
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
# An image that validates is as large as a patch: one forward pass each.
VALIDATION_SHAPE = (64, 128, 128)
_KINDS = (*KINDS, "nuclei", "nuclei", "nuclei")
# One real stack among many simulations: its distorted copies, and how often its rest validates.
_N_DISTORTED = 20
_N_VALIDATING = 3
_TRAINING_PLANES = slice(0, 118)
_VALIDATION_PLANES = slice(118, 182)


def write_images(folder: Path, n: int, first_seed: int, idr0062: Path | None = None) -> Path:
    """Write n pairs of OME-TIFF files, and those of the real stack, and return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    rng = np.random.default_rng(first_seed)
    for i in range(n):
        trains = i < n * 6 / 7
        shape = SHAPE if trains else VALIDATION_SHAPE
        kind = _KINDS[i % len(_KINDS)]
        simulated = simulate(first_seed + i, shape, kind, difficulty=rng.uniform(0, 1))
        files = _write(folder, f"{i:03d}", simulated.image, simulated.mask)
        rows.append((*files, "train" if trains else "val"))
    if idr0062 is not None:
        rows += _write_real(folder, idr0062, rng)
    manifest = folder / "images.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("raw", "seg", "split"), *rows])
    return manifest


def _write_real(
    folder: Path, idr0062: Path, rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """Write distorted copies of one part of the real stack, and another part; return their rows."""
    image = imread(idr0062 / "6001240_L1_DAPI.ome.tif")
    mask = imread(idr0062 / "6001240_L1_labels_GT61.ome.tif") > 0
    rows = []
    for i in range(_N_DISTORTED):
        copy = distort(image[_TRAINING_PLANES], mask[_TRAINING_PLANES], rng)
        rows.append((*_write(folder, f"idr0062_{i}", *copy), "train"))
    validating = _write(folder, "idr0062_val", image[_VALIDATION_PLANES], mask[_VALIDATION_PLANES])
    return rows + [(*validating, "val")] * _N_VALIDATING


def distort(image: Array, mask: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a stack and its mask, turned and scaled, with other gray values, blur and noise."""
    turned = tuple(slice(None, None, int(rng.choice([1, -1]))) for _ in range(3))
    axes = rng.choice([(0, 1, 2), (0, 2, 1)])
    factors = rng.uniform((0.7, 0.8, 0.8), (1.3, 1.4, 1.4))
    values = ndimage.zoom(image[turned].transpose(axes).astype(np.float32), factors, order=1)
    inside = ndimage.zoom(mask[turned].transpose(axes), factors, order=0)
    # At least a patch; beyond the stack is its mirror image.
    missing = np.maximum(np.array(VALIDATION_SHAPE) - values.shape, 0)
    padding = [(0, int(n)) for n in missing]
    values = np.pad(values, padding, "symmetric")
    inside = np.pad(inside, padding, "symmetric")
    low = values.min()
    high = values.max()
    values = ((values - low) / (high - low)) ** rng.uniform(0.6, 1.5)
    values = ndimage.gaussian_filter(values, rng.uniform(0, 0.9, 3), truncate=2)
    values += rng.normal(0, rng.uniform(0, 0.03), values.shape)
    return (np.clip(values, 0, 1) * 60000).astype(np.uint16), inside


def _write(folder: Path, name: str, image: Array, mask: Array) -> tuple[str, str]:
    """Write an image and its mask, and return the names of their files."""
    raw = f"{name}_raw.ome.tif"
    seg = f"{name}_seg.ome.tif"
    for file, values in ((raw, image), (seg, mask.astype(np.uint8))):
        imwrite(folder / file, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    return raw, seg


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
