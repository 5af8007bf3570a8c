"""Heavy modules that each command may import: start-up is most of the time of a small command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.images import blobs, write_image

HEAVY = {
    "bokeh",
    "botocore",
    "cc3d",
    "dask",
    "dask.array",
    "distributed",
    "jinja2",
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
    "tornado",
    "xarray",
    "zarr",
}
STATUS = {"numpy", "pydantic"}
PLANNING = {*STATUS, "ome_zarr_models", "zarr"}
# The converted network is kept, so torch and MONAI are not needed to run it.
COMPUTING = {*PLANNING, "cc3d", "openvino"}
# What the scheduler needs, and its page where it is installed. The workers compute.
SCHEDULING = {*PLANNING, "bokeh", "dask", "distributed", "jinja2", "tornado"}

# A new command gets a row: its arguments, and the heavy modules that it may import.
OPTIONS = "--model starter --threads 1"
COMMANDS = {
    "help": ("--help", set()),
    # Typer's own conversion of values uses pydantic.
    "version": ("--version", {"pydantic"}),
    "help of a command": ("segment --help", {"pydantic"}),
    "status": ("status done.zarr", STATUS),
    "a finished run again": (f"segment cells.zarr done.zarr {OPTIONS}", PLANNING),
    "a finished run again, in this process": (
        f"segment cells.zarr done.zarr {OPTIONS} --workers 0",
        PLANNING,
    ),
    "plan": (f"plan cells.zarr planned.zarr {OPTIONS}", PLANNING),
    "plan, with a record": (f"plan cells.zarr recorded.zarr {OPTIONS} --record", PLANNING),
    "segment in this process": (f"segment cells.zarr new.zarr {OPTIONS} --workers 0", COMPUTING),
    "segment, measured": (
        f"segment cells.zarr measured.zarr {OPTIONS} --workers 0 --outputs labels,measurements",
        # pyarrow imports pandas where it is installed; scikit-image has the areas of surfaces.
        {*COMPUTING, "pandas", "pyarrow", "skimage"},
    ),
    "segment on a worker": (f"segment cells.zarr other.zarr {OPTIONS} --workers 1", SCHEDULING),
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
    """A folder with an image, a finished run of it, and the network and the speed that it kept."""
    folder = tmp_path_factory.mktemp("imports")
    write_image(folder / "cells.zarr", blobs((16, 64, 64)))
    modules_after(f"segment cells.zarr done.zarr {OPTIONS} --workers 0", folder)
    # The first plan on a machine times the network.
    modules_after(f"plan cells.zarr planned.zarr {OPTIONS}", folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_more_than_it_may(command, folder):
    arguments, allowed = COMMANDS[command]
    assert modules_after(arguments, folder) <= allowed
