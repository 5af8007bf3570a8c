"""Certificates on real images: each engine and precision against float32 PyTorch, and wrong ones.

    python -m benchmarks.certificates [TIFF …]

The image of the demo, and others ``(z, y, x)`` that are given, in three places, by ``starter``.
Half precision of PyTorch is its autocast on a CPU, whose rounding is that of a GPU. Beside them
stand networks that are wrong in one weight.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import imread

from benchmarks.machine import describe, keep
from megaseg_dask.inference.certificate import Certificate, Float32, compare
from megaseg_dask.inference.engine import EngineSpec, open_apart
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.models.registry import load
from megaseg_dask.tools.demo import read_sample

PATCH = (64, 128, 128)
PLACES = (1 / 2, 1 / 4, 3 / 4)
CASES = (
    ("openvino", "fp32", False),
    ("openvino", "bf16", False),
    ("torch", "bf16", False),
    ("torch", "fp16", False),
    ("openvino", "fp32", True),
    ("openvino", "bf16", True),
)
# A weight of the first and of the last convolution.
WRONG = ("input_block.conv1.conv.weight", "output_block.conv.conv.weight")


def measure(images: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the worst certificate of each case, and of wrong networks, by image."""
    path, bundle = load("starter")
    model = ModelRef.of({str(path): bundle})
    found: dict[str, Any] = {}
    for name, image in images.items():
        patches = list(iter_patches(image))
        rows: dict[str, Any] = {}
        for tta in (False, True):
            spec = EngineSpec("torch", "cpu", "fp32", 1, tta)
            # Mirrored eight times: one place is enough.
            chosen = patches[:1] if tta else patches
            with open_apart(model, spec) as exact:
                expected = [exact(patch[None])[0] for patch in chosen]
            for engine, precision, is_mirrored in CASES:
                if is_mirrored != tta:
                    continue
                other = replace(spec, engine=engine, precision=precision)
                with open_apart(model, other) as opened:
                    certificates = [
                        compare(logits, opened(patch[None]), other)
                        for patch, logits in zip(chosen, expected, strict=True)
                    ]
                title = f"{engine} {precision}{', tta' if tta else ''}"
                rows[title] = as_row(certificates)
            if tta:
                continue
            for weight in WRONG:
                wrong = with_flipped(bundle, weight)
                opened = TorchEngine(wrong, spec)
                certificate = compare(expected[0], opened(patches[0][None]), spec)
                rows[f"the sign of one weight of {weight.partition('.')[0]} flipped"] = as_row(
                    [certificate]
                )
        found[name] = rows
    return {"machine": describe(), "patch": PATCH, "images": found}


def as_row(certificates: list[Certificate]) -> dict[str, Any]:
    """Return the worst of certificates, and whether all hold."""
    worst = min(certificates, key=lambda each: (each.dice, -each.largest_difference))
    largest = max(each.largest_difference for each in certificates)
    holds = all(each.holds for each in certificates)
    return {**asdict(worst), "largest_difference": largest, "holds": holds}


def iter_patches(image: np.ndarray) -> Iterator[Float32]:
    """Yield patches ``(1, z, y, x)`` as engines prove themselves on."""
    for share in PLACES:
        start = [int(share * max(n - p, 0)) for n, p in zip(image.shape, PATCH, strict=True)]
        box = tuple(slice(s, s + p) for s, p in zip(start, PATCH, strict=True))
        values = image[box].astype(np.float64)
        patch = np.zeros((1, *PATCH), np.float32)
        inside = tuple(slice(0, n) for n in values.shape)
        patch[0, *inside] = (values - values.mean()) / values.std()
        yield patch


def with_flipped(bundle: Any, name: str) -> Any:
    """Return the bundle with the sign of the largest number of a weight flipped."""
    weights = dict(bundle.weights)
    values = weights[name].clone()
    flat = values.view(-1)
    largest = int(flat.abs().argmax())
    flat[largest] = -flat[largest]
    weights[name] = values
    return replace(bundle, weights=weights)


def main() -> None:
    """Measure the image of the demo and those that are given, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="*", type=Path)
    options = parser.parse_args()
    images = {"nuclei of the demo": read_sample()[0]}
    images |= {path.name.partition(".")[0]: imread(path) for path in options.images}
    keep("certificates", measure(images))


if __name__ == "__main__":
    main()
