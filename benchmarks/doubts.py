"""How often each word of doubt is wrong, on simulations with their truth, real stacks and noise.

    python -m benchmarks.doubts volumes [--data FOLDER] [--synthetic FOLDER]
    python -m benchmarks.doubts plates

Each image is predicted once with ``starter``, and the rules of ``megaseg_dask/run/doubts.py`` are
asked about several results of it: a threshold of 0.5, one of Otsu's, and 0.5 with several
``--min-size``. A doubt is right if the truth says so: see :data:`IS_RIGHT`. Volumes far from
others are asked of simulated plates: fields of one large image, of which some are then damaged.
The result is the table of docs/doubts.md.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from benchmarks.labelled import add_folders, iter_stacks
from benchmarks.machine import describe, keep
from benchmarks.prediction import predict, starter
from megaseg_dask.algorithms.components import label_block
from megaseg_dask.algorithms.doubts import SPECK_VOXELS, ObjectSizes, bimodality
from megaseg_dask.algorithms.geometry import PatchGrid
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.inference.block import Engine
from megaseg_dask.models.registry import load
from megaseg_dask.run.doubts import Facts, find_doubts
from megaseg_dask.run.state import ChannelStatistics, OutputState
from starter.simulation import KINDS, simulate

SHAPE = (32, 128, 128)
DIFFICULTIES = (0.2, 0.5, 0.8)
# Training uses seeds below 10^9, its validation those from there. The rules were chosen on others.
FIRST_SEED = 3 * 10**9
N_SEEDS = 2
MIN_SIZES = (30, 100, 300)
# What an overlap with the truth has to be for a result to be of use, and a gain to be one.
USEFUL_DICE = 0.5
GAIN = 0.02

# Plates: kinds of structures, and fields on a side of one image.
PLATES = ("vesicles", "nuclei", "network", "filaments")
FIELDS_ON_SIDE = 4

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """An image, and the true label of each voxel; noise has none."""

    name: str
    image: Array
    truth: Array


def iter_cases(data: Path, synthetic: Path | None) -> Iterator[Case]:
    """Yield simulations, real stacks and noise."""
    seed = FIRST_SEED
    for kind in KINDS:
        for difficulty in DIFFICULTIES * N_SEEDS:
            made = simulate(seed, SHAPE, kind, difficulty)
            yield Case(f"simulated {kind} {difficulty}", made.image, components(made.mask))
            seed += 1
    for stack in iter_stacks(data, synthetic):
        yield Case(stack.name, stack.image, stack.truth.astype(np.int64))
    rng = np.random.default_rng(0)
    for number in range(6):
        noise = rng.normal(1000, 50 * (number + 1), SHAPE)
        if number % 2:
            noise = rng.poisson(5 * number, SHAPE)
        yield Case(f"noise {number}", noise.astype(np.uint16), np.zeros(SHAPE, np.int64))


def components(mask: Array) -> Array:
    """Return the label of each voxel."""
    return np.asarray(label_block(mask.astype(np.uint8), 1))


def drop_small(labels: Array, min_size: int) -> Array:
    """Return labels without objects of fewer voxels."""
    is_kept = np.bincount(labels.ravel()) >= min_size
    is_kept[0] = False
    return np.where(is_kept[labels], labels, 0)


@dataclass(frozen=True, eq=False)
class Result:
    """Labels of a case, all that has been found, and those of a least size."""

    labels: Array
    min_size: int
    truth: Array
    dice_at_half: float

    def quality(self, min_size: int) -> float:
        """Panoptic quality of the objects of at least this size."""
        return evaluate(drop_small(self.labels, min_size), self.truth).panoptic_quality

    @cached_property
    def dice(self) -> float:
        """The overlap of the foreground with the truth."""
        return dice(drop_small(self.labels, self.min_size) > 0, self.truth > 0)

    @property
    def true_sizes(self) -> Array:
        """The voxels of each true object."""
        sizes = np.bincount(self.truth.ravel())[1:]
        return sizes[sizes > 0]


def dice(mask: Array, truth: Array) -> float:
    """Return the overlap of two masks."""
    return float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1))


def _is_several(result: Result) -> bool:
    """Whether the truth is several objects of which none is most of it."""
    sizes = result.true_sizes
    return not sizes.size or sizes.max() <= sizes.sum() / 2


def _is_better_without_specks(result: Result) -> bool:
    return result.quality(SPECK_VOXELS) >= result.quality(result.min_size)


def _has_better_size(result: Result) -> bool:
    now = result.quality(result.min_size)
    others = (result.quality(size) for size in (result.min_size // 2, 2 * result.min_size))
    return max(others) > now + GAIN


# When a doubt is right.
IS_RIGHT: dict[str, Callable[[Result], bool]] = {
    "one object": _is_several,
    "specks": _is_better_without_specks,
    "small objects": _has_better_size,
    "threshold": lambda result: result.dice < result.dice_at_half - GAIN,
    "no classes": lambda result: result.dice < USEFUL_DICE,
    "foreground": lambda result: (result.truth > 0).mean() <= 0.6,
    "noise": lambda result: result.dice < USEFUL_DICE,
}


def facts_of(name: str, image: Array, logits: Array, cutoff: float, min_size: int) -> Facts:
    """Return what a run with these options knows at its end; the cutoff is found, if not 0."""
    is_found = cutoff != 0
    mask = logits > cutoff
    values = image.astype(np.float64)
    sizes = np.bincount(components(mask).ravel())[1:]
    kept = np.cumsum(sizes >= min_size) * (sizes >= min_size)
    counts, _ = np.histogram(logits, 256)
    output = OutputState(
        n_objects=int((sizes >= min_size).sum()),
        sizes=ObjectSizes.of(kept.astype(np.uint32), sizes.astype(np.uint64), min_size),
        threshold=cutoff if is_found else None,
        bimodality=bimodality(counts, logits.min(), logits.max()) if is_found else None,
        n_above=None if is_found else int(mask.sum()),
        sum_above=None if is_found else float(values[mask].sum()),
    )
    channel = ChannelStatistics(values.mean(), values.std(), values.min(), values.max())
    return Facts(name, mask.size, channel, True, output, min_size, is_split=False)


class Tally:
    """How often each doubt was said, and how often it was right."""

    def __init__(self) -> None:
        """Count nothing."""
        self.said: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.n_results: Counter[str] = Counter()
        # Of results without a doubt, how many are of use.
        self.silent: Counter[bool] = Counter()

    def add(self, case: Case, logits: Array) -> None:
        """Ask about the results of one image."""
        ways = {"0.5": (0.0, 0), "otsu": (float(threshold_otsu(logits)), 0)}
        ways |= {f"min-size {size}": (0.0, size) for size in MIN_SIZES}
        for way, (cutoff, min_size) in ways.items():
            facts = facts_of(case.name, case.image, logits, cutoff, min_size)
            abouts = [doubt.about for doubt in find_doubts([facts])]
            print(case.name, way, abouts, flush=True)
            self.n_results[way] += 1
            self.said.update(abouts)
            at_half = dice(logits > 0, case.truth > 0)
            result = Result(components(logits > cutoff), min_size, case.truth, at_half)
            self.right.update(about for about in abouts if IS_RIGHT[about](result))
            if not abouts:
                self.silent[result.dice >= USEFUL_DICE] += 1

    def rows(self) -> dict[str, dict[str, int]]:
        """Return the numbers of each doubt."""
        rows = {}
        for about in IS_RIGHT:
            said = self.said[about]
            right = self.right[about]
            rows[about] = {"said": said, "right": right, "wrong": said - right}
        return rows


# -- volumes far from the others of their plate


def damaged(field: Array) -> dict[str, Array]:
    """Return what may have become of a field: out of focus, dark, or empty."""
    rng = np.random.default_rng(0)
    background = float(np.percentile(field, 10))
    dark = background + 0.1 * (field.astype(np.float64) - background)
    noise = rng.poisson(background, field.shape)
    return {
        "out of focus": gaussian_filter(field.astype(np.float64), (3, 6, 6)).astype(np.uint16),
        "dark": rng.poisson(np.maximum(dark, 0)).astype(np.uint16),
        "empty": noise.astype(np.uint16),
    }


def measure_plates(network: Engine) -> dict[str, Any]:
    """Return how many sound fields of plates are called outliers, and how many damaged ones."""
    n_fields: Counter[str] = Counter()
    n_said: Counter[str] = Counter()
    for number, kind in enumerate(PLATES):
        extent = FIELDS_ON_SIDE * SHAPE[1]
        made = simulate(FIRST_SEED + 10**6 + number, (SHAPE[0], extent, extent), kind, 0.4)
        starts = [(y, x) for y in range(0, extent, SHAPE[1]) for x in range(0, extent, SHAPE[2])]
        fields = [made.image[:, y : y + SHAPE[1], x : x + SHAPE[2]] for y, x in starts]

        def facts(name: str, field: Array) -> Facts:
            logits = predict(network, field, PatchGrid(SHAPE, SHAPE, (0.0, 0.0, 0.0)))
            return facts_of(name, field, logits, 0.0, 0)

        plate = [facts(f"sound {place}", field) for place, field in enumerate(fields)]
        far = _outliers(plate)
        n_fields["sound"] += len(plate)
        n_said["sound"] += len(far)
        for name, field in damaged(fields[0]).items():
            with_damage = [facts(name, field), *plate[1:]]
            n_fields[name] += 1
            n_said[name] += name in _outliers(with_damage)
        print(kind, "plate", dict(n_said), flush=True)
    return {name: {"fields": n_fields[name], "said": n_said[name]} for name in n_fields}


def _outliers(plate: list[Facts]) -> list[str]:
    found = [doubt.volumes for doubt in find_doubts(plate) if doubt.about == "outlier"]
    return [name for volumes in found for name in volumes]


def measure(data: Path, synthetic: Path | None) -> dict[str, Any]:
    """Return how often each doubt was said of one volume, and how often it was right."""
    bundle = load("starter")[1]
    tally = Tally()
    with starter() as network:
        for case in iter_cases(data, synthetic):
            grid = PatchGrid(case.image.shape, bundle.patch_shape, bundle.overlap)
            tally.add(case, predict(network, case.image, grid))
    return {
        "machine": describe(),
        "results": dict(tally.n_results),
        "without a doubt": {"of use": tally.silent[True], "of no use": tally.silent[False]},
        "doubts": tally.rows(),
    }


def main() -> None:
    """Measure doubts about one volume, or outliers among those of plates, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("volumes", "plates"))
    add_folders(parser)
    options = parser.parse_args()
    if options.what == "volumes":
        keep("doubts", measure(options.data, options.synthetic))
    else:
        with starter() as network:
            keep("outliers", measure_plates(network))


if __name__ == "__main__":
    main()
