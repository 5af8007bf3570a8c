"""Measurements as files: one Parquet table for a whole run, and a table beside the labels of each image.

Both are written volume by volume into a local temporary file and then put in
one piece, so no reader sees a part and a plate's rows are never in memory. The
table of an image follows ngio's feature table, version 1, whose Parquet backend
needs no other library (``ngio.tables.v1._feature_table``, ngio 1.1).
"""

import io
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megaseg_dask.algorithms.measurements import COLUMNS
from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.ngff.group import open_group, require_version, write_group
from megaseg_dask.stores import Location, naming

Columns = Mapping[str, NDArray[Any]]

# The mark of a table that this package wrote; any other is somebody's own.
PROVENANCE = "megaseg"

# Each row group costs a footer entry per column: one for each of a hundred thousand fields would outweigh the rows.
_GROUP_ROWS = 2**17
_BATCH_ROWS, _READ_BYTES = 2**16, 2**20

_PLACE = {
    "plate": "string",
    "well": "string",
    "field": "string",
    "timepoint": "int32",
    "channel": "int32",
    "output": "string",
}


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    return pa.schema(
        [pa.field(n, pa.type_for_alias(t), nullable=t == "string") for n, t in columns.items()]
    )


# People script against these columns: they may be joined by others, but never change.
RUN_SCHEMA = _schema(_PLACE | COLUMNS)
# An image knows its own place in a plate, and each of its label images has a table of its own.
IMAGE_SCHEMA = _schema(
    {n: t for n, t in (_PLACE | COLUMNS).items() if n not in ("plate", "well", "field", "output")}
)


@dataclass(frozen=True, slots=True)
class Place:
    """The volume whose objects some rows describe; a plain image has no plate, well and field.

    ``output`` is which of several outputs of the network they are of.
    """

    timepoint: int
    channel: int
    plate: str | None = None
    well: str | None = None
    field: str | None = None
    output: str | None = None


def write_parquet(
    folder: Location,
    key: str,
    volumes: Iterable[tuple[Place, Columns]],
    *,
    schema: pa.Schema = RUN_SCHEMA,
) -> int:
    """Write the rows of all volumes, in the order given, into one Parquet file; return their number.

    ``volumes`` pairs a place with the columns of ``measurements.to_columns``;
    it is read once, and the rows of a volume or of a row group, whichever are
    more, are held at a time. Raises :class:`StoreError` naming what could not be
    written.
    """
    n_rows = 0
    # A file without a name: it is gone however this ends, and thousands of them are made quickly.
    with tempfile.TemporaryFile() as file:
        with (
            naming(Location.of(tempfile.gettempdir()), "write"),
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for rows in _iter_groups(volumes, schema):
                writer.write_table(rows, row_group_size=_GROUP_ROWS)
                n_rows += rows.num_rows
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A store takes any buffer, and a mapped file costs no memory.
            folder.put(key, cast(bytes, data))
    return n_rows


def write_ngio_table(
    image: Location,
    version: str,
    name: str,
    volumes: Iterable[tuple[Place, Columns]],
    *,
    label_name: str,
    provenance: Mapping[str, object],
) -> None:
    """Write ``tables/<name>`` of an image, the features of the objects in its ``labels/<label_name>``.

    ``version`` is the image's, ``"0.4"`` or ``"0.5"``; ``volumes`` are its
    timepoints, told apart by the column ``timepoint``. The table is listed when
    it is complete. Raises :class:`TargetError` if a table of that name is
    there that has no provenance of this package, or an image of another version.
    """
    require_version(image, version)
    require_own_table(image, name)
    tables = image / "tables"
    # First the rows, then what makes a reader look for them.
    write_parquet(tables / name, "table.parquet", volumes, schema=IMAGE_SCHEMA)
    write_group(
        tables / name,
        version,
        {
            "type": "feature_table",
            "table_version": "1",
            "region": {"path": f"../labels/{label_name}"},
            "instance_key": "label",
            "backend": "parquet",
            "index_key": "label",
            "index_type": "int",
            PROVENANCE: dict(provenance),
        },
    )
    # Unlike the list of labels, that of tables is no OME metadata: in both versions it stands by itself.
    write_group(tables, version, {})
    listed = cast("list[str]", open_group(tables).attrs.get("tables", []))
    write_group(tables, version, {"tables": [*listed, *({name} - set(listed))]})


def read_ngio_table(image: Location, name: str) -> list[tuple[int, int, Columns]]:
    """Return timepoint, channel and rows of each volume that :func:`write_ngio_table` wrote; none if there is none."""
    data = (image / "tables" / name).get("table.parquet")
    if data is None:
        return []
    table = pq.read_table(pa.BufferReader(data))
    places = dict.fromkeys(
        zip(table["timepoint"].to_pylist(), table["channel"].to_pylist(), strict=True)
    )
    found: list[tuple[int, int, Columns]] = []
    for t, c in places:
        rows = table.filter((pc.field("timepoint") == t) & (pc.field("channel") == c))
        found.append((t, c, {measured: rows[measured].to_numpy() for measured in COLUMNS}))
    return found


def remove_own_table(image: Location, name: str) -> None:
    """Remove a table of this name, and from the list of tables, if this package wrote it."""
    tables = image / "tables"
    if _is_own_table(image, name):
        (tables / name).remove()
        group = open_group(tables)
        listed = [
            other for other in cast("list[str]", group.attrs.get("tables", [])) if other != name
        ]
        write_group(tables, "0.4" if group.metadata.zarr_format == 2 else "0.5", {"tables": listed})


def _is_own_table(image: Location, name: str) -> bool | None:
    """Tell whether this package wrote the table of this name; ``None`` if there is none."""
    where = image / "tables" / name
    if not any(where.size(key) is not None for key in ("zarr.json", ".zgroup")):
        return None
    return PROVENANCE in open_group(where).attrs


def require_own_table(image: Location, name: str) -> None:
    """Raise :class:`TargetError` if an image has a table of this name that this package did not write."""
    where = image / "tables" / name
    if _is_own_table(image, name) is False:
        raise TargetError(
            f"{where} is a table that megaseg did not write, and is never replaced; choose another name"
        )


def _iter_groups(volumes: Iterable[tuple[Place, Columns]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of many small volumes together."""
    waiting: list[pa.Table] = []
    n_rows = 0
    for place, columns in volumes:
        waiting.append(_table(place, columns, schema))
        n_rows += waiting[-1].num_rows
        if n_rows >= _GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting, n_rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _table(place: Place, columns: Columns, schema: pa.Schema) -> pa.Table:
    """Return the rows of one volume."""
    n_rows = len(columns["label"])
    here = {
        n: pa.repeat(pa.scalar(v, pa.type_for_alias(_PLACE[n])), n_rows)
        for n, v in asdict(place).items()
    }
    measured = {name: pa.array(values) for name, values in columns.items()}
    return pa.table([(here | measured)[name] for name in schema.names], schema=schema)


# -- reading


def iter_columns(file: Location, names: Sequence[str]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield columns of a Parquet file, some ten thousand rows at a time; memory does not grow with the file.

    Raises :class:`StoreError` if there is no such file, or none that can be read.
    """
    folder, key = file.parent, file.basename
    size = folder.size(key)
    if size is None:
        raise StoreError(f"{file} is not there")
    try:
        with pq.ParquetFile(io.BufferedReader(_Parts(folder, key, size), _READ_BYTES)) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=list(names)):
                yield tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in names)
    except pa.ArrowInvalid as error:
        raise StoreError(f"{file} is no table that can be read ({error})") from error


class _Parts(io.RawIOBase):
    """One object of a store as a file that is read in parts."""

    def __init__(self, folder: Location, key: str, size: int) -> None:
        self._folder, self._key, self._size, self._at = folder, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._folder.get_range(self._key, self._at, self._at + len(buffer)) or b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
