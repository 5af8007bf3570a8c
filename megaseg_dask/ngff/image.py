"""OME-Zarr images: their metadata as plain values, read and written.

Axes go by name, never by position or extent: an image may lack t, c or z, and
its spatial axes may come in any order. Metadata pass through the models of
ome-zarr-models in both directions, so what is written is valid by construction.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np
from pydantic import ValidationError

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.algorithms.pyramids import default_level_shapes
from megaseg_dask.concurrency import ignored_warnings
from megaseg_dask.errors import DataError, SourceError, StoreError
from megaseg_dask.ngff.coordinate_systems import (
    is_version_06,
    without_coordinate_systems,
)
from megaseg_dask.ngff.group import (
    PROVENANCE,
    describe_group,
    first_problem,
    lies_below,
    ome_attributes,
    ome_of,
    open_attributes,
    require_known_version,
)
from megaseg_dask.ngff.units import micrometers
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.stores import Location, cause_of
from megaseg_dask.stores.failures import is_denied

T = TypeVar("T")
Json = Mapping[str, Any]
# Of a list of transformations, in JSON.
Change = Callable[[list[Any]], list[Any]]
# Scores are those that this package wrote.
Kind = Literal["image", "label image", "scores"]

# The thousands of fields of a plate have few different metadata documents. Each is parsed and
# checked once; this many are kept.
_MAX_DOCUMENTS = 64
# Fields are read in threads, of which the first would otherwise all parse the same document.
_PARSING = threading.Lock()

SPATIAL = ("z", "y", "x")
# Voxels from atoms to planets: beyond, volumes and moments of objects are no numbers.
_LEAST_UM = 1e-9
_LARGEST_UM = 1e15
_TRANSFORMS = "coordinateTransformations"
# Keys of a multiscale that are read by themselves.
_UNCHECKED = ("name", "version")
_AXIS_TYPES = {"t": "time", "c": "channel", **dict.fromkeys(SPATIAL, "space")}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an image: ``t``, ``c``, ``z``, ``y`` or ``x``, with its unit."""

    name: str
    type: str | None = None
    unit: str | None = None

    @property
    def is_in_um(self) -> bool:
        """Whether the unit is a length that is known in µm."""
        return self.name in SPATIAL and micrometers(self.unit) is not None

    @property
    def in_um(self) -> float:
        """Micrometers of one unit; 1 if it is missing or unknown, or no length."""
        known = micrometers(self.unit) if self.name in SPATIAL else None
        return 1.0 if known is None else known


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of an image; tuples follow the image's axes, scales are in the axes' units.

    Scale and translation are its own: those of the image come after them.
    """

    path: str
    shape: Shape
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """What images of one form have for themselves: a name, and where they and their levels lie."""

    name: str
    translations: tuple[tuple[float, ...], ...]
    translation: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """The metadata of a multiscale image, finest level first.

    ``scale`` and ``translation`` hold for all levels, after each one's own; empty if the metadata
    have none. Some readers ignore them, so they are written as they were read, where they were.
    """

    version: str
    name: str
    axes: tuple[Axis, ...]
    levels: tuple[Level, ...]
    dtype: str
    channel_names: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    translation: tuple[float, ...] = ()
    # As it is stored: metadata of 0.4 may lie in Zarr v3.
    zarr_format: int | None = None
    kind: Kind = "image"
    # Whether its metadata are of OME-Zarr 0.6, and have another form than this version's.
    is_reduced: bool = False
    # How many parts a run of ours left out of it, because their tasks failed. ``None`` if no run of
    # ours wrote it.
    n_missing: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all its chunks were written, so that an absent one is lost."""
        return self.n_missing == 0

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes, in the order of the arrays."""
        return tuple(axis.name for axis in self.axes)

    @property
    def channels(self) -> list[str]:
        """The name of each channel, or its number where it has none."""
        n = self.extent("c")
        return [*self.channel_names[:n], *map(str, range(len(self.channel_names), n))]

    def extent(self, axis: str) -> int:
        """Return the number of voxels along an axis of the finest level.

        It is 1 if there is no such axis.
        """
        names = self.axis_names
        if axis not in names:
            return 1
        return self.levels[0].shape[names.index(axis)]

    def spatial(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the ``(z, y, x)`` entries of a per-axis tuple."""
        return tuple(values[self.axis_names.index(name)] for name in SPATIAL)

    def volume_shape(self, level: int = 0) -> Shape:
        """Return the ``(z, y, x)`` shape of a level."""
        return tuple(int(n) for n in self.spatial(self.levels[level].shape))

    @property
    def spacing_um(self) -> tuple[float, ...]:
        """Voxel size ``(z, y, x)`` of the finest level.

        It is in µm unless the unit is missing or unknown.
        """
        scale, _ = self.transform()
        return self.spatial([abs(s) * a.in_um for s, a in zip(scale, self.axes, strict=True)])

    @property
    def unknown_size(self) -> str | None:
        """Why the size of voxels is not known in µm, in words; ``None`` if it is known."""
        for axis, spacing in zip(SPATIAL, self.spacing_um, strict=True):
            unit = self.axes[self.axis_names.index(axis)]
            if not unit.is_in_um:
                return f"{axis} has the unit {unit.unit!r}" if unit.unit else f"{axis} has no unit"
            if spacing == 0:
                return f"{axis} has the scale 0"
            if not _LEAST_UM <= spacing <= _LARGEST_UM:
                return f"{axis} has voxels of {spacing:g} µm"
        return None

    def transform(self, level: int = 0) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the scale and the translation of a level, with those of the image applied."""
        own = self.levels[level]
        n = len(self.axes)
        factors = self.scale or (1.0,) * n
        offsets = self.translation or (0.0,) * n
        scale = tuple(s * f for s, f in zip(own.scale, factors, strict=True))
        moved = zip(own.translation, factors, offsets, strict=True)
        return scale, tuple(t * f + o for t, f, o in moved)

    @property
    def origin_um(self) -> tuple[float, ...]:
        """Where the first voxel ``(z, y, x)`` of the finest level lies, in µm."""
        _, translation = self.transform()
        places = zip(translation, self.axes, strict=True)
        return self.spatial([place * axis.in_um for place, axis in places])

    @property
    def placement(self) -> Placement:
        """The name and the place of the image."""
        translations = tuple(level.translation for level in self.levels)
        return Placement(self.name, translations, self.translation)

    def placed(self, placement: Placement) -> "Image":
        """Return the image with the name and the place of another one of its form."""
        levels = zip(self.levels, placement.translations, strict=True)
        return replace(
            self,
            name=placement.name,
            levels=tuple(replace(level, translation=place) for level, place in levels),
            translation=placement.translation,
        )

    def from_level(self, level: int) -> "Image":
        """Return the image that starts at a coarser level."""
        return replace(self, levels=self.levels[level:])

    def without_channels(self) -> "Image":
        """Return the image without its channel axis."""
        return self.with_channels(())

    def with_channels(self, names: Sequence[str]) -> "Image":
        """Return the image with channels of these names in place of its own.

        It has a channel axis if there are several.
        """
        axis_names = self.axis_names
        first_spatial = min(map(axis_names.index, SPATIAL))
        start = stop = first_spatial
        if "c" in axis_names:
            start = axis_names.index("c")
            stop = start + 1
        has_several = len(names) > 1

        def put(values: tuple[T, ...], value: T) -> tuple[T, ...]:
            channel = (value,) if has_several else ()
            return values[:start] + channel + values[stop:]

        levels = tuple(
            replace(
                level,
                shape=put(level.shape, len(names)),
                scale=put(level.scale, 1.0),
                translation=put(level.translation, 0.0),
            )
            for level in self.levels
        )
        return replace(
            self,
            axes=put(self.axes, Axis("c", _AXIS_TYPES["c"])),
            levels=levels,
            channel_names=tuple(names) if has_several else (),
            scale=put(self.scale, 1.0) if self.scale else (),
            translation=put(self.translation, 0.0) if self.translation else (),
        )

    def cropped(self, box: Box) -> "Image":
        """Return the image of a box of its finest level, in its place in space.

        It has no coarser levels.
        """
        level = self.levels[0]
        extents = self._per_axis(box.shape, level.shape)
        starts = self._per_axis(box.start, [0] * len(self.axes))
        origin = tuple(
            offset + start * step
            for offset, start, step in zip(level.translation, starts, level.scale, strict=True)
        )
        return replace(self, levels=(replace(level, shape=extents, translation=origin),))

    def with_times(self, start: int, stop: int) -> "Image":
        """Return the image of timepoints ``start:stop``, in its place in time."""
        if "t" not in self.axis_names:
            return self
        t = self.axis_names.index("t")

        def cut(level: Level) -> Level:
            origin = level.translation[t] + start * level.scale[t]
            return replace(
                level,
                shape=_changed(level.shape, t, stop - start),
                translation=_changed(level.translation, t, origin),
            )

        return replace(self, levels=tuple(map(cut, self.levels)))

    def with_pyramid(self, *, complete: bool = True) -> "Image":
        """Return the image with levels named by number.

        If it is to be ``complete`` and has one level, it gets coarser ones.
        """
        levels = list(self.levels)
        if complete and len(levels) == 1:
            for shape, factor in default_level_shapes(self.volume_shape(), self.spacing_um):
                levels.append(self._coarser(levels[-1], shape, factor))
        named = [replace(level, path=str(i)) for i, level in enumerate(levels)]
        return replace(self, levels=tuple(named))

    def _coarser(self, level: Level, shape: Shape, factor: Shape) -> Level:
        factors = self._per_axis(factor, [1] * len(self.axes))
        # The origin of a level is the center of its first window.
        origin = tuple(
            o + s * (f - 1) / 2
            for o, s, f in zip(level.translation, level.scale, factors, strict=True)
        )
        return Level(
            path="",
            shape=self._per_axis(shape, level.shape),
            scale=tuple(s * f for s, f in zip(level.scale, factors, strict=True)),
            translation=origin,
        )

    def _per_axis(self, spatial: Shape, others: Sequence[int]) -> Shape:
        """Return the entries of ``(z, y, x)`` at their axes, and those of ``others`` elsewhere."""
        by_name = dict(zip(SPATIAL, spatial, strict=True))
        return tuple(by_name.get(n, v) for n, v in zip(self.axis_names, others, strict=True))


def _changed(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def require_axes(subject: object, names: Sequence[str]) -> None:
    """Require the axes z, y and x, and none but t and c beside them.

    Raises:
        SourceError: The ``subject`` has other axes, or one of them twice.
    """
    axes = list(names)
    if len(set(axes)) < len(axes):
        raise SourceError(f"{subject} has axes {axes}: each axis may occur only once")
    unknown = sorted(set(axes) - set(_AXIS_TYPES))
    if unknown:
        raise SourceError(f"{subject} has axes {axes}; {unknown} is not one of t, c, z, y, x")
    missing = [name for name in SPATIAL if name not in axes]
    if missing:
        raise SourceError(
            f"{subject} has axes {axes} and no {' or '.join(missing)}; the model needs 3D volumes "
            "with z, y and x"
        )


# -- reading


def read_image(location: Location) -> Image:
    """Read and check the metadata of the image at ``location``.

    Raises:
        SourceError: There is no image that can be read; it says what there is instead.
        StoreError: The store failed.
    """
    zarr_format, attributes = open_attributes(location, "OME-Zarr image")
    ome = ome_of(attributes)
    entries = ome.get("multiscales")
    if not entries or not isinstance(entries, list) or not isinstance(entries[0], dict):
        raise SourceError(f"{location} is {describe_group(location, ome)}, not an OME-Zarr image")
    entry = entries[0]
    version = require_known_version(location, zarr_format, ome, entry)
    is_reduced = is_version_06(ome, entry)
    if is_reduced:
        entry = without_coordinate_systems(location, entry)
        require_axes(location, list(map(_name_of, entry["axes"])))
    multiscale = _read_multiscale(location, version, entry, "0.6" if is_reduced else version)
    axes = _read_axes(location, multiscale["axes"])
    unopened = [_read_dataset(location, axes, data) for data in multiscale["datasets"]]
    scale, translation = _read_transforms(location, axes, multiscale)
    forms = [_read_level_form(location, level.path, axes) for level in unopened]
    levels = [replace(v, shape=form.shape) for v, form in zip(unopened, forms, strict=True)]
    return Image(
        version=version,
        name=str(entry.get("name") or location.name),
        axes=axes,
        levels=tuple(_with_even_times(axes, levels)),
        dtype=forms[0].dtype,
        channel_names=_channel_names(ome),
        scale=scale,
        translation=translation,
        zarr_format=zarr_format,
        kind=_kind_of(attributes, ome),
        is_reduced=is_reduced,
        n_missing=_count_missing(attributes),
    )


def _count_missing(attributes: Json) -> int | None:
    match attributes.get(PROVENANCE):
        case {"missing_boxes": [*boxes]}:
            return len(boxes)
    return None


def _kind_of(attributes: Json, ome: Json) -> Kind:
    if "image-label" in ome:
        return "label image"
    return "scores" if PROVENANCE in attributes else "image"


def _read_multiscale(location: Location, version: str, entry: Json, stated: str) -> Json:
    """Return a multiscale of a version's valid form, with the transformations that are read."""
    multiscale = _with_known_transforms(entry)
    document = json.dumps(_form_of(multiscale))
    try:
        with _PARSING:
            _require_valid_multiscale(version, document)
    except ValidationError as error:
        raise SourceError(
            f"{location}: its OME-Zarr {stated} metadata are invalid: "
            f"{first_problem(error, 'multiscales')}; correct them, or write the image again with a "
            "newer version of its program"
        ) from error
    return multiscale


def _with_known_transforms(entry: Json) -> Json:
    """Return a multiscale without transformations that change nothing.

    Those are identities, which iohub wrote until 0.2.3, and those into coordinate systems of
    SpatialData. A level that is left without any has voxels of size 1.
    """
    axes = entry.get("axes")
    ones = [{"type": "scale", "scale": [1.0] * len(axes)}] if isinstance(axes, list) else []

    def of_image(transforms: list[Any]) -> list[Any]:
        return [t for t in transforms if not (isinstance(t, dict) and _changes_nothing(t))]

    known = _map_transforms(entry, of_image, lambda transforms: of_image(transforms) or ones)
    if not known.get(_TRANSFORMS):
        known.pop(_TRANSFORMS, None)
    return known


def _changes_nothing(transform: Json) -> bool:
    return transform.get("type") == "identity" or isinstance(transform.get("output"), dict)


def _map_transforms(multiscale: Json, of_image: Change, of_level: Change) -> dict[str, Any]:
    """Return a multiscale with all lists of transformations changed; it may be of any form."""

    def changed(part: Any, change: Change) -> Any:
        if not isinstance(part, dict) or not isinstance(part.get(_TRANSFORMS), list):
            return part
        return {**part, _TRANSFORMS: change(part[_TRANSFORMS])}

    mapped = {**changed(multiscale, of_image)}
    if isinstance(mapped.get("datasets"), list):
        mapped["datasets"] = [changed(dataset, of_level) for dataset in mapped["datasets"]]
    return mapped


def _form_of(multiscale: Json) -> Json:
    """Return what is checked of a multiscale.

    Fields of a plate may differ in names and places alone. Scales may be negative, and those of
    time may differ between levels: some programs write them so, and nothing follows from it.
    """
    axes = multiscale.get("axes")
    listed = axes if isinstance(axes, list) else []
    names = [_name_of(axis) for axis in listed if isinstance(axis, dict)]

    def plain(transform: Any) -> Any:
        if not isinstance(transform, dict):
            return transform
        scale = transform.get("scale")
        offset = transform.get("translation")
        if _are_numbers(scale) and len(scale) == len(names):
            plain_scale = [
                abs(s) if n in SPATIAL else 1.0 for s, n in zip(scale, names, strict=True)
            ]
            return {**transform, "scale": plain_scale}
        if _are_numbers(offset):
            return {**transform, "translation": [0.0] * len(offset)}
        return transform

    def plain_all(transforms: list[Any]) -> list[Any]:
        return list(map(plain, transforms))

    form = _map_transforms(multiscale, plain_all, plain_all)
    return {key: value for key, value in form.items() if key not in _UNCHECKED}


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


@functools.lru_cache(maxsize=_MAX_DOCUMENTS)
def _require_valid_multiscale(version: str, document: str) -> None:
    model = VERSIONS[version].models.multiscales.Multiscale
    # The models warn of what the specification only recommends: no reason to refuse an image.
    with ignored_warnings():
        model.model_validate(json.loads(document))


def _name_of(axis: Json) -> str:
    # iohub writes the names as capitals.
    return str(axis.get("name")).lower()


def _read_axes(location: Location, listed: Sequence[Json]) -> tuple[Axis, ...]:
    names = list(map(_name_of, listed))
    require_axes(location, names)
    axes = []
    for name, axis in zip(names, listed, strict=True):
        unit = axis.get("unit")
        # By name: of t and c, the type is only a recommendation.
        axes.append(Axis(name, _AXIS_TYPES[name], unit if isinstance(unit, str) else None))
    return tuple(axes)


def _read_dataset(location: Location, axes: Sequence[Axis], dataset: Json) -> Level:
    """Return a level without its shape."""
    path = dataset["path"]
    if not lies_below(path):
        raise SourceError(f"{location}: level {path!r} is outside the image")
    scale, translation = _read_transforms(location / path, axes, dataset)
    return Level(path, (), scale, translation)


def _read_transforms(
    location: Location, axes: Sequence[Axis], part: Json
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return scale and translation of a dataset, or of a multiscale; both are empty if it has none.

    Raises:
        SourceError: They are not numbers in the metadata.
    """
    transforms = part.get(_TRANSFORMS)
    if not transforms:
        return (), ()
    try:
        return _compose(len(axes), transforms)
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{location}: {error}") from error


def _compose(ndim: int, transforms: Sequence[Json]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Apply transformations one after the other; return their one scale and translation.

    Raises :class:`ValueError` for numbers that are in a file, or not finite.
    """
    scale = np.ones(ndim)
    translation = np.zeros(ndim)
    for transform in transforms:
        offset = transform.get("translation", [0.0] * ndim)
        if transform.get("path") is not None or isinstance(offset, str):
            raise ValueError(
                "its scale or translation is in a separate file; megaseg reads only numbers in the "
                "metadata"
            )
        factors = np.asarray(transform.get("scale", [1.0] * ndim), np.float64)
        with np.errstate(all="ignore"):
            scale = scale * factors
            translation = translation * factors + np.asarray(offset, np.float64)
    if not np.isfinite([scale, translation]).all():
        raise ValueError(f"scale {scale} and translation {translation} must be finite")
    return tuple(map(float, scale)), tuple(map(float, translation))


def _with_even_times(axes: Sequence[Axis], levels: Sequence[Level]) -> Iterator[Level]:
    """Yield levels whose scales of t and c never get smaller: a coarser level lacks no timepoint.

    Some programs write the scale of time at the first level alone.
    """
    finer: tuple[float, ...] | None = None
    for level in levels:
        if finer is not None:
            scale = tuple(
                own if axis.name in SPATIAL else max(own, below)
                for axis, own, below in zip(axes, level.scale, finer, strict=True)
            )
            level = replace(level, scale=scale)
        finer = level.scale
        yield level


@dataclass(frozen=True, slots=True)
class _ArrayForm:
    """The shape of an array, and its dtype in native byte order."""

    shape: Shape
    dtype: str


def _read_level_form(location: Location, path: str, axes: Sequence[Axis]) -> _ArrayForm:
    try:
        form = _read_array_form(location / path)
    except StoreError:
        raise
    except DataError as error:
        raise SourceError(str(error)) from error
    except FileNotFoundError as error:
        raise SourceError(
            f"{location} lists level {path!r}, but no Zarr array is there: the copy is incomplete"
        ) from error
    except Exception as error:
        raise SourceError(
            f"{location / path} cannot be opened as a Zarr array: {cause_of(error)}; if its codec "
            "is unknown, install the package of the codec, or write the image again with zstd or "
            "Blosc compression"
        ) from error
    n_dims = len(form.shape)
    if n_dims != len(axes):
        names = [axis.name for axis in axes]
        raise SourceError(f"{location}/{path}: {n_dims} dimensions for axes {names}")
    return form


def _read_array_form(location: Location) -> _ArrayForm:
    # Newest version first: zarr prefers it too where there are documents of two versions.
    denied: StoreError | None = None
    for version in sorted(VERSIONS.values(), key=lambda each: -each.zarr_format):
        try:
            document = location.get(version.array_file)
        except StoreError as error:
            # A store that may not be listed denies absent objects.
            if not is_denied(error):
                raise
            denied = denied or error
            continue
        if document is not None:
            with _PARSING:
                return _parse_array(version.array_file, document)
    if denied is not None:
        raise denied
    raise FileNotFoundError(location.url)


@functools.lru_cache(maxsize=_MAX_DOCUMENTS)
def _parse_array(name: str, document: bytes) -> _ArrayForm:
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    # As the only object of a store in memory: to open an array in its place, zarr would ask for
    # three objects.
    buffer = default_buffer_prototype().buffer.from_bytes(document)
    array = zarr.open_array(MemoryStore({name: buffer}), mode="r")
    # Volumes are read in native byte order, so that is the dtype they have.
    return _ArrayForm(tuple(array.shape), str(array.dtype.newbyteorder("=")))


def _channel_names(ome: Mapping[str, object]) -> tuple[str, ...]:
    omero = ome.get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list):
        return ()
    # A channel without a name keeps its place, so that the names of the others stay with theirs.
    labels = [c.get("label") if isinstance(c, dict) else None for c in channels]
    return tuple(str(i if label in (None, "") else label) for i, label in enumerate(labels))


# -- writing


def require_valid(image: Image, where: object) -> None:
    """Require that the metadata of an image, and of labels of it, can be written.

    Raises:
        SourceError: They are valid in no form; it names the source, ``where``.
    """
    for axis, steps in zip(
        image.axes, zip(*(v.scale for v in image.levels), strict=True), strict=True
    ):
        if min(steps) < 0 and len(image.levels) > 1:
            raise SourceError(
                f"{where}: {axis.name} has scale {min(steps):g}, and a pyramid with a negative "
                "scale is not valid OME-Zarr; make it positive in the metadata of the source"
            )
    try:
        image_attributes(image)
        image_attributes(image.without_channels(), label=True)
    except ValidationError as error:
        raise SourceError(
            f"{where}: with its axes and scales the output would not be valid OME-Zarr "
            f"{image.version} ({first_problem(error)}); correct the metadata of the source"
        ) from error


def image_attributes(image: Image, *, label: bool = False) -> dict[str, Any]:
    """Return the attributes of an image group.

    A ``label`` image lies two groups below its source. One that stands for itself is so by its
    kind.
    """
    models = VERSIONS[image.version].models
    axes = [models.axes.Axis(name=a.name, type=a.type, unit=a.unit) for a in image.axes]
    datasets = [
        models.multiscales.Dataset(
            path=level.path,
            coordinateTransformations=_transforms(level.scale, level.translation),
        )
        for level in image.levels
    ]
    multiscale = models.multiscales.Multiscale(
        axes=axes,
        datasets=tuple(datasets),
        coordinateTransformations=_transforms(image.scale, image.translation) or None,
        name=image.name,
    )
    parts: dict[str, Any] = {"multiscales": [multiscale.model_dump(exclude_none=True)]}
    if label:
        parts["image-label"] = {"source": {"image": "../../"}}
    elif image.kind == "label image":
        parts["image-label"] = {}
    return ome_attributes(parts, image.version)


def _transforms(
    scale: tuple[float, ...], translation: tuple[float, ...]
) -> tuple[dict[str, Any], ...]:
    transforms: list[dict[str, Any]] = []
    if scale:
        transforms.append({"type": "scale", "scale": list(scale)})
    if any(translation):
        transforms.append({"type": "translation", "translation": list(translation)})
    return tuple(transforms)
