"""How often each word of doubt is wrong, on simulations with their truth, real stacks and noise.

``python -m benchmarks.doubts`` predicts each image once with ``starter``, and asks the rules of
``megaseg_dask/run/doubts.py`` about three results of it: a threshold of 0.5, one of Otsu's, and
0.5 with ``--min-size``. A doubt is right if the truth says so: see :data:`IS_RIGHT`. It prints the
table of docs/doubts.md.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from skimage.filters import threshold_otsu

from megaseg_dask import segment
from megaseg_dask.algorithms.components import label_block
from megaseg_dask.algorithms.doubts import SPECK_VOXELS, ObjectSizes, bimodality
from megaseg_dask.run.doubts import Facts, find_doubts
from megaseg_dask.run.state import ChannelStatistics, OutputState
from starter.compare import DAPI, LAMIN, NUCLEI
from starter.simulation import KINDS, simulate
from tests.fixtures.images import write_image

DATA = Path(__file__).resolve().parents[2] / "shared/data"
SHAPE = (32, 128, 128)
DIFFICULTIES = (0.2, 0.5, 0.8)
# Training uses seeds below 10^9, its validation those from there.
FIRST_SEED = 3 * 10**9
N_SEEDS = 2
MIN_SIZE = 100
# What an overlap with the truth has to be for a result to be of use.
USEFUL_DICE = 0.5

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """An image, and its true foreground if it is known; noise has none."""

    name: str
    image: Array
    truth: Array | None


def iter_cases() -> Iterator[Case]:
    """Yield simulations, real stacks and noise."""
    seed = FIRST_SEED
    for kind in KINDS:
        for difficulty in DIFFICULTIES * N_SEEDS:
            simulated = simulate(seed, SHAPE, kind, difficulty)
            yield Case(f"simulated {kind} {difficulty}", simulated.image, simulated.mask)
            seed += 1
    for image, labels in (NUCLEI, DAPI):
        truth = np.squeeze(tifffile.imread(DATA / labels)) > 0
        yield Case(image, np.squeeze(tifffile.imread(DATA / image)), truth)
    yield Case(LAMIN, np.squeeze(tifffile.imread(DATA / LAMIN)), None)
    rng = np.random.default_rng(0)
    for number in range(6):
        noise = rng.normal(1000, 50 * (number + 1), SHAPE)
        if number % 2:
            noise = rng.poisson(5 * number, SHAPE)
        yield Case(f"noise {number}", noise.astype(np.uint16), np.zeros(SHAPE, np.bool_))


@dataclass(frozen=True)
class Outcome:
    """A result of a case, and what it is compared with."""

    mask: Array
    truth: Array
    sizes: Array
    dice_at_half: float

    @property
    def dice(self) -> float:
        """The overlap of the result with the truth."""
        return dice(self.mask, self.truth)

    @property
    def true_sizes(self) -> Array:
        """The voxels of each true object."""
        return sizes_of(self.truth)


def dice(mask: Array, truth: Array) -> float:
    """Return the overlap of two masks."""
    return float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1))


def sizes_of(mask: Array) -> Array:
    """Return the voxels of each object."""
    return np.bincount(label_block(mask.astype(np.uint8), 1).ravel())[1:]


def _is_one(outcome: Outcome) -> bool:
    """Whether the truth is several objects of which none is most of it."""
    sizes = outcome.true_sizes
    return not sizes.size or sizes.max() <= sizes.sum() / 2


def _are_specks(outcome: Outcome) -> bool:
    sizes = outcome.true_sizes
    return not sizes.size or (sizes < SPECK_VOXELS).mean() <= 0.5


# When a doubt is right.
IS_RIGHT: dict[str, Callable[[Outcome], bool]] = {
    "one object": _is_one,
    "specks": _are_specks,
    "small objects": lambda outcome: np.median([0, *outcome.true_sizes]) > 2 * MIN_SIZE,
    "threshold": lambda outcome: outcome.dice < outcome.dice_at_half - 0.02,
    "no classes": lambda outcome: outcome.dice < USEFUL_DICE,
    "foreground": lambda outcome: outcome.truth.mean() <= 0.6,
    "noise": lambda outcome: outcome.dice < USEFUL_DICE,
}


def predict(image: Array, folder: Path) -> Array:
    """Return the scores of ``starter``."""
    scale = {"z": 0.29, "y": 0.26, "x": 0.26}
    source = write_image(folder / "image.zarr", image, scale=scale)
    target = folder / "out.zarr"
    options = {"outputs": "scores", "scores_dtype": "float32", "workers": 0, "overwrite": True}
    segment(str(source), str(target), model="starter", **options)
    return np.asarray(zarr.open_array(target / "0", mode="r")[...])


def facts_of(case: Case, logits: Array, cutoff: float, min_size: int, *, is_found: bool) -> Facts:
    """Return what a run with these options knows at its end."""
    mask = logits > cutoff
    values = case.image.astype(np.float64)
    labels = label_block(mask.astype(np.uint8), 1)
    sizes = np.bincount(labels.ravel())[1:]
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
    return Facts(case.name, mask.size, channel, True, output, min_size, is_split=False)


def main() -> None:
    """Print how often each doubt was told, and how often it was right."""
    told: Counter[str] = Counter()
    right: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    n_results = Counter()
    silent = Counter()
    for case in iter_cases():
        with tempfile.TemporaryDirectory() as folder:
            scores = predict(case.image, Path(folder)).astype(np.float64)
        scores = np.clip(scores, 1e-7, 1 - 1e-7)
        logits = np.log(scores / (1 - scores)).astype(np.float32)
        for name, cutoff, min_size in (
            ("0.5", 0.0, 0),
            ("otsu", float(threshold_otsu(logits)), 0),
            ("min-size", 0.0, MIN_SIZE),
        ):
            facts = facts_of(case, logits, cutoff, min_size, is_found=name == "otsu")
            doubts = find_doubts([facts])
            print(case.name, name, [doubt.about for doubt in doubts], flush=True)
            n_results[name] += 1
            mask = logits > cutoff
            for doubt in doubts:
                told[doubt.about] += 1
                if case.truth is None:
                    unknown[doubt.about] += 1
                    continue
                outcome = Outcome(mask, case.truth, sizes_of(mask), dice(logits > 0, case.truth))
                right[doubt.about] += bool(IS_RIGHT[doubt.about](outcome))
            if case.truth is not None and not doubts:
                silent[dice(mask, case.truth) >= USEFUL_DICE] += 1
    print(f"{dict(n_results)} results; without a doubt: {dict(silent)}")
    print("| doubt | told | right | false |\n|---|---|---|---|")
    for about in IS_RIGHT:
        known = told[about] - unknown[about]
        print(f"| {about} | {told[about]} | {right[about]} | {known - right[about]} |")


if __name__ == "__main__":
    main()
