"""MegaSeg 3D segmentation of any volume over Dask workers, identical to predicting it whole."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from megaseg_dask.events import Result
    from megaseg_dask.lazy import open_image, predict

__all__ = ["open_image", "predict", "segment"]


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
        # xarray and Dask's arrays take a second to import; segmenting does not need them.
        if name not in ("open_image", "predict"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from megaseg_dask import lazy

        return getattr(lazy, name)
