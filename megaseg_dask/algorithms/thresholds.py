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

from megaseg_dask.errors import DataError

Table = dict[str, NDArray[Any]]

N_BINS = 256  # scikit-image's default

_LI_BITS = 24
_MIN_LI_BITS = 16
_SLAB = 2**20
_MAX_ITERATIONS = 10_000

# How rows of one bin become one.
_COMBINE = {"counts": np.add, "sums": np.add, "minima": np.minimum, "maxima": np.maximum}


def tabulate(values: NDArray[np.float32], low: float, high: float, method: str) -> Table:
    """Return the table of one block's logits, of any shape.

    ``low`` and ``high`` are the volume's extremes. A table takes 2 kB; for
    ``li`` 28 bytes a bin: at most 60 MB, for 2 million voxels (and three times
    that while it is made), and less than 2 MB from 34 million on.

    Raises:
        DataError: A logit is not between the extremes, such as NaN, or the
            volume has no room for the bins that ``method`` needs.
    """
    if values.size and not (low <= values.min() and values.max() <= high):
        raise DataError(
            f"logits of {values.min()} to {values.max()} in a volume of {low} to {high}: the "
            "logits changed; run the same command again"
        )
    if low == high:
        return {"counts": np.array([values.size])}
    if method == "li":
        return _tabulate_li(values.reshape(-1), low, _span(low, high, method))
    edges = _edges(low, high, method)
    counts, _ = np.histogram(values, N_BINS, (edges[0], edges[-1]))
    return {"counts": counts}


def merge_tables(tables: Iterable[Table]) -> Table:
    """Add the tables of at least one block, in any order; it holds one total and one table."""
    return reduce(_merge, tables)


def find_threshold(table: Table, low: float, high: float, method: str) -> float:
    """Return the logit above which a voxel is foreground.

    It is a float32 number, scikit-image's for the whole volume. A constant
    volume gives its own value (``yen``: half below it, as in scikit-image).

    Raises:
        DataError: ``method`` finds no threshold.
    """
    if low == high and method in ("otsu", "triangle", "li"):
        return low
    # The ratios of empty classes are infinite or NaN, in scikit-image as here, and lose every
    # comparison.
    with np.errstate(all="ignore"):
        if method == "li":
            threshold = _li(table, low)
        else:
            threshold = _of_histogram(table["counts"], low, high, method)
    if not np.isfinite(threshold):
        raise _no_threshold(low, high, method, f"its result is {threshold}")
    return threshold


# -- methods of a histogram


def _of_histogram(counts: NDArray[np.int64], low: float, high: float, method: str) -> float:
    edges = _edges(low, high, method)
    centers = (edges[:-1] + edges[1:]) / np.float32(2)
    if low == high:
        if method == "yen":
            return float(centers[0])
        raise _no_threshold(low, high, method, "the volume has one single value")
    if method == "triangle":
        return float(centers[_triangle(counts)])
    try:
        from skimage import filters

        return float(getattr(filters, f"threshold_{method}")(hist=(counts, centers)))
    except (RuntimeError, IndexError) as error:
        cause = str(error)
        if method == "minimum":
            cause = "the histogram has no two modes"
        raise _no_threshold(low, high, method, cause) from error


def _triangle(counts: NDArray[np.int64]) -> int:
    """Return the bin farthest below the line from the end of the longer tail to the peak.

    Zack et al. 1977.
    """
    peak = int(counts.argmax())
    tail_is_right = peak < counts.size - 1 - peak
    heights = counts[:peak]
    if tail_is_right:
        heights = counts[:peak:-1]
    # Python integers: the square of a count may pass 2^63.
    run = heights.size
    rise = int(counts[peak])
    norm = np.sqrt(float(run**2 + rise**2))
    level = int(np.argmax(rise / norm * np.arange(run) - run / norm * heights))
    if tail_is_right:
        return counts.size - 1 - level
    return level


def _edges(low: float, high: float, method: str) -> NDArray[np.float32]:
    """Return the edges of scikit-image's bins of a float32 image with these extremes."""
    _span(low, high, method)
    extremes = np.array([low, high], np.float32)
    try:
        edges: NDArray[np.float32] = np.histogram_bin_edges(extremes, N_BINS)
    except ValueError as error:
        raise _no_threshold(
            low, high, method, f"their range is too narrow for {N_BINS} bins"
        ) from error
    return edges


def _span(low: float, high: float, method: str) -> float:
    """Return the range of the logits, rounded as scikit-image's is."""
    with np.errstate(over="ignore"):
        span = float(np.float32(high) - np.float32(low))
    if not np.isfinite(span):
        raise _no_threshold(low, high, method, "their range overflows")
    return span


def _no_threshold(low: float, high: float, method: str, cause: str) -> DataError:
    return DataError(
        f"{method} finds no threshold for logits from {low:g} to {high:g}: {cause}; "
        "pass --threshold with a number or another method"
    )


# -- Li's method


def _tabulate_li(values: NDArray[np.float32], low: float, span: float) -> Table:
    """Return count, sum and extremes above ``low`` of the bins that are not empty."""
    n = values.size
    slabs = (values[start : start + _SLAB] for start in range(0, n, _SLAB))
    return merge_tables(_tabulate_slab(slab, low, span, n) for slab in slabs)


def _tabulate_slab(values: NDArray[np.float32], low: float, span: float, n: int) -> Table:
    # In float32, as in scikit-image: there too, the logits above the minimum are rounded before
    # they are compared.
    above = np.sort(values - np.float32(low))
    table = {
        "bins": np.multiply(above, 2**_LI_BITS / span, dtype=np.float64).astype(np.int32),
        "counts": np.ones(above.size, np.int64),
        "sums": above.astype(np.float64),
        "minima": above,
        "maxima": above,
    }
    return _pool(table, n)


def _merge(one: Table, other: Table) -> Table:
    if "bins" not in one:
        return {"counts": one["counts"] + other["counts"]}
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    order = np.argsort(both["bins"], kind="stable")
    ordered = {name: column[order] for name, column in both.items()}
    return _pool(ordered, int(both["counts"].sum()))


def _pool(table: Table, n: int) -> Table:
    """Return a table that is sorted by bin in bins as wide as suits ``n`` voxels.

    A bin is named by its first fine bin. A threshold inside a bin splits it by
    interpolation, which errs by a few voxels in ``n``: little among many, so
    where there are few a bin holds one or two. As ``n`` only grows, tables end
    in the same bins in whatever order they add.
    """
    n_bits = min(max(42 - n.bit_length(), _MIN_LI_BITS), _LI_BITS)
    bins = table["bins"] & -(1 << (_LI_BITS - n_bits))
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    pooled = {"bins": bins[starts]}
    for name, combine in _COMBINE.items():
        pooled[name] = combine.reduceat(table[name], starts)
    return pooled


def _li(table: Table, low: float) -> float:
    """Iterate to the minimum cross entropy (Li and Tam 1998), from the mean.

    It ends when the threshold moves less than values differ.
    """
    counts = table["counts"]
    minima = table["minima"].astype(np.float64)
    maxima = table["maxima"].astype(np.float64)
    # Voxels and their sum in all bins before each bin.
    n_before = np.cumsum(np.append(0.0, counts))
    sum_before = np.cumsum(np.append(0.0, table["sums"]))
    n_all = n_before[-1]
    sum_all = sum_before[-1]
    tolerance = _smallest_gap(counts, minima, maxima) / 2
    # Rounded as scikit-image's are, thresholds equal to a value compare alike.
    threshold = np.float32(sum_all / n_all)
    # The bound is for cycles of rounding.
    for _ in range(_MAX_ITERATIONS):
        i = int(np.searchsorted(minima, threshold, "right")) - 1
        n_below = n_before[i + 1]
        sum_below = sum_before[i + 1]
        if threshold < maxima[i]:
            inner = (counts[i] - 2) * (threshold - minima[i]) / (maxima[i] - minima[i])
            n_below = n_before[i] + 1 + inner
            sum_below = sum_before[i] + minima[i] + inner * (minima[i] + threshold) / 2
        if sum_below == 0:
            break
        mean_below = sum_below / n_below
        mean_above = (sum_all - sum_below) / (n_all - n_below)
        last = threshold
        threshold = np.float32(
            (mean_below - mean_above) / (np.log(mean_below) - np.log(mean_above))
        )
        # Also where it is NaN.
        if not abs(threshold - last) > tolerance:
            break
    return float(threshold + np.float32(low))


def _smallest_gap(
    counts: NDArray[np.int64], minima: NDArray[np.float64], maxima: NDArray[np.float64]
) -> np.float64:
    """Return the smallest difference of values, between bins and, on average, inside them."""
    between = minima[1:] - maxima[:-1]
    inside = (maxima - minima) / np.maximum(counts - 1, 1)
    gaps = np.append(between, inside)
    smallest: np.float64 = gaps[gaps > 0].min()
    return smallest
