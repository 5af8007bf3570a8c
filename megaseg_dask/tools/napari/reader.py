"""Layers of napari: channels, scores and labels of an image, a target, or the fields of a plate.

What there is to show is found as by ``megaseg view``. Voxels are read when napari draws them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypedDict

from megaseg_dask.errors import MegasegError, SettingsError
from megaseg_dask.lazy import open_image
from megaseg_dask.ngff.group import find_attributes, ome_of
from megaseg_dask.ngff.image import Axis, Image
from megaseg_dask.ngff.plate import is_plate
from megaseg_dask.ngff.units import seconds
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.gallery import IMAGE, LABELS, SCORES, Gallery, Layer, Scene

# Each field has some layers, and napari becomes slow with hundreds of them.
_MAX_FIELDS = 16
# A field lies below its plate as ROW/COLUMN/FIELD.
_FIELD_DEPTH = 3
_AXES = ("t", "z", "y", "x")
_COLORS = ("green", "magenta", "cyan", "yellow", "red", "blue")


class Origin(TypedDict):
    """What a layer shows; it is in the layer's metadata under ``megaseg``."""

    address: str
    kind: str
    channel: str | None


class Options(TypedDict, total=False):
    """Keywords of a layer of napari."""

    name: str
    axis_labels: tuple[str, ...]
    scale: tuple[float, ...]
    translate: tuple[float, ...]
    units: tuple[str, ...]
    visible: bool
    multiscale: bool
    metadata: dict[str, Origin]
    contrast_limits: tuple[float, float]
    colormap: str
    blending: str


class LayerData(NamedTuple):
    """A layer as readers give it to napari.

    ``data`` is a Dask array ``(t, z, y, x)``, or a list of those of several levels, finest first.
    """

    data: Any
    options: Options
    type: Literal["image", "labels"]


def find_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], object] | None:
    """Return the function that reads a path or several, if all of them are OME-Zarr."""
    return read if all(map(_is_ome_zarr, _listed(path))) else None


def read(path: str | Sequence[str]) -> list[LayerData]:
    """Return the layers of a path or of several.

    Raises:
        MegasegError: One of them cannot be shown; it says why.
    """
    return [layer for each in _listed(path) for layer in read_layers(each)]


def read_layers(address: str) -> list[LayerData]:
    """Return the layers of an image, a target, a field, or each field of a plate.

    Raises:
        MegasegError: It cannot be shown, or has too many fields.
    """
    gallery, fields = _open(address)
    if len(fields) > _MAX_FIELDS:
        raise SettingsError(
            f"{gallery.location} has {len(fields)} fields, too many for napari at once; open one, "
            f"such as {gallery.location / fields[0]}, or see all: megaseg view {gallery.location}"
        )
    layers: list[LayerData] = []
    for field in fields:
        is_first = field == fields[0]
        layers += _scene_layers(gallery.scene(field), gallery.name, is_shown=is_first)
    return layers


def _listed(path: str | Sequence[str]) -> Sequence[str]:
    return [path] if isinstance(path, str) else path


def _is_ome_zarr(path: str) -> bool:
    try:
        return bool(ome_of(find_attributes(Location.of(path)) or {}))
    except MegasegError:
        # Another reader may know more.
        return False


def _open(address: str) -> tuple[Gallery, list[str]]:
    """Return what is at an address, and the fields to show, ``""`` of an image.

    A field is looked up in its plate, beside which the record of a run lies.
    """
    parts = address.rstrip("/").rsplit("/", _FIELD_DEPTH)
    if len(parts) > _FIELD_DEPTH and parts[0] and is_plate(Location.of(parts[0])):
        gallery = Gallery(parts[0])
        field = "/".join(parts[1:])
        if field in gallery.fields:
            return gallery, [field]
    gallery = Gallery(address)
    return gallery, gallery.fields


def _scene_layers(scene: Scene, name: str, *, is_shown: bool) -> Iterator[LayerData]:
    """Yield the layers of an image or field; only the first of several fields is shown."""
    title = name if scene.name == name else f"{name} {scene.name}"
    layers = list(map(_as_marked, scene.layers))
    n_channels = sum(layer.kind == IMAGE for layer in layers)
    for number, layer in enumerate(layers):
        options = _options_of(layer, title)
        options["visible"] = layer.visible and is_shown
        if layer.kind == LABELS:
            yield LayerData(_data_of(layer), options, "labels")
            continue
        options["contrast_limits"] = layer.limits
        if layer.kind == SCORES:
            options |= {"colormap": "inferno", "blending": "additive"}
        elif n_channels > 1:
            options |= {"colormap": _COLORS[number % len(_COLORS)], "blending": "additive"}
        yield LayerData(_data_of(layer), options, "image")


def _as_marked(layer: Layer) -> Layer:
    """Return an image as labels if its metadata say that its voxels are ids of objects."""
    is_label = layer.kind == IMAGE and layer.image.kind == "label image"
    return replace(layer, kind=LABELS) if is_label else layer


def _options_of(layer: Layer, title: str) -> Options:
    image = layer.image
    scales, offsets = image.transform()
    scale = []
    translate = []
    units = []
    for name in _axes_of(image):
        number = image.axis_names.index(name)
        factor, unit = _unit_of(image.axes[number])
        # Some files say 0 for an unknown size, and mirror an axis by a negative one.
        scale.append((abs(scales[number]) or 1.0) * factor)
        translate.append(offsets[number] * factor)
        units.append(unit)
    has_several = image.extent("c") > 1
    channel = str(layer.channel) if has_several else None
    return Options(
        name=title if layer.name == IMAGE else f"{title} {layer.name}",
        axis_labels=_axes_of(image),
        scale=tuple(scale),
        translate=tuple(translate),
        units=tuple(units),
        multiscale=len(image.levels) > 1,
        metadata={"megaseg": Origin(address=layer.location.url, kind=layer.kind, channel=channel)},
    )


def _axes_of(image: Image) -> tuple[str, ...]:
    return tuple(name for name in _AXES if name in image.axis_names)


def _unit_of(axis: Axis) -> tuple[float, str]:
    """Return a unit of OME-Zarr in those that layers have in common."""
    if axis.name == "t":
        factor = seconds(axis.unit)
        return (1.0, "pixel") if factor is None else (factor, "s")
    return axis.in_um, "µm" if axis.is_in_um else "pixel"


def _data_of(layer: Layer) -> Any:
    """Return the voxels of one channel, as in `LayerData`."""
    tree = open_image(layer.location.url, labels=False)
    axes = _axes_of(layer.image)
    arrays = []
    for level in range(len(layer.image.levels)):
        image = tree[f"{level}/image"]
        if "c" in image.dims:
            image = image.isel(c=layer.channel)
        arrays.append(image.transpose(*axes).data)
    return arrays if len(arrays) > 1 else arrays[0]


def origin_of(metadata: dict[str, Any]) -> Origin | None:
    """Return what a layer shows by its metadata; ``None`` if another reader opened it."""
    return metadata.get("megaseg")


def of_kinds(layers: Iterable[LayerData], kinds: Sequence[str]) -> Iterator[LayerData]:
    """Yield the layers that show one of some kinds."""
    for layer in layers:
        if layer.options["metadata"]["megaseg"]["kind"] in kinds:
            yield layer
