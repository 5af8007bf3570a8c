"""The commands that only look at what a run wrote: ``report`` and ``view``."""

import contextlib
import json
from typing import Annotated, Any

import typer

from megaseg_dask.cli.exit_codes import Json, exit_codes
from megaseg_dask.cli.options import STORE, open_stores, with_settings

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="Target of a run that was begun or recorded.")
]
RunName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which of the runs on TARGET; needed if there are several."),
]


@with_settings(*STORE)
def report(
    target: Target,
    *,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write. (default: TARGET.report.html)"),
    ] = None,
    label_name: RunName = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Write one HTML page about a run: quality control, timings, and the proof that nothing is cut at block seams.

    It opens offline, in any browser. Of large outputs it reads samples, and says so.

    \b
    Example:
      megaseg report segmented.zarr --out monday.html
    """
    with exit_codes(json_):
        open_stores(options, None)
        from megaseg_dask.tools.report.write import write_report

        place = write_report(target, out, label_name)
        if json_:
            typer.echo(
                json.dumps(
                    {"event": "result", "status": "done", "report": place.url, "exit_code": 0}
                )
            )
        else:
            typer.echo(f"report in {place}")


@with_settings(*STORE)
def view(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="What segment wrote, or any other OME-Zarr.")
    ],
    *,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address, and open no browser.")
    ] = False,
    label_name: RunName = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Look at image, scores and labels in a browser: z and t, contrast, layers, the wells of a plate. Ctrl-C ends it.

    It needs no network: data are read from where they are, and shown to this machine alone.

    \b
    Examples:
      megaseg view segmented.zarr
      megaseg view s3://results/plate.zarr --no-browser
    """
    with exit_codes(json_):
        open_stores(options, None)
        from megaseg_dask.tools.view.viewer import view as run_view

        def announce(url: str) -> None:
            if json_:
                typer.echo(json.dumps({"event": "view", "url": url}))
            else:
                typer.echo(f"{url}\nshown to this machine alone; Ctrl-C ends it")

        with contextlib.suppress(KeyboardInterrupt):
            run_view(target, label_name, announce, browser=not no_browser)
