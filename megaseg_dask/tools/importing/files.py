"""Files of microscopes: what they say that they hold, and their planes.

TIFF is read by tifffile; CZI, ND2 and LIF by the readers of bioio, which are an
extra. What a file does not say stays unknown: nobody guesses a size or an axis.
"""

import importlib
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.concurrency import ignored_warnings
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.messages import closest, install_command
from megaseg_dask.ngff.foreign import EXTRA_READERS, TIFF_SUFFIXES
from megaseg_dask.ngff.units import micrometers, seconds
from megaseg_dask.stores import cause_of, open_served

Array = NDArray[Any]
AXES = "TCZYX"
# What helps if the reader of a microscope's format cannot.
_EXPORT = "; if it opens in the program of the microscope, export it there as OME-TIFF"


@dataclass(frozen=True, slots=True)
class Contents:
    """What one series of a file holds, as far as the file says it.

    ``shape`` is ``(t, c, z, y, x)``, with 1 for an axis that is not in ``axes``. ``spacing_um`` is
    ``(z, y, x)``. ``time_s`` are the seconds between two timepoints.
    """

    axes: str
    shape: Shape
    dtype: str
    spacing_um: tuple[float | None, ...] = (None, None, None)
    time_s: float | None = None
    channel_names: tuple[str, ...] = ()

    @property
    def n_planes(self) -> tuple[int, int, int]:
        """Timepoints, channels and planes."""
        return self.shape[0], self.shape[1], self.shape[2]


@dataclass(frozen=True, slots=True)
class FileSeries:
    """One series (or scene) of a file, of ``n_series``."""

    path: Path
    number: int = 0
    name: str = ""
    n_series: int = 1

    def __str__(self) -> str:
        if self.n_series == 1:
            return str(self.path)
        return f"series {self.number} ({self.name}) of {self.path}"


class ImageFile(Protocol):
    """An open file: all of its series, and the one that is read."""

    contents: Contents
    series: FileSeries

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each series."""
        ...

    def read_plane(self, t: int, c: int, z: int, rows: slice, columns: slice) -> Array:
        """Return a part of a plane, ``(y, x)``."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_file(path: Path, series: str | None = None, axes: str | None = None) -> ImageFile:
    """Open one series of a file; ``axes`` are those of its array, if the file does not say them.

    ``series`` is its number or its name; ``None`` is the only one.

    Raises:
        SourceError: It cannot be read, or what it holds cannot be told.
        SettingsError: The series does not exist, or is needed.
    """
    suffix = path.suffix.lower()
    if suffix in EXTRA_READERS:
        return BioioFile(path, EXTRA_READERS[suffix], series, axes)
    if suffix not in TIFF_SUFFIXES:
        known = ", ".join((*TIFF_SUFFIXES, *EXTRA_READERS))
        raise SourceError(
            f"{path}: files of these kinds can be imported: {known}; for others see "
            "docs/importing.md"
        )
    return TiffImage(path, series, axes)


@contextmanager
def _naming(path: Path, advice: str = "") -> Iterator[None]:
    """Turn what readers raise and log of a file into errors that name it, and the ``advice``."""
    heard = _Listener()
    logger = logging.getLogger("tifffile")
    was_propagated = logger.propagate
    logger.addHandler(heard)
    logger.propagate = False
    try:
        # Readers warn of metadata that they do not understand.
        with ignored_warnings():
            yield
    except (SourceError, SettingsError):
        raise
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist; check the path") from error
    except Exception as error:
        if "imagecodecs" in str(error):
            advice = f"; {install_command('import')}"
        raise SourceError(f"{path} cannot be read: {cause_of(error)}{advice}") from error
    finally:
        logger.removeHandler(heard)
        logger.propagate = was_propagated
    if heard.errors:
        # tifffile goes on with what is left of a damaged file.
        raise SourceError(f"{path} is damaged: {heard.errors[0]}")


class _Listener(logging.Handler):
    """Keeps what tifffile logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(" ".join(record.getMessage().split()))


def _choose_series(
    path: Path, names: Sequence[str], shown: Sequence[str], series: str | None
) -> FileSeries:
    """Return a series by its number or its name; ``shown`` is what is told of each one.

    Raises:
        SourceError: The file has none.
        SettingsError: There is none of this number or name, or one of several has to be chosen.
    """
    if not names:
        raise SourceError(f"{path} has no image; check that it was written completely")
    listed = "; ".join(f"{number}: {text}" for number, text in enumerate(shown))
    if series is None and len(names) > 1:
        raise SettingsError(
            f"{path} has {len(names)} series; choose one with --series NUMBER or NAME, or --series "
            f"all to write them as the fields of a plate ({listed})"
        )
    number = _number_of(names, series or "0")
    if number is None:
        meant = closest(str(series), names)
        hint = f"; did you mean {meant}?" if meant else ""
        raise SettingsError(f"--series {series}: {path} has {listed}{hint}")
    return FileSeries(path, number, names[number], len(names))


def _number_of(names: Sequence[str], series: str) -> int | None:
    if series.isdecimal() and int(series) < len(names):
        return int(series)
    return names.index(series) if series in names else None


class _Order:
    """Where the axes t, c, z, y and x are in an array of a file."""

    def __init__(self, path: Path, stored: str, shape: Sequence[int], given: str | None) -> None:
        names = (given or stored).upper()
        shown = "×".join(map(str, shape))
        if given is not None and len(names) != len(shape):
            raise SettingsError(
                f"--axes {given}: {path} has {len(shape)} axes ({shown}, {stored} by its metadata)"
            )
        if "S" in names and "C" not in names:
            # Red, green and blue of a pixel are channels.
            names = names.replace("S", "C")
        # An axis of one entry is none.
        kept = [
            (place, name) for place, name in enumerate(names) if name in AXES or shape[place] > 1
        ]
        unknown = [name for _, name in kept if name not in AXES]
        found = "".join(name for _, name in kept)
        if unknown or len(set(found)) < len(found) or not {"Y", "X"} <= set(found):
            raise SettingsError(
                f"{path}: the axes of its {shown} array are not known ({stored} in its metadata); "
                f"give all of them in their order with --axes, such as {_example(len(shape))}"
            )
        self.names = found
        self._places = {name: place for place, name in kept}
        self._n_dims = len(shape)
        self.shape = tuple(
            shape[self._places[name]] if name in self._places else 1 for name in AXES
        )

    def index(self, t: int, c: int, z: int, rows: slice, columns: slice) -> tuple[int | slice, ...]:
        """Return the index of a part of a plane in the array."""
        wanted: dict[str, int | slice] = {"T": t, "C": c, "Z": z, "Y": rows, "X": columns}
        index: list[int | slice] = [0] * self._n_dims
        for name, place in self._places.items():
            index[place] = wanted[name]
        return tuple(index)

    def plane(self, values: Array) -> Array:
        """Return a plane as ``(y, x)``."""
        is_transposed = self._places["X"] < self._places["Y"]
        return values.T if is_transposed else values


def _example(n_dims: int) -> str:
    return {2: "YX", 3: "ZYX", 4: "CZYX"}.get(n_dims, AXES)


class TiffImage:
    """One series of a TIFF file: OME-TIFF, a hyperstack of ImageJ, or any other."""

    def __init__(self, path: Path, series: str | None, axes: str | None) -> None:
        """Read the metadata of a series."""
        import tifffile

        self._path = path
        with _naming(path):
            self._file = tifffile.TiffFile(path)
            try:
                self._open(series, axes)
            except BaseException:
                self._file.close()
                raise

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each series; empty where it has none."""
        return tuple(each.name for each in self._file.series)

    def _open(self, series: str | None, axes: str | None) -> None:
        all_series = self._file.series
        shapes = [f"{each.axes} {'×'.join(map(str, each.shape))}" for each in all_series]
        shown = [f"{n} {s}".strip() for n, s in zip(self.names, shapes, strict=True)]
        self.series = _choose_series(self._path, self.names, shown, series)
        number = self.series.number
        chosen = all_series[number]
        self._require_complete(chosen)
        self._order = _Order(self._path, chosen.axes, chosen.shape, axes)
        self.is_one_of_several = bool(chosen.is_multifile)
        self._array = open_served(chosen.aszarr(level=0))
        self.contents = Contents(
            axes=self._order.names,
            shape=self._order.shape,
            dtype=str(np.dtype(chosen.dtype).newbyteorder("=")),
            **self._said(number),
        )

    def _require_complete(self, series: Any) -> None:
        # A set of files is one series; what is absent of it would read as background.
        if series.is_multifile and any(page is None for page in series.pages):
            raise SourceError(
                f"{self._path} is one file of a set, and other files of the set do "
                "not exist; add them"
            )
        if series.dataoffset is not None:
            # One piece, of which only the first plane need be described.
            end = series.dataoffset + math.prod(series.shape) * series.dtype.itemsize
            n_bytes = self._file.filehandle.size
        else:
            last = series.pages[-1]
            ends = map(add, last.dataoffsets, last.databytecounts)
            end = max(ends, default=0)
            n_bytes = last.parent.filehandle.size
        if end > n_bytes:
            raise SourceError(
                f"{self._path} has {n_bytes} bytes, and its planes reach to {end}: the copy is "
                "incomplete"
            )

    def _said(self, number: int) -> dict[str, Any]:
        """Return what the file says of sizes, times and names."""
        if self._file.ome_metadata:
            return _said_by_ome(self._file.ome_metadata, number)
        if self._file.imagej_metadata:
            return self._said_by_imagej(self._file.imagej_metadata)
        return {}

    def _said_by_imagej(self, said: Mapping[str, Any]) -> dict[str, Any]:
        unit = str(said.get("unit", "")).replace("\\u00B5", "µ")
        in_um = micrometers(unit)
        spacing: list[float | None] = [said.get("spacing")]
        for name in ("YResolution", "XResolution"):
            tag = self._file.pages[0].tags.get(name)  # type: ignore[union-attr]
            per_unit = tag.value[0] / tag.value[1] if tag and tag.value[1] else 0
            spacing.append(1 / per_unit if per_unit else None)
        return {
            "spacing_um": tuple(n * in_um if n and in_um else None for n in spacing),
            "time_s": said.get("finterval"),
        }

    def read_plane(self, t: int, c: int, z: int, rows: slice, columns: slice) -> Array:
        """Return a part of a plane, ``(y, x)``."""
        with _naming(self._path):
            return self._order.plane(
                np.asarray(self._array[self._order.index(t, c, z, rows, columns)])
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _said_by_ome(document: str, number: int) -> dict[str, Any]:
    root = ElementTree.fromstring(document)
    pixels = [element for element in root.iter() if _tag(element) == "Pixels"]
    if number >= len(pixels):
        return {}
    of_series = pixels[number]
    names = [element.get("Name") for element in of_series if _tag(element) == "Channel"]
    spacing = [_ome_length(of_series, f"PhysicalSize{axis}") for axis in "ZYX"]
    increment = of_series.get("TimeIncrement")
    unit = seconds(of_series.get("TimeIncrementUnit", "s"))
    return {
        "spacing_um": tuple(spacing),
        "time_s": float(increment) * unit if increment and unit else None,
        "channel_names": tuple(str(name) for name in names) if all(names) else (),
    }


def _tag(element: ElementTree.Element) -> str:
    return re.sub(r"\{.*\}", "", element.tag)


def _ome_length(pixels: ElementTree.Element, name: str) -> float | None:
    value = pixels.get(name)
    # Without a unit, the specification means µm.
    unit = micrometers(pixels.get(f"{name}Unit", "µm"))
    return float(value) * unit if value and unit else None


def _spacing_of(reader: Any, data: Any) -> tuple[float | None, ...]:
    """Return the size of voxels in µm ``(z, y, x)`` that a reader of bioio knows."""
    sizes = reader.physical_pixel_sizes
    spacing = (sizes.Z, sizes.Y, sizes.X)
    said = data.attrs.get("unprocessed")
    metadata = said.get("metadata") if isinstance(said, dict) else None
    channels = getattr(metadata, "channels", None)
    if not channels:
        return spacing
    # ND2: a size that is not known is 1, and not calibrated. They are in the order x, y, z.
    is_known = reversed(channels[0].volume.axesCalibrated)
    return tuple(n if known else None for n, known in zip(spacing, is_known, strict=True))


class BioioFile:
    """One scene of a CZI, ND2 or LIF file."""

    def __init__(self, path: Path, module: str, series: str | None, axes: str | None) -> None:
        """Read the metadata of a scene."""
        try:
            reader_class = importlib.import_module(module).Reader
        except ImportError as error:
            raise SettingsError(
                f"{path}: {path.suffix} files are read by {module.replace('_', '-')}: "
                f"{install_command('import')}"
            ) from error
        self._path = path
        self._blocks: Any = None
        with _naming(path, advice=_EXPORT):
            # By themselves they read all planes of a timepoint for one plane.
            options = {} if path.suffix.lower() == ".nd2" else {"chunk_dims": ["Y", "X"]}
            reader = reader_class(str(path), **options)
            self.names = tuple(map(str, reader.scenes))
            self.series = _choose_series(path, self.names, self.names, series)
            reader.set_scene(self.series.number)
            self._data = reader.xarray_dask_data
            stored = "".join(map(str, self._data.dims)).upper()
            n_tiles = self._data.sizes.get("M", 1)
            if n_tiles > 1:
                raise SourceError(
                    f"{self.series} is a mosaic of {n_tiles} tiles; stitch them in the program of "
                    "the microscope, and import the result"
                )
            self._order = _Order(path, stored, self._data.shape, axes)
            interval = getattr(reader, "time_interval", None)
            self.contents = Contents(
                axes=self._order.names,
                shape=self._order.shape,
                dtype=str(self._data.dtype.newbyteorder("=")),
                spacing_um=_spacing_of(reader, self._data),
                time_s=interval.total_seconds() if interval else None,
                channel_names=tuple(map(str, reader.channel_names or ())),
            )

    def read_plane(self, t: int, c: int, z: int, rows: slice, columns: slice) -> Array:
        """Return a part of a plane, ``(y, x)``."""
        with _naming(self._path, advice=_EXPORT):
            index = self._order.index(t, c, z, rows, columns)
            return self._order.plane(self._read(index))

    def _read(self, index: tuple[int | slice, ...]) -> Array:
        """Return a part of the array.

        The blocks of a plane are taken one by one: each index into the lazy array would walk over
        the planes of the whole file.
        """
        array = self._data.data
        if self._blocks is None:
            self._blocks = array.to_delayed()
        block: list[int] = []
        inside: list[int | slice] = []
        for place, extents in zip(index, array.chunks, strict=True):
            stops = list(accumulate(extents))
            number = bisect_right(stops, place) if isinstance(place, int) else 0
            if isinstance(place, slice) and len(stops) > 1:
                # No reader cuts planes; one that does is slow, and right.
                return np.asarray(array[index].compute(scheduler="synchronous"))
            block.append(number)
            first = stops[number] - extents[number]
            inside.append(place - first if isinstance(place, int) else place)
        values = self._blocks[tuple(block)].compute(scheduler="synchronous")
        return np.asarray(np.asarray(values)[tuple(inside)])

    def close(self) -> None:
        """Forget the file; its reader opens it for each read."""
