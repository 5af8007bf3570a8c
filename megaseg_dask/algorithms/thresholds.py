"""Automatic thresholds of one whole volume, from tables of its blocks that add.

Five methods need 256 bins between the volume's extremes. Their counts are those
of ``skimage.exposure.histogram`` of the whole float32 array, and so the threshold
is scikit-image's, bit for bit. Li's method needs means over all voxels on either
side of a moving threshold: its table holds count, sum and extremes of narrow
bins, the narrower the fewer voxels there are. Float32 values of one bin sum
exactly in float64 (up to 2^28 of them; only the bin at the minimum mixes
magnitudes), so the split into blocks does not show in that threshold either.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import filters

from megaseg_dask.errors import DataError

METHODS = ("otsu", "yen", "isodata", "minimum", "triangle", "li")

Table = dict[str, NDArray[Any]]

N_BINS = 256  # scikit-image's default

_LI_BITS = 24
_SLAB = 2**20
_MAX_ITERATIONS = 10_000

_MERGE = {"counts": np.add, "sums": np.add, "minima": np.minimum, "maxima": np.maximum}


def tabulate(values: NDArray[np.float32], low: float, high: float, method: str) -> Table:
    """Return the table of one block's logits, of any shape; ``low`` and ``high`` are the volume's extremes.

    Raises :class:`DataError` for a logit that is not between them, such as NaN,
    and for a volume without room for the bins that ``method`` needs. A table
    takes 2 kB; for ``li`` 28 bytes a bin: at most 60 MB, for 2 million voxels (and
    three times that while it is made), and less than 2 MB from 34 million on.
    """
    if not (low <= values.min() and values.max() <= high):
        raise DataError(
            f"logits of {values.min()} to {values.max()} in a volume of {low} to {high}: run it again"
        )
    if low == high:
        return {"counts": np.array([values.size])}
    if method == "li":
        flat, span = values.reshape(-1), _span(low, high, method)
        slabs = (flat[start : start + _SLAB] for start in range(0, flat.size, _SLAB))
        return merge_tables(_tabulate_slab(slab, low, span, flat.size) for slab in slabs)
    edges = _edges(low, high, method)
    return {"counts": np.histogram(values, N_BINS, (edges[0], edges[-1]))[0]}


def merge_tables(tables: Iterable[Table]) -> Table:
    """Add the tables of at least one block, in any order; one total and one table are in memory."""
    return reduce(_merge, tables)


def find_threshold(table: Table, low: float, high: float, method: str) -> float:
    """Return the logit above which a voxel is foreground: a float32 number, scikit-image's for the whole volume.

    A constant volume gives its own value (``yen``: half below it, as in
    scikit-image). Raises :class:`DataError` where ``method`` finds no threshold.
    """
    if low == high and method in ("otsu", "triangle", "li"):
        return low
    # The ratios of empty classes are infinite or NaN, in scikit-image as here, and lose every comparison.
    with np.errstate(all="ignore"):
        threshold = (
            _li(table, low) if method == "li" else _of_histogram(table["counts"], low, high, method)
        )
    if not np.isfinite(threshold):
        raise _no_threshold(low, high, method, f"it comes to {threshold}")
    return threshold


def _of_histogram(counts: NDArray[np.int64], low: float, high: float, method: str) -> float:
    edges = _edges(low, high, method)
    centres = (edges[:-1] + edges[1:]) / np.float32(2)
    if low == high:
        if method == "yen":
            return float(centres[0])
        raise _no_threshold(low, high, method, "the volume is constant")
    if method == "triangle":
        return float(centres[_triangle(counts)])
    try:
        return float(getattr(filters, f"threshold_{method}")(hist=(counts, centres)))
    except (RuntimeError, IndexError) as error:
        cause = "the histogram has no two modes" if method == "minimum" else str(error)
        raise _no_threshold(low, high, method, cause) from error


def _triangle(counts: NDArray[np.int64]) -> int:
    """Return the bin farthest below the line from the end of the longer tail to the peak (Zack et al. 1977)."""
    peak = int(counts.argmax())
    tail_right = peak < counts.size - 1 - peak
    heights = counts[:peak:-1] if tail_right else counts[:peak]
    # Python integers: the square of a count may pass 2^63.
    run, rise = heights.size, int(counts[peak])
    norm = np.sqrt(float(run**2 + rise**2))
    level = int(np.argmax(rise / norm * np.arange(run) - run / norm * heights))
    return counts.size - 1 - level if tail_right else level


def _tabulate_slab(values: NDArray[np.float32], low: float, span: float, n: int) -> Table:
    """Return count, sum and extremes above ``low`` of the bins that are not empty, for a block of ``n`` voxels."""
    # In float32, as in scikit-image: there too, the logits above the minimum are rounded before they are compared.
    above = np.sort(values - np.float32(low))
    bins = np.multiply(above, 2**_LI_BITS / span, dtype=np.float64).astype(np.int32)
    ones = np.ones(bins.size, np.int64)
    table = {
        "bins": bins,
        "counts": ones,
        "sums": above.astype(np.float64),
        "minima": above,
        "maxima": above,
    }
    return _pool(table, n)


def _merge(one: Table, other: Table) -> Table:
    if "bins" not in one:
        return {"counts": one["counts"] + other["counts"]}
    order = np.argsort(np.concatenate([one["bins"], other["bins"]]), kind="stable")
    n = int(one["counts"].sum() + other["counts"].sum())
    return _pool({name: np.concatenate([one[name], other[name]])[order] for name in one}, n)


def _pool(table: Table, n: int) -> Table:
    """Return the table, sorted by bin, in bins as wide as suits ``n`` voxels; a bin is named by its first fine bin.

    A threshold inside a bin splits it by interpolation, which errs by a few
    voxels in ``n``: little among many, so where there are few a bin holds one or
    two. As ``n`` only grows, tables end in the same bins in whatever order they add.
    """
    bits = min(max(42 - n.bit_length(), 16), _LI_BITS)
    bins = table["bins"] & -(1 << (_LI_BITS - bits))
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    return {"bins": bins[starts]} | {
        name: add.reduceat(table[name], starts) for name, add in _MERGE.items()
    }


def _li(table: Table, low: float) -> float:
    """Iterate to the minimum cross entropy (Li and Tam 1998) from the mean, until it moves less than values differ."""
    counts, minima, maxima = (
        table["counts"],
        table["minima"].astype(np.float64),
        table["maxima"].astype(np.float64),
    )
    n, total = (np.cumsum(np.append(0.0, table[name])) for name in ("counts", "sums"))
    gaps = np.append(minima[1:] - maxima[:-1], (maxima - minima) / np.maximum(counts - 1, 1))
    tolerance = gaps[gaps > 0].min() / 2
    # Rounded as scikit-image's are, thresholds equal to a value compare alike. The bound is for cycles of rounding.
    threshold = np.float32(total[-1] / n[-1])
    for _ in range(_MAX_ITERATIONS):
        i = int(np.searchsorted(minima, threshold, "right")) - 1
        below, sum_below = n[i + 1], total[i + 1]
        if threshold < maxima[i]:
            inner = (counts[i] - 2) * (threshold - minima[i]) / (maxima[i] - minima[i])
            below = n[i] + 1 + inner
            sum_below = total[i] + minima[i] + inner * (minima[i] + threshold) / 2
        if sum_below == 0:
            break
        back, fore = sum_below / below, (total[-1] - sum_below) / (n[-1] - below)
        last, threshold = threshold, np.float32((back - fore) / (np.log(back) - np.log(fore)))
        if not abs(threshold - last) > tolerance:
            break
    return float(threshold + np.float32(low))


def _span(low: float, high: float, method: str) -> float:
    """Return the range of the logits, rounded as theirs is."""
    with np.errstate(over="ignore"):
        span = float(np.float32(high) - np.float32(low))
    if not np.isfinite(span):
        raise _no_threshold(low, high, method, "their range overflows")
    return span


def _edges(low: float, high: float, method: str) -> NDArray[np.float32]:
    """Return the edges of scikit-image's bins of a float32 image with these extremes."""
    _span(low, high, method)
    try:
        edges: NDArray[np.float32] = np.histogram_bin_edges(
            np.array([low, high], np.float32), N_BINS
        )
    except ValueError as error:
        raise _no_threshold(low, high, method, f"they are too few for {N_BINS} bins") from error
    return edges


def _no_threshold(low: float, high: float, method: str, cause: str) -> DataError:
    return DataError(
        f"{method} finds no threshold for logits from {low:g} to {high:g}: {cause}; "
        "pass --threshold with a number or another method"
    )
