"""Zarr arrays at a location: opened for reading or writing, and kept open within a process."""

import functools
from typing import Any

import zarr
import zarr.storage

from megaseg_dask.stores import access
from megaseg_dask.stores.access import StoreOptions
from megaseg_dask.stores.clients import client_of
from megaseg_dask.stores.location import Location, naming


def zarr_store(location: Location, *, read_only: bool) -> zarr.storage.StoreLike:
    """Return the zarr store rooted at a location."""
    return location.backend().arrays(read_only=read_only)


def open_array(location: Location, *, writable: bool = False) -> zarr.Array[Any]:
    """Open the array at a location.

    Raises:
        FileNotFoundError: There is no array.
        StoreError: The store failed.

    """
    mode = "r+" if writable else "r"
    with naming(location, "open"):
        return zarr.open_array(zarr_store(location, read_only=not writable), mode=mode)


@functools.lru_cache(maxsize=64)
def cached_array(location: Location, *, writable: bool = False) -> zarr.Array[Any]:
    """Open an array once per process: opening costs more than reading a small chunk.

    Raises:
        FileNotFoundError: There is no array.
        StoreError: The store failed.

    """
    return open_array(location, writable=writable)


def configure(given: StoreOptions) -> None:
    """Set how this process opens stores; what was opened otherwise is forgotten."""
    if access.set_current(given):
        forget()


def forget() -> None:
    """Forget opened stores and arrays, such as after credentials in the environment changed."""
    client_of.cache_clear()
    cached_array.cache_clear()
