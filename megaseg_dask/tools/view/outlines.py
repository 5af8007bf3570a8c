"""The outlines of labels in the planes of x and y, as an OME-Zarr label image made on request.

Neuroglancer draws labels filled only. A voxel is on an outline if one of its
four neighbors in its plane has another id; it keeps its id, so that colors and
selection are those of the labels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.ngff.group import lies_below
from megaseg_dask.ngff.image import SPATIAL
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.tools.view.gallery import Layer
from megaseg_dask.tools.view.made_arrays import METADATA, array_document, group_document
from megaseg_dask.tools.view.objects import unsigned

Labels = NDArray[np.unsignedinteger]

_CHUNK_SHAPE = (8, 256, 256)


def outline(labels: NDArray[Any]) -> Labels:
    """Return the ids on outlines, and 0 elsewhere, of ``(z, y, x)`` without a voxel on each side.

    ``labels`` have a border of one voxel in y and x.
    """
    labels = unsigned(labels)
    inner = labels[:, 1:-1, 1:-1]
    differs = labels[:, :-2, 1:-1] != inner
    for neighbor in (labels[:, 2:, 1:-1], labels[:, 1:-1, :-2], labels[:, 1:-1, 2:]):
        differs |= neighbor != inner
    return np.where(differs, inner, 0).astype(inner.dtype)


class Outlines:
    """The objects of the label image of a layer's outlines."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._levels = {level.path: i for i, level in enumerate(layer.image.levels)}

    def get(self, key: str) -> bytes | None:
        """Return metadata of the image or of a level, or a chunk of it.

        Raises:
            MegasegError: The labels cannot be read.
        """
        if key == METADATA:
            return group_document(self._layer.image)
        path, _, name = key.partition("/c/")
        if path in self._levels and name and lies_below(name):
            return self._chunk(self._levels[path], name)
        path, _, name = key.rpartition("/")
        if path in self._levels and name == METADATA:
            return self._array(self._levels[path])
        return None

    def _array(self, level: int) -> bytes:
        image = self._layer.image
        shape = image.levels[level].shape
        return array_document(shape, self._chunk_shape, self._dtype, image.axis_names)

    @property
    def _dtype(self) -> str:
        dtype = np.dtype(self._layer.image.dtype)
        return dtype.name if dtype.kind == "u" else "uint64"

    @property
    def _chunk_shape(self) -> tuple[int, ...]:
        extents = dict(zip(SPATIAL, _CHUNK_SHAPE, strict=True))
        return tuple(extents.get(name, 1) for name in self._layer.image.axis_names)

    def _chunk(self, level: int, name: str) -> bytes | None:
        image = self._layer.image
        try:
            position = [int(number) for number in name.split("/")]
        except ValueError:
            return None
        if len(position) != len(image.axes):
            return None
        at = dict(zip(image.axis_names, position, strict=True))
        start = tuple(at[a] * n for a, n in zip(SPATIAL, _CHUNK_SHAPE, strict=True))
        core = Box(start, tuple(a + n for a, n in zip(start, _CHUNK_SHAPE, strict=True)))
        whole = Box.of(image.volume_shape(level))
        if min((core & whole).shape) <= 0:
            return None
        t = at.get("t", 0)
        volume = Volume.of(self._layer.location, image, level=level, t=t)
        framed = core.grown((0, 1, 1))
        inside = framed & whole
        labels = volume.read(inside)
        # Where the volume ends, objects end too.
        padding = [
            (a - b, c - d)
            for a, b, c, d in zip(inside.start, framed.start, framed.stop, inside.stop, strict=True)
        ]
        chunk = outline(np.pad(labels, padding)).astype(np.dtype(self._dtype).newbyteorder("<"))
        # The axes of an image may have another order.
        order = [SPATIAL.index(name) for name in image.axis_names if name in SPATIAL]
        return chunk.transpose(order).tobytes()
