"""Stores: where data live and how they are opened, on disks, in object stores and on web servers."""

from megaseg_dask.stores.downloads import Depot, Entry
from megaseg_dask.stores.failures import cause_of, is_store_failure
from megaseg_dask.stores.folders import METADATA
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
from megaseg_dask.stores.options import StoreOptions, is_secret, lose_patience
from megaseg_dask.stores.threads import at_once

__all__ = [
    "METADATA",
    "ZARR_FORMAT",
    "Depot",
    "Entry",
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
