"""Score a label image on a store against the truth, block by block.

Only a table of touching pairs of objects is kept, and tables add, so images of
any size can be compared. Ids start again in each timepoint: an object is known by
timepoint and id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.matching import Contingency, Evaluation, evaluate_contingency
from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.labels import choose_label, read_label_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.run.target.provenance import missing_at
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
    return choose_label(location, name) or location


def require_labels(location: Location) -> None:
    """Check that the metadata of an image say that its voxels are ids of objects.

    Raises:
        SourceError: They do not.
    """
    if read_label_image(location).kind != "label image":
        raise SourceError(
            f"{location} is not marked as a label image, and has none in it; name a label image "
            "(such as IMAGE/labels/NAME), or pass --unmarked if its voxels are ids of objects"
        )


def evaluate_images(
    predicted: Location, truth: Location, block_shape: Shape = BLOCK_SHAPE
) -> Evaluation:
    """Compare two label images of one shape, all timepoints together; any block gives the same.

    Voxels that one of them lacks because tasks of its run failed are left out, and counted.

    Raises:
        SourceError: for images of different shapes, without a voxel in common, or whose voxels are
            no integers.
        MegasegError: if one of them cannot be read.
    """
    ours = _Labels.open(predicted)
    theirs = _Labels.open(truth)
    if ours.shape != theirs.shape:
        shapes = f"{predicted} has {ours.shape}, {truth} has {theirs.shape}"
        raise SourceError(f"shapes (t, z, y, x) differ: {shapes}")
    n_times, *volume_shape = ours.shape
    table = Contingency.none()
    n_left_out = 0
    for t in range(n_times):
        for box in BlockGrid(tuple(volume_shape), block_shape):
            is_there = ours.has(t, box) & theirs.has(t, box)
            n_left_out += int((~is_there).sum())
            compared = (labels.read(t, box)[is_there] for labels in (ours, theirs))
            table = table + Contingency.of(*compared)
    if not len(table.voxels):
        raise SourceError(
            f"{predicted} lacks all voxels: its run failed; fix the cause, and run the same "
            "megaseg segment command again"
        )
    return replace(evaluate_contingency(table), left_out_voxels=n_left_out)


@dataclass(frozen=True, slots=True)
class _Labels:
    """A label image of one or more timepoints."""

    location: Location
    image: Image
    missing: Sequence[tuple[int, Box]]

    @classmethod
    def open(cls, location: Location) -> "_Labels":
        return cls(location, read_label_image(location), missing_at(location))

    @property
    def shape(self) -> Shape:
        """Extents (t, z, y, x)."""
        return (self.image.extent("t"), *self.image.volume_shape())

    def has(self, t: int, box: Box) -> NDArray[np.bool_]:
        """Return which voxels ``(z, y, x)`` of a box were computed."""
        is_there = np.ones(box.shape, bool)
        for time, lost in self.missing:
            common = box & lost
            if time == t and min(common.shape) > 0:
                is_there[common.within(box).slices] = False
        return is_there

    def read(self, t: int, box: Box) -> NDArray[np.uint64]:
        """Return labels ``(z, y, x)``, with ids that are unique over all timepoints."""
        volume = Volume.of(self.location, self.image, t=t)
        ids = volume.read(box).astype(np.uint64)
        unique = ids + np.uint64(t * _IDS_PER_TIMEPOINT)
        return np.where(ids > 0, unique, np.uint64(0))
