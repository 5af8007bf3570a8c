"""Heavy modules that each command may import: start-up is most of the time of a small command."""

import json
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

# Commands in one process, each with what it may import; what one imported stays for the next, so a
# row allows all that the rows before it do.
IN_ORDER = (
    "help",
    "version",
    "help of a command",
    "status",
    "a finished run again",
    "a finished run again, in this process",
    "plan",
    "plan, with a record",
)
COMPUTED = ("relabel", "segment in this process", "segment, measured")
ROWS = (IN_ORDER, COMPUTED, ("segment on a worker",))

RUN = f"""
import contextlib
import io
import json
import sys
from megaseg_dask.cli import main

# Arguments of commands, and for each its exit code, its last line and what is imported after it.
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments.split())
        except SystemExit as ended:
            code = ended.code or 0
    last = ["", *said.getvalue().splitlines()][-1]
    print(json.dumps([code, last, sorted({HEAVY} & set(sys.modules))]))
"""


def run(commands: list[str], folder: Path) -> list[tuple[int, str, set[str]]]:
    """Run commands in one other process.

    Returns exit code, last line and the heavy modules that are imported after each.
    """
    ended = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MEGASEG_HOME": str(folder / "home"), "MEGASEG_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(commands)
    return [(code, line, set(modules)) for code, line, modules in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an image, a finished run of it, and the network and the speed that it kept."""
    folder = tmp_path_factory.mktemp("imports")
    write_image(folder / "cells.zarr", blobs((16, 64, 64)))
    # The first plan on a machine times the network.
    segmented = f"segment cells.zarr done.zarr {OPTIONS} --workers 0"
    run([segmented, f"plan cells.zarr planned.zarr {OPTIONS}"], folder)
    return folder


@pytest.mark.parametrize("names", ROWS, ids=lambda names: names[-1])
def test_a_command_imports_no_more_than_it_may(names, folder):
    rows = [COMMANDS[name] for name in names]
    found = run([arguments for arguments, _ in rows], folder)
    for name, (_, allowed), (code, line, modules) in zip(names, rows, found, strict=True):
        assert code == 0, (name, line)
        assert modules <= allowed, name


def test_each_command_is_in_a_row():
    assert sorted(name for names in ROWS for name in names) == sorted(COMMANDS)


def test_a_refusal_imports_no_more_than_a_plan(folder):
    found = run([arguments for arguments, _ in REFUSALS.values()], folder)
    for (name, (_, words)), (code, line, modules) in zip(REFUSALS.items(), found, strict=True):
        assert (code, words in line) == (2, True), (name, line)
        assert modules <= PLANNING, name


def test_a_gpu_that_is_not_there_is_found_out_without_torch(folder):
    from megaseg_dask.inference.gpu import _may_have_gpu

    if _may_have_gpu():
        pytest.skip("this machine has a driver of a GPU")
    command = f"segment cells.zarr no.zarr {OPTIONS} --device cuda"
    [(code, line, modules)] = run([command], folder)
    assert (code, "finds no GPU" in line) == (2, True), line
    assert modules <= PLANNING
