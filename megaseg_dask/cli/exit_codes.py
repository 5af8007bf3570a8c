"""How a command ends: one line for each of our errors, its exit code, and a last line for scripts."""

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer

from megaseg_dask.errors import MegasegError

WRONG_REQUEST = 2
PENDING = 3
INTERRUPTED = 130

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object a line on stdout; all else on stderr.")
]


@contextlib.contextmanager
def exit_codes(as_json: bool) -> Iterator[None]:
    """Turn our errors into one line and their exit code, and Ctrl-C into 130."""
    try:
        yield
    except MegasegError as error:
        fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on", INTERRUPTED, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        # A bug: scripts get their last line all the same, people the traceback to report.
        if as_json:
            echo_error(f"{type(error).__name__}: {error}", 1)
        raise


def fail(message: str, code: int, as_json: bool) -> NoReturn:
    """End with one line on stderr and an exit code, and a last JSON line for scripts."""
    if as_json:
        echo_error(message, code)
    # One line, whatever a path or a foreign message holds.
    typer.echo(f"megaseg: {' '.join(message.splitlines())}", err=True)
    raise typer.Exit(code)


def echo_error(message: str, code: int) -> None:
    """Print the last JSON line of a command that failed."""
    status = "interrupted" if code == INTERRUPTED else "error"
    typer.echo(
        json.dumps({"event": "result", "status": status, "error": message, "exit_code": code})
    )
