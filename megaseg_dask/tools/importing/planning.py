"""From files and options to the plan of an import; nothing is written."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
from megaseg_dask.tools.importing.files import Contents, open_file
from megaseg_dask.tools.importing.pattern import Group, group_files

# The beginning and the end of a file, where its metadata mostly are.
_DIGESTED_BYTES = 64 * 1024
_SMALL_BYTES = 500 * 10**6
# Disks serve no more of them any faster.
_MAX_WORKERS = 8
_UNITS = {"t": ("time", "second"), "c": ("channel", None)}


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a person says of the files: ``voxel_size`` is in µm ``(z, y, x)``."""

    pattern: str | None = None
    series: int | None = None
    axes: str | None = None
    voxel_size: tuple[float, ...] | None = None
    channel_names: tuple[str, ...] = ()


def parse_options(
    pattern: str | None = None,
    voxel_size: str | None = None,
    axes: str | None = None,
    channel_names: str | None = None,
    series: str | None = None,
) -> ImportOptions:
    """Return what the command line says of the files.

    Raises:
        SettingsError: A value cannot be used.
    """
    names = tuple(name.strip() for name in channel_names.split(",")) if channel_names else ()
    if series is not None and not series.isdecimal():
        raise SettingsError(f"--series {series}: expected a number from 0 on")
    if axes is not None and not axes.isalpha():
        raise SettingsError(f"--axes {axes}: expected letters, such as TCZYX")
    return ImportOptions(
        pattern=pattern,
        series=None if series is None else int(series),
        axes=axes,
        voxel_size=None if voxel_size is None else _parse_size(voxel_size),
        channel_names=names,
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
    groups = group_files(paths, options.pattern)
    where = Location.of(target)
    contents = dict(zip(paths, map_threaded(_Read(options, len(paths)), paths), strict=True))
    _require_decodable(paths[0], options)
    settings = _with_workers(settings, paths)
    memory_bytes = memory_of(settings, cluster_of(settings))
    images = []
    for group in groups:
        image, parts = _describe(group, contents, paths, options, settings, where)
        images.append(ImportedImage(group.path, image, parts, choose_block(image, memory_bytes)))
    return ImportPlan(
        files=tuple(map_threaded(_identify, paths)),
        series=options.series or 0,
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

    def __call__(self, path: Path) -> Contents:
        opened = open_file(path, self.options.series, self.options.axes)
        try:
            if self.n_files > 1 and getattr(opened, "is_one_of_several", False):
                raise SettingsError(
                    f"{path} is one file of an OME-TIFF set, which names all others: pass it alone"
                )
            return opened.contents
        finally:
            opened.close()


def _require_decodable(path: Path, options: ImportOptions) -> None:
    """Read a first plane: a codec that is missing is told before anything is written."""
    opened = open_file(path, options.series, options.axes)
    try:
        opened.read_plane(0, 0, 0, slice(0, 1), slice(0, 1))
    finally:
        opened.close()


def _identify(path: Path) -> SourceFile:
    n_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_DIGESTED_BYTES))
        file.seek(max(n_bytes - _DIGESTED_BYTES, 0))
        digest.update(file.read(_DIGESTED_BYTES))
    return SourceFile(str(path), n_bytes, digest.hexdigest())


def require_same_file(file: SourceFile) -> None:
    """Require that a file is the one that was planned.

    Raises:
        SourceError: It is another one, or gone.
    """
    path = Path(file.path)
    if not path.exists():
        raise SourceError(f"{path} is gone; restore it and run the same command again")
    if _identify(path) != file:
        raise SourceError(
            f"{path} was changed since the import was planned; restore it, or import it to another "
            "TARGET"
        )


def _describe(
    group: Group,
    contents: dict[Path, Contents],
    paths: Sequence[Path],
    options: ImportOptions,
    settings: Settings,
    target: Location,
) -> tuple[Image, tuple[FilePart, ...]]:
    """Return the metadata of the image of a group of files, and where each file lies in it."""
    first_path, *_ = group.files.values()
    first = contents[first_path]
    if np.dtype(first.dtype).kind not in "iuf":
        raise SourceError(f"{first_path} has voxels of {first.dtype}; numbers can be imported")
    _require_alike(group, contents)
    _require_unspread(group, first, options)
    n_files = tuple(map(len, group.values))
    n_planes = tuple(a * b for a, b in zip(n_files, first.n_planes, strict=True))
    numbers = {path: number for number, path in enumerate(paths)}
    parts = []
    for values, path in group.files.items():
        places = [known.index(value) for known, value in zip(group.values, values, strict=True)]
        start = [place * n for place, n in zip(places, first.n_planes, strict=True)]
        parts.append(FilePart(numbers[path], (start[0], start[1], start[2]), first.n_planes))
    is_named = {
        "t": "T" in first.axes or n_files[0] > 1,
        "c": "C" in first.axes or n_files[1] > 1,
    }
    shape = {**dict(zip("tcz", n_planes, strict=True)), "y": first.shape[3], "x": first.shape[4]}
    spacing = dict(zip("zyx", _spacing(first_path, first, options), strict=True))
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
    )
    require_valid(image, first_path)
    return image.with_pyramid(), tuple(parts)


def _require_alike(group: Group, contents: dict[Path, Contents]) -> None:
    """Raise :class:`SourceError` if the files of one image differ in what they hold."""
    first_path, *others = group.files.values()
    first = contents[first_path]
    for path in others:
        other = contents[path]
        for name in ("axes", "shape", "dtype", "spacing_um"):
            ours = getattr(first, name)
            theirs = getattr(other, name)
            if ours != theirs:
                raise SourceError(
                    f"{first_path} has {name} {ours}, and {path} has {theirs}; files of one image "
                    "have the same"
                )


def _require_unspread(group: Group, first: Contents, options: ImportOptions) -> None:
    """Raise :class:`SettingsError` if an axis is in the files and between them."""
    spread = zip(("time", "channel", "z"), group.values, first.n_planes, strict=True)
    for name, values, extent in spread:
        if len(values) > 1 and extent > 1:
            raise SettingsError(
                f"--pattern {options.pattern}: {{{name}}} differs between files that hold "
                f"{extent} of it each; use * there, or {{field}} if they are other images"
            )


def _spacing(path: Path, first: Contents, options: ImportOptions) -> tuple[float, ...]:
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
        f"{path} does not say the size of its voxels in µm ({words}); say it with "
        "--voxel-size Z,Y,X"
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
