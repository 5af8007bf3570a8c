"""The journal: what it says is done is done, for this plan and no other."""

import json

import pytest

from megaseg_dask.errors import StoreError
from megaseg_dask.journal import FOLDER, Journal
from megaseg_dask.stores import Location

PLAN = "0123abcd"


@pytest.fixture
def run(tmp_path) -> Location:
    return Location(str(tmp_path / "out.zarr.run/megaseg"))


def segments(run: Location) -> list[str]:
    return [key.removeprefix(f"{FOLDER}/") for key in run.keys(FOLDER)]


def write(run: Location, *indices: int, plan: str = PLAN, stage: str = "segment") -> Journal:
    """A run that goes on from what is there, finishes some tasks and stops."""
    journal = Journal.read(run, plan)
    with journal.flushed():
        for index in indices:
            journal.add(stage, index, {"n": index})
    return journal


def test_nothing_is_done_where_nothing_is(run):
    journal = Journal.read(run, PLAN)
    assert (journal.n_done, journal.result, journal.summaries("segment")) == (0, None, [])
    assert not journal.is_done("segment", 0)


def test_what_was_recorded_is_read_back_in_the_order_of_tasks(run):
    write(run, 7, 0, 3)
    write(run, 1, stage="label")
    journal = Journal.read(run, PLAN)
    assert journal.n_done == 4
    assert journal.summaries("segment") == [{"n": 0}, {"n": 3}, {"n": 7}]
    assert journal.is_done("label", 1)
    assert not journal.is_done("label", 0)


def test_segments_are_new_objects_and_never_appended(run):
    write(run, 0)
    first = run.get(f"{FOLDER}/00000000.jsonl")
    write(run, 1)
    assert segments(run) == ["00000000.jsonl", "00000001.jsonl"]
    assert run.get(f"{FOLDER}/00000000.jsonl") == first


def test_a_missing_segment_leaves_its_number_unused(run):
    for index in range(3):
        write(run, index)
    (run.path / FOLDER / "00000001.jsonl").unlink()
    write(run, 5)
    assert segments(run) == ["00000000.jsonl", "00000002.jsonl", "00000003.jsonl"]
    assert sorted(Journal.read(run, PLAN).done["segment"]) == [0, 2, 5]


def test_another_plans_record_counts_for_nothing(run):
    write(run, 0, 1, plan="another")
    journal = write(run, 5)
    assert journal.n_done == 1
    assert sorted(Journal.read(run, PLAN).done["segment"]) == [5]
    assert segments(run) == ["00000000.jsonl", "00000001.jsonl"]


@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 100, b'{"plan": "0123', b"[1]\n", b'{"stage": "segment", "index": 9}']
)
def test_a_torn_segment_counts_for_nothing(damage, run):
    write(run, 0)
    write(run, 1)
    run.put(f"{FOLDER}/00000001.jsonl", damage)
    assert sorted(Journal.read(run, PLAN).done["segment"]) == [0]


def test_a_cut_segment_counts_for_nothing(run):
    write(run, 0, 1, 2)
    whole = run.get(f"{FOLDER}/00000000.jsonl")
    run.put(f"{FOLDER}/00000000.jsonl", whole[:-3])
    assert Journal.read(run, PLAN).n_done == 0


def test_other_files_in_its_folder_are_left_alone(run):
    write(run, 0)
    run.put(f"{FOLDER}/.DS_Store", b"\x00\x01")
    run.put(f"{FOLDER}/notes/00000007.jsonl", b"{}")
    write(run, 1)
    assert Journal.read(run, PLAN).n_done == 2
    assert "00000001.jsonl" in segments(run)


def test_what_is_finished_reaches_the_store_when_a_run_is_interrupted(run):
    def interrupted() -> None:
        with Journal.read(run, PLAN).flushed() as journal:
            journal.add("segment", 4, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Journal.read(run, PLAN).is_done("segment", 4)


def test_records_are_gathered_into_few_segments(run):
    write(run, *range(1000))
    assert len(segments(run)) <= 2
    assert Journal.read(run, PLAN).n_done == 1000


def test_the_result_is_the_last_word(run):
    journal = write(run, 0)
    journal.finish({"n_objects": 12})
    assert Journal.read(run, PLAN).result == {"n_objects": 12}
    assert Journal.read(run, "another").result is None


def test_a_segment_that_could_not_be_written_is_kept_for_the_next_try(run, monkeypatch):
    journal = Journal.read(run, PLAN)
    journal.add("segment", 3, {})

    def full(*_: object) -> None:
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "create", full)
        with pytest.raises(StoreError):
            journal.flush()
    journal.flush()
    assert Journal.read(run, PLAN).is_done("segment", 3)


def test_segments_are_lines_that_people_can_read(run):
    write(run, 2)
    lines = (run.get(f"{FOLDER}/00000000.jsonl") or b"").decode().splitlines()
    assert list(map(json.loads, lines)) == [{"plan": PLAN}, {"stage": "segment", "index": 2, "summary": {"n": 2}}]
