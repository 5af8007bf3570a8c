"""How a command ends: one line for each of our errors, its exit code, and a last JSON line."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, NoReturn

import typer

from megaseg_dask.errors import MegasegError

FAILED = 1
WRONG_REQUEST = 2
PENDING = 3
INTERRUPTED = 130

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object a line on stdout; all else on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final line only.")]


@contextlib.contextmanager
def exit_codes(as_json: bool) -> Iterator[None]:
    """Turn our errors into one line and their exit code, and Ctrl-C into 130.

    Raises:
        typer.Exit: with the exit code of one of our errors.
    """
    try:
        yield
    except MegasegError as error:
        fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on", INTERRUPTED, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        # A bug: a script still gets its last line, and a person the traceback to report.
        if as_json:
            echo_error(f"{type(error).__name__}: {error}", FAILED)
        raise


def fail(message: str, code: int, as_json: bool) -> NoReturn:
    """End with one line on stderr and an exit code, after a last JSON line for scripts.

    Raises:
        typer.Exit: always.
    """
    if as_json:
        echo_error(message, code)
    # A path or a foreign message may hold line breaks.
    typer.echo(f"megaseg: {' '.join(message.splitlines())}", err=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    typer.echo(f"megaseg: warning: {message}", err=True)


def echo_error(message: str, code: int) -> None:
    """Print the last JSON line of a command that failed."""
    status = "interrupted" if code == INTERRUPTED else "error"
    echo_result({"error": message, "exit_code": code}, status)


def echo_result(fields: Mapping[str, object], status: str = "done") -> None:
    """Print the last JSON line of a command."""
    typer.echo(json.dumps({"event": "result", "status": status, **fields}))
