"""What a run believes of its source: nothing that it did not read, and nothing that changed.

A source that is gone is a failure, and never background; one that changed between two looks is
named. Restored, the same command ends as a run that nothing disturbed.
"""

import json
import os
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import zarr

from megaseg_dask.ngff.labels import list_labels
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans, run_tasks
from megaseg_dask.run.status import status
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location
from megaseg_dask.stores.arrays import clear_array_cache
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (16, 32, 96)
OPTIONS = {"engine": "torch", "threads": 1, "overlap": 0, "retries": 0}
BLOCKS = {**OPTIONS, "block": "16,32,32"}
CHUNK = "0/c/0/0/1"


class Moments:
    """Does something to the source before a task runs."""

    def __init__(self) -> None:
        self.acts = {}

    def run_task(self, workspace, stage, index, original=worker.run_task):
        self.acts.pop((stage, index), lambda: None)()
        return original(workspace, stage, index)


@pytest.fixture
def before(monkeypatch):
    moments = Moments()
    monkeypatch.setattr(worker, "run_task", moments.run_task)
    return moments.acts


class Case:
    def __init__(self, folder, bundle, options, axes="zyx"):
        self.folder = folder
        shape = SHAPE if axes == "zyx" else (3, *SHAPE)
        image = blobs(SHAPE) if axes == "zyx" else np.stack([blobs(SHAPE, n) for n in range(3)])
        chunks = (1,) * (len(shape) - 3) + (16, 32, 32)
        self.source = write_image(folder / "image.zarr", image, axes=axes, chunks=chunks)
        self.settings = parse_settings({"model": str(bundle), **options})
        assert self.run("calm").status == "done"

    def run(self, name="out", **changes):
        target = self.folder / f"{name}.zarr"
        return segment_here(str(self.source), str(target), self.settings.model_copy(update=changes))

    def assert_as_calm(self):
        result = self.run()
        assert result.status == "done", result.failures
        assert contents(self.folder / "out.zarr") == contents(self.folder / "calm.zarr")


def unmount(case):
    """Leave the empty folder of a mount."""
    case.source.rename(case.folder / "elsewhere")
    case.source.mkdir()


def move(case):
    case.source.rename(case.folder / "elsewhere")


def remove_chunks_after_metadata(case):
    """A removal that is under way, seen from the array that is processed."""
    shutil.copytree(case.source, case.folder / "elsewhere")
    for path in case.source.rglob("*"):
        if path.is_file():
            path.unlink()


def restore(case):
    shutil.rmtree(case.source, ignore_errors=True)
    (case.folder / "elsewhere").rename(case.source)


GONE = [unmount, move, remove_chunks_after_metadata]


@pytest.mark.parametrize("act", GONE)
@pytest.mark.parametrize(
    ("options", "axes", "moment"),
    [
        (BLOCKS, "zyx", ("segment", 1)),
        ({**BLOCKS, "outputs": "labels,measurements"}, "zyx", ("measurements", 1)),
        # Volumes of one task.
        (OPTIONS, "tzyx", ("volume", 1)),
        # Nothing is measured.
        ({**BLOCKS, "normalization": "1000,400"}, "zyx", ("segment", 1)),
    ],
)
def test_a_source_that_is_gone_is_a_failure(
    act, options, axes, moment, tmp_path, tiny_bundle, before
):
    case = Case(tmp_path, tiny_bundle, options, axes)
    before[moment] = lambda: act(case)
    result = case.run()
    assert result.status == "failed"
    assert "the array, its bucket or its disk is missing now" in result.failures[0].error
    restore(case)
    case.assert_as_calm()


def replace_chunk(case, x=33):
    array = zarr.open_array(case.source / "0", mode="r+")
    array[:, :, x] = array[:, :, x] + 1


def remove_chunk(case):
    (case.source / CHUNK).unlink()


@pytest.mark.parametrize("change", [replace_chunk, remove_chunk])
@pytest.mark.parametrize("moment", [("segment", 0), ("segment", 1), ("measurements", 1)])
def test_a_chunk_that_changed_after_it_was_measured_is_named(
    change, moment, tmp_path, tiny_bundle, before
):
    options = {**BLOCKS, "overlap": 0.5, "outputs": "labels,scores,measurements"}
    case = Case(tmp_path, tiny_bundle, options)
    shutil.copytree(case.source, case.folder / "elsewhere")
    before[moment] = lambda: change(case)
    result = case.run()
    assert result.status == "failed"
    for failure in result.failures:
        assert "the source changed during the run" in failure.error, failure
    # Also in the halos of neighbors, and in the next attempt.
    stage, first = moment
    n_blocks = 3 if change is remove_chunk and stage == "segment" else 2
    found = [(failure.stage, failure.index) for failure in result.failures]
    assert found == [(stage, index) for index in range(first, n_blocks)]
    assert case.run().status == "failed"
    restore(case)
    case.assert_as_calm()


def test_a_chunk_that_changes_between_two_runs_is_named(tmp_path, tiny_bundle, before):
    case = Case(tmp_path, tiny_bundle, BLOCKS)
    shutil.copytree(case.source, case.folder / "elsewhere")

    def stop():
        raise KeyboardInterrupt

    before["segment", 2] = stop
    with pytest.raises(KeyboardInterrupt):
        case.run()
    # Finished blocks saw what was there.
    replace_chunk(case, x=65)
    result = case.run()
    assert "the source changed during the run" in result.failures[0].error
    # What changed may be what is wanted.
    assert case.run(overwrite=True).status == "done"
    assert case.run("anew").status == "done"
    assert contents(case.folder / "out.zarr") == contents(case.folder / "anew.zarr")


def test_chunks_that_are_removed_long_before_their_array_are_a_failure(
    tmp_path, tiny_bundle, before
):
    case = Case(tmp_path, tiny_bundle, OPTIONS, "tzyx")
    shutil.copytree(case.source, case.folder / "elsewhere")
    before["volume", 1] = (case.source / "0/c/1/0/0/1").unlink
    before["volume", 2] = (case.source / "0/zarr.json").unlink
    result = case.run()
    assert [failure.index for failure in result.failures] == [1]
    assert "the array, its bucket or its disk is missing now" in result.failures[0].error
    restore(case)
    case.assert_as_calm()


@pytest.mark.parametrize(
    ("options", "axes", "chunk", "moment"),
    [(BLOCKS, "zyx", CHUNK, ("segment", 1)), (OPTIONS, "tzyx", "0/c/1/0/0/1", ("volume", 2))],
)
@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_chunk_that_was_absent_and_is_back_is_read(
    is_stopped, options, axes, chunk, moment, tmp_path, tiny_bundle, before
):
    case = Case(tmp_path, tiny_bundle, options, axes)
    hidden = (case.source / chunk).rename(tmp_path / "hidden")

    def show():
        hidden.rename(case.source / chunk)
        if is_stopped:
            raise KeyboardInterrupt

    before[moment] = show
    with pytest.raises(KeyboardInterrupt) if is_stopped else nullcontext():
        case.run()
    case.assert_as_calm()


def test_an_array_that_was_repaired_is_read_anew(tmp_path, tiny_bundle):
    """By processes that read it before."""
    case = Case(tmp_path, tiny_bundle, BLOCKS)
    path = case.source / "0/zarr.json"
    metadata = path.read_text()
    wrong = json.loads(metadata)
    # As of another program: all chunks are absent under these names.
    wrong["chunk_key_encoding"]["configuration"]["separator"] = "."
    path.write_text(json.dumps(wrong))
    assert case.run().status == "failed"
    path.write_text(metadata)
    assert case.run(overwrite=True).status == "done"
    assert contents(case.folder / "out.zarr") == contents(case.folder / "calm.zarr")


ANOTHER = {
    "larger": lambda path: write_image(path, blobs((16, 32, 128))),
    "smaller": lambda path: write_image(path, blobs((16, 16, 96))),
    "floats": lambda path: write_image(path, blobs(SHAPE, dtype="float32")),
    "more axes": lambda path: write_image(path, blobs(SHAPE)[None], axes="tzyx"),
}


@pytest.mark.parametrize(
    "options", [OPTIONS, pytest.param(BLOCKS, marks=pytest.mark.slow)], ids=["one task", "staged"]
)
@pytest.mark.parametrize("another", ANOTHER)
def test_tasks_read_no_other_array_than_was_planned(
    options, another, tmp_path, tiny_bundle, cheap_engine
):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    settings = parse_settings({"model": str(tiny_bundle), **options})
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    shutil.rmtree(source)
    ANOTHER[another](source)
    clear_array_cache()
    [failure] = run_tasks(plan, plan.stages[0].name, [0]).failures
    assert "is another array than when the run was planned" in failure.error


# -- changes after the last read


def touch(path):
    """Let a file be written a second later than it was."""
    modified_ns = path.stat().st_mtime_ns
    os.utime(path, ns=(modified_ns, modified_ns + 10**9))


READ = {
    "segmented channel": "image.zarr/0/c/0/0/0/0/0",
    "measured channel": "image.zarr/0/c/0/1/0/0/0",
    "regions": "cells.zarr/0/c/0/0/0",
    "mask": "cells.zarr/1/c/0/0/0",
}
NOT_READ = {
    "another channel": "image.zarr/0/c/0/2/0/0/0",
    "another timepoint": "image.zarr/0/c/2/0/0/0/0",
    "labels of another name": "image.zarr/labels",
}


@pytest.fixture
def measured(tmp_path, tiny_bundle, cheap_engine):
    """A function that segments two of three timepoints, with a mask, regions and two channels."""
    shape = (16, 16, 32)
    values = np.stack([np.stack([blobs(shape, 3 * t + c) for c in range(3)]) for t in range(3)])
    image = write_image(tmp_path / "image.zarr", values, axes="tczyx", chunks=(1, 1, *shape))
    (image / "labels").mkdir()
    cells = np.kron(np.ones((4, 4, 8), "uint8"), np.ones((4, 4, 4), "uint8"))
    write_image(tmp_path / "cells.zarr", cells, cells[::2, ::2, ::2])
    settings = parse_settings(
        {
            **OPTIONS,
            "model": str(tiny_bundle),
            "unmarked": True,
            "channel": "0",
            "time": "0:2",
            "where": str(tmp_path / "cells.zarr/1"),
            "regions": str(tmp_path / "cells.zarr"),
            "outputs": "labels,measurements",
            "measure_channels": "1",
        }
    )
    return lambda: segment_here(str(image), str(tmp_path / "out.zarr"), settings)


@pytest.mark.parametrize(
    "name",
    ["segmented channel", "regions"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("measured channel", "mask")],
)
def test_a_chunk_that_changes_after_it_was_read_is_named_and_read_again(
    name, tmp_path, before, measured
):
    before["volume", 1] = lambda: touch(tmp_path / READ[name])
    result = measured()
    assert result.exit_code == 1
    # Both timepoints have the mask and the regions.
    n_changed = 2 if "cells" in READ[name] else 1
    assert [failure.volume for failure in result.failures] == ["t=0 c=0", "t=1 c=0"][:n_changed]
    assert "changed during the run" in result.failures[0].error
    assert not list_labels(Location.of(tmp_path / "out.zarr"))
    (run,) = status(str(tmp_path / "out.zarr"))
    assert run.stages["volume"] == (2 - n_changed, 2)
    assert measured().status == "done"
    assert measured().already_done


def test_what_is_not_read_may_change(tmp_path, before, measured):
    def touch_all():
        for path in NOT_READ.values():
            touch(tmp_path / path)

    before["volume", 1] = touch_all
    assert measured().status == "done"
    touch_all()
    assert measured().already_done


@pytest.mark.slow
def test_a_source_that_changes_after_the_last_look_is_read_again(
    tmp_path, tiny_bundle, before, cheap_engine
):
    case = Case(tmp_path, tiny_bundle, BLOCKS)
    before["join", 0] = lambda: replace_chunk(case)
    result = case.run()
    assert result.exit_code == 1
    assert "changed during the run" in result.failures[0].error
    assert case.run().status == "done"
    assert case.run("anew").status == "done"
    assert contents(case.folder / "out.zarr") == contents(case.folder / "anew.zarr")
    # What is gone after it was read was read.
    before["join", 0] = lambda: move(case)
    assert case.run("gone").status == "done"
    assert contents(case.folder / "gone.zarr") == contents(case.folder / "anew.zarr")


def test_a_volume_that_changes_takes_its_group_along(tmp_path, tiny_bundle, before, cheap_engine):
    """The statistics of all of them are also those of what changed."""
    options = {**BLOCKS, "normalization": "series", "threshold": "otsu"}
    case = Case(tmp_path, tiny_bundle, options, "tzyx")

    def change():
        array = zarr.open_array(case.source / "0", mode="r+")
        array[0] = array[0] // 3

    before["join", 2] = change
    result = case.run()
    assert [failure.volume for failure in result.failures] == ["t=0 c=0"]
    assert case.run().status == "done"
    assert case.run("anew").status == "done"
    assert contents(case.folder / "out.zarr") == contents(case.folder / "anew.zarr")
