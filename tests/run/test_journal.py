"""The journal: what it says is done is done, for this plan and no other."""

import hashlib
import json
import tempfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseg_dask.algorithms.normalization import Counts, Moments
from megaseg_dask.errors import StoreError
from megaseg_dask.events import Failure
from megaseg_dask.plan.stages import PlannedStage, declared
from megaseg_dask.run.journal import FOLDER, Journal
from megaseg_dask.run.state import (
    ChannelStatistics,
    Ending,
    OutputState,
    PartStatistics,
    TaskSummary,
    VolumeState,
)
from megaseg_dask.stores import Location

PLAN = "0123abcd"
STAGES = (
    PlannedStage(declared("measure"), 2, 1),
    PlannedStage(declared("segment"), 1000, 500),
    PlannedStage(declared("label"), 1000, 500),
)


def read(run: Location, plan: str = PLAN) -> Journal:
    return Journal(run, plan, STAGES).replayed()


def told(index: int) -> TaskSummary:
    return TaskSummary(absent=index + 1)


def failure(index: int) -> Failure:
    return Failure("segment", index, "t=0", "", "gone")


def done(run: Location, stage: str = "segment") -> list[int]:
    return read(run).done(stage).nonzero()[0].tolist()


@pytest.fixture
def run(tmp_path) -> Location:
    return Location(str(tmp_path / "out.zarr.run/megaseg"))


def segments(run: Location) -> list[str]:
    return [key.removeprefix(f"{FOLDER}/") for key in run.keys(FOLDER)]


def write(run: Location, *indices: int, plan: str = PLAN, stage: str = "segment") -> Journal:
    """A run that goes on from what is there, finishes some tasks and stops."""
    journal = read(run, plan)
    with journal.flushed():
        for index in indices:
            statistics = (ChannelStatistics(0.0, 1.0),) if stage == "measure" else ()
            journal.add(stage, index, replace(told(index), statistics=statistics))
    return journal


def test_nothing_is_done_where_nothing_is(run):
    journal = read(run)
    assert (journal.n_done, journal.result, journal.summaries("segment")) == (0, None, [])
    assert not journal.done("segment")[0]


def test_what_was_recorded_is_read_back_in_the_order_of_tasks(run):
    write(run, 7, 0, 3)
    write(run, 1, stage="label")
    journal = read(run)
    assert journal.n_done == 4
    assert journal.summaries("segment") == [told(0), told(3), told(7)]
    assert journal.done("label")[1]
    assert not journal.done("label")[0]


def test_segments_are_new_objects_and_never_appended(run):
    write(run, 0)
    first = run.get(f"{FOLDER}/00000000.jsonl")
    write(run, 1)
    assert segments(run) == ["00000000.jsonl", "00000001.jsonl"]
    assert run.get(f"{FOLDER}/00000000.jsonl") == first


def test_what_follows_a_lost_segment_is_not_done(run):
    for index in range(3):
        write(run, index)
    (run.path / FOLDER / "00000001.jsonl").unlink()
    assert done(run) == [0]
    write(run, 5)
    assert segments(run) == ["00000000.jsonl", "00000001.jsonl"]
    assert done(run) == [0, 5]


def test_another_plans_record_counts_for_nothing(run):
    write(run, 0, 1, plan="another")
    journal = write(run, 5)
    assert journal.n_done == 1
    assert done(run) == [5]
    assert segments(run) == ["00000000.jsonl", "00000001.jsonl"]


@settings(max_examples=15)
@given(data=st.data())
def test_a_damaged_segment_and_what_follows_it_count_for_nothing(data):
    """Cut, torn, filled with zeros, or with one byte changed; what is recorded next counts."""
    with tempfile.TemporaryDirectory() as folder:
        run = Location(folder)
        for index in range(4):
            write(run, index)
        damaged = data.draw(st.integers(0, 3))
        key = f"{FOLDER}/{damaged:08d}.jsonl"
        run.put(key, data.draw(damages(run.get(key))))
        assert done(run) == list(range(damaged))
        write(run, 9)
        assert done(run) == [*range(damaged), 9]


@st.composite
def damages(draw, whole: bytes) -> bytes:
    at = draw(st.integers(0, len(whole) - 1))
    other = bytes([draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))])
    return draw(
        st.sampled_from(
            [
                whole[:at],
                whole[:at] + bytes(len(whole) - at),
                whole[:at] + other + whole[at + 1 :],
                whole + whole[at:],
            ]
        )
    )


ODD = [
    b"[1]",
    b"null",
    b'"segment"',
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"stage": "another", "index": 1, "s": 0.0, "peak": 0}',
    b'{"stage": ["segment"], "index": 1, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": 1000, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": -1, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": 1.0, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": true, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": 1' + b"0" * 5000 + b', "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": 1, "peak": 0}',
    b'{"stage": "segment", "index": 1, "s": "0", "peak": 0}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": null}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": [1]}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"absent": "1"}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"parts": [[1]]}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"parts": [[]]}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"parts": []}}',
    b'{"stage": "measure", "index": 1, "s": 0.0, "peak": 0}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"wrote": ["?", ""]}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"wrote": [1, 2]}}',
    b'{"session": {"began": "1", "wall_s": 1.0, "workers": []}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"by_output": [{"a": 1}]}}',
    b'{"stage": "segment", "index": 1, "s": 0.0, "peak": 0, "summary": {"by_output": 3}}',
    b'{"stage": "segment", "index": 1, "failure": {"stage": "segment"}}',
    b'{"stage": "segment", "index": 1, "failure": 3}',
    b'{"undo": "segment", "volume": 2}',
    b'{"undo": "another", "volume": 0}',
    b'{"session": {"began": 1}}',
    b'{"session": 3}',
    b'{"result": 3}',
    b'{"result": {"n_objects": 1}}',
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:60].decode("latin-1"))
def test_a_segment_with_an_odd_record_counts_for_nothing(odd, run):
    """Also where its digest is right, as of another version of the package."""
    write(run, 0)
    write(run, 1)
    whole = run.get(f"{FOLDER}/00000001.jsonl") or b""
    lines = b"\n".join([*whole.splitlines()[1:], odd])
    head = json.dumps({"plan": PLAN, "digest": hashlib.sha256(lines).hexdigest()})
    run.put(f"{FOLDER}/00000001.jsonl", head.encode() + b"\n" + lines)
    assert done(run) == [0]


def test_other_files_in_its_folder_are_left_alone(run):
    write(run, 0)
    run.put(f"{FOLDER}/.DS_Store", b"\x00\x01")
    run.put(f"{FOLDER}/notes/00000007.jsonl", b"{}")
    write(run, 1)
    assert read(run).n_done == 2
    assert "00000001.jsonl" in segments(run)


def test_what_is_finished_reaches_the_store_when_a_run_is_interrupted(run):
    def interrupted() -> None:
        with read(run).flushed() as journal:
            journal.add("segment", 4, TaskSummary())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(run).done("segment")[4]


def test_records_are_gathered_into_few_segments(run):
    write(run, *range(1000))
    assert len(segments(run)) <= 2
    assert read(run).n_done == 1000


def test_the_result_is_the_last_word(run):
    for stage in STAGES:
        journal = write(run, *range(stage.n_tasks), stage=stage.name)
    journal.finish(Ending(n_objects=12))
    assert read(run).result == Ending(12)
    assert read(run, "another").result is None
    read(run).undo(["label"], 1)
    assert read(run).result is None


def test_no_result_is_believed_before_its_tasks(run):
    journal = write(run, 0)
    journal.finish(Ending(n_objects=12))
    assert read(run).result is None


def test_a_segment_that_could_not_be_written_is_kept_for_the_next_try(run, monkeypatch):
    journal = read(run)
    journal.add("segment", 3, TaskSummary())

    def full(*_: object, **_options: object) -> None:
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "create", full)
        with pytest.raises(StoreError):
            journal.flush()
    journal.flush()
    assert read(run).done("segment")[3]


def test_segments_are_lines_that_people_can_read(run):
    write(run, 2)
    lines = (run.get(f"{FOLDER}/00000000.jsonl") or b"").decode().splitlines()
    head, *records = map(json.loads, lines)
    assert head.keys() == {"plan", "digest"}
    assert head["plan"] == PLAN
    assert records == [
        {"stage": "segment", "index": 2, "s": 0.0, "peak": 0, "summary": {"absent": 3}},
    ]


def test_what_was_undone_is_not_done_and_its_failures_are_forgotten(run):
    journal = write(run, 0, 499, 500, 999)
    journal.add_failure(failure(3))
    journal.add_failure(failure(600))
    journal.undo(["segment"], 0)
    assert done(run) == [500, 999]
    assert read(run).summaries("segment") == [told(500), told(999)]
    assert list(read(run).failed) == [("segment", 600)]


def test_a_task_that_succeeds_is_no_failure_any_more(run):
    journal = write(run, 0)
    journal.add_failure(failure(3))
    journal.flush()
    assert ("segment", 3) in read(run).failed
    write(run, 3)
    assert not read(run).failed


def test_a_volume_is_complete_when_all_its_stages_are(run):
    journal = write(run, *range(500))
    write(run, *range(500), stage="label")
    journal = write(run, 0, stage="measure")
    assert journal.is_complete(0)
    assert not journal.is_complete(1)
    assert journal.summaries("segment", 1) == []


def test_a_million_finished_tasks_weigh_a_megabyte(run):
    journal = Journal(run, PLAN, (PlannedStage(declared("segment"), 10**6, 10**6),))
    assert journal.done("segment").nbytes == 10**6


def test_data_are_made_durable_before_the_journal_speaks_of_them(run):
    order = []
    journal = Journal(run, PLAN, STAGES, sync=lambda: order.append(len(segments(run))))
    journal.add("segment", 1, TaskSummary())
    journal.flush()
    assert order == [0]
    assert segments(run) == ["00000000.jsonl"]


def test_of_a_summary_only_what_it_tells_is_kept():
    output = OutputState(low=0.0, threshold=1.5)
    part = PartStatistics(3, Moments(2, 0.5, 0.1, 0.0, 1.0))
    counts = PartStatistics(0, Counts(2, 3, 5, 1, 2))
    summary = TaskSummary(
        parts=((part,), (counts,)),
        batch=2,
        statistics=(ChannelStatistics(0.5, 0.0),),
        by_output=(OutputState(), output),
    )
    assert TaskSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    assert TaskSummary(by_output=(OutputState(), OutputState())).to_json() == {}
    state = VolumeState((1, 4), ("scores",), summary.statistics, summary.by_output)
    assert VolumeState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert state.present(6) == [0, 2, 3, 5]
