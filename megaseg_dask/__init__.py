"""MegaSeg 3D segmentation of any volume over Dask workers, identical to predicting it whole.

This module, :mod:`megaseg_dask.errors` and :mod:`megaseg_dask.events` are the public API. All
other modules may change at any time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from megaseg_dask.events import Result
    from megaseg_dask.lazy import open_image, predict
    from megaseg_dask.models import Bundle, read_bundle
    from megaseg_dask.run.status import status

__all__ = ["Bundle", "Result", "open_image", "predict", "read_bundle", "segment", "status"]

# Importing all of them takes a second, so each comes with its first use.
_MODULES = {
    "Bundle": "megaseg_dask.models",
    "Result": "megaseg_dask.events",
    "open_image": "megaseg_dask.lazy",
    "predict": "megaseg_dask.lazy",
    "read_bundle": "megaseg_dask.models",
    "status": "megaseg_dask.run.status",
}


def segment(
    source: "str | Path",
    target: "str | Path",
    *,
    model: "str | Path | list[str | Path]" = "MegaSeg_v1",
    client: Any = None,
    **settings: Any,
) -> "Result":
    """Segment the OME-Zarr image ``source`` into ``target``, as ``megaseg segment`` does.

    Of several models the logits are averaged. ``settings`` are the command's
    options with underscores; ``client`` is a Dask client to use instead of
    starting workers. The result names the tasks that failed.

    Raises:
        MegasegError: for a request that cannot be carried out.
    """
    from megaseg_dask.plan.settings import parse_settings
    from megaseg_dask.run import runner

    parsed = parse_settings({"model": model, **settings})
    return runner.segment(str(source), str(target), parsed, client=client)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
