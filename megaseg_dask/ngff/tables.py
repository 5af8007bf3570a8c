"""Measurements as files: one table for a whole run, and a table beside each label image.

Both are written volume by volume into a local temporary file and then put in
one piece, so no reader sees a part and a plate's rows are never in memory. The
table of an image follows ngio's feature table, version 1, whose Parquet backend
needs no other library (``ngio.tables.v1._feature_table``, ngio 1.1).
"""

import io
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megaseg_dask.algorithms.measurements import COLUMNS
from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.ngff.group import (
    PROVENANCE,
    find_attributes,
    holds,
    is_damaged,
    require_version,
    write_group,
)
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.stores import METADATA, Location, naming

Columns = Mapping[str, NDArray[Any]]

# Each row group costs a footer entry per column: one for each of a hundred thousand fields would
# outweigh the rows.
_GROUP_ROWS = 2**17

CSV = ".csv"

# Rows, and bytes of the file, that are read at a time.
_BATCH_ROWS = 2**16
_READ_BYTES = 2**20

_OF_PLACE = {
    "plate": "string",
    "well": "string",
    "field": "string",
    "timepoint": "int32",
    "source_timepoint": "int32",
    "channel": "int32",
    "channel_name": "string",
    "output": "string",
}
# An image knows its own place in a plate, and each of its label images has its own table.
_OF_PLACE_IN_IMAGE = {name: _OF_PLACE[name] for name in ("timepoint", "channel", "channel_name")}
# Labels begin at 1 in each timepoint: with several, this names a row of an image's table.
_KEY = "key"
# The rows of a table in an image, and how a Parquet file begins and ends.
_ROWS = "table.parquet"
_PARQUET = b"PAR1"


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    fields = []
    for name, dtype in columns.items():
        is_optional = dtype == "string"
        fields.append(pa.field(name, pa.type_for_alias(dtype), nullable=is_optional))
    return pa.schema(fields)


# People script against these columns: more may be added, but none may change.
RUN_SCHEMA = _schema(_OF_PLACE | COLUMNS)
IMAGE_SCHEMA = _schema(_OF_PLACE_IN_IMAGE | COLUMNS)

# The columns of measurements in a table, and their dtypes.
Form = Mapping[str, str]


def schema_of(place: Mapping[str, str], forms: Sequence[Form]) -> pa.Schema:
    """Return the schema of a table of rows of several forms.

    A column that some forms lack holds nulls.
    """
    dtypes: dict[str, str] = {}
    for form in forms:
        dtypes |= form
    known = {name: dtypes.pop(name) for name in COLUMNS if name in dtypes}
    schema = _schema({**place, **known, **dtypes})
    for index, field in enumerate(schema):
        is_lacking = field.name not in place and any(field.name not in form for form in forms)
        if is_lacking:
            schema = schema.set(index, field.with_nullable(True))
    return schema


def run_schema(forms: Sequence[Form]) -> pa.Schema:
    """Return the schema of the table of a run whose images have measurements of these forms."""
    return schema_of(_OF_PLACE, forms)


@dataclass(frozen=True, slots=True)
class Place:
    """The volume whose objects some rows describe; a plain image has no plate, well and field.

    ``timepoint`` is that of the label image, ``source_timepoint`` that of the source: they differ
    where only some timepoints were segmented.

    Channels go by index in their image, and have names: fields may list them in another order.
    ``output`` is the output of the network, if it has several.
    """

    timepoint: int
    channel: int
    plate: str | None = None
    well: str | None = None
    field: str | None = None
    channel_name: str | None = None
    output: str | None = None
    source_timepoint: int = 0


def write_rows(
    folder: Location,
    key: str,
    volumes: Iterable[tuple[Place, Columns]],
    *,
    schema: pa.Schema = RUN_SCHEMA,
    group_rows: int = _GROUP_ROWS,
) -> int:
    """Write the rows of all volumes, in the order given, into one Parquet or CSV file.

    Return their number.

    The form follows from the ending of ``key``.
    ``volumes`` pairs a place with the columns of ``measurements.to_columns``;
    it is read once, and the rows of a volume or of a row group, whichever are
    more, are held at a time.

    Raises:
        StoreError: The file cannot be written.
    """
    n_rows = 0
    # A file without a name: it is gone however this ends, and thousands of them are made quickly.
    with tempfile.TemporaryFile() as file:
        with (
            naming(Location.of(tempfile.gettempdir()), "write"),
            _open_writer(key, file, schema) as writer,
        ):
            for rows in _iter_groups(volumes, schema, group_rows):
                writer.write_table(rows, group_rows)
                n_rows += rows.num_rows
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A store takes any buffer, and a mapped file costs no memory.
            folder.put(key, cast(bytes, data))
    return n_rows


def _open_writer(key: str, file: IO[bytes], schema: pa.Schema) -> Any:
    """Return a writer of tables of rows, which is closed at the end of ``with``."""
    if key.endswith(CSV):
        return pyarrow.csv.CSVWriter(file, schema)
    return pq.ParquetWriter(file, schema, compression="zstd")


def _iter_groups(
    volumes: Iterable[tuple[Place, Columns]], schema: pa.Schema, group_rows: int
) -> Iterator[pa.Table]:
    """Yield the rows of many small volumes together."""
    waiting: list[pa.Table] = []
    n_rows = 0
    for place, columns in volumes:
        rows = _rows(place, columns, schema)
        waiting.append(rows)
        n_rows += rows.num_rows
        if n_rows >= group_rows:
            yield pa.concat_tables(waiting)
            waiting = []
            n_rows = 0
    if waiting:
        yield pa.concat_tables(waiting)


def _rows(place: Place, columns: Columns, schema: pa.Schema) -> pa.Table:
    """Return the rows of one volume."""
    n_rows = len(columns["label"])
    arrays = {name: pa.array(values) for name, values in columns.items()}
    if _KEY in schema.names:
        arrays[_KEY] = pa.array([f"{place.timepoint}:{label}" for label in columns["label"]])
    for name, value in asdict(place).items():
        scalar = pa.scalar(value, pa.type_for_alias(_OF_PLACE[name]))
        arrays[name] = pa.repeat(scalar, n_rows)
    for field in schema:
        if field.nullable and field.name not in arrays:
            arrays[field.name] = pa.nulls(n_rows, field.type)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


# -- tables of images


@dataclass(frozen=True, slots=True)
class ImageTable:
    """``tables/<name>`` of an image: the features of the objects in one of its label images."""

    image: Location
    name: str

    @property
    def location(self) -> Location:
        """The group of the table."""
        return self._tables / self.name

    @property
    def _tables(self) -> Location:
        return self.image / "tables"

    def write(
        self,
        version: str,
        volumes: Iterable[tuple[Place, Columns]],
        *,
        label_name: str | None,
        provenance: Mapping[str, object],
        form: Form = COLUMNS,
        has_times: bool = False,
    ) -> None:
        """Write the features of the objects in ``labels/<label_name>``, or of others elsewhere.

        ``version`` is the image's, ``"0.4"`` or ``"0.5"``; ``volumes`` are its
        timepoints, told apart by the column ``timepoint``, and have columns of one ``form``.
        With several, ``has_times``, the index is a key of timepoint and label: readers want
        each value once. The table is listed when it is complete.

        Raises:
            TargetError: There is a table of this name without provenance of
                this package, or the image is of another version.
            StoreError: The store failed.
        """
        require_version(self.image, version)
        self.require_own()
        place = dict(_OF_PLACE_IN_IMAGE)
        if has_times:
            place = {_KEY: "string", **place}
        # First the rows, then what makes a reader look for them.
        write_rows(self.location, _ROWS, volumes, schema=schema_of(place, [form]))
        metadata = _table_attributes(label_name, has_times=has_times)
        write_group(self.location, version, {**metadata, PROVENANCE: dict(provenance)})
        # Unlike the list of labels, that of tables is no OME metadata: it has the same place in
        # all versions.
        write_group(self._tables, version, {})
        names = self._listed()
        if self.name not in names:
            names.append(self.name)
        write_group(self._tables, version, {"tables": names})

    def is_whole(
        self, *, label_name: str | None, provenance: Mapping[str, object], has_times: bool
    ) -> bool:
        """Return whether the table is there as it was written, and listed.

        ``provenance`` may be a part of that. Of the rows only both ends are read.

        Raises:
            TargetError: Metadata are damaged.
            StoreError: The store failed.
        """
        metadata = _table_attributes(label_name, has_times=has_times)
        is_described = holds(self.location, {**metadata, PROVENANCE: dict(provenance)})
        return is_described and self.name in self._listed() and has_ends(self.location / _ROWS)

    def read(self) -> list[tuple[int, int, Columns]]:
        """Return timepoint, channel and rows of each volume that was written.

        It is empty if there is no table.

        Raises:
            StoreError: It cannot be read.
        """
        data = self.location.get(_ROWS)
        if data is None:
            return []
        with _naming_damage(self.location / _ROWS):
            table = pq.read_table(pa.BufferReader(data))
        timepoints = table["timepoint"].to_pylist()
        channels = table["channel"].to_pylist()
        volumes: list[tuple[int, int, Columns]] = []
        for t, c in dict.fromkeys(zip(timepoints, channels, strict=True)):
            rows = table.filter((pc.field("timepoint") == t) & (pc.field("channel") == c))
            volumes.append((t, c, _measured([rows])))
        return volumes

    def iter_volumes(self) -> Iterator[tuple[int, int, Columns]]:
        """Yield timepoint, channel and rows of each volume, in order; one is held at a time.

        Raises:
            StoreError: There is no table, or it cannot be read.
        """
        waiting: list[pa.Table] = []
        volume = None
        for rows in _iter_runs(self.location / _ROWS, ("timepoint", "channel")):
            begins = _volume_of(rows)
            if begins != volume and volume is not None:
                yield *volume, _measured(waiting)
                waiting = []
            volume = begins
            waiting.append(rows)
        if volume is not None:
            yield *volume, _measured(waiting)

    def provenance(self) -> dict[str, object]:
        """Return what the table says of how it was made.

        Raises:
            StoreError: The store failed.
        """
        found = (find_attributes(self.location) or {}).get(PROVENANCE)
        return dict(found) if isinstance(found, dict) else {}

    def remove_own(self) -> None:
        """Remove the table if this package wrote it, and the list of tables if none is left."""
        if self._is_own():
            names = [name for name in self._listed() if name != self.name]
            for version in VERSIONS.values():
                if self._tables.size(version.group_file) is not None:
                    write_group(self._tables, version.name, {"tables": names})
            self.location.remove()
        # The next table may be of an image of another version.
        attributes = find_attributes(self._tables) or {}
        lists_none = not attributes.get("tables") and attributes.keys() <= {"tables"}
        if lists_none and set(self._tables.children()) <= set(METADATA):
            self._tables.remove()

    def is_damaged(self) -> bool:
        """Return whether the metadata of the table are damaged.

        Raises:
            StoreError: The store failed.
        """
        return is_damaged(self.location, METADATA)

    def remove_damaged(self) -> None:
        """Remove the table, and the list of tables, if their metadata are damaged.

        Only for images that are ours: what others wrote could be repaired by hand.

        Raises:
            StoreError: The store failed.
        """
        if self.is_damaged():
            self.location.remove()
        if is_damaged(self._tables, METADATA):
            for name in METADATA:
                self._tables.delete(name)

    def require_own(self) -> None:
        """Require that no table of this name is there that another program wrote.

        Raises:
            TargetError: There is one.
        """
        attributes = find_attributes(self.location)
        # A writer that was killed may have left a bare group.
        if attributes and PROVENANCE not in attributes:
            raise TargetError(
                f"{self.location} is a table that megaseg did not write and never replaces; choose "
                "another name"
            )

    def _is_own(self) -> bool:
        return PROVENANCE in (find_attributes(self.location) or {})

    def _listed(self) -> list[str]:
        return list((find_attributes(self._tables) or {}).get("tables") or ())


def _table_attributes(label_name: str | None, *, has_times: bool) -> dict[str, object]:
    """Return the metadata of a table by which Fractal's tools read it."""
    index = {"index_key": "label", "index_type": "int"}
    if has_times:
        index = {"index_key": _KEY, "index_type": "str"}
    return {
        "type": "feature_table",
        "table_version": "1",
        **({"region": {"path": f"../labels/{label_name}"}} if label_name else {}),
        "instance_key": "label",
        "backend": "parquet",
        **index,
    }


# -- reading


def has_ends(file: Location) -> bool:
    """Return whether a table is there, a Parquet file with the ends that it has.

    Raises:
        StoreError: The store failed.
    """
    size = file.parent.size(file.basename) or 0
    if file.basename.endswith(CSV):
        return size > 0
    ends = [(0, len(_PARQUET)), (size - len(_PARQUET), size)]
    return size > len(_PARQUET) and all(
        file.parent.get_range(file.basename, *end) == _PARQUET for end in ends
    )


def read_notes(file: Location) -> dict[str, str]:
    """Return what the schema of a Parquet file tells beside its columns; nothing of CSV.

    Raises:
        StoreError: There is no such file, or it cannot be read.
    """
    if file.basename.endswith(CSV):
        return {}
    with _naming_damage(file), pq.ParquetFile(_reader(file)) as table:
        notes = table.schema_arrow.metadata or {}
    return {name.decode(): value.decode() for name, value in notes.items()}


def iter_columns(file: Location, names: Sequence[str]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield columns of a Parquet file, some ten thousand rows at a time.

    Memory does not grow with the file.

    Raises:
        StoreError: There is no such file, or it cannot be read.
    """
    reader = _reader(file)
    with _naming_damage(file):
        for batch in _iter_batches(file, reader, names):
            yield tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in names)


def _reader(file: Location) -> Any:
    folder = file.parent
    size = folder.size(file.basename)
    if size is None:
        raise StoreError(f"{file} is missing")
    return io.BufferedReader(_ObjectReader(folder, file.basename, size), _READ_BYTES)


def _iter_runs(file: Location, keys: Sequence[str]) -> Iterator[pa.Table]:
    """Yield neighboring rows of a Parquet file that have the same values in some columns."""
    with _naming_damage(file), pq.ParquetFile(_reader(file)) as table:
        for batch in table.iter_batches(_BATCH_ROWS):
            changes = np.zeros(max(batch.num_rows - 1, 0), bool)
            for key in keys:
                changes |= np.diff(batch[key].to_numpy()) != 0
            starts = [0, *(np.flatnonzero(changes) + 1).tolist(), batch.num_rows]
            for start, stop in pairwise(starts):
                yield pa.Table.from_batches([batch.slice(start, stop - start)])


def _volume_of(rows: pa.Table) -> tuple[int, int]:
    return rows["timepoint"][0].as_py(), rows["channel"][0].as_py()


def _measured(parts: Sequence[pa.Table]) -> Columns:
    """Return the columns of a table of an image without those of its place."""
    rows = pa.concat_tables(parts)
    names = [name for name in rows.column_names if name not in (*_OF_PLACE, _KEY)]
    return {name: rows[name].to_numpy() for name in names}


def _iter_batches(
    file: Location, reader: IO[bytes], names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    if not file.basename.endswith(CSV):
        with pq.ParquetFile(reader) as table:
            yield from table.iter_batches(_BATCH_ROWS, columns=list(names))
        return
    types = {field.name: field.type for field in RUN_SCHEMA}
    options = pyarrow.csv.ConvertOptions(
        include_columns=list(names), column_types=types, strings_can_be_null=True
    )
    with pyarrow.csv.open_csv(reader, convert_options=options) as table:
        yield from table


@contextmanager
def _naming_damage(file: Location) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        raise StoreError(
            f"{file} cannot be read as a table ({error}); restore it from a copy, or compute "
            "it again with --overwrite"
        ) from error


class _ObjectReader(io.RawIOBase):
    """One object of a store as a file that is read in parts."""

    def __init__(self, folder: Location, key: str, size: int) -> None:
        self._folder = folder
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = origin[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = self._position + len(buffer)
        data = self._folder.get_range(self._key, self._position, stop) or b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
