"""Meshes of single objects, in Neuroglancer's precomputed form, made when they are asked for."""

import json
import math
import re

import numpy as np

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.meshes import Mesh, mesh_of
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.tools.view.gallery import Layer
from megaseg_dask.tools.view.objects import factors, finest_level, read_objects

# Voxels of an object's box that a mesh is made from; a larger object is shown coarser.
_MAX_MESH_VOXELS = 2**22
_MANIFEST = re.compile(r"(\d{1,19}):0")
_FRAGMENT = re.compile(r"(\d{1,19})")


class Meshes:
    """The meshes of the objects of one layer at a timepoint of its own.

    Corners are in voxels of the labels: the page states their place in the world.
    """

    def __init__(self, layer: Layer, t: int) -> None:
        self._layer = layer
        self._t = t

    def get(self, key: str) -> bytes | None:
        """Return the description of all meshes, the parts of one, or the only part.

        Raises:
            MegasegError: Labels or table cannot be read.
        """
        if key == "info":
            return json.dumps({"@type": "neuroglancer_legacy_mesh"}).encode()
        if match := _MANIFEST.fullmatch(key):
            return json.dumps({"fragments": [match[1]]}).encode()
        if match := _FRAGMENT.fullmatch(key):
            mesh = self._mesh(int(match[1]))
            return None if mesh is None else _encode(mesh)
        return None

    def _mesh(self, label: int) -> Mesh | None:
        layer = self._layer
        objects = read_objects(layer, self._t)
        row = objects.row_of(label)
        if row is None:
            return None
        box = objects.box_of(row)
        level = finest_level(layer, _MAX_MESH_VOXELS, box)
        scale = factors(layer, level)
        coarse = _at_level(box, scale) & Box.of(layer.image.volume_shape(level))
        volume = Volume.of(layer.location, layer.image, level=level, t=self._t)
        # Where no level is coarse enough, voxels are left out.
        step = math.ceil(max(math.prod(coarse.shape) / _MAX_MESH_VOXELS, 1) ** (1 / 3))
        mask = volume.read(coarse)[::step, ::step, ::step] == label
        mesh = mesh_of(mask)
        corners = (mesh.corners * step + coarse.start + 0.5) * scale - 0.5
        return Mesh(corners.astype(np.float32), mesh.triangles)


def _at_level(box: Box, scale: tuple[float, ...]) -> Box:
    start = tuple(math.floor(a / f) for a, f in zip(box.start, scale, strict=True))
    stop = tuple(math.ceil(b / f) for b, f in zip(box.stop, scale, strict=True))
    return Box(start, stop)


def _encode(mesh: Mesh) -> bytes:
    """Return number of corners, corners (x, y, z) and triangles, as Neuroglancer reads them."""
    n_corners = np.array([len(mesh.corners)], "<u4")
    corners = np.ascontiguousarray(mesh.corners[:, ::-1], "<f4")
    return n_corners.tobytes() + corners.tobytes() + mesh.triangles.astype("<u4").tobytes()
