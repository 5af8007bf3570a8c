"""Score a label image on a store against the truth, block by block.

Only a table of touching pairs of objects is kept, and tables add; so images
of any size can be compared. Timepoints number their objects afresh, so an
object is known by timepoint and id.
"""

import numpy as np

from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.algorithms.matching import Contingency, Evaluation, evaluate_contingency
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.group import read_ome
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.stores import Location

_BLOCK_SHAPE = (64, 512, 512)
# Ids of a timepoint stay below this: a volume of 2^40 objects would have 2^41 voxels.
_IDS_PER_TIMEPOINT = 2**40


def find_labels(address: str, name: str | None = None) -> Location:
    """Return the label image at an address: the address itself, or the image's only (or named) label image.

    Raises :class:`SourceError` if there is none, :class:`SettingsError` if there are several and none was named.
    """
    location = Location.of(address)
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    labels = location / "labels"
    names = (read_ome(labels).get("labels") or []) if labels.exists() else []
    if not names:
        return location
    if name is None and len(names) > 1:
        raise SettingsError(
            f"{location} has label images {', '.join(names)}; choose one with --label"
        )
    if name is not None and name not in names:
        raise SettingsError(f"{location} has no label image {name}; it has {', '.join(names)}")
    return labels / (name or names[0])


def is_label_image(location: Location) -> bool:
    """Tell whether an image says that its voxels are ids of objects."""
    return "image-label" in read_ome(location)


def evaluate_images(predicted: Location, truth: Location) -> Evaluation:
    """Compare two label images of one shape.

    Raises :class:`SourceError` for images of another shape or dtype, and what reading raises.
    """
    images = [read_image(location) for location in (predicted, truth)]
    for location, image in zip((predicted, truth), images, strict=True):
        if np.dtype(image.dtype).kind not in "iub":
            raise SourceError(
                f"{location} holds {image.dtype}; labels are integers. Name a label image"
            )
    shapes = [(image.extent("t"), *image.volume_shape()) for image in images]
    if shapes[0] != shapes[1]:
        raise SourceError(
            f"shapes (t, z, y, x) differ: {predicted} has {shapes[0]}, {truth} has {shapes[1]}"
        )
    table = Contingency.none()
    for t in range(shapes[0][0]):
        volumes = [
            _volume(location, image, t)
            for location, image in zip((predicted, truth), images, strict=True)
        ]
        for box in BlockGrid(images[0].volume_shape(), _BLOCK_SHAPE):
            ours, theirs = (_unique_in_time(volume.read(box), t) for volume in volumes)
            table = table + Contingency.of(ours, theirs)
    return evaluate_contingency(table)


def _volume(location: Location, image: Image, t: int) -> Volume:
    return Volume(location / image.levels[0].path, image.axis_names, t=t)


def _unique_in_time(labels: np.ndarray, t: int) -> np.ndarray:
    ids = labels.astype(np.uint64)
    return np.where(ids > 0, ids + np.uint64(t * _IDS_PER_TIMEPOINT), np.uint64(0))
