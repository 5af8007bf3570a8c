"""Heavy modules that each command may import: start-up is most of the time of a small command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.images import blobs, write_image

HEAVY = {
    "botocore",
    "cc3d",
    "dask",
    "dask.array",
    "distributed",
    "matplotlib",
    "monai",
    "numpy",
    "ome_zarr_models",
    "openvino",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich.progress",
    "scipy",
    "skimage",
    "torch",
    "xarray",
    "zarr",
}
STATUS = {"numpy", "pydantic", "zarr"}
FINISHED = {*STATUS, "ome_zarr_models", "pyarrow"}
# The converted network is kept, so torch and MONAI are not needed to run it.
COMPUTING = {*FINISHED, "cc3d", "openvino"}

# A new command gets a row: its arguments, and the heavy modules that it may import.
OPTIONS = "--model starter --threads 1"
COMMANDS = {
    "help": ("--help", set()),
    # Typer's own conversion of values uses pydantic.
    "version": ("--version", {"pydantic"}),
    "help of a command": ("segment --help", {"pydantic"}),
    "status": ("status done.zarr", STATUS),
    "a finished run again": (f"segment cells.zarr done.zarr {OPTIONS}", FINISHED),
    "a finished run again, in this process": (
        f"segment cells.zarr done.zarr {OPTIONS} --workers 0",
        FINISHED,
    ),
    "plan": (f"plan cells.zarr planned.zarr {OPTIONS}", COMPUTING),
    "segment in this process": (f"segment cells.zarr new.zarr {OPTIONS} --workers 0", COMPUTING),
}

RUN = f"""
import sys
from megaseg_dask.cli import main

try:
    main(sys.argv[1:])
finally:
    print(*({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


def modules_after(arguments: str, folder: Path) -> set[str]:
    """Run a command in another process, and return the heavy modules that it imported."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *arguments.split()],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MEGASEG_HOME": str(folder / "home"), "MEGASEG_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stderr.splitlines()[-1].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an image, a finished run of it, and the converted network that it kept."""
    folder = tmp_path_factory.mktemp("imports")
    write_image(folder / "cells.zarr", blobs((16, 64, 64)))
    modules_after(f"segment cells.zarr done.zarr {OPTIONS} --workers 0", folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_more_than_it_may(command, folder):
    arguments, allowed = COMMANDS[command]
    assert modules_after(arguments, folder) <= allowed
