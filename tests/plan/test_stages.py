"""A stage is declared once: an entry and a function are all that a new one takes."""

from dataclasses import replace

import pytest

from megaseg_dask.messages import stage_phrase
from megaseg_dask.plan import stages
from megaseg_dask.plan.resolved import Resolved
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.stages import STAGES, WHOLE_VOLUME, Stage
from megaseg_dask.run.job_array import join_run, record_plans, run_tasks
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.tasks import components, functions
from tests.fixtures.images import blobs, write_image


@pytest.mark.parametrize("stage", [WHOLE_VOLUME, *STAGES], ids=lambda stage: stage.name)
def test_every_stage_names_a_function(stage):
    assert callable(functions.function_of(stage))


def test_every_stage_is_shown_as_a_phrase():
    for stage in (WHOLE_VOLUME, *STAGES):
        name = f"{stage.name}-1" if stage.over == "levels" else stage.name
        assert " " in stage_phrase(name), f"{stage.name} lacks a phrase in messages.STAGE_PHRASES"


def test_every_fact_is_told_by_one_stage():
    facts = [fact for stage in STAGES for fact in stage.tells]
    # Of split objects the last stage that numbers them tells; scores are predicted or read.
    facts.remove("objects")
    facts.remove("scores")
    assert sorted(facts) == sorted(set(facts)) == sorted(WHOLE_VOLUME.tells)
    names = [stage.name for stage in STAGES]
    assert len(names) == len(set(names))


def plan_blocks(folder, bundle):
    source = write_image(folder / "image.zarr", blobs((16, 32, 64)))
    settings = parse_settings(
        {"model": str(bundle), "engine": "torch", "threads": 1, "block": "16,32,32"}
    )
    target = str(folder / "out.zarr")
    [plan] = record_plans(str(source), target, settings)
    return plan, target


def test_a_new_stage_is_one_entry_and_one_function(tmp_path, tiny_bundle, monkeypatch):
    calls = []

    def count_voxels(workspace, output, number):
        calls.append((output.number, number))
        return OutputState()

    monkeypatch.setattr(components, "count_voxels", count_voxels, raising=False)
    counting = Stage(
        "count",
        "components.count_voxels",
        over="blocks",
        when=Resolved.writes_labels,
        memory=lambda sizes: sizes.core_voxels * 1000,
        local=True,
    )
    monkeypatch.setattr(stages, "STAGES", (*STAGES[:-1], counting, STAGES[-1]))
    plan, target = plan_blocks(tmp_path, tiny_bundle)
    names = [stage.name for stage in plan.stages]
    assert names.index("count") == names.index("relabel") + 1
    assert plan.stage("count").n_tasks == 2
    added = plan.projected(plan.stage("count")) - plan.projected(plan.stage("seams"))
    assert added == 999 * 16 * 32 * 32
    for stage in plan.stages:
        assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures
    assert sorted(calls) == [(0, 0), (0, 1)]
    assert join_run(target, "megaseg").status == "done"


def test_a_stage_that_a_block_cannot_do_without_leaves_out_those_after_it(
    tmp_path, tiny_bundle, monkeypatch
):
    """What a failure costs is declared too: without this stage there are no labels."""

    def fail(workspace, output, number):
        raise RuntimeError("no")

    monkeypatch.setattr(components, "fail", fail, raising=False)
    failing = replace(
        stages.declared("seams"), name="check", function="components.fail", quick=False
    )
    before = [stage.name for stage in STAGES].index("seams")
    monkeypatch.setattr(stages, "STAGES", (*STAGES[:before], failing, *STAGES[before:]))
    plan, target = plan_blocks(tmp_path, tiny_bundle)
    for stage in plan.stages:
        run_tasks(plan, stage.name, range(stage.n_tasks))
    result = join_run(target, "megaseg")
    assert {failure.stage for failure in result.failures} == {"check"}
    assert result.status == "failed"
    assert plan.stage("relabel").n_tasks == 2
    assert not Journal.read(plan).done("relabel").any()
    assert (tmp_path / "out.zarr/0/zarr.json").exists()
