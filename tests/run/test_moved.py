"""Addresses in a record are where it was made, never where to act."""

import json
import shutil
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import MegasegError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import join_run, read_plan, record_plans, run_tasks
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

OPTIONS = {"engine": "torch", "threads": 1, "block": "16,32,32", "overlap": 0}


def megaseg(*arguments) -> int:
    return CliRunner().invoke(build_app(), list(map(str, arguments))).exit_code


@pytest.fixture
def made(tmp_path, tiny_bundle):
    """A source and the settings of a run, in a folder that is moved as a whole or in part."""
    folder = tmp_path / "made"
    source = write_image(folder / "image.zarr", blobs((16, 32, 64)))
    return source, parse_settings({"model": str(tiny_bundle), **OPTIONS})


def move(target, folder):
    """Move a target and its run folder."""
    folder.mkdir()
    for path in (target, target.with_name(f"{target.name}.run")):
        shutil.move(path, folder)
    return folder / target.name


def run_stages(target, names=None):
    plan = read_plan(str(target), "megaseg")
    failures = []
    for stage in plan.stages:
        if names is None or stage.name in names:
            ran = run_tasks(plan, stage.name, range(stage.n_tasks))
            failures += ran.failures
    return plan, failures


def test_each_command_acts_where_it_finds_a_moved_run(made, tmp_path):
    source, settings = made
    calm, target = source.parent / "calm.zarr", source.parent / "out.zarr"
    segment_here(str(source), str(calm), settings)
    record_plans(str(source), str(target), settings)
    run_stages(target, ["measure", "segment"])
    moved = move(target, tmp_path / "moved")
    # Another image stands where the run was made.
    write_image(target, blobs((16, 32, 64), seed=5))
    foreign = contents(target)

    plan, failures = run_stages(moved)
    assert not failures
    assert (plan.target, plan.run) == (Location(str(moved)), Location(f"{moved}.run/megaseg"))
    result = join_run(str(moved), "megaseg")
    assert (result.status, result.target) == ("done", str(moved))
    [run] = status(str(moved))
    assert run.done
    assert megaseg("report", moved) == 0
    assert segment_here(str(source), str(moved), settings).already_done
    assert contents(target) == foreign
    assert contents(moved) == contents(calm)
    assert not [path for path in source.parent.iterdir() if path.name.startswith("out.zarr.")]


def test_labels_in_a_source_that_moved_go_where_it_is(made, tmp_path):
    source, settings = made
    settings = settings.model_copy(update={"outputs": ("labels",)})
    record_plans(str(source), str(source), settings)
    moved = move(source, tmp_path / "moved")
    shutil.copytree(moved, source)
    before = contents(source)
    assert not run_stages(moved)[1]
    assert join_run(str(moved), "megaseg").status == "done"
    assert contents(source) == before
    assert (moved / "labels/megaseg/0/zarr.json").exists()


def lead_elsewhere(plan: dict, victim: str, key: str) -> None:
    level = plan["target_image"]["levels"][0]
    match key:
        case "run":
            plan["run"] = f"{victim}.run/megaseg"
        case "target" | "source":
            plan[key] = victim
        case "both":
            plan["source"] = plan["target"] = victim
        case "image":
            plan["volumes"][0]["image"] = "../victim.zarr"
        case "level":
            level["path"] = "../../victim.zarr/0"
        case "label_name":
            plan["resolved"]["label_name"] = "../../victim.zarr"
        case "suffix":
            plan["suffixes"] = ["/../../../victim.zarr"]
        case "outputs":
            plan["resolved"]["outputs"] = ["scores", "../victim.zarr"]


@pytest.mark.parametrize(
    "key", ["run", "target", "source", "both", "image", "level", "label_name", "suffix", "outputs"]
)
def test_a_record_that_leads_elsewhere_changes_nothing_there(key, made, tmp_path):
    source, settings = made
    target, victim = source.parent / "out.zarr", source.parent / "victim.zarr"
    segment_here(str(source), str(victim), settings)
    record_plans(str(source), str(target), settings)
    path = target.with_name("out.zarr.run") / "megaseg/plan.json"
    plan = json.loads(path.read_text())
    lead_elsewhere(plan, str(victim), key)
    path.write_text(json.dumps(plan))

    def elsewhere():
        return {
            path: data
            for path, data in contents(source.parent).items()
            if not path.parts[0].startswith(target.name)
        }

    before = elsewhere()
    for act in (run_stages, lambda target: join_run(str(target), "megaseg"), segment_again):
        with suppress(MegasegError, ValueError):
            act(target)
        assert elsewhere() == before
    for command in ("join", "status", "report"):
        megaseg(command, target)
        assert elsewhere() == before


def segment_again(target):
    source = target.with_name("image.zarr")
    settings = read_plan(str(target), "megaseg").settings
    segment_here(str(source), str(target), settings)
