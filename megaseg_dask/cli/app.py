"""The command line: its commands, and how it ends.

Rooms that compute are imported inside the commands, and the options of a run are
declared only for the command that is named, so that ``--help`` answers at once.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import typer

from megaseg_dask.cli.cluster import check
from megaseg_dask.cli.console import (
    print_demo,
    print_plan,
    print_result,
    print_status,
    reporter,
    stop_display,
)
from megaseg_dask.cli.exit_codes import (
    FAILED,
    INTERRUPTED,
    WRONG_REQUEST,
    Json,
    Quiet,
    echo,
    echo_error,
    exit_codes,
    fail,
    give_up_help,
    help_without_command,
    require_printed,
)
from megaseg_dask.cli.exporting import export
from megaseg_dask.cli.importing import IMPORT_SETTINGS, import_
from megaseg_dask.cli.jobs import join, status, task
from megaseg_dask.cli.look import doctor, evaluate, report, view
from megaseg_dask.cli.models import models_app
from megaseg_dask.cli.options import (
    STORE,
    all_settings,
    live_settings,
    next_commands,
    settings_of,
    with_options,
    without_options,
)
from megaseg_dask.cli.prices import Price, cost_of, cost_rows, prices_of
from megaseg_dask.cli.tracking import track
from megaseg_dask.cli.train import train
from megaseg_dask.events import Step
from megaseg_dask.messages import version_of

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="OME-Zarr image or plate to read.", show_default=False),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="OME-Zarr to write. If it is SOURCE itself, labels are added to it."
    ),
]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


def megaseg(context: typer.Context, *, version: Version = False) -> None:
    """Segment cells and organelles in 3D microscopy images of any size, with MegaSeg.

    \b
    See the plan first, then run it:
      megaseg plan cells.zarr segmented.zarr
      megaseg segment cells.zarr segmented.zarr

    To begin with an example image and a small model: megaseg demo

    \b
    Exit codes:
      0    all is done, or was done before
      1    a task failed and is named; run the same command again to retry it
      2    invalid request; nothing was written
      3    tasks are pending (megaseg status and megaseg join)
      130  interrupted; run the same command again to resume

    NO_COLOR turns colors off. Without a terminal, progress is plain lines. --json is for scripts.
    """
    if version:
        echo(f"megaseg-dask {version_of('megaseg-dask')}")
        return
    help_without_command(context)


def segment(
    source: Source, target: Target, *, json_: Json = False, quiet: Quiet = False, **options: Any
) -> None:
    """Segment an image: scores and labels, as multiscale OME-Zarr.

    After Ctrl-C or a crash, run the same command again to resume.

    \b
    Examples:
      megaseg segment cells.zarr segmented.zarr --channel 0
      megaseg segment cells.zarr segmented.zarr --model megaSeg.zip --overlap 0
      megaseg segment cells.zarr cells.zarr --outputs labels
    """
    with exit_codes(json_):
        settings = settings_of(options)
        with reporter(json_, quiet) as emit:
            emit(Step("starting"))
            from megaseg_dask.run.runner import segment as run_segment

            result = run_segment(source, target, settings, emit=emit)
        if not json_:
            following = next_commands(
                target, settings, failed=bool(result.failures), doubts=result.doubts
            )
            print_result(result, following, quiet=quiet)
        raise typer.Exit(result.exit_code)


def plan(
    source: Source,
    target: Target,
    *,
    record: Annotated[
        bool, typer.Option("--record", help="Record the plan at TARGET, for megaseg task.")
    ] = False,
    price: Price = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show what segment would do with the same options: blocks, patches, memory, bytes, time.

    It writes nothing unless --record is given. The exit code is 1 if fields of a plate cannot be
    segmented. These fields are named.

    The time is for one worker like this machine. It comes from a few forward passes of the network
    that were measured in the last hour.

    \b
    Examples:
      megaseg plan cells.zarr segmented.zarr --channel 0 --memory 4GB
      megaseg plan s3://in/plate.zarr s3://out/plate.zarr --price gpu=3.2/h,put=5e-6,get=4e-7
    """
    with exit_codes(json_):
        prices = prices_of(price)
        settings = settings_of(options)
        from megaseg_dask.plan.summary import summarize
        from megaseg_dask.run.job_array import record_plans
        from megaseg_dask.run.request import plan_runs
        from megaseg_dask.run.runner import estimate_time
        from megaseg_dask.run.status import status as status_of
        from megaseg_dask.run.usage import projected_usage

        # Events go to stderr: stdout holds the plan alone.
        with reporter(as_json=False, quiet=False) as emit:
            if record:
                record_plans(source, target, settings, emit)
            runs = plan_runs(source, target, settings, emit)
        summaries = []
        rows = []
        for run, journal in runs:
            progress = {"tasks_done": journal.n_done, "done": journal.result is not None}
            time_of_run = estimate_time(run)
            usage = projected_usage(run, time_of_run["projected_s"])
            used = {"usage": usage and asdict(usage), "cost": usage and cost_of(usage, prices)}
            summaries.append({**summarize(run), **time_of_run, **used, **progress})
            rows.append(cost_rows(usage, prices) if usage else {})
        code = FAILED if any(summary["missing"] for summary in summaries) else 0
        if json_:
            # Several runs: a plate whose fields do not share one plan.
            first, *further = summaries
            whole = {"event": "plan", **first, "further_runs": further, "exit_code": code}
            echo(json.dumps(whole))
            raise typer.Exit(code)
        for summary, of_costs in zip(summaries, rows, strict=True):
            print_plan(summary, of_costs)
        if record:
            for run_status in status_of(target, settings.label_name):
                print_status(run_status, target)
        raise typer.Exit(code)


def relabel(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="TARGET of a run that kept scores or logits.")
    ],
    *,
    json_: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Make new labels from the scores of a run, with another threshold or size; no network runs.

    It writes a new label image beside that of the run. An option that you omit has the value of
    the run, but only labels are written. Scores of 8 bits are rounded: --threshold 0.3 then means
    stored scores above 76.5. From float32 scores (--scores-dtype float32) and kept logits
    (--keep-logits), the labels equal those of a new run. Automatic thresholds need kept logits.

    \b
    Examples:
      megaseg relabel segmented.zarr --label-name strict --threshold 0.8
      megaseg relabel segmented.zarr --label-name apart --split distance --min-size 100
    """
    with exit_codes(json_):
        settings = settings_of(options)
        from megaseg_dask.run.runner import relabel as run_relabel

        with reporter(json_, quiet) as emit:
            result = run_relabel(target, settings, emit=emit)
        if not json_:
            following = next_commands(
                target,
                settings,
                failed=bool(result.failures),
                table_label=settings.label_name,
            )
            print_result(result, following, quiet=quiet)
        raise typer.Exit(result.exit_code)


def demo(
    folder: Annotated[
        str, typer.Argument(metavar="[DIR]", help="Folder to write to.")
    ] = "megaseg-demo",
    *,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment an image of real nuclei with the starter model, offline.

    It writes an OME-Zarr image with true labels, segments it, draws a picture of the result, and
    prints where these files are.

    \b
    Example:
      megaseg demo my-first-cells
    """
    with exit_codes(json_):
        with reporter(json_, quiet) as emit:
            emit(Step("writing the example image"))
            from pathlib import Path

            from megaseg_dask.tools.demo import run_demo

            made = run_demo(Path(folder), emit)
        if not json_:
            print_demo(made)


# -- the application

# Every command that is not in a group, in the order of the help, with the settings it takes.
_NO_SETTINGS = ()
# As `megaseg_dask.plan.relabelling` has them: what follows the scores, then how the work is done.
_RELABELLING = (
    "label_name",
    "threshold",
    "connectivity",
    "min_size",
    "fill_holes",
    "split",
    "split_depth",
    "outputs",
    "regions",
    "table",
    "unmarked",
    "overwrite",
    "memory",
    "workers",
    "scheduler",
    "cluster",
    "endpoint",
    "anon",
    "storage_option",
    "retries",
    "timeout",
    "on_volume",
)
# Names, or a function that returns them: the settings are declared in a room that computes.
_Names = Sequence[str] | Callable[[], Sequence[str]]
_COMMANDS: Mapping[Callable[..., None], _Names] = {
    segment: all_settings,
    plan: all_settings,
    relabel: _RELABELLING,
    demo: _NO_SETTINGS,
    track: STORE,
    evaluate: STORE,
    doctor: STORE,
    task: STORE,
    join: STORE,
    status: STORE,
    report: STORE,
    view: live_settings,
    import_: IMPORT_SETTINGS,
    export: STORE,
    train: _NO_SETTINGS,
}
_CHECK_SETTINGS = (*STORE, "engine", "device")


def _name_of(command: Callable[..., None]) -> str:
    """Return the word that is typed: that of a command may be taken in Python."""
    return command.__name__.rstrip("_")


def build_app(words: Collection[str] | None = None) -> typer.Typer:
    """Return the command line; if ``words`` are given, only commands that they name have options.

    All other commands can only be listed.
    """

    def complete(command: Callable[..., None], settings: _Names) -> Callable[..., None]:
        if words is not None and _name_of(command) not in words:
            return without_options(command)
        names = settings() if callable(settings) else settings
        # Where a run is labelled again, its own values are the defaults.
        return with_options(command, names, shows_defaults=command is not relabel)

    app = typer.Typer(
        name="megaseg",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(megaseg)
    for command, settings in _COMMANDS.items():
        app.command(_name_of(command))(complete(command, settings))
    app.add_typer(models_app)
    cluster = typer.Typer(
        name="cluster", help="Test a cluster file before a long run depends on it."
    )
    # With a callback it is a group of commands, also while it has only one.
    cluster.callback(invoke_without_command=True)(help_without_command)
    cluster.command()(complete(check, _CHECK_SETTINGS))
    app.add_typer(cluster)
    return app


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Raises:
        SystemExit: always, with the exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_standard_streams()
    _catch_signals()
    app = build_app(None if _is_completing() else arguments)
    try:
        code = app(arguments, prog_name="megaseg", standalone_mode=False) or 0
    except OSError as error:
        code = give_up_help(error)
    except Exception as error:
        if not _is_usage_error(error):
            raise
        with contextlib.suppress(typer.Exit):
            fail(_usage_text(error), WRONG_REQUEST, "--json" in arguments)
        code = WRONG_REQUEST
    sys.exit(require_printed(code))


def _is_completing() -> bool:
    """Return whether a shell asks for completions."""
    return "_MEGASEG_COMPLETE" in os.environ


def _is_usage_error(error: Exception) -> bool:
    """Return whether typer refused the arguments; its class has no public name."""
    return hasattr(error, "format_message")


def _usage_text(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "megaseg"
    message = error.format_message().rstrip(".")
    return f"{message}; see {command} --help"


# -- standard streams and interrupts


def _open_standard_streams() -> None:
    """Open those that the caller closed: a file of ours would otherwise take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a letter that a terminal does not have stops nothing.
        sys.stdout.reconfigure(errors="backslashreplace")


# One Ctrl-C may arrive twice: from the terminal, and from the program that started us (make, srun).
_SAME_INTERRUPT_S = 0.2


# What ends a process: Ctrl-C and Ctrl-\\, a terminal that is closed, and what batch systems send
# before they end a job. Workers must not stay.
_INTERRUPTS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


def _catch_signals(handler: Callable[..., None] | None = None) -> None:
    """Treat all of them as Ctrl-C, but those that the caller ignores, as ``nohup`` does."""
    for number in _INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or _interrupt)


def _interrupt(*_: object) -> NoReturn:
    """Leave in order when interrupted once, and at once when interrupted again."""
    began = time.monotonic()

    def interrupt_again(*_: object) -> None:
        if time.monotonic() - began > _SAME_INTERRUPT_S:
            _leave_at_once()

    _catch_signals(interrupt_again)
    # The terminal may be gone, or in use at this moment.
    with contextlib.suppress(OSError, RuntimeError):
        stop_display()
    with contextlib.suppress(OSError):
        os.write(2, b"megaseg: stopping; press Ctrl-C again to quit now\n")
    raise KeyboardInterrupt


def _leave_at_once() -> NoReturn:
    if "--json" in sys.argv:
        with contextlib.suppress(Exception):
            echo_error("interrupted twice; run the same command again to resume", INTERRUPTED)
    os._exit(INTERRUPTED)
