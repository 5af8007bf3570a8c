"""Objects in regions, such as organelles in cells: sums over the voxels of both that add.

Three sums tell all: the voxels that each object shares with each region, the sums of the regions,
and those of the structure inside each region. Each adds across blocks, exactly as
:mod:`megaseg_dask.algorithms.measurements` says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.algorithms.measurements import (
    Columns,
    Sums,
    columns_of,
    measure_block,
    merge,
    sum_block,
    to_columns,
)

Array = NDArray[Any]

# The columns that objects get, and those of a region beside its own measurements; in µm.
_OBJECT_COLUMNS = {
    "region": "int64",
    "region_share": "float64",
    "region_distance_um": "float64",
}
_STRUCTURE_COLUMNS = {
    "n_objects": "int64",
    "structure_voxels": "int64",
    "structure_um3": "float64",
    "structure_share": "float64",
    "structure_intensity_sum": "float64",
}
_UM_COLUMNS = ("region_distance_um", "structure_um3")
# The name under which distances are stored.
DISTANCES = "region_distance_um"
# A region whose box, and one voxel around it, has more voxels is not looked at as a whole.
MAX_BOX_VOXELS = 2**25

# Rows of parts that wait before they are added, so that small parts are not sorted one by one.
_MAX_WAITING_ROWS = 2**14


@dataclass(frozen=True, slots=True, eq=False)
class RegionSums:
    """Sums of some regions, of the structure inside them, and of the pairs of object and region.

    ``overlaps`` has objects as ``predicted`` and regions as ``true``, without background.
    """

    regions: Sums
    inside: Sums
    overlaps: Contingency

    def __len__(self) -> int:
        return len(self.regions) + len(self.overlaps.voxels)

    def arrays(self) -> Columns:
        """Return all columns by name, to be stored."""
        arrays = {f"regions_{name}": values for name, values in self.regions.arrays().items()}
        arrays |= {f"inside_{name}": values for name, values in self.inside.arrays().items()}
        overlaps = self.overlaps
        return {
            **arrays,
            "overlap_object": overlaps.predicted,
            "overlap_region": overlaps.true,
            "overlap_voxels": overlaps.voxels,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "RegionSums":
        """Return the sums that :meth:`arrays` lists."""

        def those_of(prefix: str) -> Columns:
            names = [name for name in arrays if name.startswith(prefix)]
            return {name.removeprefix(prefix): arrays[name] for name in names}

        pairs = those_of("overlap_")
        overlaps = Contingency(pairs["object"], pairs["region"], pairs["voxels"])
        return cls(Sums(**those_of("regions_")), Sums(**those_of("inside_")), overlaps)


def measure_regions(labels: Array, regions: Array, intensity: Array, core: Box) -> RegionSums:
    """Return the sums of a block.

    ``labels`` and ``regions`` are ids ``(z, y, x)`` of the block and of one voxel around it, and
    ``intensity`` the channels ``(c, z, y, x)`` of the block, as for
    :func:`~megaseg_dask.algorithms.measurements.measure_block`.

    Raises:
        DataError: The shapes differ, or a region has a negative id.
    """
    inner = np.s_[1:-1, 1:-1, 1:-1]
    # It refuses ids that are negative.
    overlaps = Contingency.of(labels[inner], regions[inner])
    regions = regions.astype(np.uint64, copy=False)
    structure = np.where(labels[inner] != 0, regions[inner], np.uint64(0))
    is_pair = (overlaps.predicted != 0) & (overlaps.true != 0)
    return RegionSums(
        measure_block(regions, intensity, core),
        sum_block(structure, intensity, core),
        Contingency(overlaps.predicted[is_pair], overlaps.true[is_pair], overlaps.voxels[is_pair]),
    )


def merge_regions(parts: Iterable[RegionSums]) -> RegionSums:
    """Add the sums of at least one part of a volume, in grid order."""
    waiting: list[RegionSums] = []
    n_rows = 0
    max_rows = _MAX_WAITING_ROWS
    for part in parts:
        waiting.append(part)
        n_rows += len(part)
        if n_rows > max_rows:
            waiting = [_add(waiting)]
            n_rows = len(waiting[0])
            max_rows = 2 * n_rows + _MAX_WAITING_ROWS
    return _add(waiting)


def _add(parts: Sequence[RegionSums]) -> RegionSums:
    return RegionSums(
        merge(part.regions for part in parts),
        merge(part.inside for part in parts),
        Contingency.sum_of([part.overlaps for part in parts]),
    )


def choose_regions(objects: NDArray[np.uint64], overlaps: Contingency) -> tuple[Array, Array]:
    """Return the region of each object ``(n,)``, ascending, and how many of its voxels lie there.

    It is the one with most of them, the smallest id of several, and 0 of an object in none.
    """
    # By object, then by voxels, then by smaller id: the last of each object is its region.
    order = np.lexsort((~overlaps.true, overlaps.voxels, overlaps.predicted))
    owners = overlaps.predicted[order]
    is_last = np.append(owners[1:] != owners[:-1], True)[: len(owners)]
    rows = np.searchsorted(objects, owners[is_last])
    region = np.zeros(len(objects), np.int64)
    region[rows] = overlaps.true[order][is_last].astype(np.int64)
    shared = np.zeros(len(objects), np.int64)
    shared[rows] = overlaps.voxels[order][is_last]
    return region, shared


def measure_distances(
    objects: Sums,
    sums: RegionSums,
    read: Callable[[Box], Array],
    volume_shape: Shape,
    spacing_um: Sequence[float],
    *,
    max_voxels: int = MAX_BOX_VOXELS,
) -> NDArray[np.float64]:
    """Return how far the centroid of each object is from the surface of its region, in µm.

    That is the distance to the nearest center of a voxel outside the region, 0 if the centroid
    lies in such a voxel itself. What is beyond the volume is not outside. It is NaN of objects in
    no region, of a region that fills the volume, and of one whose box has more than
    ``max_voxels``. ``read`` returns the ids of regions in a box of the volume; one region is read
    at a time.
    """
    region, _ = choose_regions(objects.label, sums.overlaps)
    centroid = (objects.coordinates / objects.n_voxels).T
    distances = np.full(len(objects), np.nan)
    order = np.argsort(region, kind="stable")
    in_order = region[order]
    for label in np.unique(region[region > 0]).tolist():
        place = int(np.searchsorted(sums.regions.label, np.uint64(label)))
        start = tuple(sums.regions.start[:, place].tolist())
        stop = tuple(sums.regions.stop[:, place].tolist())
        box = Box(start, stop).grown(1) & Box.of(volume_shape)
        if box.size <= max_voxels:
            own = order[slice(*np.searchsorted(in_order, [label, label + 1]))]
            mask = read(box) == label
            distances[own] = _distances_to_outside(mask, box, centroid[own], spacing_um)
    return distances


def _distances_to_outside(
    mask: Array, box: Box, points: Array, spacing_um: Sequence[float]
) -> Array:
    """Return the distances of points ``(n, 3)`` from the voxels of a box that are not set.

    Points are in voxels of the volume, and so do not round differently in another box.
    """
    from scipy.spatial import cKDTree

    # Of a point in the mask, the nearest voxel outside has a neighbor by a face in the mask.
    touching = np.zeros(mask.shape, np.bool_)
    for axis in range(mask.ndim):
        low = (slice(None),) * axis + (slice(None, -1),)
        high = (slice(None),) * axis + (slice(1, None),)
        touching[low] |= mask[high]
        touching[high] |= mask[low]
    surface = np.argwhere(touching & ~mask)
    if not len(surface):
        return np.full(len(points), np.nan)
    places = (surface + np.array(box.start)) * np.array(spacing_um)
    distances, _ = cKDTree(places).query(points * np.array(spacing_um))
    nearest = np.rint(points).astype(np.int64) - np.array(box.start)
    is_within = ((nearest >= 0) & (nearest < mask.shape)).all(axis=1)
    is_inside = np.zeros(len(points), np.bool_)
    is_inside[is_within] = mask[tuple(nearest[is_within].T)]
    return np.where(is_inside, distances, 0.0)


def object_columns(*, size_is_known: bool) -> dict[str, str]:
    """Return the columns that objects get, and their dtypes."""
    left_out = () if size_is_known else _UM_COLUMNS
    return {name: dtype for name, dtype in _OBJECT_COLUMNS.items() if name not in left_out}


def columns_of_objects(
    objects: Sums, overlaps: Contingency, distances: NDArray[np.float64] | None
) -> Columns:
    """Return :func:`object_columns` of objects, and their distances if the voxel size is known.

    ``region`` is that of :func:`choose_regions`, and ``region_share`` the share of the object's
    voxels that lie in it.
    """
    region, shared = choose_regions(objects.label, overlaps)
    columns = {"region": region, "region_share": shared / objects.n_voxels}
    if distances is not None:
        columns["region_distance_um"] = distances
    return columns


def columns_of_regions(*, size_is_known: bool, channels: Sequence[str] = ()) -> dict[str, str]:
    """Return the columns of :func:`to_region_columns`, and their dtypes."""
    left_out = () if size_is_known else _UM_COLUMNS
    own = {name: dtype for name, dtype in _STRUCTURE_COLUMNS.items() if name not in left_out}
    return {**columns_of(size_is_known=size_is_known, channels=channels), **own}


def to_region_columns(
    sums: RegionSums,
    region_of_objects: NDArray[np.int64],
    volume_shape: Shape,
    spacing_um: Sequence[float] | None,
    channels: Mapping[str, int] | None = None,
) -> Columns:
    """Return the table of a volume's regions, a row per region, by ascending label.

    Beside the region's own measurements: the objects of which it holds the most voxels; voxels,
    volume and sum of intensity of all structure inside it; and the share that the structure takes.
    """
    columns = to_columns(sums.regions, volume_shape, spacing_um, channels)
    labels = sums.regions.label
    rows = np.searchsorted(labels, sums.inside.label)
    n_voxels = np.zeros(len(labels), np.int64)
    n_voxels[rows] = sums.inside.n_voxels
    total = np.zeros(len(labels))
    total[rows] = sums.inside.total[0]
    chosen = region_of_objects[region_of_objects > 0].astype(np.uint64)
    n_objects = np.bincount(np.searchsorted(labels, chosen), minlength=len(labels))
    columns["n_objects"] = n_objects.astype(np.int64)
    columns["structure_voxels"] = n_voxels
    if spacing_um:
        columns["structure_um3"] = n_voxels * float(np.prod(spacing_um))
    columns["structure_share"] = n_voxels / sums.regions.n_voxels
    columns["structure_intensity_sum"] = total
    return columns
