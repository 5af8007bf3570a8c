import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.tools.doctor import machine
from megaseg_dask.tools.doctor.address import check_address
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields


def finding(name: str) -> machine.Finding:
    return next(f for f in machine.examine() if f.name == name)


def test_it_names_versions_choice_and_models():
    listed = json.loads(CliRunner().invoke(build_app(), ["doctor", "--json"]).output)["findings"]
    names = [f["name"] for f in listed]
    assert {"machine", "packages", "memory", "disk", "GPU", "auto", "model starter"} <= set(names)
    assert "torch" in finding("packages").text
    assert "threads" in finding("auto").text


@pytest.mark.parametrize(
    ("devices", "built_with", "expected"),
    [([], None, "without CUDA"), ([], "13.0", "driver"), (["NVIDIA X"], "13.0", "NVIDIA X")],
)
def test_a_gpu_that_cannot_be_used_gets_advice(devices, built_with, expected, monkeypatch):
    monkeypatch.setattr(machine, "device_names", lambda: devices)
    monkeypatch.setattr(machine, "cuda_version", lambda: built_with)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    gpu = machine.check_gpu()
    assert expected in gpu.text + gpu.advice


@pytest.mark.parametrize(
    ("driver", "hidden", "expected"),
    [
        ("echo 470.82.01", None, "driver 470.82.01 is too old for CUDA 12.8, which needs 525"),
        ("echo 580.65.06", None, "is new enough"),
        ("echo 580.65.06", "", "CUDA_VISIBLE_DEVICES='' hides the GPU"),
        (
            "echo failed to communicate with the NVIDIA driver; exit 9",
            None,
            "the driver does not answer",
        ),
    ],
)
def test_why_a_gpu_cannot_be_used(driver, hidden, expected, monkeypatch, tmp_path):
    """The driver's own program is asked; here a script stands in its place."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{driver}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine, "device_names", list)
    monkeypatch.setattr(machine, "cuda_version", lambda: "12.8")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert expected in machine.check_gpu().advice


def told(address: object) -> list[str]:
    """All that is found at an address, one text a finding."""
    return [f"{f.text} {f.advice}".strip() for f in check_address(str(address))]


def test_an_image_is_read_and_nothing_is_written_beside_it(tmp_path):
    image = write_image(tmp_path / "image.zarr", blobs((16, 40, 44)), axes="zyx")
    before = sorted(tmp_path.rglob("*"))
    found = told(image)
    assert found[1].startswith("OME-Zarr 0.5 image: z 16, y 40, x 44; uint16, 1 level, voxels of ")
    assert found[2].startswith("its voxels are ")
    assert found[3].startswith("can be read: ")
    assert found[4].startswith("write access not tested")
    assert sorted(tmp_path.rglob("*")) == before


def test_channels_are_listed(tmp_path):
    data = blobs((2, 16, 40, 44))
    image = write_image(tmp_path / "image.zarr", data, axes="czyx", channels=["DNA", "Actin"])
    assert told(image)[1].endswith("; channels 0 (DNA), 1 (Actin)")


def test_a_constant_image_is_named(tmp_path):
    image = write_image(tmp_path / "image.zarr", np.full((16, 40, 44), 7, np.uint16))
    assert any("all voxels in the middle have the value 7" in text for text in told(image))


def test_a_damaged_image_is_named(tmp_path):
    image = write_image(tmp_path / "image.zarr", blobs((16, 40, 44)))
    for chunk in (p for p in (image / "0/c").rglob("*") if p.is_file()):
        chunk.write_bytes(b"nothing")
    *_, last = check_address(str(image))
    assert last.is_fatal
    assert "is corrupt" in last.advice


def test_a_place_to_write_to(tmp_path):
    found = told(tmp_path / "new" / "out.zarr")
    assert found[0].startswith("does not exist yet")
    assert found[1] == "can be written"
    assert "free at" in found[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("{}/text.txt", "OME-Zarr"),
        ("/proc/out.zarr", "cannot be written"),
        ("gopher://x/y", "gopher"),
    ],
)
def test_an_address_that_cannot_be_used_ends_with_1(address, expected, tmp_path):
    (tmp_path / "text.txt").write_text("no image")
    ended = CliRunner().invoke(build_app(), ["doctor", address.format(tmp_path), "--json"])
    assert ended.exit_code == 1
    last = json.loads(ended.output.splitlines()[-1])
    assert (last["status"], last["exit_code"]) == ("failed", 1)
    assert expected in last["findings"][-1]["advice"]


def test_little_disk_and_memory_get_advice(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(
        machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=2 * 10**9)
    )
    assert finding("disk").advice
    assert finding("memory").advice


def test_a_field_that_cannot_be_read_hides_no_plate(tmp_path):
    fields = {"A/1/0": FieldSpec(), "A/1/1": FieldSpec()}
    plate = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    (plate / "A/1/0/zarr.json").write_text("{")
    findings = list(check_address(str(plate)))
    assert not any(finding.is_fatal for finding in findings)
    assert any("plate of 2 fields; the first field that can be read" in f.text for f in findings)
