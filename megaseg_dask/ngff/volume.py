"""Single volumes of an image as ``(z, y, x)`` arrays, and the arrays that hold them.

A volume is an address with a timepoint and a channel, so it travels to
workers. What cannot be read is named by its stored object: a codec knows what
is wrong with a chunk, but not where it lies.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import Layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.errors import DataError, MegasegError, StoreError
from megaseg_dask.ngff.group import ZARR_FORMAT
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.stores import (
    Location,
    cached_array,
    cause_of,
    is_store_failure,
    store_error,
    zarr_store,
)

Array = NDArray[Any]

# A checksum tells a damaged chunk from data. Readers of Zarr v2 (jzarr, and so Fiji and QuPath) know Blosc, not Zstd.
_COMPRESSORS: dict[str, Any] = {
    "0.5": {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
    "0.4": {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1},
}


@dataclass(frozen=True, slots=True)
class Volume:
    """One timepoint and channel of one array, seen as ``(z, y, x)``; a value that opens on first use."""

    location: Location
    axis_names: tuple[str, ...]
    t: int = 0
    c: int = 0

    def read(self, box: Box) -> Array:
        """Read a box as ``(z, y, x)`` in native byte order.

        Raises :class:`DataError` naming a corrupt chunk, or :class:`StoreError` naming one that cannot be read.
        """
        array = self._open()
        try:
            values = np.asarray(array[self._index(box)])
        except Exception as error:
            raise self._blame(array, box, error) from error
        if array.shards is not None:
            self._require_no_empty_shard(array, box, values)
        self._require_still_there(array, values)
        return self._to_zyx(values).astype(values.dtype.newbyteorder("="), copy=False)

    def count_absent(self, box: Box, values: Array) -> int:
        """Return how many stored objects that begin in ``box`` are not there; ``values`` is what was read.

        Zarr reads them as the fill value: legal, and worth telling.
        """
        array, full = cached_array(self.location), self._full_box(box)
        values = values.transpose(
            [SPATIAL.index(name) for name in self.axis_names if name in SPATIAL]
        )
        values = values.reshape(full.shape)
        grid = BlockGrid(array.shape, array.shards or array.chunks)
        n_absent = 0
        for position in grid.iter_overlapping(full):
            core = grid.core(position)
            begins_here = all(a >= b for a, b in zip(core.start, full.start, strict=True))
            # Objects are only asked for where all voxels are the fill value: elsewhere something was read.
            if (
                begins_here
                and (values[(core & full).within(full).slices] == array.fill_value).all()
            ):
                n_absent += self.location.size(array.metadata.encode_chunk_key(position)) is None
        return n_absent

    def write(self, box: Box, values: Array) -> None:
        """Write a box of ``(z, y, x)`` values of the array's dtype; one task must own its write units."""
        array = self._open(writable=True)
        # zarr casts silently, and a wrapped number would look like data.
        if values.dtype != array.dtype:
            raise TypeError(
                f"{self.location}: values are {values.dtype}, the array is {array.dtype}"
            )
        spatial = [name for name in self.axis_names if name in SPATIAL]
        stored = values.transpose([SPATIAL.index(name) for name in spatial])
        try:
            try:
                array[self._index(box)] = stored
            except ValueError:
                # zarr reads a shard before it replaces it. One that a power loss tore cannot be read, and is all ours.
                self._remove_units(array, box)
                array[self._index(box)] = stored
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_failure(error)):
                raise
            if not self.location.is_local:
                raise store_error(self.location, "write", error) from error
            raise StoreError(
                f"cannot write {self.location}: {cause_of(error)}; mend that (make room, mount the "
                "disk) and run the same command again"
            ) from error

    def _remove_units(self, array: zarr.Array[Any], box: Box) -> None:
        grid = BlockGrid(array.shape, array.shards or array.chunks)
        for position in grid.iter_overlapping(self._full_box(box)):
            self.location.delete(array.metadata.encode_chunk_key(position))

    def _open(self, *, writable: bool = False) -> zarr.Array[Any]:
        try:
            return cached_array(self.location, writable=writable)
        except FileNotFoundError as error:
            if self.location.is_local:
                raise
            raise self._lost() from error

    def _lost(self) -> StoreError:
        return StoreError(
            f"cannot open {self.location}: the array is not there any more, or its bucket is not; "
            "restore it and run the same command again"
        )

    def _require_still_there(self, array: zarr.Array[Any], values: Array) -> None:
        """Raise :class:`StoreError` if what reads as background may be nothing: a lost bucket has no chunk either."""
        if self.location.is_local or not _holds_fill_value(values, array.fill_value):
            return
        if (
            self.location.size("zarr.json" if array.metadata.zarr_format == 3 else ".zarray")
            is None
        ):
            raise self._lost()

    def _index(self, box: Box) -> tuple[int | slice, ...]:
        where: dict[str, int | slice] = {
            "t": self.t,
            "c": self.c,
            **dict(zip(SPATIAL, box.slices, strict=True)),
        }
        return tuple(where[name] for name in self.axis_names)

    def _to_zyx(self, values: Array) -> Array:
        spatial = [name for name in self.axis_names if name in SPATIAL]
        return np.ascontiguousarray(values.transpose([spatial.index(name) for name in SPATIAL]))

    def _full_box(self, box: Box) -> Box:
        index = self._index(box)
        return Box(
            tuple(i.start if isinstance(i, slice) else i for i in index),
            tuple(i.stop if isinstance(i, slice) else i + 1 for i in index),
        )

    def _require_no_empty_shard(self, array: zarr.Array[Any], box: Box, values: Array) -> None:
        """Raise :class:`DataError` for a shard of no bytes: zarr 3.1 reads it as background."""
        full = self._full_box(box)
        values = values.reshape(full.shape)
        grid = BlockGrid(array.shape, array.shards or array.chunks)
        for position in grid.iter_overlapping(full):
            part = values[(grid.core(position) & full).within(full).slices]
            # Objects are only asked for where all voxels are the fill value: elsewhere something was read.
            if (part == array.fill_value).all():
                key = array.metadata.encode_chunk_key(position)
                if self.location.size(key) == 0:
                    raise _corrupt(f"{self.location}/{key}", "it is empty")

    def _blame(self, array: zarr.Array[Any], box: Box, error: Exception) -> MegasegError:
        """Find the stored object that cannot be read: codecs say what is wrong, but not where."""
        if not self.location.is_local and is_store_failure(error):
            # It was asked again and again for minutes already.
            return store_error(self.location, "read", error)
        full, grid = self._full_box(box), BlockGrid(array.shape, array.shards or array.chunks)
        for position in grid.iter_overlapping(full):
            try:
                array[(grid.core(position) & full).slices]
            except Exception as cause:
                return self._judge(array.metadata.encode_chunk_key(position), cause)
        return StoreError(f"cannot read {self.location} at {box}: {cause_of(error)}")

    def _judge(self, key: str, cause: Exception) -> MegasegError:
        """Tell a store that failed, and may recover, from a chunk that will never decode."""
        place = f"{self.location}/{key}"
        if is_store_failure(cause):
            return store_error(self.location / key, "read", cause)
        try:
            self.location.get(key)
        except StoreError as error:
            return error
        return _corrupt(place, f"{type(cause).__name__}: {cause}")


def _holds_fill_value(values: Array, fill_value: Any) -> bool:
    # Arrays of Zarr v2 may have none, and are then read as zeros.
    fill_value = 0 if fill_value is None else fill_value
    is_nan = fill_value != fill_value
    # Plane by plane: a mask of the whole block would be memory that nobody planned.
    return any((np.isnan(plane) if is_nan else plane == fill_value).any() for plane in values)


def _corrupt(place: str, cause: str) -> DataError:
    return DataError(
        f"chunk {place} is corrupt ({cause}); restore it from a copy and run the same command again"
    )


def create_array(
    location: Location, image: Image, level: int, dtype: str, layout: Layout, version: str
) -> None:
    """Create one level's array, over what may be there; t and c have chunks of one."""

    def per_axis(spatial: Shape) -> Shape:
        return tuple(spatial[SPATIAL.index(n)] if n in SPATIAL else 1 for n in image.axis_names)

    chunks, unit = per_axis(layout.chunk_shape), per_axis(layout.write_unit)
    v3 = ZARR_FORMAT[version] == 3
    zarr.create_array(
        zarr_store(location, read_only=False),
        shape=image.levels[level].shape,
        chunks=chunks,
        shards=unit if v3 and unit != chunks else None,
        dtype=dtype,
        compressors=_COMPRESSORS[version],
        fill_value=0,
        zarr_format=3 if v3 else 2,
        dimension_names=image.axis_names if v3 else None,
        # OME-Zarr 0.4 asks for nested folders, which is not Zarr v2's own default.
        chunk_key_encoding=None if v3 else {"name": "v2", "separator": "/"},
        overwrite=True,
    )
