"""OME-Zarr images: their metadata as plain values, read and written.

Axes go by name, never by position or extent: an image may lack t, c or z, and
its spatial axes may come in any order. Metadata pass through the models of
ome-zarr-models in both directions, so what is written is valid by construction.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import zarr
from pydantic import ValidationError

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.pyramids import default_level_shapes
from megaseg_dask.errors import SourceError, StoreError
from megaseg_dask.ngff.group import ZARR_FORMAT, ome_of, open_group, read_attributes
from megaseg_dask.stores import (
    METADATA,
    Location,
    cause_of,
    is_store_failure,
    open_array,
    store_error,
)

T = TypeVar("T")

_SAMPLES = 16
_SAMPLE_BYTES = 2**16

SPATIAL = ("z", "y", "x")
_AXIS_TYPES = {"t": "time", "c": "channel", **dict.fromkeys(SPATIAL, "space")}
_MICROMETRES = {
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "meter": 1e6,
    "angstrom": 1e-4,
}
_FIRST_BYTES = {b"II": "TIFF", b"MM": "TIFF", b"PK": "zip"}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an image: ``t``, ``c``, ``z``, ``y`` or ``x``, with its unit."""

    name: str
    type: str | None = None
    unit: str | None = None

    @property
    def is_in_um(self) -> bool:
        """Tell whether the unit is a length that is known in µm."""
        return self.unit in _MICROMETRES

    @property
    def in_um(self) -> float:
        """Micrometres of one unit; 1 if the unit is missing or unknown."""
        return _MICROMETRES.get(self.unit or "", 1.0)


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of an image; tuples follow the image's axes, scales are in the axes' units."""

    path: str
    shape: Shape
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """The metadata of a multiscale image, finest level first."""

    version: str
    name: str
    axes: tuple[Axis, ...]
    levels: tuple[Level, ...]
    dtype: str
    channel_names: tuple[str, ...] = ()

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes, in the order of the arrays."""
        return tuple(axis.name for axis in self.axes)

    def extent(self, axis: str) -> int:
        """Return the number of voxels along an axis of the finest level; 1 if there is no such axis."""
        names = self.axis_names
        return self.levels[0].shape[names.index(axis)] if axis in names else 1

    def spatial(self, values: Sequence[float]) -> tuple[float, ...]:
        """Pick the ``(z, y, x)`` entries of a per-axis tuple."""
        return tuple(values[self.axis_names.index(name)] for name in SPATIAL)

    def volume_shape(self, level: int = 0) -> Shape:
        """Return the ``(z, y, x)`` shape of a level."""
        return tuple(int(n) for n in self.spatial(self.levels[level].shape))

    @property
    def spacing_um(self) -> tuple[float, ...]:
        """Voxel size ``(z, y, x)`` of the finest level; µm unless the unit is missing or unknown."""
        return self.spatial(
            [s * axis.in_um for s, axis in zip(self.levels[0].scale, self.axes, strict=True)]
        )

    def from_level(self, level: int) -> "Image":
        """Return the image that starts at a coarser level."""
        return replace(self, levels=self.levels[level:])

    def without_channels(self) -> "Image":
        """Return the image without its channel axis."""
        return self.with_channels(())

    def with_channels(self, names: Sequence[str]) -> "Image":
        """Return the image with channels of these names in place of its own; without a channel axis if it is one."""
        has_c, several = "c" in self.axis_names, len(names) > 1
        c = self.axis_names.index("c") if has_c else min(map(self.axis_names.index, SPATIAL))

        def put(values: tuple[T, ...], value: T) -> tuple[T, ...]:
            return (*values[:c], *[value] * several, *values[c + has_c :])

        levels = tuple(
            Level(v.path, put(v.shape, len(names)), put(v.scale, 1.0), put(v.translation, 0.0))
            for v in self.levels
        )
        axes = put(self.axes, Axis("c", _AXIS_TYPES["c"]))
        return replace(
            self, axes=axes, levels=levels, channel_names=tuple(names) if several else ()
        )

    def cropped(self, box: Box) -> "Image":
        """Return the image of a box of its finest level, in its place in space, without coarser levels."""
        level = self.levels[0]
        extents, starts = (
            dict(zip(SPATIAL, box.shape, strict=True)),
            dict(zip(SPATIAL, box.start, strict=True)),
        )
        axes = list(zip(self.axis_names, level.shape, level.translation, level.scale, strict=True))
        shape = tuple(extents.get(name, n) for name, n, _, _ in axes)
        origin = tuple(offset + starts.get(name, 0) * step for name, _, offset, step in axes)
        return replace(self, levels=(replace(level, shape=shape, translation=origin),))

    def with_times(self, start: int, stop: int) -> "Image":
        """Return the image of timepoints ``start:stop``, in its place in time."""
        if "t" not in self.axis_names:
            return self
        t = self.axis_names.index("t")
        levels = tuple(
            replace(
                v,
                shape=_changed(v.shape, t, stop - start),
                translation=_changed(v.translation, t, v.translation[t] + start * v.scale[t]),
            )
            for v in self.levels
        )
        return replace(self, levels=levels)

    def with_pyramid(self, *, complete: bool = True) -> "Image":
        """Return the image with levels named by number; with coarser ones if it has none and is to be complete."""
        levels = list(self.levels)
        if complete and len(levels) == 1:
            for shape, factor in default_level_shapes(self.volume_shape(), self.spacing_um):
                levels.append(self._coarser(levels[-1], shape, factor))
        return replace(self, levels=tuple(replace(v, path=str(i)) for i, v in enumerate(levels)))

    def _coarser(self, level: Level, shape: Shape, factor: Shape) -> Level:
        steps = dict(zip(SPATIAL, factor, strict=True))
        extents = dict(zip(SPATIAL, shape, strict=True))
        factors = [steps.get(name, 1) for name in self.axis_names]
        # The origin of a level is the centre of its first window.
        offsets = [
            o + s * (f - 1) / 2
            for o, s, f in zip(level.translation, level.scale, factors, strict=True)
        ]
        return Level(
            path="",
            shape=tuple(
                extents.get(name, n) for name, n in zip(self.axis_names, level.shape, strict=True)
            ),
            scale=tuple(s * f for s, f in zip(level.scale, factors, strict=True)),
            translation=tuple(offsets),
        )


def _changed(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


# -- reading


def read_image(location: Location) -> Image:
    """Read and check the metadata of the image at ``location``.

    Raises :class:`SourceError` that says what was found instead of an image.
    """
    group, ome = open_ome_group(location, "OME-Zarr image")
    entries = ome.get("multiscales")
    if not entries or not isinstance(entries, list) or not isinstance(entries[0], dict):
        raise SourceError(f"{location} is {describe_group(location, ome)}, not an OME-Zarr image")
    entry = entries[0]
    version = require_known_version(location, group, ome, entry)
    axes, transforms = _parse_multiscale(location, version, entry)
    arrays = [_open_level(location, path) for path, _, _ in transforms]
    for (path, _, _), array in zip(transforms, arrays, strict=True):
        if array.ndim != len(axes):
            raise SourceError(
                f"{location}/{path}: {array.ndim} dimensions for axes {[a.name for a in axes]}"
            )
    levels = tuple(
        Level(path, array.shape, scale, translation)
        for (path, scale, translation), array in zip(transforms, arrays, strict=True)
    )
    name = str(entry.get("name") or location.name)
    # Volumes are read in native byte order, so that is the dtype they have.
    return Image(
        version, name, axes, levels, str(arrays[0].dtype.newbyteorder("=")), _channel_names(ome)
    )


def digest_of(location: Location, image: Image) -> str:
    """Return a digest of what identifies a source: its metadata, shapes and dtypes, not its address."""
    levels = [open_array(location / level.path) for level in image.levels]
    attributes = read_attributes(location)
    identity = [attributes, [[list(a.shape), str(a.dtype), list(a.chunks)] for a in levels]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def sample_of(location: Location) -> str:
    """Return a digest of the beginnings of some stored objects of an array: tells two images of one form apart."""
    array = open_array(location)
    grid = BlockGrid(array.shape, array.shards or array.chunks)
    digest = hashlib.sha256()
    for number in sorted({round(i * (len(grid) - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)}):
        key = array.metadata.encode_chunk_key(grid.position(number))
        digest.update(key.encode() + (location.head(key, _SAMPLE_BYTES) or b""))
    return digest.hexdigest()


def open_ome_group(location: Location, wanted: str) -> tuple[zarr.Group, dict[str, Any]]:
    """Open the group at ``location``, with its OME metadata; the error says what is there that is no ``wanted``."""
    # A first, impatient look: a wrong address or key is told at once, and in the store's own words.
    location.require_readable()
    try:
        group = open_group(location)
        return group, ome_of(group.attrs.asdict())
    except Exception as error:
        if not location.is_local and is_store_failure(error):
            raise store_error(location, "read", error) from error
        raise SourceError(
            f"{location} is {_describe_place(location, error)}, not an {wanted}"
        ) from error


def require_known_version(
    location: Location, group: zarr.Group, ome: Mapping[str, Any], part: Mapping[str, Any]
) -> str:
    """Return the version of the group's OME metadata, which stands with all of them or with their main part."""
    version = str(
        ome.get("version")
        or part.get("version")
        or {2: "0.4", 3: "0.5"}[group.metadata.zarr_format]
    )
    if version not in ZARR_FORMAT:
        raise SourceError(
            f"{location} is OME-Zarr {version}; 0.4 and 0.5 can be read: convert it first"
        )
    return version


def _describe_place(location: Location, error: Exception) -> str:
    """Say what stands where no Zarr group could be opened."""
    if not location.is_folder():
        first = location.parent.head(location.basename, 2) or b""
        kind = _FIRST_BYTES.get(first, PurePosixPath(location.basename).suffix.removeprefix("."))
        return (
            f"a {kind} file".replace("  ", " ") + " (convert it, with bioformats2raw for instance)"
        )
    with suppress(Exception):
        open_array(location)
        return f"a single Zarr array (name the folder of its image, perhaps {location.parent})"
    # What is on a web server is not listed.
    names = (
        location.children()
        if location.is_listable
        else [n for n in METADATA if location.size(n) is not None]
    )
    if {"zarr.json", ".zgroup"} & set(names):
        return f"a Zarr group whose metadata cannot be read ({cause_of(error)})"
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"a folder with {shown}" if names else "an empty folder"


def describe_group(location: Location, ome: Mapping[str, Any]) -> str:
    """Say what a group is, and where an image of it would be."""
    match ome:
        case {"multiscales": [_, *_]}:
            return "an OME-Zarr image"
        case {"plate": {"wells": [{"path": str(well)}, *_]}}:
            return f"an HCS plate (name one image in it, such as {location / well}/0)"
        case {"plate": _}:
            return "an HCS plate (name one image in it)"
        case {"well": {"images": [{"path": str(field)}, *_]}}:
            return f"a well of a plate (name one image in it, such as {location / field})"
        case {"well": _}:
            return "a well of a plate (name one image in it)"
        case {"labels": _}:
            return f"a labels group (name the image that it belongs to, {location.parent})"
        case {"bioformats2raw.layout": _}:
            return f"a bioformats2raw collection (name one image in it, such as {location}/0)"
    return "a Zarr group without multiscales metadata"


def _parse_multiscale(
    location: Location, version: str, entry: dict[str, object]
) -> tuple[tuple[Axis, ...], list[tuple[str, tuple[float, ...], tuple[float, ...]]]]:
    model = _multiscale_model(version)
    try:
        with warnings.catch_warnings():
            # The models warn of what the specification only recommends: no reason to refuse an image.
            warnings.simplefilter("ignore")
            multiscale = model.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, ("multiscales", *problem["loc"])))
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise SourceError(
            f"{location}: its OME-Zarr {version} metadata are invalid: {where}: {message}"
        ) from error
    # iohub writes them as capitals.
    names = [str(axis.name).lower() for axis in multiscale.axes]
    if len(set(names)) < len(names):
        raise SourceError(
            f"{location} has axes {[str(axis.name) for axis in multiscale.axes]}: one of them twice"
        )
    require_axes(location, names)
    # By name: of t and c, the type is only a recommendation.
    axes = tuple(
        Axis(name, _AXIS_TYPES[name], a.unit if isinstance(a.unit, str) else None)
        for name, a in zip(names, multiscale.axes, strict=True)
    )
    overall = multiscale.coordinateTransformations
    levels = []
    for dataset in multiscale.datasets:
        if dataset.path.startswith("/") or {"", ".", ".."} & set(dataset.path.split("/")):
            raise SourceError(f"{location}: level {dataset.path!r} does not lie in the image")
        try:
            levels.append(
                (dataset.path, *_compose(len(axes), dataset.coordinateTransformations, overall))
            )
        except ValueError as error:
            raise SourceError(f"{location}: level {dataset.path!r}: {error}") from error
    return axes, levels


def require_axes(subject: object, names: Sequence[str]) -> None:
    """Check the names of the axes of an image; ``subject`` is what has them.

    Raises:
        SourceError: An axis is none of t, c, z, y, x, or one of z, y, x is missing.
    """
    if unknown := set(names) - set(_AXIS_TYPES):
        raise SourceError(
            f"{subject} has axes {names}; {sorted(unknown)} cannot be told apart from t, c, z, y, x"
        )
    if missing := [name for name in SPATIAL if name not in names]:
        raise SourceError(
            f"{subject} has axes {names} and no {' or '.join(missing)}: "
            "the model segments 3D volumes of z, y and x"
        )


def _multiscale_model(version: str):  # type: ignore[no-untyped-def]  # one of two unrelated classes
    from ome_zarr_models import v04, v05

    return {"0.4": v04.multiscales.Multiscale, "0.5": v05.multiscales.Multiscale}[version]


def _compose(
    ndim: int, *stages: Sequence[object] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Apply a dataset's transformations, then those of the whole multiscale, to one scale and translation.

    Raises :class:`ValueError` for what is neither: numbers in a file of their own, or not finite.
    """
    scale, translation = np.ones(ndim), np.zeros(ndim)
    for transform in (t for stage in stages for t in stage or ()):
        factors, offset = (
            getattr(transform, "scale", np.ones(ndim)),
            getattr(transform, "translation", np.zeros(ndim)),
        )
        if getattr(transform, "path", None) is not None or isinstance(offset, str):
            raise ValueError(
                "its scale or translation is in a file of its own; only numbers in the metadata are read"
            )
        with np.errstate(all="ignore"):
            scale, translation = scale * factors, translation * factors + offset
    if not np.isfinite([scale, translation]).all():
        raise ValueError(f"scale {scale} and translation {translation} have to be finite")
    return tuple(map(float, scale)), tuple(map(float, translation))


def _open_level(location: Location, path: str) -> zarr.Array[Any]:
    try:
        return open_array(location / path)
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise SourceError(
            f"{location} lists level {path!r}, but no Zarr array is there: the copy is incomplete"
        ) from error
    except Exception as error:
        raise SourceError(
            f"{location / path} is no Zarr array that can be opened: {cause_of(error)}"
        ) from error


def _channel_names(ome: Mapping[str, object]) -> tuple[str, ...]:
    omero = ome.get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    # A channel without a name keeps its place, so that the names of the others stay with theirs.
    listed = channels if isinstance(channels, list) else []
    labels = [c.get("label") if isinstance(c, dict) else None for c in listed]
    return tuple(str(i if label in (None, "") else label) for i, label in enumerate(labels))


# -- writing


def image_attributes(image: Image, *, label: bool = False) -> dict[str, object]:
    """Return the attributes of an image group, or of a label image two groups below its source."""
    from ome_zarr_models import v04, v05

    models = {"0.4": v04, "0.5": v05}[image.version]
    multiscale = models.multiscales.Multiscale(
        axes=[models.axes.Axis(name=a.name, type=a.type, unit=a.unit) for a in image.axes],
        datasets=tuple(
            models.multiscales.Dataset.build(
                path=v.path,
                scale=v.scale,
                translation=v.translation if any(v.translation) else None,
            )
            for v in image.levels
        ),
        name=image.name,
    )
    attributes: dict[str, object] = {"multiscales": [multiscale.model_dump(exclude_none=True)]}
    if label:
        attributes["image-label"] = {"source": {"image": "../../"}}
    return versioned(attributes, image.version)


def versioned(attributes: dict[str, Any], version: str) -> dict[str, Any]:
    """Put OME metadata where their version keeps them: under ``ome`` from 0.5 on."""
    if version == "0.5":
        return {"ome": {"version": version, **attributes}}
    for part in ("multiscales", "image-label"):
        match attributes.get(part):
            case [dict(entry)] | dict(entry):
                entry["version"] = version
    return attributes
