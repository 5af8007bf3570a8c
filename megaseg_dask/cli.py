"""The command line: options from :class:`Settings`, messages for people, JSON lines for scripts.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

import contextlib
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from megaseg_dask.errors import MegasegError
from megaseg_dask.settings import Settings, declared, parse_settings

if TYPE_CHECKING:
    from megaseg_dask.events import Event

app = typer.Typer(
    name="megaseg",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WRONG_REQUEST = 2
INTERRUPTED = 130

# What typer raises for an unknown option or command; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="OME-Zarr image to read.", show_default=False)]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="OME-Zarr image to write; SOURCE again adds labels to it.")
]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout; all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final line only.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of :class:`Settings`, in place of ``**options``."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [_option(name) for name in Settings.model_fields]
    command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
    return command


def _option(name: str) -> inspect.Parameter:
    """Return a field as a command line option; its text is parsed by the field's own validator."""
    field, extra = Settings.model_fields[name], declared(name)
    info = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description}{_default(field.default)}",
        metavar=extra["metavar"],
        rich_help_panel=extra["panel"],
        show_default=False,
    )
    kind = bool if field.annotation is bool else str | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[kind, info],
    )


def _default(value: object) -> str:
    if value is None or value is False:
        return ""
    return f" (default: {','.join(value) if isinstance(value, tuple) else value})"


def _settings_of(options: dict[str, Any]) -> Settings:
    return parse_settings({name: value for name, value in options.items() if value not in (None, False)})


@app.callback(invoke_without_command=True)
def megaseg(context: typer.Context, *, version: Version = False) -> None:
    r"""Segment 3D microscopy with MegaSeg, at any size, as if the whole volume had been predicted at once.

    \b
    Look first, then run:
      megaseg plan cells.zarr segmented.zarr
      megaseg segment cells.zarr segmented.zarr
    """
    if version:
        import importlib.metadata

        typer.echo(f"megaseg-dask {importlib.metadata.version('megaseg-dask')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_REQUEST)


@app.command()
@with_settings
def segment(source: Source, target: Target, *, json_: Json = False, quiet: Quiet = False, **options: Any) -> None:
    r"""Segment an image: scores and labels, as multiscale OME-Zarr.

    Interrupt it with Ctrl-C, or lose the machine: the same command goes on where it stopped.

    \b
    Examples:
      megaseg segment cells.zarr segmented.zarr --channel 0
      megaseg segment cells.zarr segmented.zarr --model megaSeg.zip --overlap 0
      megaseg segment cells.zarr cells.zarr --outputs labels
    """
    with _exit_codes(json_):
        settings = _settings_of(options)
        from megaseg_dask.run import segment as run_segment

        with _reporter(json_, quiet) as emit:
            result = run_segment(source, target, settings, emit=emit)
        if not json_:
            _print_result(result, quiet)
        raise typer.Exit(result.exit_code)


@app.command()
@with_settings
def plan(source: Source, target: Target, *, json_: Json = False, **options: Any) -> None:
    r"""Show what segment would do with the same options: blocks, patches, memory, bytes. Writes nothing.

    \b
    Example:
      megaseg plan cells.zarr segmented.zarr --channel 0 --memory 4GB
    """
    with _exit_codes(json_):
        settings = _settings_of(options)
        from megaseg_dask.run import plan_run

        planned, journal = plan_run(source, target, settings)
        summary = {**planned.summary(), "tasks_done": journal.n_done, "done": journal.result is not None}
        if json_:
            typer.echo(json.dumps({"event": "plan", **summary}))
        else:
            _print_plan(summary)


# -- how a command ends


@contextlib.contextmanager
def _exit_codes(as_json: bool) -> Iterator[None]:
    """Turn our errors into one line and their exit code, and Ctrl-C into 130."""
    try:
        yield
    except MegasegError as error:
        _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", INTERRUPTED, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        # A bug: scripts get their last line all the same, people the traceback to report.
        if as_json:
            _echo_error(f"{type(error).__name__}: {error}", 1)
        raise


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        _echo_error(message, code)
    # One line, whatever a path or a foreign message holds.
    typer.echo(f"megaseg: {' '.join(message.splitlines())}", err=True)
    raise typer.Exit(code)


def _echo_error(message: str, code: int) -> None:
    status = "interrupted" if code == INTERRUPTED else "error"
    typer.echo(json.dumps({"event": "result", "status": status, "error": message, "exit_code": code}))


# -- what a person reads


@contextlib.contextmanager
def _reporter(as_json: bool, quiet: bool) -> Iterator[Callable[["Event"], None]]:
    """Yield a function that shows events: JSON lines, a progress bar on a terminal, or plain lines."""
    if as_json:
        yield lambda event: typer.echo(json.dumps(event.as_dict()))
    elif quiet:
        yield lambda event: None
    elif sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bars() -> Iterator[Callable[["Event"], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def show(event: "Event") -> None:
            fields: dict[str, Any] = event.as_dict()
            match event.kind:
                case "started":
                    progress.console.print(_started_line(fields))
                case "progress":
                    stage = str(fields["stage"])
                    if stage not in bars:
                        bars[stage] = progress.add_task(stage, total=fields["n_tasks"], rate="")
                    progress.update(bars[stage], completed=fields["n_done"], rate=_rate(fields))
                case "failure":
                    progress.console.print(_failure_line(fields))

        yield show


def _lines(every_s: float = 5.0) -> Callable[["Event"], None]:
    """Return a printer of plain lines, one per stage and every few seconds."""
    last: dict[str, float] = {}

    def show(event: "Event") -> None:
        fields: dict[str, Any] = event.as_dict()
        match event.kind:
            case "started":
                typer.echo(_started_line(fields), err=True)
            case "failure":
                typer.echo(_failure_line(fields), err=True)
            case "progress":
                stage, now = str(fields["stage"]), time.monotonic()
                complete = fields["n_done"] == fields["n_tasks"]
                if complete or now - last.setdefault(stage, now) > every_s:
                    last[stage] = now
                    left = "" if complete else f", about {fields['left_s']:.0f} s left"
                    line = f"{stage}: {fields['n_done']}/{fields['n_tasks']} tasks, {fields['elapsed_s']:.1f} s"
                    typer.echo(f"{line}, {_rate(fields)}{left}", err=True)

    return show


def _rate(fields: dict[str, Any]) -> str:
    return f"{fields['voxels_per_s'] / 1e6:.1f} Mvoxel/s"


def _started_line(fields: dict[str, Any]) -> str:
    resumed = f", {fields['n_done']} of them done before" if fields["n_done"] else ""
    return f"{fields['n_tasks']} tasks{resumed}; dashboard {fields['dashboard']}"


def _failure_line(fields: dict[str, Any]) -> str:
    return f"FAILED {fields['stage']} {fields['volume']} box {fields['box']}: {fields['error']}"


def _print_result(result: Any, quiet: bool) -> None:
    if n := len(result.failures):
        typer.echo(
            f"megaseg: {n} {'task' if n == 1 else 'tasks'} failed; what is finished is kept in {result.run}:",
            err=True,
        )
        for failure in result.failures[:10]:
            typer.echo(_failure_line(failure), err=True)
        typer.echo("Run the same command again once the cause is mended.", err=True)
        return
    objects = "" if result.n_objects is None else f"{result.n_objects} objects in "
    if result.already_done:
        typer.echo(f"{objects}{result.target}: already done, nothing to do")
        return
    typer.echo(f"{objects}{result.target} after {result.wall_s:.1f} s")
    if not quiet and result.peak_bytes:
        stage, peak = max(result.peak_bytes.items(), key=lambda item: item[1])
        typer.echo(f"most memory of a worker: {peak / 1e9:.2f} GB in stage {stage}", err=True)


def _print_plan(summary: dict[str, Any]) -> None:
    engine, model = summary["engine"], summary["model"]
    peaks = ", ".join(f"{stage} {n / 1e9:.2f}" for stage, n in summary["projected_bytes"].items())
    tasks = " → ".join(f"{stage} {n}" for stage, n in summary["stages"].items())
    rows = {
        "source": f"{summary['source']}  ({summary['volumes']} volumes of {_shape(summary['volume_shape'])}"
                  f" {summary['dtype']})",
        "target": summary["target"],
        "model": f"{model['name']}  ({model['parameters']:,} parameters, digest {model['digest'][:12]})",
        "engine": f"{engine['engine']} {engine['precision']} on {engine['device']}, {engine['threads']} threads, "
                  f"batch {engine['batch']}",
        "patches": f"{summary['patches']} of {_shape(summary['patch_shape'])} per volume, overlap "
                   f"{_shape(summary['overlap'])}: {summary['patch_voxels_per_voxel']} voxels predicted per voxel",
        "blocks": f"{summary['blocks']} of {_shape(summary['block_shape'])} per volume, redundancy "
                  f"{summary['redundancy']}",
        "bytes": f"{_size(summary['bytes_read'])} read ({summary['read_amplification']} times the volume), "
                 f"{_size(summary['bytes_written'])} written before compression, labels {summary['label_dtype']}",
        "memory": f"{_size(summary['memory_bytes'])} per worker; projected GB: {peaks}",
        "tasks": tasks + (f"  ({summary['tasks_done']} done)" if summary["tasks_done"] else ""),
        "fingerprint": summary["fingerprint"][:16],
    }  # fmt: skip
    for name, text in rows.items():
        typer.echo(f"{name:<12} {text}")


def _shape(values: Any) -> str:
    return ",".join(map(str, values))


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # A batch system ends a job by SIGTERM: leave as after Ctrl-C, with the journal written and no worker left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
