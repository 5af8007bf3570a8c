"""How Fractal calls a task: as a script, with its arguments in a file."""

import sys
from collections.abc import Callable
from typing import Any

from megaseg_dask.errors import MegasegError
from megaseg_dask.messages import install_command


def run(task: Callable[..., Any]) -> None:
    """Run a task in this process: ``--args-json`` has its arguments, ``--out-json`` gets the rest.

    One of our errors is one line, and exit code 1.
    """
    try:
        from fractal_task_tools.task_wrapper import run_fractal_task
    except ModuleNotFoundError:
        sys.exit(f"a task of Fractal needs fractal-task-tools; run {install_command('fractal')}")
    try:
        run_fractal_task(task_function=task)
    except MegasegError as error:
        sys.exit(f"megaseg: {' '.join(str(error).splitlines())}")
