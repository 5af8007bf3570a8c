"""What a worker imports.

A second or more each, so only what its engine needs. No clock is asked.
"""

import os
import subprocess
import sys

import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from tests.fixtures.images import blobs, write_image

HEAVY = {"torch", "monai", "openvino", "distributed", "xarray", "pandas", "ome_zarr_models"}

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


# MONAI imports pandas where it is installed.
BUILDING_A_NETWORK = {"torch", "monai", "pandas"}


def test_a_worker_with_a_kept_conversion_imports_neither_torch_nor_monai(record):
    first = imports_of_worker(record("first.zarr", engine="openvino"))
    assert {"torch", "openvino"} <= first <= {"openvino", *BUILDING_A_NETWORK}, "it had to convert"
    assert imports_of_worker(record("second.zarr", engine="openvino")) == {"openvino"}


def test_a_worker_of_torch_imports_no_other_engine(record):
    imports = imports_of_worker(record(engine="torch"))
    assert {"torch", "monai"} <= imports <= BUILDING_A_NETWORK


def test_choosing_an_engine_imports_none():
    code = f"""
import sys
from megaseg_dask.inference.engine import resolve_engine

resolve_engine(device="cpu")
print({HEAVY} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
