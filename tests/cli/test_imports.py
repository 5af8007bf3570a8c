"""Heavy modules that each command may import: start-up is most of the time of a small command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megaseg_dask
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
STORES = {"numpy", "zarr"}
# Settings and plans are pydantic's; reading a plan takes the rooms that define it.
PLANS = {*STORES, "pydantic", "dask", "pyarrow"}

# A new command gets a row: its arguments, and the heavy modules that it may import.
COMMANDS = {
    "help": ("--help", set()),
    "version": ("--version", set()),
    "help of a command": ("segment --help", {"pydantic"}),
    "status": ("status done.zarr", PLANS),
    "a finished run again": (
        "segment cells.zarr done.zarr --model starter --threads 1",
        {*PLANS, "ome_zarr_models"},
    ),
    "plan": (
        "plan cells.zarr new.zarr --model starter --threads 1",
        # The time of a patch is measured, by the engine that `auto` chooses.
        {*PLANS, "ome_zarr_models", "openvino"},
    ),
}

RUN = """
import contextlib, json, sys
from megaseg_dask.cli import main

with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, client) -> Path:
    """A folder with an image, and a finished run of it."""
    folder = tmp_path_factory.mktemp("imports")
    source = write_image(folder / "cells.zarr", blobs((16, 64, 64)))
    done = megaseg_dask.segment(
        source, folder / "done.zarr", model="starter", threads=1, client=client
    )
    assert done.status == "done"
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_more_than_it_may(command, folder):
    arguments, allowed = COMMANDS[command]
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *arguments.split()],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    *messages, modules = ended.stderr.splitlines()
    assert "megaseg: " not in "".join(messages), ended.stderr
    assert HEAVY & set(json.loads(modules)) <= allowed
