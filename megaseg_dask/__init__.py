"""MegaSeg 3D segmentation of any volume over Dask workers, identical to predicting it whole.

This module, :mod:`megaseg_dask.errors` and :mod:`megaseg_dask.events` are the public API. All
other modules may change at any time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaseg_dask.api import Result, relabel, segment
    from megaseg_dask.lazy import open_image, predict
    from megaseg_dask.models import Bundle, read_bundle
    from megaseg_dask.run.status import status

__all__ = [
    "Bundle",
    "Result",
    "open_image",
    "predict",
    "read_bundle",
    "relabel",
    "segment",
    "status",
]

# Importing all of them takes a second, so each comes with its first use.
_MODULES = {
    "Bundle": "megaseg_dask.models",
    "Result": "megaseg_dask.api",
    "open_image": "megaseg_dask.lazy",
    "predict": "megaseg_dask.lazy",
    "read_bundle": "megaseg_dask.models",
    "relabel": "megaseg_dask.api",
    "segment": "megaseg_dask.api",
    "status": "megaseg_dask.run.status",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
