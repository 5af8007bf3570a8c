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
    "relabel": (
        "relabel done.zarr --label-name again --threshold 0.6 --workers 0",
        {*PLANNING, "cc3d"},
    ),
    "segment on a worker": (f"segment cells.zarr other.zarr {OPTIONS} --workers 1", SCHEDULING),
}

# A refusal comes before anything heavy: its arguments and what it says. None imports more than a
# plan does.
REFUSALS = {
    "a value": ("segment cells.zarr new.zarr --batch two", "expected a whole number"),
    "no image": ("segment cels.zarr new.zarr", "cells.zarr is there"),
    "no channel": ("segment cells.zarr new.zarr --channel DNA", "has no such channel"),
    "no model": ("segment cells.zarr new.zarr --model nothing", "neither a known model"),
    "a region": ("segment cells.zarr new.zarr --roi 0:99,0:9,0:9 --model starter", "outside"),
    "a plan": ("plan cells.zarr new.zarr --model starter --patch 7", "in multiples of"),
    "a target": ("segment cells.zarr https://example.org/new.zarr", "web server"),
    "a run": ("status nothing.zarr", "no run is recorded"),
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
    code, _, modules = run(arguments, folder)
    assert code == 0
    return modules


def run(arguments: str, folder: Path) -> tuple[int, str, set[str]]:
    """Return exit code, last line and heavy modules of a command in another process."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *arguments.split()],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MEGASEG_HOME": str(folder / "home"), "MEGASEG_OFFLINE": "1"},
    )
    *lines, modules = ["", *ended.stderr.splitlines()]
    return ended.returncode, lines[-1], set(modules.split())


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


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_imports_no_more_than_a_plan(refusal, folder):
    arguments, words = REFUSALS[refusal]
    code, line, modules = run(arguments, folder)
    assert (code, words in line) == (2, True), line
    assert modules <= PLANNING


def test_a_gpu_that_is_not_there_is_found_out_without_torch(folder):
    from megaseg_dask.inference.gpu import _may_have_gpu

    if _may_have_gpu():
        pytest.skip("this machine has a driver of a GPU")
    code, line, modules = run(f"segment cells.zarr no.zarr {OPTIONS} --device cuda", folder)
    assert (code, "finds no GPU" in line) == (2, True), line
    assert modules <= PLANNING
