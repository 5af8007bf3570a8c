"""Stores: bytes at an address, on disks, in object stores and on web servers."""

from megaseg_dask.stores.access import StoreOptions, configure, is_secret, stop_waiting
from megaseg_dask.stores.arrays import (
    cached_array,
    clear_array_cache,
    clear_store_caches,
    open_array,
    open_served,
    zarr_store,
)
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import cause_of, is_store_failure
from megaseg_dask.stores.location import Location, naming, store_error
from megaseg_dask.stores.notes import Entry, Note, checksum_of, noting
from megaseg_dask.stores.traffic import NO_TRAFFIC, Traffic, take_traffic

__all__ = [
    "METADATA",
    "NO_TRAFFIC",
    "Entry",
    "Location",
    "Note",
    "StoreOptions",
    "Traffic",
    "cached_array",
    "cause_of",
    "checksum_of",
    "clear_array_cache",
    "clear_store_caches",
    "configure",
    "is_secret",
    "is_store_failure",
    "naming",
    "noting",
    "open_array",
    "open_served",
    "stop_waiting",
    "store_error",
    "take_traffic",
    "zarr_store",
]
