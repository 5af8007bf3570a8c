"""Stores: where data live and how they are opened, on disks, in object stores and on web servers."""

from megaseg_dask.stores.access import StoreOptions, is_secret, lose_patience
from megaseg_dask.stores.arrays import cached_array, configure, forget, open_array, zarr_store
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import cause_of, is_store_failure
from megaseg_dask.stores.location import Location, naming, store_error

__all__ = [
    "METADATA",
    "Location",
    "StoreOptions",
    "cached_array",
    "cause_of",
    "configure",
    "forget",
    "is_secret",
    "is_store_failure",
    "lose_patience",
    "naming",
    "open_array",
    "store_error",
    "zarr_store",
]
