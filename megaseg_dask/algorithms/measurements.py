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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.algorithms.surfaces import count_cubes, to_areas
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
    "extent": "float64",
    "equivalent_diameter_um": "float64",
    "axis_major_um": "float64",
    "axis_middle_um": "float64",
    "axis_minor_um": "float64",
    "surface_area_um2": "float64",
    "sphericity": "float64",
}

# The columns that tracks add to a table of objects.
TRACK_COLUMNS = {"track_id": "int64", "parent_track_id": "int64", "lineage_id": "int64"}

# Those that need a voxel size.
UM_COLUMNS = (
    *(name for name in COLUMNS if name.endswith(("_um", "_um2", "_um3"))),
    "sphericity",
)

# Columns of each channel that is measured beside the first; its name is appended.
CHANNEL_COLUMNS = tuple(name for name in COLUMNS if name.startswith("intensity_"))

# Temporaries of a slab take about 30 bytes a voxel; where each voxel differs from the next, 400
# (100 MB).
_SLAB_VOXELS = 2**18

# Rows and parts that wait before they are added, so that small parts are not sorted one by one.
_MAX_WAITING_ROWS = 2**16
_MAX_WAITING_PARTS = 1024

_HALF_BITS = 16

# Sums of products of coordinates are kept as upper and lower part, the lower one below 2^28.
_PRODUCT_BITS = 28
# Pairs of axes, as second moments list them.
_AXIS_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over the voxels of some objects, a column per object; ascending ids, each once.

    ``label`` uint64 and ``n_voxels`` int64 are ``(n,)``. ``coordinates`` (sums
    over voxels), ``start`` and ``stop`` (bounding box) are int64 ``(3, n)`` in
    z, y, x of the volume. ``products`` are the sums of zz, yy, xx, zy, zx and yx,
    the upper parts and the lower 28 bits, int64 ``(2, 6, n)``. ``cubes`` are
    those of :func:`~megaseg_dask.algorithms.surfaces.count_cubes`.

    Intensities are those of ``c`` channels. ``minimum`` and ``maximum`` are ``(c, n)`` in the
    image's dtype. Of an image of at most 16-bit integers, ``total`` is the
    exact sum of values, int64 ``(c, n)``, and ``squares`` sums the upper and the
    lower 16 bits of the squares, int64 ``(2, c, n)``: neither overflows below
    2^47 voxels. Of any other image they are the sum, and the sum of squared
    deviations from the object's mean, float64 ``(c, n)``.
    """

    label: NDArray[np.uint64]
    n_voxels: NDArray[np.int64]
    coordinates: NDArray[np.int64]
    products: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    cubes: NDArray[np.int64]
    total: Array
    squares: Array
    minimum: Array
    maximum: Array

    def __len__(self) -> int:
        return len(self.label)

    @property
    def is_exact(self) -> bool:
        """Whether the intensities are exact sums of integers."""
        return self.squares.ndim == 3

    def arrays(self) -> Columns:
        """Return the columns by name, to be stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "Sums":
        """Return the sums that :meth:`arrays` lists, among others by other names."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def measure_block(
    labels: NDArray[np.unsignedinteger],
    intensity: Array,
    core: Box,
    *,
    slab_voxels: int = _SLAB_VOXELS,
) -> Sums:
    """Return the sums of a block's objects, 0 being background.

    ``labels`` are final ids ``(z, y, x)`` of any unsigned width, of the block and of one voxel
    around it, 0 where the volume ends. ``intensity`` are the channels of the image in the block,
    ``(c, z, y, x)``, integers or floats; ``core`` is where the block lies in the volume.

    Holds, besides the block, 30 MB and about 2000 bytes per object of it.
    ``slab_voxels`` are read at a time.

    Raises:
        DataError: The shapes differ.
    """
    inner = labels[1:-1, 1:-1, 1:-1]
    sums = sum_block(inner, intensity, core, slab_voxels=slab_voxels)
    return replace(sums, cubes=count_cubes(labels, sums.label))


def sum_block(
    labels: NDArray[np.unsignedinteger],
    intensity: Array,
    core: Box,
    *,
    slab_voxels: int = _SLAB_VOXELS,
) -> Sums:
    """Return the sums of a block's objects without their surfaces.

    ``labels`` are those of the block alone.

    Raises:
        DataError: The shapes differ.
    """
    if not labels.shape == intensity.shape[1:] == core.shape:
        raise DataError(
            f"labels {labels.shape} and image {intensity.shape[1:]} of block {core} differ in shape"
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


def to_columns(
    sums: Sums,
    volume_shape: Shape,
    spacing_um: Sequence[float] | None,
    channels: Mapping[str, int] | None = None,
) -> Columns:
    """Return the table of a whole volume's objects, a row per object, by ascending label.

    ``spacing_um`` is ``None`` if it is unknown: the columns in µm are then left out, and
    sphericity, which needs it too. ``channels`` are names and numbers of the channels of
    ``sums`` that have columns of their own; the columns without a name are those of the first.
    The names and dtypes are ``COLUMNS``, the definitions those of
    ``skimage.measure.regionprops``: centroids in voxels are mean indices, and
    those in µm are measured from the center of the volume's first voxel; boxes
    are half-open; ``intensity_std`` is that of the population; the axes are those of the
    ellipsoid with the same second moments; ``extent`` is the share of the box.
    ``touches_border`` is true where a voxel lies in the first or last plane of
    an axis. Surfaces are those of :mod:`megaseg_dask.algorithms.surfaces`, closed where the
    volume ends. ``sphericity`` is the surface of a ball of the same volume, divided by the
    object's.
    """
    columns: dict[str, Array] = {"label": sums.label, "volume_voxels": sums.n_voxels}
    centroid = (sums.coordinates.astype(object) / sums.n_voxels.astype(object)).astype(np.float64)
    for axis, name in enumerate("zyx"):
        columns[f"centroid_{name}"] = centroid[axis]
        columns[f"bbox_{name}_start"] = sums.start[axis]
        columns[f"bbox_{name}_stop"] = sums.stop[axis]
    at_border = (sums.start == 0) | (sums.stop == np.reshape(volume_shape, (3, 1)))
    columns["touches_border"] = at_border.any(axis=0)
    columns["extent"] = sums.n_voxels / np.prod(sums.stop - sums.start, axis=0)
    if spacing_um:
        columns |= _columns_in_um(sums, centroid, spacing_um)
    intensities = _intensities(sums)
    for name, values in intensities.items():
        columns[name] = values[0]
    typed = {
        name: columns[name].astype(dtype) for name, dtype in COLUMNS.items() if name in columns
    }
    for channel, number in (channels or {}).items():
        for name in CHANNEL_COLUMNS:
            typed[channel_column(name, channel)] = intensities[name][number].astype(COLUMNS[name])
    return typed


def columns_of(*, size_is_known: bool, channels: Iterable[str] = ()) -> dict[str, str]:
    """Return the columns of :func:`to_columns`, and their dtypes."""
    left_out = () if size_is_known else UM_COLUMNS
    dtypes = {name: dtype for name, dtype in COLUMNS.items() if name not in left_out}
    for channel, name in product(channels, CHANNEL_COLUMNS):
        dtypes[channel_column(name, channel)] = COLUMNS[name]
    return dtypes


def channel_column(name: str, channel: str) -> str:
    """Return the name of a column of one channel by itself."""
    return f"{name}_{channel}"


def _columns_in_um(sums: Sums, centroid: Array, spacing_um: Sequence[float]) -> Columns:
    volume = sums.n_voxels * math.prod(spacing_um)
    surface = to_areas(sums.cubes, spacing_um)
    columns = {
        "volume_um3": volume,
        "equivalent_diameter_um": np.cbrt(6 * volume / np.pi),
        "surface_area_um2": surface,
        "sphericity": np.cbrt(np.pi * np.square(6 * volume)) / surface,
    }
    for name, values, size_um in zip("zyx", centroid, spacing_um, strict=True):
        columns[f"centroid_{name}_um"] = values * size_um
    lengths = _axis_lengths(sums, spacing_um)
    for name, values in zip(("minor", "middle", "major"), lengths, strict=True):
        columns[f"axis_{name}_um"] = values
    return columns


def _axis_lengths(sums: Sums, spacing_um: Sequence[float]) -> Array:
    """Return the lengths of the principal axes in µm, ``(3, n)``, the shortest first."""
    # As Python integers: each covariance is exact until it is rounded, once.
    n = sums.n_voxels.astype(object)
    coordinates = sums.coordinates.astype(object)
    upper, lower = sums.products.astype(object)
    products = upper * 2**_PRODUCT_BITS + lower
    covariance = np.empty((len(sums), 3, 3))
    for summed, (i, j) in zip(products, _AXIS_PAIRS, strict=True):
        values = (n * summed - coordinates[i] * coordinates[j]) / (n * n)
        covariance[:, i, j] = values.astype(np.float64) * (spacing_um[i] * spacing_um[j])
        covariance[:, j, i] = covariance[:, i, j]
    # Of flat objects the least is 0, or less by rounding.
    eigenvalues = np.maximum(np.linalg.eigvalsh(covariance), 0)
    lengths: Array = np.sqrt(20 * eigenvalues).T
    return lengths


def _intensities(sums: Sums) -> Columns:
    """Return the columns of intensities, float64 ``(c, n)``: std is that of the population."""
    if sums.is_exact:
        # As Python integers: each quotient is exact until it is rounded, once.
        n = sums.n_voxels.astype(object)
        exact = sums.total.astype(object)
        upper, lower = sums.squares.astype(object)
        squares = upper * 2**_HALF_BITS + lower
        mean = (exact / n).astype(np.float64)
        variance = ((n * squares - exact * exact) / (n * n)).astype(np.float64)
    else:
        mean = sums.total / sums.n_voxels
        variance = sums.squares / sums.n_voxels
    return {
        "intensity_mean": mean,
        "intensity_min": sums.minimum,
        "intensity_max": sums.maximum,
        "intensity_std": np.sqrt(variance),
        "intensity_sum": sums.total,
    }


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
        mean = np.empty(rows.total.shape)
        mean[:, order] = np.repeat(total / n, np.diff(first, append=len(rows)), axis=1)
        squares = squares + rows.n_voxels * np.square(rows.total / rows.n_voxels - mean)
    return Sums(
        label[first],
        n,
        each(np.add, rows.coordinates),
        _carried(each(np.add, rows.products)),
        each(np.minimum, rows.start),
        each(np.maximum, rows.stop),
        each(np.add, rows.cubes),
        total,
        each(np.add, squares),
        each(np.minimum, rows.minimum),
        each(np.maximum, rows.maximum),
    )


def _carried(products: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return upper and lower parts with all that the lower one has too much in the upper one."""
    upper, lower = products
    return np.stack([upper + (lower >> _PRODUCT_BITS), lower & (2**_PRODUCT_BITS - 1)])


# -- runs of one block


def _iter_slabs(labels: Array, intensity: Array, core: Box, slab_voxels: int) -> Iterator[Sums]:
    """Yield the sums of a few rows at a time, in raster order.

    Temporaries of a whole block would cost too much.
    """
    n_z, n_y, n_x = core.shape
    n_planes = max(slab_voxels // (n_y * n_x), 1)
    n_rows = n_y if n_planes > 1 else max(slab_voxels // n_x, 1)
    for z, y in product(range(0, n_z, n_planes), range(0, n_y, n_rows)):
        part = np.s_[z : z + n_planes, y : y + n_rows]
        values = intensity[:, *part]
        if values.dtype == np.bool_:
            values = values.view(np.uint8)
        start = (core.start[0] + z, core.start[1] + y, core.start[2])
        yield _add([_list_runs(labels[part], values, start)])


def _list_runs(labels: Array, values: Array, origin: Sequence[int]) -> Sums:
    """Return a row for each run of one label along x, in raster order.

    ``labels`` are ``(z, y, x)``, ``values`` ``(c, z, y, x)``, and ``origin`` is where they begin.
    """
    foreground = labels != 0
    begins = foreground.copy()
    begins[..., 1:] &= labels[..., 1:] != labels[..., :-1]
    values = values[:, foreground]
    first = np.flatnonzero(begins[foreground])
    n = np.diff(first, append=values.shape[1])
    start = np.stack(np.nonzero(begins)) + np.reshape(origin, (3, 1))
    stop = start + 1
    stop[2] += n - 1
    total, squares = _sum_runs(values, first, n)
    return Sums(
        labels[begins].astype(np.uint64),
        n,
        *_sum_coordinates(start, n),
        start,
        stop,
        # Cubes are counted of a block as a whole.
        np.empty((0, len(n)), np.int64),
        total,
        squares,
        np.minimum.reduceat(values, first, axis=1),
        np.maximum.reduceat(values, first, axis=1),
    )


def _sum_coordinates(start: Array, n: Array) -> tuple[Array, Array]:
    """Return ``coordinates`` and ``products`` of runs of ``n`` voxels along x from ``start``."""
    z, y, x = start
    steps = n * (n - 1) // 2
    sum_x = x * n + steps
    # The steps squared, 1 + 4 + 9 + …, are n(n-1)(2n-1)/6.
    sum_xx = x * (sum_x + steps) + steps * (2 * n - 1) // 3
    products = np.stack([z * z * n, y * y * n, sum_xx, z * y * n, z * sum_x, y * sum_x])
    return np.stack([z * n, y * n, sum_x]), _carried(np.stack([np.zeros_like(products), products]))


def _sum_runs(values: Array, first: Array, n: Array) -> tuple[Array, Array]:
    """Return ``total`` and ``squares`` of each run, as :class:`Sums` has them."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        exact = values.astype(np.int64)
        square = exact * exact
        upper = np.add.reduceat(square >> _HALF_BITS, first, axis=1)
        lower = np.add.reduceat(square & (2**_HALF_BITS - 1), first, axis=1)
        return np.add.reduceat(exact, first, axis=1), np.stack([upper, lower])
    wide = values.astype(np.float64)
    total = np.add.reduceat(wide, first, axis=1)
    # A channel that is measured alone may have voxels that are no number, and so is their sum.
    with np.errstate(invalid="ignore"):
        deviations = wide - np.repeat(total / n, n, axis=1)
    return total, np.add.reduceat(np.square(deviations), first, axis=1)
