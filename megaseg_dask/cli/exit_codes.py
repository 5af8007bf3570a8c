"""How a command ends: one line for each of our errors, its exit code, and a last JSON line."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, NoReturn

import typer

from megaseg_dask.errors import MegasegError

FAILED = 1
WRONG_REQUEST = 2
PENDING = 3
INTERRUPTED = 130

Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object per line on stdout, and all else on stderr."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the final line.")]


@contextlib.contextmanager
def exit_codes(as_json: bool) -> Iterator[None]:
    """Turn our errors into one line and their exit code, and Ctrl-C into 130.

    Raises:
        typer.Exit: with the exit code of one of our errors.
    """
    _OUTPUT.is_begun = True
    try:
        yield
    except MegasegError as error:
        fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to resume", INTERRUPTED, as_json)
    except typer.Exit:
        raise
    except Exception as error:
        # A bug: a script still gets its last line, and a person the traceback to report.
        if as_json:
            echo_error(f"{type(error).__name__}: {error}", FAILED)
        raise


@dataclass
class _Output:
    """Whether a command began, and why results could not be printed, if that is so."""

    is_begun: bool = False
    failure: str = ""


_OUTPUT = _Output()


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line on stdout or stderr.

    A stream that is closed or full stops no work: nothing more is written to it.
    """
    try:
        typer.echo(text, err=err)
    except OSError as error:
        _give_up(error, err=err)


def _give_up(error: OSError, *, err: bool) -> None:
    if not err:
        _OUTPUT.failure = error.strerror or str(error)
    # What is left in its buffer would fail again.
    stream = sys.stderr if err else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def give_up_help(error: OSError) -> int:
    """Return the exit code where help could not be printed, which typer does by itself.

    Raises:
        OSError: A command had begun: it is a bug.
    """
    if _OUTPUT.is_begun:
        raise error
    _give_up(error, err=False)
    return FAILED


def require_printed(code: int) -> int:
    """Return the exit code of a command whose work ended with ``code``.

    Results that a script could not read are a failure.
    """
    if not _OUTPUT.failure:
        return code
    echo(f"megaseg: not all results could be printed on stdout: {_OUTPUT.failure}", err=True)
    return code or FAILED


def fail(message: str, code: int, as_json: bool) -> NoReturn:
    """End with one line on stderr and an exit code, after a last JSON line for scripts.

    Raises:
        typer.Exit: always.
    """
    if as_json:
        echo_error(message, code)
    # A path or a foreign message may hold line breaks.
    echo(f"megaseg: {' '.join(message.splitlines())}", err=True)
    raise typer.Exit(code)


def help_without_command(context: typer.Context) -> None:
    """Print the help of a group of commands that was called alone.

    Raises:
        typer.Exit: with the exit code of an invalid request, if no command was named.
    """
    if context.invoked_subcommand is None:
        echo(context.get_help())
        raise typer.Exit(WRONG_REQUEST)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    echo(f"megaseg: warning: {message}", err=True)


def echo_error(message: str, code: int) -> None:
    """Print the last JSON line of a command that failed."""
    status = "interrupted" if code == INTERRUPTED else "error"
    echo_result({"error": message, "exit_code": code}, status)


def echo_result(fields: Mapping[str, object], status: str = "done") -> None:
    """Print the last JSON line of a command."""
    echo(json.dumps({"event": "result", "status": status, **fields}))
