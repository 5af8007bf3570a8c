"""Tasks of Fractal, called as its server calls them: the scripts that the manifest lists.

The arrays are those of a plate that is segmented in place.
"""

import inspect
import json
import logging
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet
import pytest
import zarr
from ngio import open_ome_zarr_container

import megaseg_dask
from megaseg_dask.plan.settings import Settings, parse_settings
from megaseg_dask.tools.fractal.arguments import DEFAULTS
from megaseg_dask.tools.fractal.plan_images import plan_images
from tests.counts.test_engine_calls import contents
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here
from tests.stores.test_plates import deepen

PACKAGE = Path(megaseg_dask.__file__).parent
MANIFEST = PACKAGE / "__FRACTAL_MANIFEST__.json"
OPTIONS = {
    "channel": "dna",
    "overlap": "0",
    "engine": "torch",
    "threads": 1,
    "min_size": 3,
    "measure_channels": "all",
}


def tasks() -> list[dict]:
    return json.loads(MANIFEST.read_text())["task_list"]


def labels(plate: Path) -> dict[str, bytes]:
    """All objects of the label arrays of a plate, by their paths."""
    return {
        path.as_posix(): content
        for path, content in contents(plate).items()
        if "labels" in path.parts and path.name not in (".zattrs", "zarr.json")
    }


class Server:
    """What Fractal's server does with a task: each job is a script, its arguments are a file."""

    def __init__(self, folder: Path, task: int = 0) -> None:
        folder.mkdir()
        self.folder = folder
        self.task = tasks()[task]
        self.n_jobs = 0

    def command(self, kind: str, arguments: Mapping[str, object]) -> list[str]:
        self.n_jobs += 1
        given = self.folder / f"{self.n_jobs}-arguments.json"
        given.write_text(json.dumps(arguments))
        script = PACKAGE / self.task[f"executable_{kind}"]
        output = self.folder / f"{self.n_jobs}-output.json"
        return [str(script), "--args-json", str(given), "--out-json", str(output)]

    def run_here(self, kind: str, arguments: Mapping[str, object], monkeypatch) -> object:
        command = self.command(kind, arguments)
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("FRACTAL_TASK_SKIP_LOG_CONFIG", "1")
        runpy.run_path(command[0], run_name="__main__")
        return json.loads(Path(command[-1]).read_text())

    def plan_here(self, urls: list[str], options: Mapping[str, object], monkeypatch) -> list[dict]:
        arguments = {"zarr_urls": urls, "zarr_dir": str(self.folder), **options}
        planned = self.run_here("non_parallel", arguments, monkeypatch)
        return planned["parallelization_list"]


@pytest.fixture
def options(tiny_bundle) -> dict[str, object]:
    return {**OPTIONS, "model": [str(tiny_bundle)]}


@pytest.fixture
def plate(tmp_path) -> Path:
    """A plate of two fields that differ in shape and in the order of channels."""
    fields = {
        "A/1/0": FieldSpec(n_times=2),
        "B/2/0": FieldSpec(channels=("actin", "dna"), shape=(16, 40, 48), seed=3),
    }
    return write_fields(tmp_path / "plate.zarr", "0.4", fields)


def segmented_at_once(plate: Path, copy: Path, options: Mapping[str, object]) -> dict:
    shutil.copytree(plate, copy)
    settings = parse_settings({**options, "outputs": "labels,measurements"})
    assert segment_here(str(copy), str(copy), settings).status == "done"
    return labels(copy)


def test_what_a_form_shows_is_what_a_run_takes():
    parameters = inspect.signature(plan_images).parameters
    shown = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert {"model", "channel", "threshold", "min_size", "split", "overwrite"} <= shown.keys()
    assert parse_settings(shown) == parse_settings(DEFAULTS)
    unlike = {name for name in shown if shown[name] != Settings.model_fields[name].default}
    # Lists, and numbers that a form shows as text.
    assert unlike == {*DEFAULTS, "model", "threshold"}


def test_images_of_a_plate_are_as_those_segmented_at_once(
    plate, options, tmp_path, cheap_engine, monkeypatch
):
    expected = segmented_at_once(plate, tmp_path / "copy.zarr", options)
    server = Server(tmp_path / "jobs")
    urls = [str(plate / path) for path in ("A/1/0", "B/2/0")]
    jobs = server.plan_here(urls, options, monkeypatch)
    assert not list(plate.rglob("labels"))
    assert [job["zarr_url"] for job in jobs] == urls
    for job in reversed(jobs):
        assert server.run_here("parallel", job, monkeypatch) is None
    assert expected
    assert labels(plate) == expected
    table = pyarrow.parquet.read_table(plate / "B/2/0/tables/megaseg/table.parquet").to_pandas()
    n_objects = zarr.open_array(plate / "B/2/0/labels/megaseg/0", mode="r")[...].max()
    assert len(table) == n_objects > 0
    assert "intensity_mean_actin" in table.columns

    # Once more: nothing is left to do.
    before = contents(plate)
    for job in server.plan_here(urls, options, monkeypatch):
        server.run_here("parallel", job, monkeypatch)
    assert contents(plate) == before


def test_an_image_that_cannot_be_segmented_is_the_job_that_fails(
    plate, options, tmp_path, cheap_engine, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    write_fields(tmp_path / "other.zarr", "0.4", {"C/1/0": FieldSpec(channels=("actin",))})
    lacking = str(tmp_path / "other.zarr/C/1/0")
    whole = str(plate / "A/1/0")
    server = Server(tmp_path / "jobs")
    jobs = server.plan_here([lacking, whole], options, monkeypatch)
    assert "1 image cannot be segmented" in caplog.text
    server.run_here("parallel", jobs[1], monkeypatch)
    with pytest.raises(SystemExit, match="dna"):
        server.run_here("parallel", jobs[0], monkeypatch)
    assert (plate / "A/1/0/labels/megaseg/0").exists()
    # Nothing could be done: no job starts.
    for wrong, message in (
        ({"zarr_urls": [lacking]}, "dna"),
        ({"zarr_urls": []}, "no image"),
        ({"model": ["/no/such/model.ckpt"]}, "/no/such/model.ckpt"),
        ({"threshold": "2"}, "--threshold 2"),
        ({"treshold": "0.5"}, "threshold"),
        ({"outputs": ["labels", "scores", "measurements"]}, "scores would replace its image"),
    ):
        with pytest.raises(SystemExit, match=message):
            server.plan_here([whole], {**options, **wrong}, monkeypatch)


def test_on_gpus_the_device_is_given_to_each_job(plate, options, tmp_path, monkeypatch):
    server = Server(tmp_path / "jobs", task=1)
    assert server.task["meta_parallel"]["needs_gpu"]
    [job] = server.plan_here([str(plate / "A/1/0")], options, monkeypatch)
    chosen = job["init_args"]["options"]
    assert (chosen["device"], chosen["batch"]) == ("cuda", 4)
    # This machine has none, and no job computes on a CPU instead.
    with pytest.raises(SystemExit, match="cuda"):
        server.run_here("parallel", job, monkeypatch)


@pytest.mark.slow
def test_a_plate_of_another_program_by_processes_of_fractal(shared_data, tiny_bundle, tmp_path):
    plate = tmp_path / "plate.zarr"
    shutil.copytree(shared_data / "omezarr/pixels/hcs_bf2raw_v04.zarr", plate)
    deepen(plate, 16)
    options = {"channel": "0", "threads": 1, "model": [str(tiny_bundle)], "overlap": "0"}
    expected = segmented_at_once(plate, tmp_path / "copy.zarr", {**options, "wells": "B/1"})
    server = Server(tmp_path / "jobs")
    fields = ["B/1/0", "B/1/1"]
    arguments = {"zarr_urls": [str(plate / path) for path in fields], "zarr_dir": str(tmp_path)}
    command = server.command("non_parallel", {**arguments, **options})
    subprocess.run([sys.executable, *command], check=True, timeout=200)
    jobs = json.loads(Path(command[-1]).read_text())["parallelization_list"]
    running = [subprocess.Popen([sys.executable, *server.command("parallel", job)]) for job in jobs]
    assert [process.wait(200) for process in running] == [0, 0]
    assert expected
    assert labels(plate) == expected
    for path in fields:
        assert open_ome_zarr_container(plate / path).get_feature_table("megaseg") is not None
