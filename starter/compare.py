"""Compare the starter bundle with what a threshold can do, on real stacks and hard simulations.

    python -m starter.compare [--bundle FOLDER] [--data ../shared/data] [--json FILE] [--pictures FOLDER]

Prints Dice of starter, Otsu and a local threshold (scikit-image, untouched
images), and writes them as JSON with the machine. Rows whose data are absent
are skipped with a notice. The simulations have seeds that training never uses.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
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
    """Return what is above one threshold for the whole stack."""
    return np.asarray(image > threshold_otsu(image))


def otsu_smoothed(image: Array) -> Array:
    """Return Otsu's mask of the image after a Gaussian of one voxel."""
    return otsu(gaussian(image.astype(np.float32), 1, preserve_range=True))


def local(image: Array) -> Array:
    """Return what is above the Gaussian mean around it, slice by slice (scikit-image's own default offset, 0)."""
    smooth = gaussian(image.astype(np.float32), 1, preserve_range=True)
    return np.stack([plane > threshold_local(plane, 51) for plane in smooth])


def local_3d(image: Array) -> Array:
    """Return what stands out of its surroundings in 3D by more than half the image's deviation from them."""
    smooth = gaussian(image.astype(np.float32), 1, preserve_range=True)
    apart = smooth - gaussian(image.astype(np.float32), (6, 15, 15), preserve_range=True)
    return np.asarray(apart > apart.std())


def real_images(data: Path) -> Iterator[tuple[str, Array, Array | None]]:
    """Yield the labelled stacks, and LaminB1 without labels, as far as they are there."""
    import tifffile

    for name, files in {
        "nuclei": NUCLEI,
        "idr0062 DAPI": DAPI,
        "idr0062 LaminB1": (LAMIN,),
    }.items():
        if all((data / file).is_file() for file in files):
            image, *truth = (tifffile.imread(data / file) for file in files)
            yield name, image, truth[0] > 0 if truth else None
        else:
            print(f"{name}: skipped, {data / files[0]} is not there")


def hard_images() -> Iterator[tuple[str, Array, Array]]:
    """Yield simulations at signal-to-noise ratios of 1.5 to 3, uneven and of mixed contrast."""
    for number, kind in enumerate(KINDS):
        # An image whose field holds next to nothing says nothing about a method.
        made = (
            simulate(HARD_SEED + 1000 * number + i, HARD_SHAPE, kind, difficulty=1)
            for i in range(1000)
        )
        full = (one for one in made if one.mask.mean() > 0.002)
        for one, _ in zip(full, range(N_HARD), strict=False):
            yield f"hard {kind}", one.image, one.mask


def compare(
    methods: dict[str, Method], data: Path, pictures: Path | None
) -> dict[str, dict[str, float]]:
    """Return {row: {method: mean Dice}}; rows are the real stacks and the kinds of hard simulation."""
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
    return {
        name: {m: round(float(np.mean(v)), 4) for m, v in row.items()}
        for name, row in scores.items()
    }


def draw(file: Path, image: Array, truth: Array | None, mask: Array) -> None:
    """Write slices along z and one along y: image, truth (if any), starter."""
    import imageio.v3 as iio

    low, high = np.percentile(image, [0.5, 99.7])
    shown = (np.clip((image - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    stacks = [shown, *(m * np.uint8(255) for m in (truth, mask) if m is not None)]
    slices = np.linspace(0.1, 0.9, 5) * len(image)
    rows = [
        np.hstack([*(s[int(z)] for z in slices), _tall(s[:, s.shape[1] // 2], s.shape[1])])
        for s in stacks
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, np.vstack(rows))


def _tall(section: Array, height: int) -> Array:
    return np.pad(section[:height], ((0, max(0, height - len(section))), (0, 0)))


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
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
    rows["hard, mean of kinds"] = {
        m: round(float(np.mean([row[m] for row in hard])), 4) for m in methods
    }
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
