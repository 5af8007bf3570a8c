"""From files and options to the plan of an import; nothing is written."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.inference.machine import n_cores
from megaseg_dask.messages import count
from megaseg_dask.ngff.image import Axis, Image, Level, require_valid
from megaseg_dask.ngff.plate import Field, Plate
from megaseg_dask.plan.cluster_spec import cluster_of
from megaseg_dask.plan.import_plan import (
    FilePart,
    ImportedImage,
    ImportPlan,
    SourceFile,
    choose_block,
)
from megaseg_dask.plan.planner import memory_of
from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import Location
from megaseg_dask.tools.importing.files import AXES, Contents, FileSeries, ImageFile, open_file
from megaseg_dask.tools.importing.pattern import Group, group_files

# The beginning and the end of a file, where its metadata mostly are.
_DIGESTED_BYTES = 64 * 1024
_SMALL_BYTES = 500 * 10**6
# Disks serve no more of them any faster.
_MAX_WORKERS = 8
# All series of a file, in place of the number or the name of one.
_ALL = "all"
_UNITS = {"t": ("time", "second"), "c": ("channel", None)}


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a person says of the files.

    ``series`` is a number, a name, or ``all``. ``voxel_size`` is in µm ``(z, y, x)``. Voxels of
    ``labels`` are ids of objects.
    """

    pattern: str | None = None
    series: str | None = None
    axes: str | None = None
    voxel_size: tuple[float, ...] | None = None
    channel_names: tuple[str, ...] = ()
    allow_missing: bool = False
    labels: bool = False


def parse_options(
    pattern: str | None = None,
    voxel_size: str | None = None,
    axes: str | None = None,
    channel_names: str | None = None,
    series: str | None = None,
    *,
    allow_missing: bool = False,
    labels: bool = False,
) -> ImportOptions:
    """Return what the command line says of the files.

    Raises:
        SettingsError: A value cannot be used.
    """
    names = tuple(name.strip() for name in channel_names.split(",")) if channel_names else ()
    if axes is not None:
        _require_axes(axes)
    return ImportOptions(
        pattern=pattern,
        series=series,
        axes=axes,
        voxel_size=None if voxel_size is None else _parse_size(voxel_size),
        channel_names=names,
        allow_missing=allow_missing,
        labels=labels,
    )


def _require_axes(axes: str) -> None:
    """Raise :class:`SettingsError` if letters are not different axes with y and x among them."""
    names = axes.upper()
    is_known = set(names) <= set(AXES)
    if not is_known or len(set(names)) < len(names) or not {"Y", "X"} <= set(names):
        raise SettingsError(
            f"--axes {axes}: expected a letter for each axis of the file, each one once: Y and X, "
            "and T, C and Z where it has them, such as ZYX or TCZYX"
        )


def _parse_size(text: str) -> tuple[float, ...]:
    try:
        size = tuple(map(float, text.split(",")))
    except ValueError:
        size = ()
    if len(size) != 3 or not all(n > 0 and math.isfinite(n) for n in size):
        raise SettingsError(
            f"--voxel-size {text}: expected three sizes in µm, Z,Y,X, such as 0.29,0.108,0.108"
        )
    return size


def plan_import(
    files: Sequence[str], target: str, options: ImportOptions, settings: Settings
) -> ImportPlan:
    """Look into all files, and return what is to be written; writes nothing.

    Raises:
        SettingsError: The options do not fit the files, or something has to be said.
        SourceError: A file cannot be read.
    """
    paths = list(map(_local, files))
    if options.series != _ALL and ":" not in (options.pattern or ""):
        # Before a file is read: names that do not match are told at once.
        group_files(list(map(FileSeries, paths)), options.pattern, allow_missing=True)
    where = Location.of(target)
    contents: dict[FileSeries, Contents] = {}
    for found in map_threaded(_Read(options, len(paths)), paths):
        contents |= found
    series = list(contents)
    groups = group_files(series, options.pattern, allow_missing=options.allow_missing)
    _require_decodable(series[0], options)
    settings = _with_workers(settings, paths)
    memory_bytes = memory_of(settings, cluster_of(settings))
    images = []
    for group in groups:
        image, parts = _describe(group, contents, options, settings, where)
        images.append(ImportedImage(group.path, image, parts, choose_block(image, memory_bytes)))
    return ImportPlan(
        files=tuple(map_threaded(_identify, series)),
        axes=options.axes,
        target=where,
        images=tuple(images),
        plate=_plate(groups, where, settings) if groups[0].row else None,
        settings=settings.recorded(),
    )


def _with_workers(settings: Settings, paths: Sequence[Path]) -> Settings:
    """Return settings with a number of workers: what is small is done before a worker started."""
    if settings.workers is not None or settings.scheduler or settings.cluster:
        return settings
    is_small = sum(path.stat().st_size for path in paths) < _SMALL_BYTES
    n_workers = 0 if is_small else min(n_cores(), _MAX_WORKERS)
    return settings.model_copy(update={"workers": n_workers})


def _local(text: str) -> Path:
    if "://" in text:
        raise SettingsError(f"{text}: files are imported from disks; copy it to one")
    # A worker may have another current folder.
    return Path(text).absolute()


@dataclass(frozen=True, slots=True)
class _Read:
    """Reads what a file holds."""

    options: ImportOptions
    n_files: int

    def __call__(self, path: Path) -> dict[FileSeries, Contents]:
        """Return what is to be imported of a file: one of its series, or all."""
        if self.options.series != _ALL:
            series, contents, _ = self._open(path, self.options.series)
            return {series: contents}
        first, contents, n_series = self._open(path, "0")
        found = {first: contents}
        for number in range(1, n_series):
            series, contents, _ = self._open(path, str(number))
            found[series] = contents
        return found

    def _open(self, path: Path, chosen: str | None) -> tuple[FileSeries, Contents, int]:
        opened = open_file(path, chosen, self.options.axes)
        try:
            if self.n_files > 1 and getattr(opened, "is_one_of_several", False):
                raise SettingsError(
                    f"{path} is one file of an OME-TIFF set, which names all others: pass it alone"
                )
            series = opened.series
            if self.options.series != _ALL:
                # Chosen: it is all that is there.
                series = replace(series, n_series=1)
            return series, opened.contents, opened.series.n_series
        finally:
            opened.close()


def _require_decodable(series: FileSeries, options: ImportOptions) -> None:
    """Read a first plane: a codec that is missing is told before anything is written."""
    opened = open_file(series.path, str(series.number), options.axes)
    try:
        opened.read_plane(0, 0, 0, slice(0, 1), slice(0, 1))
    finally:
        opened.close()


def _identify(series: FileSeries) -> SourceFile:
    stat = series.path.stat()
    digest = hashlib.sha256()
    with series.path.open("rb") as file:
        digest.update(file.read(_DIGESTED_BYTES))
        file.seek(max(stat.st_size - _DIGESTED_BYTES, 0))
        digest.update(file.read(_DIGESTED_BYTES))
    return SourceFile(
        str(series.path), stat.st_size, digest.hexdigest(), series.number, stat.st_mtime_ns
    )


def require_same_file(file: SourceFile) -> None:
    """Require that a file is the one that was planned.

    Raises:
        SourceError: It is another one, or gone.
    """
    path = Path(file.path)
    if not path.exists():
        raise SourceError(f"{path} is gone; restore it and run the same command again")
    if _identify(FileSeries(path, file.series)) != file:
        raise SourceError(
            f"{path} was changed since the import was planned; restore it, or import it to another "
            "TARGET"
        )


def _describe(
    group: Group,
    contents: dict[FileSeries, Contents],
    options: ImportOptions,
    settings: Settings,
    target: Location,
) -> tuple[Image, tuple[FilePart, ...]]:
    """Return the metadata of the image of a group of files, and where each file lies in it."""
    first_file, *_ = group.files.values()
    first = contents[first_file]
    if np.dtype(first.dtype).kind not in "iuf":
        raise SourceError(f"{first_file} has voxels of {first.dtype}; only numbers can be imported")
    _require_alike(group, contents)
    _require_unspread(group, first, options)
    n_files = tuple(map(len, group.values))
    n_planes = tuple(a * b for a, b in zip(n_files, first.n_planes, strict=True))
    numbers = {file: number for number, file in enumerate(contents)}
    parts = []
    for values, file in group.files.items():
        places = [known.index(value) for known, value in zip(group.values, values, strict=True)]
        start = [place * n for place, n in zip(places, first.n_planes, strict=True)]
        parts.append(FilePart(numbers[file], (start[0], start[1], start[2]), first.n_planes))
    is_named = {
        "t": "T" in first.axes or n_files[0] > 1,
        "c": "C" in first.axes or n_files[1] > 1,
    }
    shape = {**dict(zip("tcz", n_planes, strict=True)), "y": first.shape[3], "x": first.shape[4]}
    spacing = dict(zip("zyx", _spacing(first_file, first, options), strict=True))
    scale = {"t": first.time_s or 1.0, "c": 1.0, **spacing}
    names = [name for name in "tczyx" if is_named.get(name, True)]
    axes = []
    for name in names:
        kind, unit = _UNITS.get(name, ("space", "micrometer"))
        axes.append(Axis(name, kind, unit if name != "t" or first.time_s else None))
    level = Level(
        "0",
        tuple(shape[name] for name in names),
        tuple(float(scale[name]) for name in names),
        (0.0,) * len(names),
    )
    image = Image(
        version=settings.ome_zarr,
        name=group.path.replace("/", "") or target.name,
        axes=tuple(axes),
        levels=(level,),
        dtype=first.dtype,
        channel_names=_channel_names(group, first, shape["c"], options),
        kind="label image" if options.labels else "image",
    )
    if options.labels:
        _require_ids(image, first_file)
    require_valid(image, first_file.path)
    return image.with_pyramid(), tuple(parts)


def _require_ids(image: Image, file: FileSeries) -> None:
    """Raise :class:`SettingsError` if the voxels of an image are no ids of objects."""
    n_channels = image.extent("c")
    if np.dtype(image.dtype).kind not in "iu" or n_channels > 1:
        raise SettingsError(
            f"--labels: {file} has {count(n_channels, 'channel')} of {image.dtype}; ids of objects "
            "are integers, in one channel"
        )


def require_no_negative_ids(plan: ImportPlan) -> None:
    """Read all voxels of labels whose dtype has a sign; writes nothing.

    Raises:
        SourceError: A voxel is negative.
    """
    blocks: dict[int, Shape] = {}
    for image in plan.images:
        if image.image.kind == "label image" and np.dtype(image.image.dtype).kind == "i":
            blocks |= {part.file: image.block for part in image.parts}

    def look(number: int) -> None:
        source = plan.files[number]
        file = open_file(Path(source.path), str(source.series), plan.axes)
        try:
            smallest = _smallest_voxel(file, blocks[number])
        finally:
            file.close()
        if smallest < 0:
            raise SourceError(
                f"--labels: {file.series} has voxels of {smallest}; the ids of objects are 1 or "
                "more, and 0 is the background. Give these voxels 0, or an id that no object has "
                "(megaseg evaluate leaves it out with --ignore)"
            )

    map_threaded(look, blocks)


def _smallest_voxel(file: ImageFile, block: Shape) -> int:
    """Return the smallest value of a file, which is read in parts of planes of a block."""
    planes = list(product(*map(range, file.contents.n_planes)))
    _, _, _, height, width = file.contents.shape
    _, n_rows, n_columns = block
    smallest = 0
    for y, x in product(range(0, height, n_rows), range(0, width, n_columns)):
        rows = slice(y, min(y + n_rows, height))
        columns = slice(x, min(x + n_columns, width))
        for t, c, z in planes:
            smallest = min(smallest, int(file.read_plane(t, c, z, rows, columns).min()))
    return smallest


def _require_alike(group: Group, contents: dict[FileSeries, Contents]) -> None:
    """Raise :class:`SourceError` if the files of one image differ in what they hold."""
    first_file, *others = group.files.values()
    first = contents[first_file]
    for file in others:
        other = contents[file]
        for name in ("axes", "shape", "dtype", "spacing_um"):
            ours = getattr(first, name)
            theirs = getattr(other, name)
            if ours != theirs:
                raise SourceError(
                    f"{first_file} has {name} {ours}, and {file} has {theirs}; all files of one "
                    f"image must have the same {name}"
                )


def _require_unspread(group: Group, first: Contents, options: ImportOptions) -> None:
    """Raise :class:`SettingsError` if an axis is in the files and between them."""
    spread = zip(("time", "channel", "z"), group.values, first.n_planes, strict=True)
    for name, values, extent in spread:
        if len(values) > 1 and extent > 1:
            raise SettingsError(
                f"--pattern {options.pattern}: {{{name}}} differs between files, and each file "
                f"holds {extent} of it; use * there, or {{field}} if the files are different images"
            )


def _spacing(file: FileSeries, first: Contents, options: ImportOptions) -> tuple[float, ...]:
    """Return the size of voxels in µm ``(z, y, x)``.

    Raises:
        SettingsError: It is not known.
    """
    if options.voxel_size is not None:
        return options.voxel_size
    known = [n for n in first.spacing_um if n and math.isfinite(n) and n > 0]
    if len(known) == len(first.spacing_um):
        return tuple(known)
    said = zip("zyx", first.spacing_um, strict=True)
    words = ", ".join(f"{axis} {n:g}" if n else f"{axis} unknown" for axis, n in said)
    raise SettingsError(
        f"{file} does not state its voxel size in µm ({words}); give it with --voxel-size Z,Y,X"
    )


def _channel_names(
    group: Group, first: Contents, n_channels: int, options: ImportOptions
) -> tuple[str, ...]:
    if options.channel_names:
        if len(options.channel_names) != n_channels:
            raise SettingsError(
                f"--channel-names {','.join(options.channel_names)}: there "
                f"{'is' if n_channels == 1 else 'are'} {count(n_channels, 'channel')}"
            )
        return options.channel_names
    by_pattern = tuple(filter(None, group.values[1]))
    if by_pattern:
        return by_pattern
    return first.channel_names if len(first.channel_names) == n_channels else ()


def _plate(groups: Sequence[Group], target: Location, settings: Settings) -> Plate:
    rows = dict.fromkeys(group.row for group in groups)
    columns = dict.fromkeys(group.column for group in groups)
    return Plate(
        version=settings.ome_zarr,
        name=target.name,
        rows=tuple(rows),
        columns=tuple(sorted(columns, key=lambda name: (len(name), name))),
        fields=tuple(Field(group.row, group.column, group.field) for group in groups),
    )


def with_recorded_blocks(plan: ImportPlan, recorded: ImportPlan) -> ImportPlan:
    """Return a plan with the blocks of an earlier one of the same import."""
    images = [
        replace(image, block=earlier.block)
        for image, earlier in zip(plan.images, recorded.images, strict=True)
    ]
    return ImportPlan.model_construct(**{**dict(plan), "images": tuple(images)})
