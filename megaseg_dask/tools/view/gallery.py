"""What the viewer can show: the layers of a run's fields, or of any OME-Zarr image or plate.

A scene is one image or field. It is described by metadata alone, except for the
range of gray values, which comes from a few voxels in the middle.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import max_score
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import MegasegError, SourceError, TargetError
from megaseg_dask.ngff.image import Axis, Image, read_image
from megaseg_dask.ngff.labels import labels_group, list_labels
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate
from megaseg_dask.ngff.units import meters, seconds
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.target.arrays import ImageTarget, Target
from megaseg_dask.run.target.provenance import missing_at
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.pictures import gray_limits

Limits = tuple[float, float]

IMAGE = "image"
SCORES = "scores"
LABELS = "labels"

# Voxels that give the range of gray values.
_SAMPLE_SHAPE = (16, 256, 256)


@dataclass(frozen=True, slots=True)
class Layer:
    """One channel of an image, or its scores or labels; ``limits`` become black and white."""

    name: str
    kind: str
    location: Location
    image: Image
    limits: Limits = (0.0, 1.0)
    channel: int = 0
    # Whether it is shown at first.
    visible: bool = True


@dataclass(frozen=True, slots=True)
class Scene:
    """The layers of one image or field; the axes are those of the first one."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def dimensions(self) -> dict[str, tuple[float, str]]:
        """Scale and unit of each axis that is shown, by name, x first."""
        image = self.layers[0].image
        scales, _ = image.transform()
        dimensions = {}
        for axis, scale in zip(reversed(image.axes), reversed(scales), strict=True):
            if axis.name != "c":
                factor, unit = _unit_of(axis)
                # Some files say 0 for an unknown size, and mirror an axis by a negative one.
                dimensions[axis.name] = ((abs(scale) or 1.0) * factor, unit)
        return dimensions

    @property
    def extents(self) -> dict[str, int]:
        """Number of voxels of each axis that is shown."""
        return {name: self.layers[0].image.extent(name) for name in self.dimensions}

    @property
    def origin(self) -> dict[str, float]:
        """World position of the first voxel of each axis, in voxels.

        It is not 0 where the image is a region or a range of timepoints.
        """
        image = self.layers[0].image
        scales, offsets = image.transform()
        origin = {}
        for axis, offset, scale in zip(image.axes, offsets, scales, strict=True):
            if axis.name != "c":
                origin[axis.name] = offset / (abs(scale) or 1.0)
        return origin


def _unit_of(axis: Axis) -> tuple[float, str]:
    """Return a unit of OME-Zarr in those of Neuroglancer."""
    unit = "s" if axis.name == "t" else "m"
    factor = seconds(axis.unit) if axis.name == "t" else meters(axis.unit)
    return (1.0, "") if factor is None else (factor, unit)


class Gallery:
    """All scenes of an address: one image, or the fields of a plate.

    Raises:
        SourceError: There is no image and no plate.
        TargetError: A run there has not published anything.

    """

    def __init__(self, address: str, label_name: str | None = None) -> None:
        self.location = Location.of(address)
        self.location.require_readable()
        self.plans = _read_plans(self.location, label_name)
        self.plate: Plate | None = None
        self.fields = [""]
        if is_plate(self.location):
            self.plate = read_plate(self.location)
            self.fields = [field.path for field in self.plate.fields]
        if not self.fields:
            raise SourceError(f"{self.location} has no field that can be read")

    @property
    def name(self) -> str:
        """Name of the image or plate."""
        return self.plate.name if self.plate else self.location.name

    def scene(self, field: str) -> Scene:
        """Return the readable layers of one field, ``""`` of an image.

        Raises:
            SourceError: The field is no OME-Zarr image that can be read.
            TargetError: The run is not finished, and nothing can be shown yet.

        """
        layers = tuple(_show_first(self._layers(field)))
        if layers:
            return Scene(field or self.name, layers)
        if self.plans:
            raise TargetError(
                f"{self.location} has nothing to show yet: its run is not finished; run the same "
                "segment command to resume"
            )
        where = self.location / field
        if not where.is_folder():
            # It says what is there instead.
            read_image(where)
        raise SourceError(f"{where} is no OME-Zarr image that can be read")

    def _layers(self, field: str) -> Iterator[Layer]:
        plans = [plan for plan in self.plans if field in Target(plan).paths]
        for plan in plans:
            yield from _run_layers(plan, field)
        if not plans:
            location = self.location / field
            yield from _image_layers(location)
            for name in _label_names(location):
                yield from _group_layers(labels_group(location) / name, LABELS, f"labels {name}")


def _show_first(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Hide the scores, and all label images but the first one, which would hide each other."""
    has_labels = False
    for layer in layers:
        is_hidden = layer.kind == SCORES or (layer.kind == LABELS and has_labels)
        has_labels |= layer.kind == LABELS
        yield replace(layer, visible=not is_hidden)


def _read_plans(location: Location, label_name: str | None) -> list[Plan]:
    """Return the plans recorded beside an address, of one label name or of all."""
    if not location.is_listable:
        return []
    return RunFolder.plans(location, label_name)


def _run_layers(plan: Plan, field: str) -> Iterator[Layer]:
    """Yield the source's channels of a run, then the outputs at its target."""
    channels = set[int]().union(*(volume.channels for volume in plan.volumes))
    yield from _image_layers(plan.source / field, sorted(channels))
    limits = (0.0, max_score(plan.resolved.scores_dtype))
    for group in ImageTarget(plan, field).groups:
        location = group.location
        if group.kind == "scores":
            yield from _group_layers(location, SCORES, "scores", limits)
        else:
            yield from _group_layers(location, LABELS, f"labels {group.name}")


def _image_layers(location: Location, channels: Iterable[int] | None = None) -> Iterator[Layer]:
    """Yield a layer for each of the channels of an image, or for all."""
    image = _try_read(location)
    if image is None:
        return
    if channels is None:
        channels = range(image.extent("c"))
    for c in channels:
        limits = _gray_limits(location, image, c)
        yield Layer(_channel_name(image, c), IMAGE, location, image, limits, c)


def _channel_name(image: Image, c: int) -> str:
    if c < len(image.channel_names):
        return image.channel_names[c]
    return f"channel {c}" if image.extent("c") > 1 else "image"


def _group_layers(
    location: Location, kind: str, name: str, limits: Limits = (0.0, 1.0)
) -> Iterator[Layer]:
    """Yield the layer of an image or label image; none if it cannot be read."""
    image = _try_read(location)
    if image is not None:
        if missing := missing_at(location):
            name += f" ({len(missing)} blocks missing)"
        yield Layer(name, kind, location, image, limits)


def _try_read(location: Location) -> Image | None:
    try:
        return read_image(location)
    except MegasegError:
        return None


def _label_names(image: Location) -> list[str]:
    try:
        return list_labels(image)
    except Exception:
        # Labels that cannot be read hide no image.
        return []


def _gray_limits(location: Location, image: Image, c: int) -> Limits:
    """Return the range of gray values in the middle of the first timepoint."""
    try:
        return gray_limits(_sample(location, image, c))
    except (MegasegError, OSError):
        return 0.0, 1.0


def _sample(location: Location, image: Image, c: int) -> NDArray[Any]:
    """Read the middle of the coarsest level, ``(z, y, x)``."""
    level = len(image.levels) - 1
    volume = Volume.of(location, image, level=level, c=c)
    return volume.read(Box.centered(_SAMPLE_SHAPE, image.volume_shape(level)))
