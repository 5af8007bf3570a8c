import json
import shutil
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megaseg_dask import doctor
from megaseg_dask.cli import app
from megaseg_dask.engines import pytorch


def finding(name: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.name == name)


def test_it_names_versions_choice_and_models():
    listed = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["findings"]
    names = [f["name"] for f in listed]
    assert {"machine", "packages", "memory", "disk", "GPU", "auto", "model starter"} <= set(names)
    assert "torch" in finding("packages").found
    assert "threads" in finding("auto").found


@pytest.mark.parametrize(
    ("devices", "built_with", "expected"),
    [([], None, "without CUDA"), ([], "13.0", "driver"), (["NVIDIA X"], "13.0", "NVIDIA X")],
)
def test_a_gpu_that_cannot_be_used_gets_advice(devices, built_with, expected, monkeypatch):
    monkeypatch.setattr(pytorch, "cuda_devices", lambda: devices)
    monkeypatch.setattr(pytorch, "cuda_version", lambda: built_with)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    gpu = doctor._gpu()[0]
    assert expected in gpu.found + gpu.advice


def test_little_disk_and_memory_get_advice(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=2 * 10**9))
    assert finding("disk").advice
    assert finding("memory").advice
