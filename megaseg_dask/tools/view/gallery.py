"""What the viewer can show: the layers of a run's fields, or of any OME-Zarr image or plate.

A scene is one image or field. It is described by metadata alone, except for the
range of gray values, which comes from a few voxels.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from megaseg_dask.algorithms.blending import max_score
from megaseg_dask.errors import MegasegError, SettingsError, SourceError, TargetError
from megaseg_dask.events import RunStatus
from megaseg_dask.messages import count
from megaseg_dask.ngff.image import Axis, Image, read_image
from megaseg_dask.ngff.labels import labels_group, list_labels, read_label_image, require_marked
from megaseg_dask.ngff.plate import Plate, is_plate, read_plate
from megaseg_dask.ngff.units import meters, seconds
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.companion import find_label
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.relabelling import can_be_basis
from megaseg_dask.plan.resolved import Fixed
from megaseg_dask.run.status import recorded_plans, status
from megaseg_dask.run.target.arrays import ImageTarget, Target
from megaseg_dask.run.target.provenance import missing_at
from megaseg_dask.run.workspace import Readable, RunFolder
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.contrast import Limits, find_limits

IMAGE = "image"
SCORES = "scores"
LABELS = "labels"

# What a command needs to find a target.
_STORE_OPTIONS = ("endpoint", "anon", "storage_option")


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
    # How the labels of the scores were made.
    threshold: float = 0.5
    connectivity: int = 1
    is_truth: bool = False

    def volume(self, level: int, t: int) -> Readable:
        """Return the voxels of a level at a timepoint."""
        return Volume.of(self.location, self.image, level=level, t=t, c=self.channel)


@dataclass(frozen=True, slots=True)
class Scene:
    """The layers of one image or field; the axes are those of the first one."""

    name: str
    layers: tuple[Layer, ...]

    def index_in(self, layer: Layer, position: Mapping[str, float]) -> dict[str, float]:
        """Return a position of the world, in voxels by axis, in voxels of a layer.

        An axis that the layer lacks, or that is not given, is 0.
        """
        dimensions = self.dimensions
        scales, offsets = layer.image.transform()
        found = dict.fromkeys("tczyx", 0.0)
        for axis, scale, offset in zip(layer.image.axes, scales, offsets, strict=True):
            if axis.name in position and axis.name in dimensions:
                factor, _ = _unit_of(axis)
                world = position[axis.name] * dimensions[axis.name][0]
                found[axis.name] = (world - offset * factor) / ((abs(scale) or 1.0) * factor)
        return found

    def world_of(self, layer: Layer, axis_name: str) -> tuple[float, float]:
        """Return factor and offset that lead from voxels of a layer to the world, of an axis."""
        dimensions = self.dimensions
        scales, offsets = layer.image.transform()
        number = layer.image.axis_names.index(axis_name)
        factor, _ = _unit_of(layer.image.axes[number])
        world = dimensions[axis_name][0]
        scale = abs(scales[number]) or 1.0
        return scale * factor / world, offsets[number] * factor / world

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

    def __init__(
        self,
        address: str,
        label_name: str | None = None,
        truth: str | None = None,
        *,
        unmarked: bool = False,
    ) -> None:
        self._truth = truth
        self._is_unmarked = unmarked
        self._label_name = label_name
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
            SettingsError: The true labels are none.
            SourceError: The field is no OME-Zarr image that can be read.
            TargetError: The run is not finished, and nothing can be shown yet.

        """
        layers = list(self._layers(field))
        if layers and self._truth is not None:
            image = layers[0].location
            is_only = len(self.fields) == 1
            truth = _truth_layer(
                self._truth, field, image, is_only=is_only, is_unmarked=self._is_unmarked
            )
            truth = replace(truth, image=_placed_as(layers[0].image, truth.image))
            others = [layer for layer in layers if layer.location != truth.location]
            layers = [*others, truth]
        if layers:
            return Scene(field or self.name, tuple(_show_first(layers)))
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

    def command(self, field: str) -> str:
        """Return the shell command that labels the scores of a field again, without its options.

        It is empty if no run kept scores.
        """
        for plan in map(_predicting, self.plans):
            if plan is not None and can_be_basis(plan) and field in Target(plan).paths:
                return command_line(
                    "relabel", self.location, settings=plan.settings, options=_STORE_OPTIONS
                )
        return ""

    def unfinished(self) -> list[RunStatus]:
        """Return the status of each run that is not finished.

        Raises:
            TargetError: The record of a run cannot be read.
        """
        if not self.plans:
            return []
        found = status(str(self.location), self._label_name)
        return [run for run in found if not run.done]

    def notice(self) -> str:
        """Return in words which runs are not finished; empty if all are."""
        return " ".join(map(_notice_of, self.unfinished()))

    def _layers(self, field: str) -> Iterator[Layer]:
        plans = [plan for plan in self.plans if field in Target(plan).paths]
        # Labels that were made again are of the same image and scores: those come first.
        plans.sort(key=lambda plan: not plan.resolved.predicts())
        shown = set()
        for plan in plans:
            for layer in _run_layers(plan, field):
                place = (layer.location, layer.channel)
                if place not in shown:
                    shown.add(place)
                    yield layer
        if not plans:
            location = self.location / field
            yield from _image_layers(location)
            for name in _label_names(location):
                yield from _group_layers(labels_group(location) / name, LABELS, f"labels {name}")


def _notice_of(run: RunStatus) -> str:
    done = [sum(counts) for counts in zip(*run.stages.values(), strict=True)]
    text = f"The run {run.label_name} is not finished: {done[0]} of {done[1]} tasks are done"
    if not run.failures:
        return f"{text}. Run the same megaseg segment command again to resume."
    failed = count(len(run.failures), "failure")
    return (
        f"{text}, with {failed}, the first: {run.failures[0].error}. Fix the cause and run the "
        "same megaseg segment command again; only failed tasks are retried."
    )


def _show_first(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Hide the scores, and all label images but the first one, which would hide each other."""
    has_labels = False
    for layer in layers:
        is_labels = layer.kind == LABELS and not layer.is_truth
        is_hidden = layer.kind == SCORES or (is_labels and has_labels)
        has_labels |= is_labels
        yield replace(layer, visible=not is_hidden)


def _read_plans(location: Location, label_name: str | None) -> list[Plan]:
    """Return the plans recorded beside an address, of one label name or of all.

    Raises:
        TargetError: There is no run of the name.
    """
    if label_name is not None:
        return recorded_plans(location.url, label_name)
    if not location.is_listable:
        return []
    return RunFolder.plans(location)


def _predicting(plan: Plan) -> Plan | None:
    """Return the run whose scores a run labels: itself, or an earlier one if its plan is kept."""
    return plan if plan.resolved.predicts() else RunFolder(plan.basis_run).find_plan()


def _run_layers(plan: Plan, field: str) -> Iterator[Layer]:
    """Yield the source's channels of a run, then its labels at the target and its scores."""
    channels = set[int]().union(*(volume.channels for volume in plan.volumes))
    yield from _image_layers(plan.source / field, sorted(channels))
    for group in ImageTarget(plan, field).label_groups:
        yield from _group_layers(group.location, LABELS, f"labels {group.name}")
    predicting = _predicting(plan)
    if predicting is not None and "scores" in predicting.arrays:
        scores = ImageTarget(predicting, field).group("scores", "")
        for layer in _score_layers(scores.location):
            yield _as_in(plan, layer)


def _as_in(plan: Plan, scores: Layer) -> Layer:
    """Return a layer of scores with what the run made its labels by."""
    fixed = plan.resolved.threshold
    return replace(
        scores,
        threshold=fixed.score if isinstance(fixed, Fixed) else scores.threshold,
        connectivity=plan.resolved.connectivity,
    )


def _image_layers(location: Location, channels: Iterable[int] | None = None) -> Iterator[Layer]:
    """Yield a layer for each of the channels of an image, or for all."""
    image = _try_read(location)
    if image is None:
        return
    if image.kind == "scores":
        yield from _score_layers(location)
        return
    if channels is None:
        channels = range(image.extent("c"))
    for c in channels:
        limits = find_limits(location, image, c)
        yield Layer(_channel_name(image, c), IMAGE, location, image, limits, c)


def _channel_name(image: Image, c: int) -> str:
    if c < len(image.channel_names):
        return image.channel_names[c]
    return f"channel {c}" if image.extent("c") > 1 else "image"


def _score_layers(location: Location) -> Iterator[Layer]:
    """Yield a layer for each channel of an image of scores; none if it cannot be read."""
    for layer in _group_layers(location, SCORES, "scores"):
        limits = (0.0, max_score(layer.image.dtype))
        n_channels = layer.image.extent("c")
        for c, channel in enumerate(layer.image.channels[:n_channels]):
            name = f"{layer.name} {channel}" if n_channels > 1 else layer.name
            yield replace(layer, name=name, limits=limits, channel=c)


def _group_layers(location: Location, kind: str, name: str) -> Iterator[Layer]:
    """Yield the layer of an image or label image; none if it cannot be read."""
    image = _try_read(location)
    if image is not None:
        if missing := missing_at(location):
            name += f" ({count(len(missing), 'block')} missing)"
        yield Layer(name, kind, location, image)


def _truth_layer(
    text: str, field: str, image: Location, *, is_only: bool, is_unmarked: bool
) -> Layer:
    """Return the layer of true labels: a label image of the image, or at another address.

    Raises:
        SettingsError: There is none, there are several, or it is no image of labels.
    """
    own = _label_names(image)
    try:
        location = labels_group(image) / text
        if text not in own:
            location = find_label(text, field, is_only=is_only)
        labels = read_label_image(location)
        if not is_unmarked:
            require_marked(location, labels)
    except SourceError as error:
        listed = f"label images {', '.join(own)}" if own else "no label image"
        raise SettingsError(f"--truth {text}: {error} ({image} has {listed})") from error
    return Layer("truth", LABELS, location, labels, is_truth=True)


def _placed_as(image: Image, labels: Image) -> Image:
    """Return labels of the same voxels as an image with its axes and sizes.

    Neuroglancer would not show labels of another unit. Labels of other voxels stay where they say.
    """
    if labels.volume_shape() != image.volume_shape():
        return labels
    scales, offsets = image.transform()
    of = dict(zip(image.axis_names, zip(image.axes, scales, offsets, strict=True), strict=True))
    if not set(labels.axis_names) <= set(of):
        return labels
    placed = [of[name] for name in labels.axis_names]
    levels = []
    for level in labels.levels:
        pairs = zip(labels.levels[0].shape, level.shape, strict=True)
        factors = [max(round(a / b), 1) for a, b in pairs]
        scale = [one * factor for (_, one, _), factor in zip(placed, factors, strict=True)]
        translation = [
            offset + one * (factor - 1) / 2
            for (_, one, offset), factor in zip(placed, factors, strict=True)
        ]
        levels.append(replace(level, scale=tuple(scale), translation=tuple(translation)))
    axes = tuple(axis for axis, _, _ in placed)
    return replace(labels, axes=axes, levels=tuple(levels), scale=(), translation=())


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
