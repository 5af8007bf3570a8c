"""Stores: where data live and how they are opened, on disks, in object stores and on web servers."""

from megaseg_dask.concurrency import at_once
from megaseg_dask.stores.access import StoreOptions, is_secret, lose_patience
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import cause_of, is_store_failure
from megaseg_dask.stores.location import (
    ZARR_FORMAT,
    Location,
    cached_array,
    configure,
    forget,
    naming,
    ome_of,
    store_error,
)

__all__ = [
    "METADATA",
    "ZARR_FORMAT",
    "Location",
    "StoreOptions",
    "at_once",
    "cached_array",
    "cause_of",
    "configure",
    "forget",
    "is_secret",
    "is_store_failure",
    "lose_patience",
    "naming",
    "ome_of",
    "store_error",
]
