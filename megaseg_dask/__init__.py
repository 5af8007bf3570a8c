"""MegaSeg 3D segmentation of any volume, split over Dask workers, identical to predicting it whole."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import xarray

    from megaseg_dask.events import Result

__all__ = ["open_image", "predict", "segment"]


def segment(
    source: "str | Path", target: "str | Path", *, model: str = "MegaSeg_v1", client: Any = None, **settings: Any
) -> "Result":
    """Segment the OME-Zarr image ``source`` into ``target``: what the command ``megaseg segment`` calls.

    ``settings`` are the command's options with underscores; ``client`` is a Dask
    client to use instead of starting workers. Raises
    :class:`~megaseg_dask.errors.MegasegError` for a request that cannot be
    carried out; tasks that failed are named in the result.
    """
    from megaseg_dask import run
    from megaseg_dask.settings import parse_settings

    return run.segment(str(source), str(target), parse_settings({"model": model, **settings}), client=client)


def open_image(
    url: "str | Path", *, labels: bool = True, anon: bool = False, endpoint: str | None = None
) -> "xarray.DataTree":
    """Open the OME-Zarr image at ``url``, a path or address: no voxel is read before it is needed.

    Levels are the children ``0`` (the finest), ``1``, …, each with a Dask-backed
    array ``image`` in the stored order of axes; those of a label image are below
    ``labels/<name>``. Coordinates z, y, x are in µm (as they are where the unit is
    unknown), t in its unit, c has the names of the channels. ``anon`` and
    ``endpoint`` hold for this process, as do credentials in the environment.
    Raises :class:`~megaseg_dask.errors.SourceError` for what is no such image;
    computing raises :class:`~megaseg_dask.errors.DataError` for a corrupt chunk.
    """
    from megaseg_dask import xarrays

    return xarrays.open_image(str(url), labels=labels, anon=anon, endpoint=endpoint)


def predict(
    image: "xarray.DataArray",
    model: str = "starter",
    *,
    patch: tuple[int, int, int] | None = None,
    overlap: float | tuple[float, float, float] | None = None,
    block: tuple[int, int, int] | None = None,
    device: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
) -> "xarray.DataArray":
    """Return the scores of ``image``, lazily: float32 from 0 to 1, with its dimensions and coordinates.

    The dimensions are z, y, x and perhaps t and c, in any order; each volume
    (z, y, x) is normalised and predicted by itself. The scores are those of
    :func:`segment` with the same settings and float32 scores, bit for bit, at any
    ``block`` (z, y, x), which is the chunk of the result; computing a part of it
    predicts only the blocks there, with the statistics of the whole volume.

    Raises :class:`~megaseg_dask.errors.SourceError` or
    :class:`~megaseg_dask.errors.SettingsError` for an image or a setting that
    cannot be carried out; computing raises
    :class:`~megaseg_dask.errors.DataError` that names a voxel that is not finite.
    """
    from megaseg_dask import xarrays

    return xarrays.predict(
        image, str(model), patch=patch, overlap=overlap, block=block, device=device, batch=batch, threads=threads
    )
