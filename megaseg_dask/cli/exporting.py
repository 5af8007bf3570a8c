"""The command ``export``: labels become TIFF files."""

from typing import Annotated, Any, Literal

import typer

from megaseg_dask.cli.console import reporter
from megaseg_dask.cli.exit_codes import Json, Quiet, echo, echo_result, exit_codes
from megaseg_dask.cli.options import open_stores
from megaseg_dask.messages import count


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="Image or plate with labels, or a label image.",
            show_default=False,
        ),
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="TIFF file to write; for a plate, a folder.", show_default=False
        ),
    ],
    *,
    as_: Annotated[
        Literal["tiff"], typer.Option("--as", help="Format of the file: OME-TIFF.")
    ] = "tiff",
    label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the label image, if there are several."),
    ] = None,
    level: Annotated[
        int, typer.Option(metavar="N", help="Level of the pyramid; 0 is full resolution.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Write labels as OME-TIFF, with their voxel size, for programs that do not read OME-Zarr.

    Each field of a plate becomes a file ROW_COLUMN_FIELD.ome.tif in a folder.

    \b
    Examples:
      megaseg export segmented.zarr labels.ome.tif
      megaseg export plate-out.zarr labels-of-plate
    """
    with exit_codes(json_):
        from megaseg_dask.tools.exporting import export_labels

        open_stores(options, None)
        with reporter(json_, quiet) as emit:
            files = export_labels(
                source, file, label=label, level=level, overwrite=overwrite, emit=emit
            )
        if json_:
            echo_result({"format": as_, "files": list(map(str, files))})
        elif not quiet:
            echo(f"wrote {count(len(files), 'file')}: {file}")
