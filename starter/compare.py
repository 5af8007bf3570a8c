"""Compare the starter bundle with what a threshold can do, on real stacks and hard simulations.

    python -m starter.compare [--bundle FOLDER] [--data FOLDER] [--json FILE] [--pictures FOLDER]

Prints Dice of starter, Otsu and a local threshold (scikit-image, untouched
images), and writes them as JSON with the machine. Rows whose data are absent
are skipped with a notice. The simulations have seeds that training never uses.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from skimage.filters import gaussian, threshold_local, threshold_otsu

from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.models import Bundle, load_bundle
from megaseg_dask.models.build import build_network
from starter.simulation import KINDS, simulate

REPOSITORY = Path(__file__).resolve().parents[1]
NUCLEI = ("cells3d_nuclei_labels/nuclei.tif", "cells3d_nuclei_labels/nuclei_label.tif")
DAPI = (
    "idr0062_6001240_level1/6001240_L1_DAPI.ome.tif",
    "idr0062_6001240_level1/6001240_L1_labels_GT61.ome.tif",
)
LAMIN = "idr0062_6001240_level1/6001240_L1_LaminB1.ome.tif"
HARD_SHAPE = (64, 128, 128)
HARD_SEED = 2 * 10**9  # training uses seeds below 10^9, its validation those from 10^9
N_HARD = 3

Array = np.ndarray[Any, Any]
Method = Callable[[Array], Array]


def starter(bundle: Bundle) -> Method:
    """Return the bundle's prediction: z-score of the whole image, patches, sigmoid > 0.5."""
    network = build_network(bundle)

    def segment(image: Array) -> Array:
        raw = torch.from_numpy(image.astype(np.float32))[None, None]
        normal = (raw - raw.mean()) / raw.std(correction=0)
        with torch.inference_mode():
            logits = sliding_window_inference(
                normal, bundle.patch_shape, 1, network, overlap=bundle.overlap, mode="gaussian"
            )
        return np.asarray(logits[0, 0].numpy() > 0)

    return segment


def otsu(image: Array) -> Array:
    """Return voxels above one threshold for the whole stack."""
    return np.asarray(image > threshold_otsu(image))


def otsu_smoothed(image: Array) -> Array:
    """Return Otsu's mask of the image after a Gaussian of one voxel."""
    return otsu(gaussian(image.astype(np.float32), 1, preserve_range=True))


def local(image: Array) -> Array:
    """Return voxels above the Gaussian mean around them, slice by slice, as scikit-image does."""
    smooth = gaussian(image.astype(np.float32), 1, preserve_range=True)
    return np.stack([plane > threshold_local(plane, 51) for plane in smooth])


def local_3d(image: Array) -> Array:
    """Return voxels that exceed their surroundings in 3D by the image's deviation from them."""
    smooth = gaussian(image.astype(np.float32), 1, preserve_range=True)
    apart = smooth - gaussian(image.astype(np.float32), (6, 15, 15), preserve_range=True)
    return np.asarray(apart > apart.std())


def real_images(data: Path) -> Iterator[tuple[str, Array, Array | None]]:
    """Yield the labelled stacks, and LaminB1 without labels, as far as they are there."""
    import tifffile

    stacks = {"nuclei": NUCLEI, "idr0062 DAPI": DAPI, "idr0062 LaminB1": (LAMIN, None)}
    for name, (image, labels) in stacks.items():
        files = [data / file for file in (image, labels) if file is not None]
        if not all(file.is_file() for file in files):
            print(f"{name}: skipped, {files[0]} is not there")
            continue
        truth = None if labels is None else tifffile.imread(data / labels) > 0
        yield name, tifffile.imread(data / image), truth


def hard_images() -> Iterator[tuple[str, Array, Array]]:
    """Yield simulations at signal-to-noise ratios of 1.5 to 3, uneven and of mixed contrast."""
    for number, kind in enumerate(KINDS):
        seeds = itertools.count(HARD_SEED + 1000 * number)
        n_left = N_HARD
        while n_left:
            simulated = simulate(next(seeds), HARD_SHAPE, kind, difficulty=1)
            # An image whose field holds next to nothing says nothing about a method.
            if simulated.mask.mean() > 0.002:
                n_left -= 1
                yield f"hard {kind}", simulated.image, simulated.mask


def compare(
    methods: dict[str, Method], data: Path, pictures: Path | None
) -> dict[str, dict[str, float]]:
    """Return the mean Dice by row and method; rows are real stacks and kinds of simulation."""
    scores: dict[str, dict[str, list[float]]] = {}
    for name, image, truth in [*real_images(data), *hard_images()]:
        masks = {}
        for method, segment in methods.items():
            begun = time.perf_counter()
            masks[method] = segment(image)
            if method == "starter" and not name.startswith("hard"):
                print(f"{name}: {image.shape} in {time.perf_counter() - begun:.1f} s", flush=True)
        if truth is not None:
            for method, mask in masks.items():
                row = scores.setdefault(name, {}).setdefault(method, [])
                row.append(evaluate(mask, truth).dice)
        if pictures is not None and len(scores.get(name, {}).get("starter", [0])) == 1:
            draw(pictures / f"{name.replace(' ', '_')}.png", image, truth, masks["starter"])
    return {name: _means(row) for name, row in scores.items()}


def _means(scores: dict[str, list[float]]) -> dict[str, float]:
    return {method: round(float(np.mean(values)), 4) for method, values in scores.items()}


def draw(file: Path, image: Array, truth: Array | None, mask: Array) -> None:
    """Write slices along z and one along y: image, truth (if any), starter."""
    import imageio.v3 as iio

    low, high = np.percentile(image, [0.5, 99.7])
    shown = (np.clip((image - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    masks = [mask] if truth is None else [truth, mask]
    stacks = [shown, *(inside * np.uint8(255) for inside in masks)]
    slices = np.linspace(0.1, 0.9, 5) * len(image)
    rows = []
    for stack in stacks:
        height = stack.shape[1]
        planes = [stack[int(z)] for z in slices]
        rows.append(np.hstack([*planes, _tall(stack[:, height // 2], height)]))
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, np.vstack(rows))


def _tall(section: Array, height: int) -> Array:
    return np.pad(section[:height], ((0, max(0, height - len(section))), (0, 0)))


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    versions = {
        "torch": torch.__version__,
        "monai": monai.__version__,
        "python": platform.python_version(),
    }
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def main() -> None:
    """Read the command line, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundle", type=Path, default=REPOSITORY / "megaseg_dask" / "models" / "starter"
    )
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--json", type=Path, help="for example benchmarks/results/starter.json")
    parser.add_argument("--pictures", type=Path, help="a folder for PNGs to look at")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bundle = load_bundle(args.bundle)
    thresholds: dict[str, Method] = {
        "Otsu": otsu,
        "Otsu, sm.": otsu_smoothed,
        "local": local,
        "local 3D": local_3d,
    }
    methods = {"starter": starter(bundle), **thresholds}
    rows = compare(methods, args.data, args.pictures)
    hard = [row for name, row in rows.items() if name.startswith("hard")]
    rows["hard, mean of kinds"] = _means({m: [row[m] for row in hard] for m in methods})
    print(f"\n{'Dice':24}" + "".join(f"{method:>10}" for method in methods))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{row[method]:10.3f}" for method in methods))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "patch": bundle.patch_shape,
            "overlap": bundle.overlap,
            "hard_shape": HARD_SHAPE,
            "n_hard": N_HARD,
        }
        result = {"bundle": bundle.digest, "settings": settings, "dice": rows, "machine": machine()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
