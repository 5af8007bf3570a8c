"""The objects of a label image at one timepoint: sizes, places and boxes.

They come from the table of measurements beside the labels where there is one.
Otherwise they are counted when they are first asked for, at the finest level
that is small enough, and said to be about right if that is not the finest one.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.measurements import Sums, merge, sum_block
from megaseg_dask.ngff.tables import ImageTable
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.tools.view.gallery import Layer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Voxels that are counted at most, some ten seconds, and voxels at a time.
_MAX_COUNTED_VOXELS = 2**28
_BLOCK_SHAPE = (32, 512, 512)
# Tables that are kept: of the last label images and timepoints that were asked for.
_KEPT_TABLES = 8


@dataclass(frozen=True, slots=True, eq=False)
class ObjectTable:
    """The objects of one label image at one timepoint, by ascending id, in voxels of its own.

    ``label`` and ``n_voxels`` are ``(n,)``; ``centroid``, ``start`` and ``stop`` (the bounding
    box) are ``(3, n)`` in z, y, x. ``volume_um3`` is ``None`` where voxels have no known size.
    All but the ids are about right if ``is_exact`` is false.
    """

    label: Ints
    n_voxels: Ints
    centroid: Floats
    start: Ints
    stop: Ints
    volume_um3: Floats | None
    intensity_mean: Floats | None = None
    is_exact: bool = True

    def row_of(self, label: int) -> int | None:
        """Return the row of an object, or none if there is no such object."""
        row = int(np.searchsorted(self.label, label))
        return row if row < len(self.label) and self.label[row] == label else None

    def box_of(self, row: int) -> Box:
        """Return the bounding box of an object."""
        return Box(tuple(self.start[:, row].tolist()), tuple(self.stop[:, row].tolist()))


@functools.lru_cache(maxsize=_KEPT_TABLES)
def read_objects(layer: Layer, t: int) -> ObjectTable:
    """Return the objects of a layer of labels at a timepoint of its own.

    Raises:
        MegasegError: Labels or table cannot be read.
    """
    return _recorded(layer, t) or _counted(layer, t)


def _recorded(layer: Layer, t: int) -> ObjectTable | None:
    """Return the objects from the table beside the labels, if it is there."""
    image = layer.location.parent.parent
    for timepoint, _, columns in ImageTable(image, layer.location.basename).read():
        if timepoint == t and "bbox_z_start" in columns:
            return _table_of(columns)
    return None


def _table_of(columns: Mapping[str, NDArray[Any]]) -> ObjectTable:
    def along_axes(name: str) -> NDArray[Any]:
        return np.stack([columns[name.format(axis)] for axis in "zyx"])

    return ObjectTable(
        columns["label"].astype(np.int64),
        columns["volume_voxels"].astype(np.int64),
        along_axes("centroid_{}").astype(np.float64),
        along_axes("bbox_{}_start").astype(np.int64),
        along_axes("bbox_{}_stop").astype(np.int64),
        columns.get("volume_um3"),
        columns.get("intensity_mean"),
    )


def _counted(layer: Layer, t: int) -> ObjectTable:
    image = layer.image
    level = finest_level(layer, _MAX_COUNTED_VOXELS)
    volume = Volume.of(layer.location, image, level=level, t=t)
    sums = merge(_count_blocks(volume, Box.of(image.volume_shape(level))))
    scale = factors(layer, level)
    n_voxels = np.rint(sums.n_voxels * math.prod(scale)).astype(np.int64)
    column = np.reshape(scale, (3, 1))
    centroid = (sums.coordinates / np.maximum(sums.n_voxels, 1) + 0.5) * column - 0.5
    is_known = image.unknown_size is None
    return ObjectTable(
        sums.label.astype(np.int64),
        n_voxels,
        centroid,
        np.floor(sums.start * column).astype(np.int64),
        np.minimum(np.ceil(sums.stop * column), np.reshape(image.volume_shape(), (3, 1))).astype(
            np.int64
        ),
        n_voxels * math.prod(image.spacing_um) if is_known else None,
        is_exact=level == 0,
    )


def _count_blocks(volume: Volume, whole: Box) -> Iterator[Sums]:
    for box in BlockGrid(whole.shape, _BLOCK_SHAPE):
        labels = unsigned(volume.read(box))
        # No intensity is asked for here.
        yield sum_block(labels, np.zeros((1, *box.shape), np.uint8), box)


def unsigned(labels: NDArray[Any]) -> NDArray[np.unsignedinteger]:
    """Return ids as unsigned integers; those below 0 mark voxels that nobody annotated."""
    if labels.dtype.kind == "u":
        return labels
    ids: NDArray[np.uint64] = np.maximum(labels, 0).astype(np.uint64)
    return ids


def finest_level(layer: Layer, max_voxels: int, box: Box | None = None) -> int:
    """Return the finest level at which a box of the finest one, or all, is small enough."""
    n_voxels = math.prod((box or Box.of(layer.image.volume_shape())).shape)
    for level in range(len(layer.image.levels)):
        if n_voxels / math.prod(factors(layer, level)) <= max_voxels:
            return level
    return len(layer.image.levels) - 1


def factors(layer: Layer, level: int) -> tuple[float, ...]:
    """Return how much larger a voxel of a level is than one of the finest, ``(z, y, x)``."""
    finest = layer.image.volume_shape()
    coarse = layer.image.volume_shape(level)
    # Rounded extents are no exact factors, and metadata may be wrong: whole numbers are meant.
    return tuple(max(float(round(a / b)), 1.0) for a, b in zip(finest, coarse, strict=True))
