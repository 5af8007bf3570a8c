"""Surface areas by marching cubes, from counts that add across blocks.

Marching cubes looks at the eight voxels of a cube, and the area inside it depends on nothing else:
on which of them belong to the object. Cubes that are mirror images have the same area at any voxel
size, so the 254 mixed cubes are 44 kinds. The cubes of each kind are counted per object, which is
exact in any order, and multiplied by their areas once, at the end. The result is that of
``skimage.measure.marching_cubes`` with its default method (Lewiner's), at level 0.5 of the object
with a border of background. Lorensen's method fills ambiguous cubes otherwise.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box

Array = NDArray[Any]
Counts = NDArray[np.int64]

_CORNERS = tuple(product((0, 1), repeat=3))
_EMPTY = 0
_FULL = 255
# Cubes that are looked at together.
_SLAB_VOXELS = 2**18


def count_cubes(labels: Array, objects: Array) -> Counts:
    """Return how many cubes of each kind each object of a block has, ``(n_kinds, n)``.

    ``labels`` ``(z, y, x)`` are those of the block and of one voxel around it, 0 where the volume
    ends; ``objects`` ``(n,)`` are the ids in the block, ascending. A cube at the border of blocks
    is counted where its first voxel of the object lies.
    """
    n_kinds = len(kinds())
    counts = np.zeros(len(objects) * n_kinds, np.int64)
    n_z, n_y, n_x = labels.shape
    inside = Box((1, 1, 1), (n_z - 1, n_y - 1, n_x - 1))
    n_planes = max(_SLAB_VOXELS // (n_y * n_x), 1)
    for z in range(0, n_z - 1, n_planes):
        slab = np.ascontiguousarray(labels[z : z + n_planes + 1])
        ids, cubes = _list_cubes(slab, inside.shifted((-z, 0, 0)))
        rows = np.searchsorted(objects, ids)
        np.add.at(counts, rows * n_kinds + _kind_numbers()[cubes], 1)
    return np.ascontiguousarray(counts.reshape(-1, n_kinds).T)


def to_areas(counts: Counts, spacing_um: Sequence[float]) -> NDArray[np.float64]:
    """Return the surface area of each object in µm², from the cubes of each kind."""
    areas = np.array([_area(kind, tuple(spacing_um)) for kind in kinds()])
    total: NDArray[np.float64] = np.zeros(counts.shape[1])
    # One kind after the other: the result does not depend on how a library sums.
    for area, n_cubes in zip(areas, counts, strict=True):
        total += area * n_cubes
    return total


@cache
def kinds() -> tuple[int, ...]:
    """Return the smallest cube of each kind; bit ``i`` is corner ``i`` in raster order."""
    return tuple(sorted({_kind(cube) for cube in range(_EMPTY + 1, _FULL)}))


def _kind(cube: int) -> int:
    """Return the smallest of the mirror images of a cube."""
    corners = _corners_of(cube)
    mirrored = []
    for axes in product((1, -1), repeat=3):
        flipped = corners[tuple(slice(None, None, step) for step in axes)]
        mirrored.append(int(np.packbits(flipped.ravel(), bitorder="little")[0]))
    return min(mirrored)


def _corners_of(cube: int) -> Array:
    return np.unpackbits(np.array([cube], np.uint8), bitorder="little").reshape(2, 2, 2)


@cache
def _kind_numbers() -> Array:
    """Return the number of the kind of each cube."""
    numbers = np.zeros(_FULL + 1, np.int64)
    for cube in range(_EMPTY + 1, _FULL):
        numbers[cube] = kinds().index(_kind(cube))
    return numbers


@cache
def _area(cube: int, spacing_um: tuple[float, ...]) -> float:
    from skimage.measure import marching_cubes, mesh_surface_area

    vertices, faces, _, _ = marching_cubes(_corners_of(cube).astype(np.float32), 0.5)
    # At voxel size 1 the vertices are exact in float32.
    return float(mesh_surface_area(vertices.astype(np.float64) * spacing_um, faces))


def _list_cubes(slab: Array, inside: Box) -> tuple[Array, Array]:
    """Return the id and the cube of each object in each mixed cube of a slab.

    Objects are left out whose first voxel in the cube is not ``inside``.
    """
    begin = np.stack(np.nonzero(_is_mixed(slab)))
    corners = np.stack([slab[tuple(begin + np.reshape(c, (3, 1)))] for c in _CORNERS])
    ids = corners.max(axis=0, initial=0)
    has_several = ((corners != 0) & (corners != ids)).any(axis=0)
    # Most cubes hold one object alone.
    alone = ~has_several
    found = [(ids[alone], begin[:, alone], _pack(corners[:, alone] != 0))]
    corners = corners[:, has_several]
    begin = begin[:, has_several]
    for number, values in enumerate(corners):
        same = corners == values
        is_first = (values != 0) & ~same[:number].any(axis=0)
        found.append((values[is_first], begin[:, is_first], _pack(same[:, is_first])))
    ids, begin, cubes = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    first_voxel = begin + _first_corners()[:, cubes]
    is_inside = (first_voxel >= np.reshape(inside.start, (3, 1))).all(axis=0)
    is_inside &= (first_voxel < np.reshape(inside.stop, (3, 1))).all(axis=0)
    return ids[is_inside], cubes[is_inside]


def _pack(corners: Array) -> Array:
    """Return cubes from their corners ``(8, n)``."""
    packed: Array = np.packbits(corners, axis=0, bitorder="little")[0]
    return packed


@cache
def _first_corners() -> Array:
    """Return the first corner of each cube that belongs to the object, ``(3, 256)``."""
    first = [np.argmax(_corners_of(cube)) for cube in range(_FULL + 1)]
    return np.array(_CORNERS)[first].T


def _is_mixed(slab: Array) -> Array:
    """Return which cubes have voxels that differ."""
    along_x = slab[..., 1:] != slab[..., :-1]
    along_y = slab[:, 1:, :-1] != slab[:, :-1, :-1]
    mixed: Array = along_x[:, 1:] | along_x[:, :-1]
    mixed |= along_y
    mixed = mixed[1:] | mixed[:-1]
    mixed |= slab[1:, :-1, :-1] != slab[:-1, :-1, :-1]
    return mixed
