"""Single tasks in many processes at once, as a job array runs them, and their end.

The arrays of one client's run.
"""

import json
import multiprocessing
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SettingsError, StoreError, TargetError
from megaseg_dask.events import Failure
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.stages import PlannedStage, declared
from megaseg_dask.run import lease
from megaseg_dask.run.job_array import choose_indices, record_plans, run_tasks
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Lease, Leases, Timing, key_of
from megaseg_dask.run.runner import segment
from megaseg_dask.run.state import TaskSummary
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image

SHAPE = (24, 64, 96)
OPTIONS = {
    "threads": 1,
    "block": "24,32,32",
    "overlap": 0,
    "threshold": "otsu",
    "retries": 0,
    "outputs": "labels,scores,measurements",
}
N_PROCESSES = 4
# `megaseg join` does the others.
ARRAYS = ["measure", "segment", "histogram", "threshold", "label", "relabel", "measurements"]


def megaseg(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.fixture
def settings(tiny_bundle):
    return parse_settings({"model": str(tiny_bundle), **OPTIONS})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_image(
        tmp_path_factory.mktemp("arrays") / "image.zarr", blobs(SHAPE), chunks=(24, 32, 32)
    )


@pytest.fixture(scope="module")
def expected(source, tiny_bundle, client) -> dict:
    target = source.parent / "expected.zarr"
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS})
    assert segment(str(source), str(target), settings, client=client).status == "done"
    return contents(target)


def run_all(plan, after: str = "") -> None:
    names = [stage.name for stage in plan.stages]
    for stage in plan.stages[names.index(after) + 1 if after else 0 :]:
        run_tasks(plan, stage.name, range(stage.n_tasks))


def take_part(number: int, target: str, stages: list[str], barrier) -> None:
    """One element of each of several job arrays, one after the other."""
    for stage in stages:
        barrier.wait(400)
        code, output = megaseg("task", target, stage, "--share", f"{number}/{N_PROCESSES}")
        assert code == 0, output
        barrier.wait(400)
        if number == 1:
            # What is quick is done in between; all else is pending.
            code, output = megaseg("join", target)
            assert code == (0 if stage == stages[-1] else 3), output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_processes_a_stage_give_the_arrays_of_one_client(source, expected, settings, tmp_path):
    target = str(tmp_path / "out.zarr")
    [plan] = record_plans(str(source), target, settings)
    stages = [
        *ARRAYS,
        *(stage.name for stage in plan.stages if stage.name.startswith("downsample")),
    ]
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(N_PROCESSES)
    processes = [
        spawn.Process(target=take_part, args=(i + 1, target, stages, barrier))
        for i in range(N_PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(800)
    assert [process.exitcode for process in processes] == [0] * N_PROCESSES
    assert contents(tmp_path / "out.zarr") == expected
    assert megaseg("status", target)[0] == 0
    assert "already done" in megaseg("join", target)[1]
    # A segment for each process and stage, whatever it did; and those of the joins.
    segments = list((tmp_path / "out.zarr.run/megaseg/journal").iterdir())
    assert len([s for s in segments if "-" in s.name]) <= N_PROCESSES * len(stages)
    assert not Leases(runs_folder(Location(target))).shared_ids()


def test_what_an_interrupted_process_finished_is_not_done_again(
    source, settings, tmp_path, monkeypatch
):
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    assert run_tasks(plan, "measure", [0]).n_done == 1
    calls = []

    def stop(workspace, stage, index, original=worker.run_task):
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    monkeypatch.setattr(worker, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(plan, "segment", range(6))
    ran = run_tasks(plan, "segment", range(6))
    assert (ran.n_before, ran.n_done) == (2, 4)
    assert sorted(calls) == sorted([*range(6), calls[2]])


def test_a_block_that_fails_is_left_out_and_mended(source, expected, settings, tmp_path):
    image, target = tmp_path / "image.zarr", tmp_path / "out.zarr"
    write_image(image, blobs(SHAPE), chunks=(24, 32, 32))
    [plan] = record_plans(str(image), str(target), settings)
    assert not run_tasks(plan, "measure", [0]).failures
    chunk = image / "0/c/0/1/2"
    whole = chunk.read_bytes()
    chunk.write_bytes(b"garbage")
    code, output = megaseg("task", target, "segment")
    assert code == 1
    assert str(chunk) in output
    run_all(plan, after="segment")
    code, output = megaseg("join", target, "--json")
    assert (code, json.loads(output.splitlines()[-1])["status"]) == (1, "failed")
    # Another process had the failure: this one names it.
    assert "FAILED predicting blocks" in megaseg("join", target)[1]
    assert json.loads((target / "zarr.json").read_text())["attributes"]["megaseg"]["missing_boxes"]
    chunk.write_bytes(whole)
    code, output = megaseg("task", target, "segment")
    assert code == 2
    assert "finished without the failed tasks" in output
    assert record_plans(str(image), str(target), settings) == [plan]
    assert megaseg("task", target, "relabel")[0] == 2
    ran = run_tasks(plan, "segment", range(6))
    assert (ran.n_before, ran.n_done) == (5, 1)
    run_all(plan, after="segment")
    assert megaseg("join", target)[0] == 0
    assert contents(target) == expected


def test_stages_go_in_their_order(source, settings, tmp_path):
    target = str(tmp_path / "out.zarr")
    assert megaseg("join", target)[0] == 2
    [plan] = record_plans(str(source), target, settings)
    with pytest.raises(SettingsError, match="run stage measure first: 1 of its 1 tasks"):
        run_tasks(plan, "segment", [0])
    code, output = megaseg("join", target, "--json")
    assert (code, json.loads(output.splitlines()[-1])["status"]) == (3, "pending")


def test_a_plate_or_field_of_one_task_is_published_by_join(source, tiny_bundle, client, tmp_path):
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "block": "24,64,96"})
    alone, target = tmp_path / "a.zarr", tmp_path / "b.zarr"
    assert segment(str(source), str(alone), settings, client=client).status == "done"
    options = [
        text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", value)
    ]
    arguments = (
        source,
        target,
        "--model",
        tiny_bundle,
        *options,
        "--block",
        "24,64,96",
        "--record",
    )
    code, output = megaseg("plan", *arguments)
    assert code == 0
    assert f"megaseg task {target} volume" in output.splitlines()[-1], "the next command"
    code, output = megaseg("join", target)
    assert code == 3
    assert f"megaseg task {target} volume" in output.splitlines()[-1]
    assert megaseg("task", target, "volume", "--share", "1/8")[0] == 0
    assert megaseg("join", target)[0] == 3
    assert megaseg("task", target, "volume", "--share", "8/8")[0] == 0
    assert megaseg("join", target)[0] == 0
    assert contents(target) == contents(alone)


# -- who may work beside whom


@pytest.fixture
def leases(tmp_path) -> Leases:
    run = Location.of(tmp_path / "out.zarr.run")
    return Leases(run, Timing(beat_s=0.1, shared_beat_s=0.1))


def test_tasks_of_one_stage_share_a_run_and_exclude_all_others(leases):
    # All live here: their hearts may miss beats for a minute.
    leases = Leases(leases.folder, replace(leases.timing, patience=600))
    with (
        leases.share("megaseg", "segment") as first,
        leases.share("megaseg", "segment"),
        leases.share("other", "label"),
    ):
        with (
            pytest.raises(TargetError, match=f"process {os.getpid()} .* is running tasks of"),
            leases.hold(),
        ):
            pass
        assert leases.last_number() == 0
        with (
            pytest.raises(TargetError, match="is running another stage of"),
            leases.share("megaseg", "label"),
        ):
            pass
        time.sleep(0.3)
        first.require()
    assert not leases.shared_ids()
    with (
        leases.hold(),
        pytest.raises(TargetError, match="is writing"),
        leases.share("megaseg", "segment"),
    ):
        pass
    with leases.share("megaseg", "label"):
        pass


def test_processes_that_are_gone_hold_up_nobody_for_long(leases, monkeypatch):
    for n in range(50):
        gone = Lease(f"megaseg/segment/0-{n:032x}", "node17", n)
        leases.folder.put(key_of(gone.id), gone.to_json())
    pauses = []
    sleep = time.sleep

    def note(seconds: float) -> None:
        pauses.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    with leases.share("megaseg", "label"):
        assert len(leases.shared_ids()) == 1
    # All of them are watched together.
    assert sum(pauses) < 2 * 6 * 0.1


def test_a_process_that_stood_still_and_was_taken_for_gone_writes_nothing(
    source, settings, tmp_path, monkeypatch
):
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    leases = Leases(runs_folder(plan.target))

    # When it wakes up, a minute later, its heart has not beaten yet.
    later = lease.clock_s() + 60

    def sleep(workspace, stage, index, original=worker.run_task):
        for lease_id in leases.shared_ids():
            leases.folder.delete(key_of(lease_id))
        with mock.patch.object(lease, "clock_s", return_value=later):
            return original(workspace, stage, index)

    run_tasks(plan, "measure", [0])
    monkeypatch.setattr(worker, "run_task", sleep)
    # The task says it, and on a slow machine the heart before that.
    with suppress(StoreError):
        ran = run_tasks(plan, "segment", [0])
        assert "now belongs to another megaseg process" in ran.failures[0].error
    assert not list((tmp_path / "out.zarr/0").glob("c/**/*"))


# -- which tasks


@pytest.mark.parametrize(
    ("texts", "share", "chosen"),
    [
        ((), None, range(10)),
        (("7",), None, [7]),
        (("8-99",), None, [8, 9]),
        (("3", "2-4"), None, [2, 3, 4]),
        ((), "1/3", [0, 1, 2]),
        ((), "3/3", [6, 7, 8, 9]),
        ((), "1/20", []),
        ((), "20/20", [9]),
        (("0-3",), "2/2", [2, 3]),
    ],
)
def test_choice_of_tasks(texts, share, chosen):
    assert list(choose_indices(PlannedStage(declared("segment"), 10, 10), texts, share)) == list(
        chosen
    )


@pytest.mark.parametrize("n_shares", [1, 3, 7, 10, 64])
def test_shares_are_all_tasks_once(n_shares):
    shares = [
        choose_indices(PlannedStage(declared("segment"), 10, 10), (), f"{i + 1}/{n_shares}")
        for i in range(n_shares)
    ]
    assert [index for share in shares for index in share] == list(range(10))


@pytest.mark.parametrize(
    ("texts", "share", "message"),
    [
        (("10",), None, "tasks 0 to 9, and no 10"),
        (("10-20",), None, "no 10"),
        (("4-2",), None, "expected a number"),
        (("x",), None, "expected a number"),
        ((), "0/4", "with I from 1 to 4"),
        ((), "5/4", "with I from 1 to 4"),
        ((), "3", "I/N"),
    ],
)
def test_wrong_choices(texts, share, message):
    with pytest.raises(SettingsError, match=message):
        choose_indices(PlannedStage(declared("segment"), 10, 10), texts, share)


def test_a_journal_of_several_writers(tmp_path):
    run, stages = (
        Location.of(tmp_path / "run"),
        (PlannedStage(declared("segment"), 10, 10), PlannedStage(declared("label"), 10, 10)),
    )

    def journal(writer: str = "") -> Journal:
        return Journal(run, "plan", stages, writer).replayed()

    first, second = journal("aa"), journal("bb")
    for index, writer in ((0, first), (1, second), (2, first)):
        writer.add("segment", index, TaskSummary(absent=index + 1))
        writer.flush()
    second.add_failure(Failure("segment", 0, "t=0", "", "tried it at the same time"))
    second.flush()
    assert run.keys("journal") == ["journal/00000000-aa.jsonl", "journal/00000000-bb.jsonl"]
    assert journal().summaries("segment") == [TaskSummary(absent=n) for n in (1, 2, 3)]
    assert not journal().failed
    client = journal()
    client.undo(["segment"], 0)
    third = journal("00")
    third.add("segment", 5, TaskSummary())
    third.flush()
    assert journal().done("segment").nonzero()[0].tolist() == [5]


def test_tasks_after_a_damaged_record_are_refused_until_it_is_taken_back(
    source, settings, tmp_path, cheap_engine
):
    """What they recorded would follow it, and not count."""
    target = str(tmp_path / "out.zarr")
    (plan,) = record_plans(str(source), target, settings)
    n_tasks = plan.stage("measure").n_tasks
    run_tasks(plan, "measure", range(n_tasks))
    last = max((tmp_path / "out.zarr.run/megaseg/journal").iterdir())
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(TargetError, match=r"jsonl is damaged.*same megaseg plan … --record"):
        run_tasks(plan, "measure", [0])
    record_plans(str(source), target, settings)
    assert run_tasks(plan, "measure", range(n_tasks)).n_done == n_tasks
    assert Journal.read(plan).is_stage_complete("measure", 0)
