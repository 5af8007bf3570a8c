"""Meshes of objects: closed, where the voxels are, and of the area that is measured."""

import numpy as np
import pytest

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import measure_block, to_columns
from megaseg_dask.algorithms.meshes import mesh_of
from tests.fixtures.images import blobs, with_border


def volume_inside(mesh) -> float:
    """Volume of a closed surface, by the divergence theorem."""
    a, b, c = (mesh.corners[mesh.triangles[:, i]].astype(float) for i in range(3))
    return abs(np.einsum("ij,ij->i", a, np.cross(b, c)).sum()) / 6


def area_of(mesh) -> float:
    a, b, c = (mesh.corners[mesh.triangles[:, i]].astype(float) for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


def test_a_mesh_is_closed_and_where_the_voxels_are():
    # It touches two faces of the array, and is closed there too.
    mask = np.zeros((6, 10, 12), bool)
    mask[0:4, 3:9, 6:12] = True
    mesh = mesh_of(mask)
    assert mesh.corners.min(axis=0).tolist() == [-0.5, 2.5, 5.5]
    assert mesh.corners.max(axis=0).tolist() == [3.5, 8.5, 11.5]
    # A box without its twelve edges, which marching cubes bevels.
    assert volume_inside(mesh) == pytest.approx(4 * 6 * 6, rel=0.1)
    # Each edge belongs to two triangles.
    edges = np.sort(np.concatenate([mesh.triangles[:, [i, (i + 1) % 3]] for i in range(3)]), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert set(counts) == {2}


def test_the_area_is_the_measured_one():
    mask = blobs((12, 20, 24), seed=3) > 1200
    image = np.zeros(mask.shape, np.uint8)
    framed, pixels = with_border(mask.astype(np.uint32), image, Box.of(mask.shape))
    sums = measure_block(framed, pixels, Box.of(mask.shape))
    (area,) = to_columns(sums, mask.shape, (1.0, 1.0, 1.0))["surface_area_um2"]
    assert area_of(mesh_of(mask)) == pytest.approx(area, rel=1e-5)


def test_nothing_has_no_corner():
    mesh = mesh_of(np.zeros((2, 3, 4), bool))
    assert len(mesh.corners) == len(mesh.triangles) == 0
