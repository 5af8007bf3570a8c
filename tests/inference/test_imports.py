"""What a worker imports.

A second or more each, so only what its engine needs. No clock is asked.
"""

import os
import subprocess
import sys

import pytest

from megaseg_dask.inference.engine import ENGINES
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from tests.fixtures.images import blobs, write_image

HEAVY = {
    "distributed",
    "matplotlib",
    "monai",
    "ome_zarr_models",
    "openvino",
    "pandas",
    "pyarrow",
    "rich",
    "skimage",
    "torch",
    "typer",
    "xarray",
}

# What a worker process does: it reads the recorded plan, runs a task, and says what it imported.
WORKER = """
import sys
from megaseg_dask.run.job_array import read_plan, run_tasks

result = run_tasks(read_plan(sys.argv[1], "megaseg"), "volume", [0])
print(*result.failures, *({heavy} & set(sys.modules)))
"""


def imports_of_worker(plan) -> set[str]:
    code = WORKER.format(heavy=HEAVY)
    command = [sys.executable, "-c", code, plan.target.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return set(done.stdout.split())


@pytest.fixture
def record(tmp_path, tiny_bundle, monkeypatch):
    """Record a plan with some settings, beside an empty cache of models."""
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))

    def record(name="out.zarr", **settings):
        parsed = parse_settings({"model": str(tiny_bundle), "threads": 1, **settings})
        [plan] = record_plans(str(source), str(tmp_path / name), parsed)
        return plan

    return record


# MONAI imports the others where they are installed; rich by scikit-learn.
BUILDING_A_NETWORK = {"torch", "monai", "matplotlib", "pandas", "pyarrow", "rich", "skimage"}


def test_a_worker_with_a_kept_conversion_imports_neither_torch_nor_monai(record):
    first = imports_of_worker(record("first.zarr", engine="openvino"))
    assert {"torch", "openvino"} <= first <= {"openvino", *BUILDING_A_NETWORK}, "it had to convert"
    assert imports_of_worker(record("second.zarr", engine="openvino")) == {"openvino"}


def test_a_worker_of_torch_imports_no_other_engine(record):
    imports = imports_of_worker(record(engine="torch"))
    assert {"torch", "monai"} <= imports <= BUILDING_A_NETWORK


def imports_of(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_choosing_an_engine_imports_none():
    choose = "from megaseg_dask.inference.engine import resolve_engine"
    assert imports_of(f"{choose}; resolve_engine(device='cpu')") == set()


def test_the_script_of_the_client_costs_its_workers_nothing():
    # A worker that is spawned imports it, and with it the module of `megaseg` in pyproject.toml.
    assert imports_of("import megaseg_dask.__main__") == set()


# A new engine gets a row: what it may import. On a GPU that is the row of torch.
OF_ENGINE = {"torch": BUILDING_A_NETWORK, "openvino": {"openvino"}}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_imports_no_other_engine(engine):
    kind = ENGINES[engine]
    assert {kind.package} <= imports_of(f"import {kind.module}") <= OF_ENGINE[engine]


def test_what_a_gpu_worker_says_of_itself_imports_nothing_else():
    describe = "from megaseg_dask.run.cluster.worker_plugin import describe, make_plugin"
    look = "from megaseg_dask.inference.gpu import visible_devices; visible_devices()"
    assert imports_of(f"{describe}; {look}") <= {"torch"}
