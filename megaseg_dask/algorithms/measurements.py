"""Shape and intensity of every object, from sums that add across blocks.

A row holds what is known of one object so far: counts, sums and extremes. A
block is read run by run (a run is a stretch of one label along x), each run is
a row, and rows of one label add up: the same addition joins the runs of a slab,
the slabs of a block and the blocks of a volume. Images of at most 16-bit
integers are summed exactly and rounded once, at the end, so every split gives
the same table bit for bit. Other images are summed in float64, in the order
given: two splits differ by at most 1e-12 of the sum of absolute values in the
sum, and of the largest of them in mean and standard deviation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import DataError

Array = NDArray[Any]
Columns = dict[str, Array]

# The columns of a table of objects, and their dtypes. People script against these names: more may
# be added, but none may change.
COLUMNS = {
    "label": "int64",
    "volume_voxels": "int64",
    "volume_um3": "float64",
    "centroid_z": "float64",
    "centroid_y": "float64",
    "centroid_x": "float64",
    "centroid_z_um": "float64",
    "centroid_y_um": "float64",
    "centroid_x_um": "float64",
    "bbox_z_start": "int64",
    "bbox_y_start": "int64",
    "bbox_x_start": "int64",
    "bbox_z_stop": "int64",
    "bbox_y_stop": "int64",
    "bbox_x_stop": "int64",
    "intensity_mean": "float64",
    "intensity_min": "float64",
    "intensity_max": "float64",
    "intensity_std": "float64",
    "intensity_sum": "float64",
    "touches_border": "bool",
}

# Those that need a voxel size.
UM_COLUMNS = tuple(name for name in COLUMNS if name.endswith(("_um", "_um3")))

# Temporaries of a slab take about 30 bytes a voxel; where each voxel differs from the next, 400
# (100 MB).
_SLAB_VOXELS = 2**18

# Rows and parts that wait before they are added, so that small parts are not sorted one by one.
_MAX_WAITING_ROWS = 2**16
_MAX_WAITING_PARTS = 1024

_HALF_BITS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over the voxels of some objects, a column per object; ascending ids, each once.

    ``label`` uint64 and ``n_voxels`` int64 are ``(n,)``. ``coordinates`` (sums
    over voxels), ``start`` and ``stop`` (bounding box) are int64 ``(3, n)`` in
    z, y, x of the volume. ``minimum`` and ``maximum`` are ``(n,)`` in the
    image's dtype. Of an image of at most 16-bit integers, ``total`` is the
    exact sum of values, int64 ``(n,)``, and ``squares`` sums the upper and the
    lower 16 bits of the squares, int64 ``(2, n)``: neither overflows below
    2^47 voxels. Of any other image they are the sum, and the sum of squared
    deviations from the object's mean, float64 ``(n,)``.
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
        """Whether the intensities are exact sums of integers."""
        return self.squares.ndim == 2

    def arrays(self) -> Columns:
        """Return the columns by name, to be stored; ``Sums(**arrays)`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def measure_block(
    labels: NDArray[np.unsignedinteger],
    intensity: Array,
    core: Box,
    *,
    slab_voxels: int = _SLAB_VOXELS,
) -> Sums:
    """Return the sums of a block's objects, 0 being background.

    ``labels`` are final ids ``(z, y, x)`` of any unsigned width, ``intensity``
    the image in the same voxels, integers or finite floats; ``core`` is where
    they lie in the volume.

    Holds, besides the block, 10 MB and about 450 bytes per object of it.
    ``slab_voxels`` are read at a time.

    Raises:
        DataError: The shapes differ.
    """
    if not labels.shape == intensity.shape == core.shape:
        raise DataError(
            f"labels {labels.shape} and image {intensity.shape} of block {core} differ in shape"
        )
    return merge(_iter_slabs(labels, intensity, core, slab_voxels))


def merge(parts: Iterable[Sums]) -> Sums:
    """Add the sums of at least one part of a volume.

    Sums that are not exact must come in grid order. Holds the objects of the
    parts so far, not the parts.
    """
    waiting: list[Sums] = []
    n_rows = 0
    max_rows = _MAX_WAITING_ROWS
    for part in parts:
        waiting.append(part)
        n_rows += len(part)
        if n_rows > max_rows or len(waiting) > _MAX_WAITING_PARTS:
            waiting = [_add(waiting)]
            n_rows = len(waiting[0])
            max_rows = 2 * n_rows + _MAX_WAITING_ROWS
    return _add(waiting)


def to_columns(sums: Sums, volume_shape: Shape, spacing_um: Sequence[float] | None) -> Columns:
    """Return the table of a whole volume's objects, a row per object, by ascending label.

    ``spacing_um`` is ``None`` if it is unknown: the columns in µm are then left out.
    Its names and dtypes are ``COLUMNS``, its definitions those of
    ``skimage.measure.regionprops``: centroids in voxels are mean indices, and
    those in µm are measured from the center of the volume's first voxel; boxes
    are half-open; ``intensity_std`` is that of the population.
    ``touches_border`` is true where a voxel lies in the first or last plane of
    an axis.
    """
    sizes = spacing_um or (1.0, 1.0, 1.0)
    total, mean, std = _intensities(sums)
    centroid = (sums.coordinates.astype(object) / sums.n_voxels.astype(object)).astype(np.float64)
    at_border = (sums.start == 0) | (sums.stop == np.reshape(volume_shape, (3, 1)))
    columns = [
        sums.label,
        sums.n_voxels,
        sums.n_voxels * math.prod(sizes),
        *centroid,
        *(centroid * np.reshape(sizes, (3, 1))),
        *sums.start,
        *sums.stop,
        mean,
        sums.minimum,
        sums.maximum,
        std,
        total,
        at_border.any(axis=0),
    ]
    return {
        name: values.astype(dtype)
        for (name, dtype), values in zip(COLUMNS.items(), columns, strict=True)
        if spacing_um or name not in UM_COLUMNS
    }


def _intensities(sums: Sums) -> tuple[Array, Array, Array]:
    """Return sum, mean and population standard deviation, float64."""
    if not sums.is_exact:
        mean = sums.total / sums.n_voxels
        return sums.total, mean, np.sqrt(sums.squares / sums.n_voxels)
    # As Python integers: each quotient is exact until it is rounded, once.
    n = sums.n_voxels.astype(object)
    total = sums.total.astype(object)
    upper, lower = sums.squares.astype(object)
    squares = upper * 2**_HALF_BITS + lower
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

    n = each(np.add, rows.n_voxels)
    total = each(np.add, rows.total)
    squares = rows.squares
    if not rows.is_exact:
        # Deviations from the means of parts become deviations from the common mean (Chan et al.
        # 1979).
        mean = np.empty(len(rows))
        mean[order] = np.repeat(total / n, np.diff(first, append=len(rows)))
        squares = squares + rows.n_voxels * np.square(rows.total / rows.n_voxels - mean)
    return Sums(
        label[first],
        n,
        each(np.add, rows.coordinates),
        each(np.minimum, rows.start),
        each(np.maximum, rows.stop),
        total,
        each(np.add, squares),
        each(np.minimum, rows.minimum),
        each(np.maximum, rows.maximum),
    )


# -- runs of one block


def _iter_slabs(labels: Array, intensity: Array, core: Box, slab_voxels: int) -> Iterator[Sums]:
    """Yield the sums of a few rows at a time, in raster order.

    Temporaries of a whole block would cost too much.
    """
    n_x = core.shape[2]
    label_rows = np.ascontiguousarray(labels).reshape(-1, n_x)
    value_rows = np.ascontiguousarray(intensity).reshape(-1, n_x)
    if value_rows.dtype == np.bool_:
        value_rows = value_rows.view(np.uint8)
    n_rows = max(slab_voxels // n_x, 1)
    for row in range(0, len(label_rows), n_rows):
        slab = slice(row, row + n_rows)
        yield _add([_list_runs(label_rows[slab].ravel(), value_rows[slab].ravel(), row, core)])


def _list_runs(labels: Array, values: Array, first_row: int, core: Box) -> Sums:
    """Return a row for each run of one label along x, in raster order.

    Both arrays are whole rows of the block.
    """
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
    stop = start + 1
    stop[2] += n - 1
    coordinates = start * n
    coordinates[2] += n * (n - 1) // 2
    total, squares = _sum_runs(values, first, n)
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


def _sum_runs(values: Array, first: Array, n: Array) -> tuple[Array, Array]:
    """Return ``total`` and ``squares`` of each run, as :class:`Sums` has them."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        exact = values.astype(np.int64)
        square = exact * exact
        upper = np.add.reduceat(square >> _HALF_BITS, first)
        lower = np.add.reduceat(square & (2**_HALF_BITS - 1), first)
        return np.add.reduceat(exact, first), np.stack([upper, lower])
    wide = values.astype(np.float64)
    total = np.add.reduceat(wide, first)
    deviations = wide - np.repeat(total / n, n)
    return total, np.add.reduceat(np.square(deviations), first)
