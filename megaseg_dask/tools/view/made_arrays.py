"""OME-Zarr images that are made when they are asked for: their metadata, and the backdrop."""

import json
from collections.abc import Sequence
from dataclasses import replace

from megaseg_dask.ngff.image import SPATIAL, Image, Level, image_attributes
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.tools.view.gallery import Scene

METADATA = "zarr.json"


def group_document(image: Image) -> bytes:
    """Return the metadata of the group of an image, in OME-Zarr 0.5."""
    attributes = image_attributes(replace(image, version="0.5"))
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document).encode()


def attribute_documents(image: Image) -> dict[str, bytes]:
    """Return the objects that hold the attributes of an image's group, as it is stored, by name."""
    if VERSIONS[image.version].zarr_format == 3:
        return {METADATA: group_document(image)}
    return {".zattrs": json.dumps(image_attributes(image)).encode()}


def array_document(
    shape: Sequence[int], chunk_shape: Sequence[int], dtype: str, axis_names: Sequence[str]
) -> bytes:
    """Return the metadata of an array of plain chunks, which are named ``c/0/0/0``."""
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(chunk_shape)},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": list(axis_names),
        "attributes": {},
    }
    return json.dumps(document).encode()


class Backdrop:
    """An image of a single voxel, as large as a scene.

    Neuroglancer does not blend the lowest layer: labels over nothing would be opaque.
    """

    def __init__(self, scene: Scene) -> None:
        image = scene.layers[0].image
        scales, offsets = image.transform()
        axes = []
        scale = []
        translation = []
        for axis, one, offset in zip(image.axes, scales, offsets, strict=True):
            if axis.name in SPATIAL:
                n = image.extent(axis.name)
                axes.append(axis)
                scale.append((abs(one) or 1.0) * n)
                translation.append(offset + (abs(one) or 1.0) * (n - 1) / 2)
        level = Level("0", (1,) * len(axes), tuple(scale), tuple(translation))
        self._image = Image("0.5", "backdrop", tuple(axes), (level,), "uint8")

    def get(self, key: str) -> bytes | None:
        """Return metadata, or the only voxel."""
        match key:
            case "zarr.json":
                return group_document(self._image)
            case "0/zarr.json":
                return array_document((1, 1, 1), (1, 1, 1), "uint8", self._image.axis_names)
            case "0/c/0/0/0":
                return bytes(1)
        return None
