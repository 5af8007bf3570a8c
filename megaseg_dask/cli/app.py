"""The command line: options from :class:`Settings`, messages for people, JSON lines for scripts.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

import contextlib
import json
import os
import signal
import sys
import time
from typing import Annotated, Any, NoReturn

import typer

from megaseg_dask.cli.cluster import cluster_app
from megaseg_dask.cli.console import (
    print_demo,
    print_evaluation,
    print_findings,
    print_plan,
    print_result,
    print_status,
    reporter,
)
from megaseg_dask.cli.exit_codes import INTERRUPTED, WRONG_REQUEST, Json, echo_error
from megaseg_dask.cli.exit_codes import exit_codes as _exit_codes
from megaseg_dask.cli.exit_codes import fail as _fail
from megaseg_dask.cli.jobs import join, status, task
from megaseg_dask.cli.look import report, view
from megaseg_dask.cli.models import models_app
from megaseg_dask.cli.options import STORE, next_commands, open_stores, settings_of, with_settings
from megaseg_dask.cli.train import train

app = typer.Typer(
    name="megaseg",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(models_app)
app.add_typer(cluster_app)

# What typer raises for an unknown option or command; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="OME-Zarr image to read.", show_default=False)
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="OME-Zarr image to write; SOURCE again adds labels to it."
    ),
]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final line only.")]


@app.callback(invoke_without_command=True)
def megaseg(context: typer.Context, *, version: Version = False) -> None:
    """Segment 3D microscopy with MegaSeg, at any size, as if the whole volume had been predicted at once.

    \b
    Look first, then run:
      megaseg plan cells.zarr segmented.zarr
      megaseg segment cells.zarr segmented.zarr

    Or begin with real cells and a small model: megaseg demo

    \b
    Exit codes:
      0    all is done, or was done before
      1    something failed and is named; the same command goes on with it
      2    the request is wrong; nothing was written
      3    megaseg status, megaseg join: work is pending
      130  interrupted; the same command goes on

    NO_COLOR is honoured; without a terminal, progress comes as plain lines; --json is for scripts.
    """
    if version:
        import importlib.metadata

        typer.echo(f"megaseg-dask {importlib.metadata.version('megaseg-dask')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_REQUEST)


@app.command()
@with_settings()
def segment(
    source: Source, target: Target, *, json_: Json = False, quiet: Quiet = False, **options: Any
) -> None:
    """Segment an image: scores and labels, as multiscale OME-Zarr.

    Interrupt it with Ctrl-C, or lose the machine: the same command goes on where it stopped.

    \b
    Examples:
      megaseg segment cells.zarr segmented.zarr --channel 0
      megaseg segment cells.zarr segmented.zarr --model megaSeg.zip --overlap 0
      megaseg segment cells.zarr cells.zarr --outputs labels
    """
    with _exit_codes(json_):
        settings = settings_of(options)
        from megaseg_dask.run.runner import segment as run_segment

        with reporter(json_, quiet) as emit:
            result = run_segment(source, target, settings, emit=emit)
        if not json_:
            print_result(
                result, quiet, next_commands(target, settings, failed=bool(result.failures))
            )
        raise typer.Exit(result.exit_code)


@app.command()
@with_settings()
def plan(
    source: Source,
    target: Target,
    *,
    record: Annotated[
        bool, typer.Option("--record", help="Write the plan, for megaseg task to work on.")
    ] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show what segment would do with the same options: blocks, patches, memory, bytes, time.

    It writes nothing, unless --record is given.

    The time is that of one worker like this machine, from a few forward passes of the network.

    \b
    Example:
      megaseg plan cells.zarr segmented.zarr --channel 0 --memory 4GB
    """
    with _exit_codes(json_):
        settings = settings_of(options)
        from megaseg_dask.models.registry import reporting
        from megaseg_dask.run.job_array import record_plans
        from megaseg_dask.run.runner import estimate_time, plan_runs
        from megaseg_dask.run.runner import status as run_status

        # Stdout has the plan alone.
        with reporter(as_json=False, quiet=False) as emit, reporting(emit):
            if record:
                record_plans(source, target, settings)
            runs = plan_runs(source, target, settings)
        summaries = [
            {
                **plan.summary(),
                **estimate_time(plan),
                "tasks_done": journal.n_done,
                "done": journal.result is not None,
            }
            for plan, journal in runs
        ]
        if json_:
            # A plate whose fields are of several forms takes further runs.
            typer.echo(json.dumps({"event": "plan", **summaries[0], "further_runs": summaries[1:]}))
        else:
            for summary in summaries:
                print_plan(summary)
            for run in run_status(target, settings.label_name) if record else ():
                print_status(run, target)


@app.command()
def demo(
    folder: Annotated[
        str, typer.Argument(metavar="[DIR]", help="Where to write.")
    ] = "megaseg-demo",
    *,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment real nuclei with the starter model, offline, and say where to look.

    It writes an OME-Zarr image with its true labels, segments it, and draws both side by side.

    \b
    Example:
      megaseg demo my-first-cells
    """
    with _exit_codes(json_):
        from pathlib import Path

        from megaseg_dask.tools.demo import run_demo

        with reporter(json_, quiet) as emit:
            done = run_demo(Path(folder), emit)
        if not json_:
            print_demo(done)


@app.command()
@with_settings(*STORE)
def evaluate(
    predicted: Annotated[
        str, typer.Argument(metavar="PREDICTED", help="Label image, or an image with labels.")
    ],
    truth: Annotated[
        str,
        typer.Argument(metavar="TRUTH", help="Label image of the same shape, or an image with it."),
    ],
    *,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of PREDICTED's label images.")
    ] = None,
    truth_label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of TRUTH's.")
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Comma-separated lines, for a spreadsheet.")
    ] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Score predicted labels against true ones: Dice, IoU, average precision, panoptic quality.

    \b
    Example:
      megaseg evaluate segmented.zarr nuclei.zarr
    """
    with _exit_codes(json_):
        from megaseg_dask.tools.evaluate import evaluate_images, find_labels, is_label_image

        open_stores(options, None)
        compared = find_labels(predicted, label), find_labels(truth, truth_label)
        found = evaluate_images(*compared)
        for location in compared:
            if not is_label_image(location):
                typer.echo(
                    f"megaseg: warning: {location} is not marked as a label image; its voxels count as ids",
                    err=True,
                )
        if json_:
            typer.echo(json.dumps({"event": "result", "status": "done", **found.as_dict()}))
        else:
            print_evaluation(found, csv=csv)


@app.command()
@with_settings(*STORE)
def doctor(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADDRESS]…", help="Sources and targets to try.", show_default=False
        ),
    ] = None,
    *,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show what this machine has, what auto would choose and why, and the usual troubles.

    Of an address it tells whether its store answers, what image is there, whether a run could write there, and how
    fast. Exit code 1: an address cannot be used. --anon is about the first address.

    \b
    Examples:
      megaseg doctor
      megaseg doctor s3://screens/plate.zarr s3://results/plate.zarr
    """
    with _exit_codes(json_):
        from megaseg_dask.tools.doctor.machine import examine

        named = addresses or []
        open_stores(options, named[0] if named else None)
        raise typer.Exit(int(print_findings(examine(named), as_json=json_)))


for _command in (task, join, status, report, view, train):
    app.command()(_command)


# -- how a command ends


# One Ctrl-C may arrive twice: from the terminal, and from the program that started us (timeout, srun, make).
_SAME_INTERRUPT_S = 0.2


def _interrupt(*_: object) -> NoReturn:
    """Leave in order when interrupted once, and at once when interrupted again."""
    began = time.monotonic()
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            either, lambda *_: _leave() if time.monotonic() - began > _SAME_INTERRUPT_S else None
        )
    os.write(sys.stderr.fileno(), b"megaseg: stopping; interrupt once more to stop at once\n")
    raise KeyboardInterrupt


def _leave() -> NoReturn:
    if "--json" in sys.argv:
        with contextlib.suppress(Exception):
            echo_error("interrupted twice; run the same command again to go on", INTERRUPTED)
    os._exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # A batch system ends a job by SIGTERM: leave as after Ctrl-C, with the journal written and no worker left.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        code = app(arguments, prog_name="megaseg", standalone_mode=False) or 0
    except _UsageError as error:
        with contextlib.suppress(typer.Exit):
            _fail(_usage(error), WRONG_REQUEST, "--json" in arguments)
        code = WRONG_REQUEST
    sys.exit(code)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "megaseg"
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    return f"{message}; see {command} --help"
