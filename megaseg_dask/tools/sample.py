"""A small image with labels, written as this package writes its own."""

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.ngff.group import write_group
from megaseg_dask.ngff.image import Axis, Image, Level, image_attributes
from megaseg_dask.ngff.labels import add_label, labels_group
from megaseg_dask.ngff.versions import LATEST
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.stores import Location

SPACING_UM = (0.29, 0.26, 0.26)
AXES = ("z", "y", "x")


def write_sample(
    location: Location,
    image: NDArray[np.uint16],
    truth: NDArray[np.uint16],
    spacing_um: tuple[float, ...] = SPACING_UM,
) -> None:
    """Write an image ``(z, y, x)``, of the sample's spacing, and its labels, as OME-Zarr 0.5."""
    level = Level("0", image.shape, spacing_um, (0.0, 0.0, 0.0))
    axes = tuple(Axis(name, "space", "micrometer") for name in AXES)
    described = Image(LATEST, "nuclei", axes, (level,), "uint16")
    labels = labels_group(location)
    write_group(location, LATEST, image_attributes(described))
    add_label(location, LATEST, "truth")
    write_group(labels / "truth", LATEST, image_attributes(described, label=True))
    _write_level(location / "0", described, image)
    _write_level(labels / "truth" / "0", described, truth)


def _write_level(array: Location, described: Image, values: NDArray[np.uint16]) -> None:
    layout = write_layout(values.shape, values.shape, sharded=True)
    create_array(array, described, 0, "uint16", layout)
    Volume(array, AXES).write(Box.of(values.shape), values)
