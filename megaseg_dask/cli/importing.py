"""The command ``import``: files of microscopes become OME-Zarr."""

from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_result, reporter
from megaseg_dask.cli.exit_codes import Json, Quiet, echo, exit_codes
from megaseg_dask.cli.options import settings_of
from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.foreign import import_command

IMPORT_SETTINGS = (
    "ome_zarr",
    "memory",
    "workers",
    "scheduler",
    "cluster",
    "endpoint",
    "storage_option",
    "retries",
    "timeout",
)


def import_(
    # One path alone is TARGET for the parser: both may lack, so that this command says which.
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES…", help="TIFF, CZI, ND2 or LIF files.", show_default=False),
    ] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="OME-Zarr to write.", show_default=False)
    ] = None,
    *,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Pattern of the names of several files, with {well} or {row} and {column}, "
            "{field}, {time}, {channel} and {z}; * stands for any text. A second pattern, after a "
            "colon, is for the names of series.",
        ),
    ] = None,
    voxel_size: Annotated[
        str | None,
        typer.Option(metavar="Z,Y,X", help="Size of voxels in µm. (default: from the files)"),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Axes of the arrays in the files, such as TCZYX. (default: from the files)",
        ),
    ] = None,
    channel_names: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Names of the channels. (default: from the files)"),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|NAME|all",
            help="Series or scene to import, if the files have several. With all, each of them "
            "becomes a field of a plate.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Accept fields that lack timepoints, channels or planes of other fields.",
        ),
    ] = False,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="Voxels are ids of objects: the image is marked as labels, and coarser levels "
            "hold ids too.",
        ),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Write TIFF, CZI, ND2 or LIF files as an OME-Zarr image, or as a plate.

    Existing files are not replaced. After Ctrl-C, run the same command again to resume.

    \b
    Examples:
      megaseg import cells.ome.tif cells.zarr
      megaseg import stack.tif cells.zarr --axes ZYX --voxel-size 0.29,0.108,0.108
      megaseg import movie_t*.tif movie.zarr --pattern 'movie_t{time}.tif'
      megaseg import scan/*.tif plate.zarr --pattern '{well}_{field}_t{time}_{channel}.tif'
      megaseg import scan.czi plate.zarr --series all --pattern '*:{well}-{field}'
      megaseg import annotated.tif truth.zarr --labels --axes ZYX --voxel-size 0.29,0.108,0.108
    """
    with exit_codes(json_):
        if not files or target is None:
            command = import_command(target or "") or "megaseg import FILES… TARGET"
            raise SettingsError(f"TARGET is missing; write it last: {command}")
        settings = settings_of(options)
        from megaseg_dask.tools.importing.convert import import_files
        from megaseg_dask.tools.importing.planning import parse_options

        chosen = parse_options(
            pattern,
            voxel_size,
            axes,
            channel_names,
            series,
            allow_missing=allow_missing,
            labels=labels,
        )
        with reporter(json_, quiet) as emit:
            imported = import_files(files, target, chosen, settings, emit)
        result = imported.result
        if not json_:
            if not quiet:
                echo(f"{'images':<13}{imported.images}")
            following = [(imported.next_command, "what segmenting it takes")]
            is_source = not labels and not result.failures
            print_result(result, following if is_source else [], quiet=quiet)
        raise typer.Exit(result.exit_code)
