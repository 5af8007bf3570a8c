"""Sums of a segmentation that tell whether it can be believed; they cost no further pass.

The limits are declared here: objects that are specks, and shares, distances and scores beyond which
a result is doubtful. docs/doubts.md has how often each is wrong.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import sigmoid

Array = NDArray[Any]

# An object below so many voxels is a speck: less than a ball of 5 voxels across.
SPECK_VOXELS = 64
# Robust z-score beyond which a volume is an outlier (Iglewicz and Hoaglin 1993), and the
# number of volumes below which there are no outliers.
OUTLIER_Z = 3.5
MIN_VOLUMES = 8

# Volumes that differ by such a share are alike.
_LEAST_SHARE = 0.07

# Objects whose sizes are looked at together.
_BATCH = 2**20


@dataclass(frozen=True, slots=True)
class ObjectSizes:
    """What the sizes of all objects of a volume say, in voxels.

    ``foreground`` counts the voxels of all objects, also of those that are dropped; ``largest`` is
    the largest object, ``n_specks`` how many are specks and ``in_specks`` their voxels, and
    ``n_near`` how many have less than twice the least size. ``others`` are the voxels of the
    objects that are neither specks nor the largest, and ``typical`` is the median of their sizes.
    """

    foreground: int = 0
    largest: int = 0
    n_specks: int = 0
    in_specks: int = 0
    n_near: int = 0
    others: int = 0
    typical: int = 0

    @classmethod
    def of(cls, ids: Array, sizes: Array, min_size: int) -> "ObjectSizes":
        """Add up the sizes of fragments of objects, by their ids; 0 are dropped ones."""
        total = np.zeros(int(ids.max(initial=0)) + 1, np.uint64)
        for start in range(0, len(ids), _BATCH):
            part = slice(start, start + _BATCH)
            np.add.at(total, ids[part], sizes[part])
        kept = total[1:]
        is_speck = kept < SPECK_VOXELS
        is_other = ~is_speck
        if len(kept):
            is_other[kept.argmax()] = False
        others = kept[is_other]
        return cls(
            foreground=int(total.sum()),
            largest=int(kept.max(initial=0)),
            n_specks=int(is_speck.sum()),
            in_specks=int(kept[is_speck].sum()),
            n_near=int((kept < 2 * min_size).sum()),
            others=int(others.sum()),
            typical=int(np.median(others)) if len(others) else 0,
        )


def bimodality(counts: Array, low: float, high: float) -> float:
    """Return the share of the variance of all scores that lies between two classes, at best.

    ``counts`` is a histogram of logits from ``low`` to ``high``. The share is 1 where all scores
    are 0 or 1, and 0.75 where all scores are as frequent.
    """
    step = (high - low) / len(counts)
    scores = sigmoid(np.float32(low) + np.float32(step) * (np.arange(len(counts)) + 0.5))
    below = np.cumsum(counts, dtype=np.float64)
    first = np.cumsum(counts * scores)
    mean = first[-1] / below[-1]
    variance = float((counts * np.square(scores - mean)).sum() / below[-1])
    is_inner = (below > 0) & (below < below[-1])
    if variance == 0 or not is_inner.any():
        return 0.0
    n = below[-1]
    below = below[is_inner]
    first = first[is_inner]
    between = np.square(mean * below - first) / (below * (n - below))
    return float(between.max() / variance)


def robust_z(values: Array, least: float = 0.0) -> Array:
    """Return the distances from the median in robust standard deviations; 0 of a few values.

    A standard deviation is ``least`` or more, and some of the median: where most values are equal,
    all others would be outliers.
    """
    if len(values) < MIN_VOLUMES:
        return np.zeros(len(values))
    median = np.median(values)
    deviation = np.median(np.abs(values - median)) / 0.6745
    z: Array = (values - median) / max(deviation, least, _LEAST_SHARE * abs(median), 1e-9)
    return z


def z_of_counts(counts: Array) -> Array:
    """Return how far numbers of objects are from the others: they differ by chance too."""
    median = float(np.median(counts)) if len(counts) else 0.0
    return robust_z(counts, max(median**0.5, 1.0))


def z_of_shares(shares: Array) -> Array:
    """Return how far shares above 0 are from the others, as factors."""
    return robust_z(np.log(shares))
