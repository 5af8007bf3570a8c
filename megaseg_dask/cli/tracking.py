"""The command ``track``: objects of a timelapse become tracks."""

from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_tracking, reporter
from megaseg_dask.cli.exit_codes import FAILED, Json, Quiet, echo_result, exit_codes
from megaseg_dask.cli.options import open_stores


def track(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="Output of segment, with measurements."),
    ],
    *,
    label_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Label name of the run; needed if TARGET has several runs."
        ),
    ] = None,
    max_distance: Annotated[
        float | None,
        typer.Option(
            metavar="UM",
            help="How far a centroid may move to the next timepoint, in µm; with 0, only objects "
            "that overlap are linked. (default: the median diameter of the objects)",
            show_default=False,
        ),
    ] = None,
    splits: Annotated[
        bool,
        typer.Option(
            "--splits/--no-splits", help="Allow one object to become two, as when a cell divides."
        ),
    ] = True,
    merges: Annotated[
        bool,
        typer.Option("--merges/--no-merges", help="Allow two objects to become one."),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Link the objects of a segmented timelapse from timepoint to timepoint.

    Objects that overlap, or whose centers are near, are linked as one moving object. The table of
    measurements gets the columns track_id, parent_track_id and lineage_id, and TARGET.tracks holds
    the graph of each label image as GEFF, for napari and other programs. In a plate, each field is
    tracked. The same command with other options replaces the tracks. It needs the package geff.

    \b
    Examples:
      megaseg segment movie.zarr segmented.zarr --outputs labels,scores,measurements
      megaseg track segmented.zarr
      megaseg track segmented.zarr --max-distance 8 --no-splits
    """
    with exit_codes(json_):
        from megaseg_dask.tools.tracking import track as run_track

        open_stores(options, None)
        with reporter(json_, quiet) as emit:
            result = run_track(
                target,
                label_name=label_name,
                max_distance=max_distance,
                splits=splits,
                merges=merges,
                emit=emit,
            )
        code = FAILED if result.failures else 0
        if json_:
            status = "failed" if code else "done"
            echo_result({**result.as_dict(), "exit_code": code}, status)
        else:
            print_tracking(result, quiet=quiet)
        raise typer.Exit(code)
