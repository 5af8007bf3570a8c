"""Single volumes of an image as ``(z, y, x)`` arrays, and the arrays that hold them.

A volume is an address with a timepoint and a channel, so it travels to
workers. What cannot be read is named by its stored object: a codec knows what
is wrong with a chunk, but not where it lies.
"""

import functools
import json
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import ge
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import Layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.errors import DataError, MegasegError, StoreError
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.ngff.shards import read_presence
from megaseg_dask.ngff.versions import VERSIONS, version_of_format
from megaseg_dask.stores import (
    METADATA,
    Location,
    cached_array,
    cause_of,
    is_store_failure,
    store_error,
)

if TYPE_CHECKING:
    import zarr

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Absent:
    """What is absent in a part of an array: stored objects, and chunks of shards that exist."""

    objects: int = 0
    inner: int = 0

    def __add__(self, other: "Absent") -> "Absent":
        return Absent(self.objects + other.objects, self.inner + other.inner)


@dataclass(frozen=True, slots=True)
class Volume:
    """One timepoint and channel of one array, seen as ``(z, y, x)``.

    It is a value that opens on first use.
    """

    location: Location
    axis_names: tuple[str, ...]
    t: int = 0
    c: int = 0
    # Whether all chunks were written, so that an absent one is lost.
    is_whole: bool = False
    # Whether an absent chunk of somebody's array is an error, and not its fill value.
    needs_chunks: bool = False
    # Whether the timepoint may be one that the array will have later.
    may_be_ahead: bool = False
    # Voxels (z, y, x) that an array of somebody has to have, and their dtype: it may be another one
    # by now.
    expected_shape: Shape | None = None
    expected_dtype: str | None = None

    @classmethod
    def of(
        cls, location: Location, image: Image, *, level: int = 0, t: int = 0, c: int = 0
    ) -> "Volume":
        """Return a volume of the image at ``location``, at one of its levels."""
        array = location / image.levels[level].path
        return cls(array, image.axis_names, t, c, is_whole=image.is_whole)

    # -- reading

    def read(self, box: Box) -> Array:
        """Read a box as ``(z, y, x)`` in native byte order.

        Raises:
            DataError: A chunk is corrupt, or lost of an array that is whole; it is named.
            StoreError: A stored object cannot be read; it is named.
        """
        array = self._open()
        try:
            values = np.asarray(array[self._index(box)])
        except Exception as error:
            raise self._read_error(array, box, error) from error
        self._require_stored(array, box, values)
        if self.needs_chunks:
            for chunk, key in self._absent_inner(array, box, values):
                raise self._missing(f"{key}, chunk {chunk}")
        return self._to_zyx(values).astype(values.dtype.newbyteorder("="), copy=False)

    def count_absent(self, box: Box, values: Array | None = None) -> Absent:
        """Return how many stored objects, and chunks of shards, that begin in ``box`` are absent.

        ``values`` ``(z, y, x)`` were read from the box; without them, the store is asked about
        each object, and about no chunk of a shard. Zarr reads what is absent as the fill value:
        legal, but users should know.

        Raises:
            DataError: All chunks of the whole volume are absent.
            StoreError: The store failed.
        """
        array = cached_array(self.location)
        units = self._units(array, box)
        n_inner = 0
        if values is not None:
            stored = self._to_stored(values)
            units = self._units_of_fill_value(array, box, stored)
            n_inner = sum(1 for _ in self._absent_inner(array, box, stored))
        keys = self._keys_beginning_in(box, units)
        n_absent = sum(self.location.size(key) is None for key in keys)
        n_units = sum(1 for _ in self._keys_beginning_in(box, self._units(array, box)))
        if n_absent and n_absent == n_units:
            _require_some(self)
        return Absent(n_absent, n_inner)

    def find_lost(self, box: Box) -> str | None:
        """Return the address of the first stored object of a box that is absent, if one is.

        Raises:
            StoreError: The store failed.
        """
        for _, key in self._units(self._open(), box):
            if self.location.size(key) is None:
                return f"{self.location}/{key}"
        return None

    def _absent_inner(
        self, array: "zarr.Array[Any]", box: Box, values: Array
    ) -> Iterator[tuple[Box, str]]:
        """Yield the voxels and the shard of the absent chunks of shards that begin in a box."""
        if array.shards is None:
            return
        stored = self._stored_box(box)
        values = values.reshape(stored.shape)
        for core, key in self._units(array, box):
            presence: Array | None = None
            chunks = BlockGrid(array.shards, array.chunks)
            for position in chunks.iter_overlapping((core & stored).within(core)):
                chunk = chunks.core(position).shifted(core.start)
                common = chunk & stored
                if not all(map(ge, chunk.start, stored.start)) or min(common.shape) <= 0:
                    continue
                if not _is_fill_value(values[common.within(stored).slices], array.fill_value):
                    continue
                if presence is None:
                    presence = read_presence(self.location, key, array)
                if presence is None:
                    break
                if not presence[position]:
                    yield chunk, key

    def require_some(self) -> None:
        """Require that a chunk of the volume exists.

        Raises:
            DataError: None does; it names the likely cause.
            StoreError: The store failed.
        """
        array = self._open()
        shape = tuple(array.shape[self.axis_names.index(name)] for name in SPATIAL)
        keys = [key for _, key in self._units(array, Box.of(shape))]
        # Spread over the volume: where some are absent, their neighbors mostly are too.
        for number in np.random.default_rng(0).permutation(len(keys)).tolist():
            if self.location.size(keys[number]) is not None:
                return
        raise DataError(
            f"{self.location}: none of the {len(keys)} chunks of t={self.t} c={self.c} is there, "
            f"such as {keys[0]}; {self._why_absent(keys[0])}"
        )

    def _why_absent(self, expected: str) -> str:
        """Return the likely cause that all chunks are absent."""
        if not self.location.is_listable:
            return "look at the address, and at how the keys of chunks are written there"
        found = [key for key in self.location.keys("") if key.rpartition("/")[2] not in METADATA]
        if not found:
            return (
                "the array has no chunk at all: the copy is incomplete, or another --level has the "
                "voxels"
            )
        if _without_digits(found[0]) == _without_digits(expected):
            return "the array has others, so this timepoint or channel was not written"
        return (
            f"the array has {found[0]}: its metadata state another separator or encoding of keys "
            "(dimension_separator, chunk_key_encoding) than its chunks have; correct them"
        )

    def is_stored(self, box: Box, listed: Container[str] | None = None) -> NDArray[np.bool_]:
        """Return which voxels of a box ``(z, y, x)`` lie in chunks that exist.

        Objects that exist are those that are ``listed`` in the array; without a list, the store
        is asked.

        Raises:
            StoreError: The store failed.
        """
        stored = self._stored_box(box)
        exists = np.zeros(stored.shape, bool)
        for chunk in self.iter_stored(box, listed):
            exists[(chunk & stored).within(stored).slices] = True
        spatial = zip(self.axis_names, stored.shape, strict=True)
        return self._to_zyx(exists.reshape([n for name, n in spatial if name in SPATIAL]))

    def iter_stored(self, box: Box, listed: Container[str] | None = None) -> Iterator[Box]:
        """Yield the chunks, in all axes of the array, that share a voxel with a box and exist."""
        array = self._open()
        stored = self._stored_box(box)
        for core, key in self._units(array, box):
            is_there = key in listed if listed is not None else self.location.size(key) is not None
            if not is_there:
                continue
            presence = read_presence(self.location, key, array)
            if presence is None or array.shards is None:
                # No shard, or one with an index of a form that is not known.
                yield core
                continue
            chunks = BlockGrid(array.shards, array.chunks)
            for position in chunks.iter_overlapping((core & stored).within(core)):
                if presence[position]:
                    yield chunks.core(position).shifted(core.start)

    def iter_keys(self, box: Box) -> Iterator[str]:
        """Yield the keys of the stored objects that share a voxel with a box, in the array."""
        for _, key in self._units(self._open(), box):
            yield key

    @property
    def is_sharded(self) -> bool:
        """Whether a stored object holds several chunks."""
        return self._open().shards is not None

    @property
    def n_times_together(self) -> int:
        """How many timepoints one stored object holds."""
        if "t" not in self.axis_names:
            return 1
        array = self._open()
        unit: Shape = array.shards or array.chunks
        return unit[self.axis_names.index("t")]

    def count_unlisted(self, box: Box, listed: Container[str]) -> int:
        """Return how many stored objects that begin in ``box`` are not ``listed`` in the array.

        Raises:
            StoreError: The store failed.
        """
        keys = self._keys_beginning_in(box, self._units(self._open(), box))
        return sum(key not in listed for key in keys)

    def _keys_beginning_in(self, box: Box, units: Iterable[tuple[Box, str]]) -> Iterator[str]:
        """Yield the keys of the write units that begin in a box."""
        start = self._stored_box(box).start
        for core, key in units:
            if all(map(ge, core.start, start)):
                yield key

    def _units_of_fill_value(
        self, array: "zarr.Array[Any]", box: Box, values: Array
    ) -> Iterator[tuple[Box, str]]:
        """Yield the write units in a box whose voxels are all the fill value: their voxels and key.

        The store is asked about these alone: elsewhere something was read.
        """
        stored = self._stored_box(box)
        values = values.reshape(stored.shape)
        for core, key in self._units(array, box):
            part = values[(core & stored).within(stored).slices]
            if _is_fill_value(part, array.fill_value):
                yield core, key

    def _units(self, array: "zarr.Array[Any]", box: Box) -> Iterator[tuple[Box, str]]:
        """Yield the write units that share a voxel with a box: their voxels and their key."""
        grid = BlockGrid(array.shape, array.shards or array.chunks)
        for position in grid.iter_overlapping(self._stored_box(box)):
            yield grid.core(position), array.metadata.encode_chunk_key(position)

    def _require_stored(self, array: "zarr.Array[Any]", box: Box, values: Array) -> None:
        """Raise if what reads as the fill value is none: a lost array or chunk, or an empty shard.

        The chunks of a lost array are absent too, and zarr 3.1 reads an empty shard as background.
        """
        version = version_of_format(array.metadata.zarr_format)
        for number, (_, key) in enumerate(self._units_of_fill_value(array, box, values)):
            if not self.is_whole:
                if number == 0 and self.location.size(version.array_file) is None:
                    raise self._lost()
                if array.shards is None and not self.needs_chunks:
                    return
            size = self.location.size(key)
            if self.needs_chunks and size is None:
                raise self._missing(key)
            if self.is_whole and size is None:
                raise DataError(
                    f"{self.location}/{key} was written but is missing now; find what removed it, "
                    "and run the megaseg command that made it again"
                )
            if size == 0:
                raise _corrupt(f"{self.location}/{key}", "it is empty")

    def _missing(self, chunk: str) -> DataError:
        return DataError(
            f"{self.location}/{chunk} is missing; restore it, or read it as the fill value with "
            "--missing-chunks fill"
        )

    def _read_error(self, array: "zarr.Array[Any]", box: Box, error: Exception) -> MegasegError:
        """Return the error that names the stored object that cannot be read.

        Codecs say what is wrong, but not where.
        """
        if isinstance(error, MegasegError):
            return error
        if not self.location.is_local and is_store_failure(error):
            # The store was asked again and again for minutes already.
            return store_error(self.location, "read", error)
        for core, key in self._units(array, box):
            try:
                array[(core & self._stored_box(box)).slices]
            except Exception as cause:
                return self._unit_error(key, cause)
        return StoreError(f"cannot read {self.location} at {box}: {cause_of(error)}")

    def _unit_error(self, key: str, cause: Exception) -> MegasegError:
        """Return the error of a store that failed, and may recover, or of a corrupt chunk."""
        if is_store_failure(cause):
            return store_error(self.location / key, "read", cause)
        try:
            self.location.get(key)
        except StoreError as error:
            return error
        return _corrupt(f"{self.location}/{key}", f"{type(cause).__name__}: {cause}")

    # -- writing

    def write(self, box: Box, values: Array) -> None:
        """Write a box of ``(z, y, x)`` values of the array's dtype; one task must own its units.

        Raises:
            TypeError: The values have another dtype.
            StoreError: The array cannot be written.
        """
        array = self._open(writable=True)
        # zarr casts silently, and a wrapped number would look like data.
        if values.dtype != array.dtype:
            raise TypeError(
                f"{self.location}: values have dtype {values.dtype}, the array has {array.dtype}"
            )
        try:
            self._write(array, box, self._to_stored(values))
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_failure(error)):
                raise
            if not self.location.is_local:
                raise store_error(self.location, "write", error) from error
            raise StoreError(
                f"cannot write {self.location}: {cause_of(error)}; fix the cause (free some space, "
                "mount the disk) and run the same command again"
            ) from error

    def _write(self, array: "zarr.Array[Any]", box: Box, stored: Array) -> None:
        try:
            array[self._index(box)] = stored
        except ValueError:
            # zarr reads a shard before it replaces it. A shard that a power loss tore cannot be
            # read, and is all ours.
            for _, key in self._units(array, box):
                self.location.delete(key)
            array[self._index(box)] = stored

    # -- the array

    def _open(self, *, writable: bool = False) -> "zarr.Array[Any]":
        try:
            array = cached_array(self.location, writable=writable)
        except FileNotFoundError as error:
            raise self._lost() from error
        if self.expected_shape is not None:
            self._require_expected(array)
        return self._with_timepoint(array) if self.may_be_ahead else array

    def _require_expected(self, array: "zarr.Array[Any]") -> None:
        """Raise :class:`DataError` if an array is not of the form with which a run was planned."""
        dtype = str(array.dtype.newbyteorder("="))
        expected_dtype = self.expected_dtype or dtype
        shape: Shape = ()
        if array.ndim == len(self.axis_names):
            shape = tuple(array.shape[self.axis_names.index(name)] for name in SPATIAL)
        if (shape, dtype) != (self.expected_shape, expected_dtype):
            raise DataError(
                f"{self.location} is another array than when the run was planned: its shape is "
                f"{array.shape}, of {dtype}; expected {self.expected_shape} (z, y, x) of "
                f"{expected_dtype}. Restore it and run the same command again, or start again with "
                "--overwrite"
            )

    def _with_timepoint(self, array: "zarr.Array[Any]") -> "zarr.Array[Any]":
        """Return the array with this timepoint, which its stored metadata may not have yet."""
        if "t" not in self.axis_names:
            return array
        t = self.axis_names.index("t")
        if self.t < array.shape[t]:
            return array
        shape = (*array.shape[:t], self.t + 1, *array.shape[t + 1 :])
        stored = array.async_array
        return type(array)(replace(stored, metadata=stored.metadata.update_shape(shape)))

    def _lost(self) -> StoreError:
        return StoreError(
            f"cannot open {self.location}: the array, its bucket or its disk is missing now; "
            "restore it and run the same command again"
        )

    @property
    def _spatial(self) -> list[str]:
        """The spatial axes in the order of the array."""
        return [name for name in self.axis_names if name in SPATIAL]

    def _index(self, box: Box) -> tuple[int | slice, ...]:
        index: dict[str, int | slice] = {"t": self.t, "c": self.c}
        index.update(zip(SPATIAL, box.slices, strict=True))
        return tuple(index[name] for name in self.axis_names)

    def _stored_box(self, box: Box) -> Box:
        """Return a box ``(z, y, x)`` in all axes of the array."""
        start = {"t": self.t, "c": self.c, **dict(zip(SPATIAL, box.start, strict=True))}
        stop = {"t": self.t + 1, "c": self.c + 1, **dict(zip(SPATIAL, box.stop, strict=True))}
        return Box(
            tuple(start[name] for name in self.axis_names),
            tuple(stop[name] for name in self.axis_names),
        )

    def _to_zyx(self, values: Array) -> Array:
        return np.ascontiguousarray(values.transpose([self._spatial.index(n) for n in SPATIAL]))

    def _to_stored(self, values: Array) -> Array:
        return values.transpose([SPATIAL.index(name) for name in self._spatial])


@functools.lru_cache(maxsize=1024)
def _require_some(volume: Volume) -> None:
    """Require once a process that a chunk of a volume exists."""
    volume.require_some()


def _without_digits(key: str) -> str:
    return re.sub(r"\d+", "0", key)


def _is_fill_value(values: Array, fill_value: Any) -> bool:
    # Arrays of Zarr v2 may have none, and are then read as zeros.
    if fill_value is None:
        fill_value = 0
    is_nan = fill_value != fill_value
    # Plane by plane: a mask of the whole block would be memory that nobody planned.
    return all((np.isnan(plane) if is_nan else plane == fill_value).all() for plane in values)


def _corrupt(chunk: str, cause: str) -> DataError:
    return DataError(
        f"chunk {chunk} is corrupt ({cause}); restore it from a copy and run the same command again"
    )


def create_array(location: Location, image: Image, level: int, dtype: str, layout: Layout) -> None:
    """Create one level's empty array, in the image's version, in the place of what may be there.

    Chunks have an extent of one in t and c.

    Raises:
        StoreError: The store failed.
    """
    location.remove()
    restore_array(location, image, level, dtype, layout)


def restore_array(location: Location, image: Image, level: int, dtype: str, layout: Layout) -> None:
    """Write the metadata of an array of ours where they are absent or damaged; chunks stay.

    Raises:
        StoreError: The store failed.
    """
    for name, data in _documents(_form_of(image, level, dtype, layout)).items():
        if location.get(name) != data:
            location.put(name, data)


def is_array_of(location: Location, image: Image, level: int, dtype: str, layout: Layout) -> bool:
    """Return whether the metadata of an array of ours are there, byte for byte.

    Raises:
        StoreError: The store failed.
    """
    documents = _documents(_form_of(image, level, dtype, layout))
    return all(location.get(name) == data for name, data in documents.items())


def is_shorter_array_of(
    location: Location, image: Image, level: int, dtype: str, layout: Layout
) -> bool:
    """Return whether the metadata of an array are ours, for as many timepoints or for fewer.

    Raises:
        StoreError: The store failed.
    """
    if "t" not in image.axis_names:
        return is_array_of(location, image, level, dtype, layout)
    try:
        document = json.loads(location.get(VERSIONS[image.version].array_file) or b"{}")
        n_times = int(document["shape"][image.axis_names.index("t")])
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
    is_shorter = 0 < n_times <= image.extent("t")
    return is_shorter and is_array_of(location, image.with_times(0, n_times), level, dtype, layout)


@dataclass(frozen=True, slots=True)
class _Form:
    """All that the metadata of an array say."""

    version: str
    axis_names: tuple[str, ...]
    shape: Shape
    dtype: str
    chunks: Shape
    unit: Shape


def _form_of(image: Image, level: int, dtype: str, layout: Layout) -> _Form:
    return _Form(
        image.version,
        image.axis_names,
        image.levels[level].shape,
        dtype,
        _per_axis(image, layout.chunk_shape),
        _per_axis(image, layout.write_unit),
    )


# The fields of a plate have arrays of few forms.
@functools.lru_cache(maxsize=64)
def _documents(form: _Form) -> dict[str, bytes]:
    """Return the metadata objects of an array by their names."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    version = VERSIONS[form.version]
    options: dict[str, Any] = {}
    if version.has_shards:
        options["dimension_names"] = form.axis_names
        options["shards"] = form.unit if form.unit != form.chunks else None
    else:
        # OME-Zarr 0.4 asks for nested folders, which is not Zarr v2's own default.
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    zarr.create_array(
        store,
        shape=form.shape,
        chunks=form.chunks,
        dtype=form.dtype,
        compressors=dict(version.compressor),
        fill_value=0,
        zarr_format=version.zarr_format,
        **options,
    )
    return {name: buffer.to_bytes() for name, buffer in store._store_dict.items()}


def _per_axis(image: Image, spatial: Shape) -> Shape:
    extents = dict(zip(SPATIAL, spatial, strict=True))
    return tuple(extents.get(name, 1) for name in image.axis_names)
