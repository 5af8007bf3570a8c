"""Labels as OME-TIFF, for programs that do not read OME-Zarr: one file for an image.

Planes are written one after the other, so memory does not grow with the image. A file
has its own name once it is complete.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import TiffWriter

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, Step, ignore
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.ngff.labels import choose_label, is_marked, read_label_image, require_complete
from megaseg_dask.ngff.plate import is_plate, read_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.stores import Location

SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff")
# Planes that are read together have at most this number of voxels.
_MAX_SLAB_VOXELS = 2**26
# A chunk has few planes more often than many; each is read once if a slab covers it.
_SLAB_PLANES = 64
# OME-XML knows no integers of 64 bits.
_MAX_ID = 2**32 - 1
_CENTIMETER_UM = 1e4


@dataclass(frozen=True, slots=True)
class _Export:
    """A label image, and the file that it is written to."""

    location: Location
    labels: Image
    level: int
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents ``(t, z, y, x)``."""
        return (self.labels.extent("t"), *self.labels.volume_shape(self.level))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of voxels in the file."""
        dtype = np.dtype(self.labels.dtype).newbyteorder("=")
        if dtype.kind == "b":
            return np.dtype(np.uint8)
        return np.dtype(np.uint32) if dtype.itemsize == 8 else dtype

    def iter_planes(self) -> Iterator[NDArray[Any]]:
        """Yield planes ``(y, x)``, z before t.

        Raises:
            SourceError: An id is below 0, or too large for the file.
            MegasegError: A chunk cannot be read.
        """
        n_times, n_z, n_y, n_x = self.shape
        n_planes = min(_SLAB_PLANES, max(_MAX_SLAB_VOXELS // (n_y * n_x), 1))
        for t in range(n_times):
            volume = Volume.of(self.location, self.labels, level=self.level, t=t)
            for start in range(0, n_z, n_planes):
                stop = min(start + n_planes, n_z)
                values = volume.read(Box((start, 0, 0), (stop, n_y, n_x)))
                self._require_ids(values)
                yield from values.astype(self.dtype, copy=False)

    def _require_ids(self, values: NDArray[Any]) -> None:
        lowest = int(values.min())
        highest = int(values.max())
        if lowest < 0 or highest > _MAX_ID:
            found = lowest if lowest < 0 else highest
            raise SourceError(
                f"{self.location} has the id {found}; a TIFF file holds ids of 0 to {_MAX_ID}"
            )

    def metadata(self) -> dict[str, Any]:
        """Return names, axes and voxel sizes as OME-XML has them; sizes only where known."""
        image = self.labels
        found: dict[str, Any] = {"axes": "TZYX", "Name": image.name}
        if image.unknown_size is None:
            for axis, size in zip(SPATIAL, self._spacing_um(), strict=True):
                found[f"PhysicalSize{axis.upper()}"] = size
                found[f"PhysicalSize{axis.upper()}Unit"] = "µm"
        return found

    def resolution(self) -> tuple[float, float] | None:
        """Return pixels per centimeter along x and y, which readers of plain TIFF look for."""
        if self.labels.unknown_size is not None:
            return None
        _, y, x = self._spacing_um()
        return _CENTIMETER_UM / x, _CENTIMETER_UM / y

    def _spacing_um(self) -> tuple[float, ...]:
        image = self.labels
        scale, _ = image.transform(self.level)
        sizes = [abs(s) * axis.in_um for s, axis in zip(scale, image.axes, strict=True)]
        return image.spatial(sizes)


def export_labels(
    source: str,
    target: str,
    *,
    label: str | None = None,
    level: int = 0,
    overwrite: bool = False,
    emit: Emit = ignore,
) -> list[Path]:
    """Write the label image of an image, or of each field of a plate, as OME-TIFF.

    Of a plate ``target`` is a folder, which gets a file ``ROW_COLUMN_FIELD.ome.tif`` per field.
    Voxels keep their type; ids of 64 bits become 32 bits. Return the files.

    Raises:
        SettingsError: A label image has to be chosen, or the level is none of its levels.
        SourceError: There are no labels, they are not complete, or an id does not fit.
        TargetError: A file is there already, or the name is not that of a TIFF file.
        MegasegError: A chunk cannot be read.
    """
    exports = list(_find(Location.of(source), Path(target), label, level))
    if not overwrite:
        for export in exports:
            if export.file.exists():
                raise TargetError(
                    f"{export.file} exists; choose another name, or replace it with --overwrite"
                )
    for export in exports:
        emit(Step(f"writing {export.file.name}"))
        _write(export)
    return [export.file for export in exports]


def _find(location: Location, target: Path, label: str | None, level: int) -> Iterator[_Export]:
    """Yield what is to be written; all of it is checked before anything is written."""
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    if not is_plate(location):
        if not target.name.lower().endswith(SUFFIXES):
            raise TargetError(
                f"{target} is not a name of a TIFF file; use a name that ends in .ome.tif"
            )
        yield _export(location, target, label, level)
        return
    if target.name.lower().endswith(SUFFIXES) or target.is_file():
        raise TargetError(
            f"{location} is a plate, and each of its fields becomes a file; give a folder, not "
            f"{target.name}"
        )
    for field in read_plate(location).fields:
        file = target / f"{field.path.replace('/', '_')}.ome.tif"
        yield _export(location / field.path, file, label, level)


def _export(image: Location, file: Path, label: str | None, level: int) -> _Export:
    location = choose_label(image, label) or image
    labels = read_label_image(location)
    if not is_marked(location, labels):
        raise SourceError(f"{image} has no label image; segment it first, or give a label image")
    require_complete(location, labels)
    if labels.extent("c") > 1:
        raise SourceError(f"{location} has several channels; expected a label image with one")
    if not 0 <= level < len(labels.levels):
        raise SettingsError(f"--level {level}: {location} has levels 0 to {len(labels.levels) - 1}")
    return _Export(location, labels, level, file)


def _write(export: _Export) -> None:
    try:
        export.file.parent.mkdir(parents=True, exist_ok=True)
        _write_planes(export)
    except OSError as error:
        raise TargetError(
            f"{export.file} cannot be written: {error.strerror or error}; choose another place"
        ) from error


def _write_planes(export: _Export) -> None:
    unfinished = export.file.with_name(f".{export.file.name}.unfinished")
    n_bytes = int(np.prod(export.shape)) * export.dtype.itemsize
    try:
        # Beyond 4 GB a TIFF file needs long offsets; compression is not known before.
        with TiffWriter(unfinished, bigtiff=n_bytes > 2**32 - 2**25, ome=True) as writer:
            writer.write(
                export.iter_planes(),
                shape=export.shape,
                dtype=export.dtype,
                compression="zlib",
                photometric="minisblack",
                metadata=export.metadata(),
                resolution=export.resolution(),
                resolutionunit="CENTIMETER",
            )
        unfinished.replace(export.file)
    finally:
        if unfinished.exists():
            unfinished.unlink()
