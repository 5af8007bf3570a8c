"""Which chunks of a shard were written: what its index says.

A chunk that is absent reads as the fill value, in a shard as elsewhere, and only the index
tells that it is.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.stores import Location

if TYPE_CHECKING:
    import zarr

_ENTRY_BYTES = 16
_CHECKSUM_BYTES = 4
# The offset and the length of a chunk that was not written.
_ABSENT = np.uint64(2**64 - 1)


def read_presence(
    location: Location, key: str, array: "zarr.Array[Any]"
) -> NDArray[np.bool_] | None:
    """Return which chunks of the shard at ``key`` were written, one bool each.

    It is ``None`` if there is no such shard, or its index is stored in a way that is not known.

    Raises:
        StoreError: The store failed.
    """
    codec = _sharding_codec(array)
    if codec is None or array.shards is None:
        return None
    size = location.size(key)
    if not size:
        return None
    grid = tuple(n // c for n, c in zip(array.shards, array.chunks, strict=True))
    n_entry_bytes = _ENTRY_BYTES * int(np.prod(grid))
    n_bytes = n_entry_bytes + _CHECKSUM_BYTES * (len(codec.index_codecs) - 1)
    start = size - n_bytes if codec.index_location.value == "end" else 0
    data = location.get_range(key, max(start, 0), max(start, 0) + n_bytes) or b""
    if len(data) < n_bytes:
        return None
    entries = np.frombuffer(data[:n_entry_bytes], "<u8").reshape(*grid, 2)
    is_there: NDArray[np.bool_] = (entries != _ABSENT).any(axis=-1)
    return is_there


def _sharding_codec(array: "zarr.Array[Any]") -> Any:
    """Return the codec of shards whose index is as all known programs write it."""
    codecs: Any = getattr(array.metadata, "codecs", ())
    if len(codecs) != 1 or not hasattr(codecs[0], "index_codecs"):
        return None
    forms = [codec.to_dict() for codec in codecs[0].index_codecs]
    names = [form["name"] for form in forms]
    is_usual = names in (["bytes", "crc32c"], ["bytes"])
    endian = forms[0].get("configuration", {}).get("endian") if is_usual else None
    return codecs[0] if endian == "little" else None
