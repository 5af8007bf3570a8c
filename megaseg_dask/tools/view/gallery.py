"""What there is to see: the image, its scores and its labels, of a run or of any OME-Zarr image or plate.

A scene is one image or field; everything is known by metadata, but for the
range of grey values, which comes from a few voxels in the middle.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError, SourceError, TargetError
from megaseg_dask.ngff.group import read_ome
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run import workspace
from megaseg_dask.run.target.ownership import read_parts
from megaseg_dask.stores import Location

# Voxels that the range of grey values is taken from.
_SAMPLE_SHAPE = (16, 256, 256)

# Units of OME-Zarr in those of Neuroglancer.
_UNITS = {
    "angstrom": (1e-10, "m"),
    "nanometer": (1e-9, "m"),
    "micrometer": (1e-6, "m"),
    "millimeter": (1e-3, "m"),
    "meter": (1.0, "m"),
    "millisecond": (1e-3, "s"),
    "second": (1.0, "s"),
    "minute": (60.0, "s"),
    "hour": (3600.0, "s"),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """An image, scores or labels: where its group is, and what becomes black and white."""

    name: str
    kind: str
    location: Location
    image: Image
    limits: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """The layers of one image or field, the first of which is the frame of the others."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def dimensions(self) -> dict[str, tuple[float, str]]:
        """Scale and unit of each axis that is shown, by name, x first."""
        image = self.layers[0].image
        found = {}
        for axis, scale in reversed(list(zip(image.axes, image.levels[0].scale, strict=True))):
            if axis.name != "c":
                factor, unit = _UNITS.get(axis.unit or "", (1.0, ""))
                found[axis.name] = (scale * factor, unit)
        return found

    @property
    def extents(self) -> dict[str, int]:
        """Number of voxels of each axis that is shown."""
        return {name: self.layers[0].image.extent(name) for name in self.dimensions}

    @property
    def origin(self) -> dict[str, float]:
        """First voxel of each axis in voxels of the world: a region or a timepoint does not begin at 0."""
        image = self.layers[0].image
        level = image.levels[0]
        return {
            axis.name: offset / scale
            for axis, offset, scale in zip(image.axes, level.translation, level.scale, strict=True)
            if axis.name in self.dimensions
        }


class Gallery:
    """All scenes of an address: one image, or the fields of a plate.

    Raises :class:`SourceError` if there is neither, :class:`TargetError` if a run there has not published anything.
    """

    def __init__(self, address: str, label_name: str | None = None) -> None:
        self.location = Location.of(address)
        self.location.require_readable()
        self.plans = list(_plans(self.location, label_name))
        self.plate: Plate | None = read_plate(self.location) if is_plate(self.location) else None
        self.fields = [field.path for field in self.plate.fields] if self.plate else [""]
        if not self.fields:
            raise SourceError(f"{self.location} has no field that can be read")

    @property
    def name(self) -> str:
        """Name of the image or plate."""
        return self.plate.name if self.plate else self.location.name

    def scene(self, field: str) -> Scene:
        """Return what there is of one field, ``""`` of an image; what cannot be read is left out."""
        layers = list(self._layers(field))
        if not layers:
            if self.plans:
                raise TargetError(
                    f"{self.location} has nothing to show yet: its run is not finished; run the same "
                    "segment command to go on"
                )
            raise SourceError(f"{self.location / field} is no OME-Zarr image that can be read")
        return Scene(field or self.name, tuple(layers))

    def _layers(self, field: str) -> Iterator[Layer]:
        plans = [plan for plan in self.plans if field in workspace.images(plan)]
        for plan in plans:
            channels = {c for volume in plan.volumes for c in volume.channels}
            yield from _image_layers(plan.source / field, wanted=channels)
            scale = 255.0 if plan.options.scores_dtype == "uint8" else 1.0
            for group in workspace.groups_of(plan, field):
                image = _try_read(group.location(plan))
                if image is not None:
                    name = "scores" if group.kind == "scores" else f"labels {group.name(plan)}"
                    kind = "scores" if group.kind == "scores" else "labels"
                    yield Layer(name, kind, group.location(plan), image, (0.0, scale))
        if not plans:
            place = self.location / field
            yield from _image_layers(place)
            for name in _label_names(place):
                image = _try_read(place / "labels" / name)
                if image is not None:
                    yield Layer(f"labels {name}", "labels", place / "labels" / name, image)


def _plans(location: Location, label_name: str | None) -> Iterator[Plan]:
    if not location.is_listable:
        return
    folder = runs_folder(location)
    names = (
        [label_name]
        if label_name
        else [name for name in folder.children() if (folder / name).is_folder()]
    )
    for name in sorted({name.partition("+")[0] for name in names}):
        yield from read_parts(location, name)


def _image_layers(location: Location, wanted: set[int] | None = None) -> Iterator[Layer]:
    """Yield a layer for each channel of an image, all of one group."""
    image = _try_read(location)
    if image is None:
        return
    for c in sorted(wanted) if wanted is not None else range(image.extent("c")):
        names = image.channel_names
        name = names[c] if c < len(names) else f"channel {c}" if image.extent("c") > 1 else "image"
        yield Layer(name, f"image:{c}", location, image, _grey_limits(location, image, c))


def _try_read(location: Location) -> Image | None:
    try:
        return read_image(location)
    except MegasegError:
        return None


def _label_names(image: Location) -> list[str]:
    try:
        listed = read_ome(image / "labels").get("labels")
    except Exception:
        return []  # an image without labels
    return [str(name) for name in listed or []]


def _grey_limits(location: Location, image: Image, c: int) -> tuple[float, float]:
    """Return the range of grey values in the middle of the first timepoint, without the brightest few."""
    level = len(image.levels) - 1
    box = Box.centered(_SAMPLE_SHAPE, image.volume_shape(level))
    try:
        values: Any = Volume(location / image.levels[level].path, image.axis_names, c=c).read(box)
    except (MegasegError, OSError):
        return 0.0, 1.0
    low, high = (float(v) for v in np.nanpercentile(values, (1, 99.8)))
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    return low, high if high > low else low + 1
