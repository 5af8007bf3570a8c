"""Does a number tell which objects are wrong? Measured outside the product, before any of it is in.

    python -m benchmarks.confidence [--data FOLDER] [--synthetic FOLDER]

``starter`` predicts each image with its own patches. Beside the weighted mean of the logits of
overlapping patches stands their weighted variance (the sums are w·x and w·x²), and on two of the
stacks the variance of the eight mirror images of ``--tta``; both also of scores. An object is
wrong if its IoU with its best true object is below 0.5. A number is as good as the chance that it
ranks a wrong object above a right one (AUROC: 0.5 is none). Its gain over the mean score has an
interval of 95 %, by drawing objects again.

Expected before it was run: the mean score finds most of what can be found (AUROC 0.7 to 0.8).
Patches disagree where they overlap alone, so most objects have no variance and their AUROC is
below that; mirrors disagree everywhere and may gain a few hundredths, for eight times the work.
The share of voxels near the threshold says much the same as the mean score.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.labelled import Labelled, add_folders, iter_simulations, iter_stacks
from benchmarks.machine import describe, keep
from benchmarks.prediction import starter, z_scored
from benchmarks.splitting import label_objects
from megaseg_dask.algorithms.blending import sigmoid, window
from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.inference.block import Engine
from megaseg_dask.models.registry import load
from megaseg_dask.plan.resolved import DEFAULT_SPLIT_DEPTH

# Of the simulations: smaller patches than those of starter, so that several overlap on each axis.
SHAPE = (48, 160, 160)
PATCH = (32, 96, 96)
DIFFICULTIES = (0.3, 0.6, 1.0)
MIN_SIZE = 50
NEAR = 0.1
N_DRAWS = 1000
# Stacks whose patches are few: mirrors take eight times as long.
MIRRORED = ("nuclei", "synthetic")

Floats = NDArray[np.float64]
Numbers = dict[str, Floats]


@dataclass
class Sums:
    """Weighted sums of what patches say about each voxel: exact means and variances of a few."""

    weight: Floats
    first: Floats
    second: Floats

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "Sums":
        """Return the sums of no patches."""
        return cls(*(np.zeros(shape) for _ in range(3)))

    def add(self, place: tuple[slice, ...], weights: Floats, values: Floats) -> None:
        """Add a patch, or the part of it that lies in the volume."""
        self.weight[place] += weights
        self.first[place] += weights * values
        self.second[place] += weights * values**2

    @property
    def mean(self) -> Floats:
        """The blended value."""
        return self.first / self.weight

    @property
    def variance(self) -> Floats:
        """The blended variance; 0 where one patch alone lies."""
        return np.maximum(self.second / self.weight - self.mean**2, 0)


@dataclass
class Prediction:
    """Logits as the product blends them, and what patches and mirrors disagree in."""

    logits: Floats
    variances: Numbers


def predict(
    network: Engine, image: NDArray[Any], grid: PatchGrid, *, is_mirrored: bool
) -> Prediction:
    """Return the blended logits of an image, and variances of patches and of mirrors."""
    padding = [
        (before, max(patch - extent - before, 0))
        for before, patch, extent in zip(
            grid.padding, grid.patch_shape, grid.volume_shape, strict=True
        )
    ]
    values = np.pad(z_scored(image), padding)
    weights = window(grid.patch_shape).astype(np.float64)
    of_what = ("patches", "mirrors") if is_mirrored else ("patches",)
    sums = {
        f"{name}, {kind}": Sums.none(grid.volume_shape)
        for name in of_what
        for kind in ("logits", "scores")
    }
    whole = Box.of(grid.volume_shape)
    for patch in grid.iter_touching(whole):
        seen = patch.shifted(grid.padding).slices
        shared = patch & whole
        inside = shared.within(patch).slices
        for number, logits in enumerate(_mirrored(network, values[seen], is_mirrored=is_mirrored)):
            said = {"logits": logits.astype(np.float64), "scores": sigmoid(logits).astype(float)}
            for name in of_what:
                # The first one is not mirrored.
                if name == "patches" and number > 0:
                    continue
                for kind, values_of_kind in said.items():
                    sums[f"{name}, {kind}"].add(
                        shared.slices, weights[inside], values_of_kind[inside]
                    )
    variances = {kind: each.variance for kind, each in sums.items()}
    return Prediction(sums["patches, logits"].mean, variances)


def _mirrored(
    network: Engine, patch: NDArray[np.float32], *, is_mirrored: bool
) -> Iterator[NDArray[Any]]:
    """Yield the logits of a patch, and perhaps of its seven mirror images, mirrored back."""
    max_axes = 3 if is_mirrored else 0
    axes_of_all = chain.from_iterable(combinations(range(3), n) for n in range(max_axes + 1))
    for axes in axes_of_all:
        mirrored = np.flip(patch, axes).copy()[None, None]
        yield np.flip(network(mirrored)[0, 0], axes)


def numbers_of(labels: NDArray[Any], prediction: Prediction) -> Numbers:
    """Return the numbers of each object that has enough voxels; more should mean more doubt."""
    flat = labels.ravel()
    counts = np.bincount(flat).astype(float)
    counts[0] = 0
    kept = counts >= MIN_SIZE
    scores = sigmoid(prediction.logits.astype(np.float32)).ravel().astype(np.float64)

    def mean_of(values: Floats) -> Floats:
        total = np.bincount(flat, weights=values.ravel(), minlength=len(counts))
        return total[kept] / counts[kept]

    near = (np.abs(scores - 0.5) < NEAR).astype(float)
    disagreement = {
        f"variance of {kind}": mean_of(values) for kind, values in prediction.variances.items()
    }
    return {
        "mean score": -mean_of(scores),
        "mean logit": -mean_of(prediction.logits),
        "share within 0.1 of the threshold": mean_of(near),
        "few voxels": -counts[kept],
        **disagreement,
    }


def is_wrong(labels: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which objects of enough voxels have an IoU below 0.5 with every true one."""
    table = Contingency.of(labels, truth)
    n_predicted = np.bincount(table.predicted.astype(int), table.voxels)
    n_true = np.bincount(table.true.astype(int), table.voxels)
    predicted = table.predicted.astype(int)
    true = table.true.astype(int)
    iou = table.voxels / (n_predicted[predicted] + n_true[true] - table.voxels)
    iou[(predicted == 0) | (true == 0)] = 0
    best = np.zeros(len(n_predicted))
    np.maximum.at(best, predicted, iou)
    kept = n_predicted >= MIN_SIZE
    kept[0] = False
    return best[kept] < 0.5


def auroc(values: Floats, wrong: NDArray[np.bool_]) -> float:
    """Return the chance that a wrong object has a higher number than a right one."""
    from scipy.stats import rankdata

    n_wrong = int(wrong.sum())
    n_right = len(wrong) - n_wrong
    ranks = rankdata(values)
    return float((ranks[wrong].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * n_right))


def judge(numbers: Numbers, wrong: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the AUROC of each number, and the interval of its gain over the mean score."""
    n_wrong = int(wrong.sum())
    found: dict[str, Any] = {"objects": len(wrong), "wrong": n_wrong}
    if min(n_wrong, len(wrong) - n_wrong) < 5:
        return found
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(wrong), len(wrong)) for _ in range(N_DRAWS)]
    draws = [draw for draw in draws if 0 < wrong[draw].sum() < len(wrong)]
    plain = [auroc(numbers["mean score"][draw], wrong[draw]) for draw in draws]
    for name, values in numbers.items():
        gains = [auroc(values[draw], wrong[draw]) for draw in draws]
        low, high = np.percentile(np.subtract(gains, plain), [2.5, 97.5])
        found[name] = {
            "auroc": round(auroc(values, wrong), 3),
            "gain": [round(float(low), 3), round(float(high), 3)],
        }
    return found


def measure(images: list[tuple[str, Labelled]], network: Engine) -> dict[str, Any]:
    """Return what each number finds, in each group of images and in all of them together."""
    bundle = load("starter")[1]
    gathered: dict[str, list[tuple[Numbers, NDArray[np.bool_]]]] = {}
    for group, labelled in images:
        is_simulated = group == "simulations"
        patch = PATCH if is_simulated else bundle.patch_shape
        grid = PatchGrid(labelled.image.shape, patch, bundle.overlap)
        prediction = predict(network, labelled.image, grid, is_mirrored=group in MIRRORED)
        mask = prediction.logits > 0
        ways = {"as they are": None, "split": DEFAULT_SPLIT_DEPTH}
        groups = [group, "all"]
        if is_simulated:
            del ways["split"]
        if group in MIRRORED:
            groups.append("mirrored stacks")
        for way, depth_um in ways.items():
            labels = label_objects(mask, labelled.spacing_um, depth_um)
            result = (numbers_of(labels, prediction), is_wrong(labels, labelled.truth))
            for name in groups:
                gathered.setdefault(f"{name}, {way}", []).append(result)
        print(labelled.name, len(grid), "patches", flush=True)
    found: dict[str, Any] = {"machine": describe(), "min_size": MIN_SIZE}
    for name, results in gathered.items():
        found[name] = judge(_joined([numbers for numbers, _ in results]), _flat(results))
    return found


def _joined(numbers: list[Numbers]) -> Numbers:
    """Return the numbers that all have, of all objects together."""
    names = [name for name in numbers[0] if all(name in each for each in numbers)]
    return {name: np.concatenate([each[name] for each in numbers]) for name in names}


def _flat(results: list[tuple[Numbers, NDArray[np.bool_]]]) -> NDArray[np.bool_]:
    return np.concatenate([wrong for _, wrong in results])


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_folders(parser)
    options = parser.parse_args()
    stacks = list(iter_stacks(options.data, options.synthetic))
    images = [(stack.name, stack) for stack in stacks]
    images += [("simulations", each) for each in iter_simulations(SHAPE, DIFFICULTIES)]
    with starter() as network:
        keep("confidence", measure(images, network))


if __name__ == "__main__":
    main()
