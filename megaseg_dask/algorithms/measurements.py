"""Shape and intensity of every object, from sums that add across blocks.

A row holds what is known of one object so far: counts, sums and extremes. A
block is read run by run (a run is a stretch of one label along x), each run is
a row, and rows of one label add up: the same addition joins the runs of a slab,
the slabs of a block and the blocks of a volume. Integer images are summed
exactly and rounded once, at the end, so every split gives the same table bit
for bit. Float images are summed in float64, in the order given: two splits
differ by at most 1e-12 of the sum of absolute values in the sum, and of the
largest of them in mean and standard deviation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import digits
from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import DataError

Array = NDArray[Any]
Columns = dict[str, Array]

# Temporaries of a slab take about 30 bytes a voxel; where each voxel differs from the next, 400 (100 MB).
_SLAB_VOXELS = 2**18

# Rows and parts that wait before they are added, so that small parts are not sorted one by one.
_WAITING_ROWS, _WAITING_PARTS = 2**16, 1024


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What is known of some objects, a column per object; ascending ids, each once.

    ``label`` uint64 and ``n_voxels`` int64 are ``(n,)``. ``coordinates`` (sums
    over voxels), ``start`` and ``stop`` (bounding box) are int64 ``(3, n)`` in
    z, y, x of the volume. ``minimum`` and ``maximum`` are ``(n,)`` in the
    image's dtype. Of an integer image, ``total`` and ``squares`` are sums of
    values and of their squares, exact, int64 ``(digits, n)`` of :mod:`.digits`;
    of a float image they are the sum, and the sum of squared deviations from
    the object's mean, float64 ``(n,)``.
    """

    label: NDArray[np.uint64]
    n_voxels: NDArray[np.int64]
    coordinates: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    total: Array
    squares: Array
    minimum: Array
    maximum: Array

    def __len__(self) -> int:
        return len(self.label)

    @property
    def is_exact(self) -> bool:
        """Whether the image has integers, whose sums are kept in digits."""
        return self.total.ndim == 2

    def arrays(self) -> Columns:
        """Return the columns by name, to be stored; ``Sums(**arrays)`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def measure_block(labels: NDArray[np.unsignedinteger], intensity: Array, core: Box) -> Sums:
    """Return the sums of a block's objects, 0 being background.

    ``labels`` are final ids ``(z, y, x)`` of any unsigned width, ``intensity``
    the image in the same voxels, integers or finite floats; ``core`` is where
    they lie in the volume. Raises :class:`DataError` if the shapes differ.

    Holds, besides the block, 10 MB and about 450 bytes per object of it.
    """
    if not labels.shape == intensity.shape == core.shape:
        raise DataError(
            f"labels {labels.shape} and image {intensity.shape} of block {core} differ in shape"
        )
    return merge(_iter_slabs(labels, intensity, core))


def merge(parts: Iterable[Sums]) -> Sums:
    """Add the sums of parts of a volume, at least one; for float images the order given must be grid order.

    Holds the objects found so far, not the parts.
    """
    waiting: list[Sums] = []
    n_rows, limit = 0, _WAITING_ROWS
    for part in parts:
        waiting.append(part)
        n_rows += len(part)
        if n_rows > limit or len(waiting) > _WAITING_PARTS:
            waiting = [_add(waiting)]
            n_rows, limit = len(waiting[0]), 2 * len(waiting[0]) + _WAITING_ROWS
    return _add(waiting)


def to_columns(sums: Sums, volume_shape: Shape, spacing_um: Sequence[float]) -> Columns:
    """Return the table of a whole volume's objects, a row per object, by ascending label.

    Definitions are those of ``skimage.measure.regionprops``: centroids in
    voxels are mean indices, and those in µm are measured from the centre of the
    volume's first voxel; boxes are half-open; ``intensity_std`` is that of the
    population. ``touches_border`` tells that a voxel lies in the first or last
    plane of an axis. Ids, counts and boxes are int64, the flag is bool, the
    rest float64.
    """
    total, mean, std = _intensities(sums)
    centroid = (sums.coordinates.astype(object) / sums.n_voxels.astype(object)).astype(np.float64)
    at_border = (sums.start == 0) | (sums.stop == np.reshape(volume_shape, (3, 1)))
    return {
        "label": sums.label.astype(np.int64),
        "volume_voxels": sums.n_voxels,
        "volume_um3": sums.n_voxels * math.prod(spacing_um),
        **{f"centroid_{axis}": centroid[i] for i, axis in enumerate("zyx")},
        **{f"centroid_{axis}_um": centroid[i] * spacing_um[i] for i, axis in enumerate("zyx")},
        **{f"bbox_{axis}_start": sums.start[i] for i, axis in enumerate("zyx")},
        **{f"bbox_{axis}_stop": sums.stop[i] for i, axis in enumerate("zyx")},
        "intensity_mean": mean,
        "intensity_min": sums.minimum.astype(np.float64),
        "intensity_max": sums.maximum.astype(np.float64),
        "intensity_std": std,
        "intensity_sum": total,
        "touches_border": at_border.any(axis=0),
    }


def _intensities(sums: Sums) -> tuple[Array, Array, Array]:
    """Return sum, mean and population standard deviation, float64."""
    if not sums.is_exact:
        return sums.total, sums.total / sums.n_voxels, np.sqrt(sums.squares / sums.n_voxels)
    # As Python integers: each quotient is exact until it is rounded, once.
    n, total, squares = (
        sums.n_voxels.astype(object),
        digits.to_integers(sums.total),
        digits.to_integers(sums.squares),
    )
    variance = (n * squares - total * total) / (n * n)
    return (
        total.astype(np.float64),
        (total / n).astype(np.float64),
        np.sqrt(variance.astype(np.float64)),
    )


# -- rows of one label add up


def _add(parts: Sequence[Sums]) -> Sums:
    """Add all rows of each label."""
    columns = zip(*(part.arrays().values() for part in parts), strict=True)
    rows = Sums(*(np.concatenate(column, axis=-1) for column in columns))
    # Stable, so that floats add in the order given.
    order = np.argsort(rows.label, kind="stable")
    label = rows.label[order]
    first = np.flatnonzero(np.diff(label, prepend=np.uint64(0)))

    def each(combine: np.ufunc, column: Array) -> Array:
        combined: Array = combine.reduceat(column[..., order], first, axis=-1)
        return combined

    n, total = each(np.add, rows.n_voxels), each(np.add, rows.total)
    if rows.is_exact:
        total, squares = digits.carried(total), digits.carried(each(np.add, rows.squares))
    else:
        # Deviations from the means of parts become deviations from the common mean (Chan et al. 1979).
        mean = np.empty(len(rows))
        mean[order] = np.repeat(total / n, np.diff(first, append=len(rows)))
        moved = rows.n_voxels * np.square(rows.total / rows.n_voxels - mean)
        squares = each(np.add, rows.squares + moved)
    return Sums(
        label[first],
        n,
        each(np.add, rows.coordinates),
        each(np.minimum, rows.start),
        each(np.maximum, rows.stop),
        total,
        squares,
        each(np.minimum, rows.minimum),
        each(np.maximum, rows.maximum),
    )


# -- runs of one block


def _iter_slabs(labels: Array, intensity: Array, core: Box) -> Iterator[Sums]:
    """Yield the sums of a few rows at a time, in raster order: temporaries of a whole block would cost too much."""
    n_x = core.shape[2]
    labels = np.ascontiguousarray(labels).reshape(-1, n_x)
    values = np.ascontiguousarray(intensity).reshape(-1, n_x)
    values = values.view(np.uint8) if values.dtype == np.bool_ else values
    step = max(_SLAB_VOXELS // n_x, 1)
    for row in range(0, len(labels), step):
        yield _add(
            [
                _list_runs(
                    labels[row : row + step].ravel(), values[row : row + step].ravel(), row, core
                )
            ]
        )


def _list_runs(labels: Array, values: Array, first_row: int, core: Box) -> Sums:
    """Return a row for each run of one label along x, in raster order; both arrays are whole rows of the block."""
    _, n_y, n_x = core.shape
    foreground = labels != 0
    begins = np.ones(labels.size, np.bool_)
    np.not_equal(labels[1:], labels[:-1], out=begins[1:])
    begins[::n_x] = True
    begins &= foreground
    at = np.flatnonzero(begins)
    values = values[foreground]
    first = np.flatnonzero(begins[foreground])
    n = np.diff(first, append=values.size)
    row, x = np.divmod(at, n_x)
    z, y = np.divmod(row + first_row, n_y)
    start = np.stack([z, y, x]) + np.reshape(core.start, (3, 1))
    stop, coordinates = start + 1, start * n
    stop[2] += n - 1
    coordinates[2] += n * (n - 1) // 2
    total, squares = (
        digits.sum_runs(values, first)
        if values.dtype.kind in "iu"
        else _sum_floats(values, first, n)
    )
    return Sums(
        labels[at].astype(np.uint64),
        n,
        coordinates,
        start,
        stop,
        total,
        squares,
        np.minimum.reduceat(values, first),
        np.maximum.reduceat(values, first),
    )


def _sum_floats(values: Array, first: Array, n: Array) -> tuple[Array, Array]:
    """Return the sum of each run, and of its squared deviations from the run's mean, float64."""
    wide = values.astype(np.float64)
    total = np.add.reduceat(wide, first)
    return total, np.add.reduceat(np.square(wide - np.repeat(total / n, n)), first)
