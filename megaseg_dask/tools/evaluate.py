"""Score a label image on a store against the truth, block by block.

Only a table of touching pairs of objects is kept, and tables add, so images of
any size can be compared. Ids start again in each timepoint: an object is known by
timepoint and id.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.matching import Contingency, Evaluation, evaluate_contingency
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.group import read_ome
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.labels import labels_group, list_labels
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.stores import Location

BLOCK_SHAPE = (64, 512, 512)
# Ids of a timepoint stay below this: a volume of 2^40 objects would have 2^41 voxels.
_IDS_PER_TIMEPOINT = 2**40


def find_labels(address: str, name: str | None = None) -> Location:
    """Return the label image at an address: the address itself, or a label image of its image.

    Raises:
        SourceError: if nothing is there.
        SettingsError: if ``name`` is missing, or is needed to choose one of several.
    """
    location = Location.of(address)
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    names = list_labels(location)
    if not names:
        return location
    listed = ", ".join(names)
    if name is None:
        if len(names) > 1:
            raise SettingsError(f"{location} has label images {listed}; choose one with --label")
        name = names[0]
    elif name not in names:
        raise SettingsError(f"{location} has no label image {name}; it has {listed}")
    return labels_group(location) / name


def is_label_image(location: Location) -> bool:
    """Return whether the metadata of an image say that its voxels are ids of objects."""
    return "image-label" in read_ome(location)


def evaluate_images(
    predicted: Location, truth: Location, block_shape: Shape = BLOCK_SHAPE
) -> Evaluation:
    """Compare two label images of one shape, all timepoints together; any block gives the same.

    Raises:
        SourceError: for images of different shapes, or whose voxels are no integers.
        MegasegError: if one of them cannot be read.
    """
    ours = _Labels.open(predicted)
    theirs = _Labels.open(truth)
    if ours.shape != theirs.shape:
        shapes = f"{predicted} has {ours.shape}, {truth} has {theirs.shape}"
        raise SourceError(f"shapes (t, z, y, x) differ: {shapes}")
    n_times, *volume_shape = ours.shape
    table = Contingency.none()
    for t in range(n_times):
        for box in BlockGrid(tuple(volume_shape), block_shape):
            table = table + Contingency.of(ours.read(t, box), theirs.read(t, box))
    return evaluate_contingency(table)


@dataclass(frozen=True, slots=True)
class _Labels:
    """A label image of one or more timepoints."""

    location: Location
    image: Image

    @classmethod
    def open(cls, location: Location) -> "_Labels":
        image = read_image(location)
        if np.dtype(image.dtype).kind not in "iub":
            advice = "labels are integers. Name a label image"
            raise SourceError(f"{location} holds {image.dtype}; {advice}")
        return cls(location, image)

    @property
    def shape(self) -> Shape:
        """Extents (t, z, y, x)."""
        return (self.image.extent("t"), *self.image.volume_shape())

    def read(self, t: int, box: Box) -> NDArray[np.uint64]:
        """Return labels ``(z, y, x)``, with ids that are unique over all timepoints."""
        volume = Volume.of(self.location, self.image, t=t)
        ids = volume.read(box).astype(np.uint64)
        unique = ids + np.uint64(t * _IDS_PER_TIMEPOINT)
        return np.where(ids > 0, unique, np.uint64(0))
