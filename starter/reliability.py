"""What scores mean: how often a voxel of a score is structure, and which threshold is best.

All follows from one small table of an image: how many voxels have a score in each of 50 bins, how
many of them are structure, and the sum of their scores. Tables of images add.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starter.thresholds import dice_of_bins

Array = NDArray[Any]

# Between the bins: 0.02, 0.04 ... 0.98.
THRESHOLDS = np.round(np.arange(0.02, 0.99, 0.02), 2)
N_BINS = len(THRESHOLDS) + 1
# Of a reliability diagram; each is 5 of the small ones.
N_WIDE = 10
_HALF = N_BINS // 2 - 1


@dataclass(frozen=True, eq=False)
class Table:
    """Voxels of an image by their score: bin k holds the scores in (0.02 k, 0.02 (k + 1)]."""

    n: Array
    n_true: Array
    sums: Array

    @classmethod
    def of(cls, scores: Array, truth: Array) -> "Table":
        """Count scores (float32 from 0 to 1) and the truth (bool) of one image of any shape."""
        flat = scores.ravel()
        bins = np.searchsorted(THRESHOLDS.astype(np.float32), flat, side="left")
        return cls(
            np.bincount(bins, minlength=N_BINS),
            np.bincount(bins[truth.ravel()], minlength=N_BINS),
            np.bincount(bins, flat, minlength=N_BINS),
        )

    @classmethod
    def sum_of(cls, tables: Sequence["Table"]) -> "Table":
        """Add the tables of several images."""
        return cls(
            np.sum([table.n for table in tables], axis=0),
            np.sum([table.n_true for table in tables], axis=0),
            np.sum([table.sums for table in tables], axis=0),
        )

    def dice(self) -> NDArray[np.float64]:
        """Return the Dice at each of the 49 thresholds."""
        return dice_of_bins(self.n, self.n_true)

    @property
    def dice_at_half(self) -> float:
        """The Dice at 0.5, which the product takes if nothing else is asked for."""
        return float(self.dice()[_HALF])


def reliability(table: Table) -> dict[str, list[float | None]]:
    """Return mean score, share of structure and voxels of ten bins of the score.

    A bin without voxels has no mean and no share.
    """
    n, n_true, sums = (_wide(values) for values in (table.n, table.n_true, table.sums))
    return {
        "mean_score": [_ratio(part, of) for part, of in zip(sums, n, strict=True)],
        "fraction_true": [_ratio(part, of) for part, of in zip(n_true, n, strict=True)],
        "voxels": n.tolist(),
    }


def expected_error(table: Table, *, doubtful: bool = False) -> float:
    """Return the mean of |mean score - share of structure| of ten bins, weighted by their voxels.

    Most voxels are background, beyond doubt. ``doubtful`` leaves out the first bin and the last.
    """
    n, n_true, sums = (_wide(values) for values in (table.n, table.n_true, table.sums))
    inside = slice(1, -1) if doubtful else slice(None)
    n_voxels = float(n[inside].sum())
    if not n_voxels:
        return 0.0
    return float(np.abs(sums - n_true)[inside].sum() / n_voxels)


def describe(tables: Sequence[Table]) -> dict[str, Any]:
    """Return all about the scores of some images, each of which counts as much as the others.

    Dice is the mean over images that hold structure. None of it is there if no image does.
    """
    whole = Table.sum_of(tables)
    found: dict[str, Any] = {
        "images": len(tables),
        "expected_error": round(expected_error(whole), 4),
        "expected_error_of_doubtful": round(expected_error(whole, doubtful=True), 4),
        "reliability": _rounded(reliability(whole)),
    }
    with_structure = [table.dice() for table in tables if table.n_true.any()]
    if with_structure:
        dice = np.mean(with_structure, axis=0)
        best = int(dice.argmax())
        found |= {
            "dice": {f"{THRESHOLDS[k]:g}": round(float(dice[k]), 4) for k in range(4, 49, 5)},
            "best_threshold": float(THRESHOLDS[best]),
            "dice_at_best": round(float(dice[best]), 4),
            "dice_at_half_less_best": round(float(dice[_HALF] - dice[best]), 4),
        }
    return found


def _wide(values: Array) -> Array:
    return values.reshape(N_WIDE, -1).sum(axis=1)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _rounded(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {
        name: [None if value is None else round(value, 4) for value in values]
        for name, values in columns.items()
    }
