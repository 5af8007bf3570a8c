"""Zarr arrays at a location: opened for reading or writing, and kept open within a process."""

import functools
from typing import TYPE_CHECKING, Any

from megaseg_dask.stores.access import StoreOptions, forget_clients
from megaseg_dask.stores.location import Location, naming
from megaseg_dask.stores.zipped import forget_archives

if TYPE_CHECKING:
    import zarr
    from zarr.storage import StoreLike


def zarr_store(location: Location, *, read_only: bool) -> "StoreLike":
    """Return the zarr store rooted at a location."""
    return location.backend().arrays(read_only=read_only)


def open_array(location: Location, *, writable: bool = False) -> "zarr.Array[Any]":
    """Open the array at a location.

    Raises:
        FileNotFoundError: There is no array.
        StoreError: The store failed.
    """
    import zarr

    mode = "r+" if writable else "r"
    with naming(location, "open"):
        array = zarr.open_array(zarr_store(location, read_only=not writable), mode=mode)
    # What is ours is written whole: an absent chunk is then a lost one, and not background.
    return array.with_config({"write_empty_chunks": True}) if writable else array


def open_served(store: "StoreLike") -> "zarr.Array[Any]":
    """Open an array that another library shows as a zarr store, such as a series of a TIFF file."""
    import zarr

    return zarr.open_array(store, mode="r")


def cached_array(location: Location, *, writable: bool = False) -> "zarr.Array[Any]":
    """Open an array once per process: opening costs more than reading a small chunk.

    Raises:
        FileNotFoundError: There is no array.
        StoreError: The store failed.
    """
    return _open_once(location.url, location.access, writable)


@functools.lru_cache(maxsize=64)
def _open_once(url: str, options: StoreOptions, writable: bool) -> "zarr.Array[Any]":
    return open_array(Location(url, options), writable=writable)


def clear_array_cache() -> None:
    """Forget opened arrays: others may have taken their places."""
    _open_once.cache_clear()


def clear_store_caches() -> None:
    """Forget opened arrays and stores: credentials in the environment may have changed."""
    clear_array_cache()
    forget_archives()
    forget_clients()
