"""``--follow``: the result is that of one run on the finished source, and valid at every moment.

The writer takes a step wherever the follower would wait: no clock, no process, each interleaving
the same in each run.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import ome_zarr_models
import pyarrow.parquet as pq
import pytest
import zarr

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Following
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import follow
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.writers import LiveImage, LivePlate, files_of, first_difference

OPTIONS = {
    "channel": "dna",
    "engine": "torch",
    "threads": 1,
    "overlap": 0,
    "patch": "16,32,32",
    "outputs": "labels,scores,measurements",
    "settle": 0,
    "threshold": 0.9,
}


@pytest.fixture
def run(tiny_bundle, cheap_engine):
    def call(source, target, emit=lambda _: None, **options):
        settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, **options})
        return segment_here(str(source), str(target), settings, emit=emit)

    return call


@pytest.fixture
def at_each_look(monkeypatch):
    """Let a writer take a step wherever the follower waits."""

    def use(steps: Iterator[str]) -> list[str]:
        taken = []

        def pause(self, look_s=0.0):
            step = next(steps, None)
            if step is None:
                # Nothing more will happen: no wait is needed to see that.
                self._timeout_s = 0.0
            else:
                taken.append(step)

        monkeypatch.setattr(follow._Watch, "pause", pause)
        return taken

    return use


def require_as_one_run(run, source, target, **options):
    """Compare a target with that of one run on the finished source, byte for byte."""
    expected = target.with_name("expected.zarr")
    assert run(source, expected, settle=None, **options).status == "done"
    assert not first_difference(files_of(target), files_of(expected))
    tables = [path.with_name(f"{path.name}.measurements.parquet") for path in (target, expected)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


SLOW = pytest.mark.slow
STYLES = pytest.mark.parametrize("style", ["append", pytest.param("full", marks=SLOW)])


@STYLES
def test_a_series_that_is_followed_is_as_one_run(style, run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    at_each_look(LiveImage(source, style, 3).steps_of())
    result = run(source, tmp_path / "out.zarr", follow=True)
    assert (result.status, result.warnings) == ("done", [])
    require_as_one_run(run, source, tmp_path / "out.zarr")


@STYLES
@pytest.mark.parametrize("lists_all", [False, pytest.param(True, marks=SLOW)])
def test_a_plate_whose_fields_appear_is_as_one_run(style, lists_all, run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    fields = ["B/2/0", "A/1/1", "A/1/0", "A/2/0"]
    at_each_look(LivePlate(source, style, fields, lists_all=lists_all).steps_of())
    assert run(source, tmp_path / "out.zarr", follow=True).status == "done"
    require_as_one_run(run, source, tmp_path / "out.zarr")


@pytest.mark.parametrize("style", ["full", pytest.param("append", marks=SLOW)])
def test_a_plate_whose_fields_are_series_is_as_one_run(style, run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    fields = ["A/2/0", "A/1/0"]
    at_each_look(LivePlate(source, style, fields, n_times=2).steps_of())
    assert run(source, tmp_path / "out.zarr", follow=True).status == "done"
    require_as_one_run(run, source, tmp_path / "out.zarr")


# -- killed, started again, and ended


class Killed(BaseException):
    """Ends a run at once, as a signal would."""


@pytest.mark.parametrize("kind", ["plate", pytest.param("series", marks=SLOW)])
def test_a_follower_that_is_ended_anywhere_goes_on(kind, run, monkeypatch, at_each_look, tmp_path):
    """Each attempt gets a few writes further than the one before."""
    source = tmp_path / "live.zarr"
    writer = LiveImage(source, "append", 2)
    if kind == "plate":
        writer = LivePlate(source, "append", ["A/2/0", "A/1/0"])
    at_each_look(writer.steps_of())
    put = Location.put
    state = {"left": 0}

    def put_or_end(self, key, data, **options):
        if "+lease" not in str(self) and not key.startswith("+"):
            state["left"] -= 1
            if state["left"] == 0:
                raise Killed
        return put(self, key, data, **options)

    n_ends = 0
    result = None
    with monkeypatch.context() as patch:
        patch.setattr(Location, "put", put_or_end)
        while result is None:
            state["left"] = 5 + 3 * n_ends
            try:
                result = run(source, tmp_path / "out.zarr", follow=True)
            except Killed:
                n_ends += 1
    assert n_ends >= 4
    require_as_one_run(run, source, tmp_path / "out.zarr")


def test_what_is_published_is_whole_at_every_write(run, monkeypatch, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    target = tmp_path / "out.zarr"
    at_each_look(LiveImage(source, "append", 3).steps_of())
    put = Location.put
    seen = set()

    def put_and_look(self, key, data, **options):
        put(self, key, data, **options)
        if "out.zarr" in f"{self}/{key}" and target.exists():
            seen.add(require_whole(target))

    monkeypatch.setattr(Location, "put", put_and_look)
    assert run(source, target, follow=True).status == "done"
    assert seen == {0, 1, 2, 3}


def require_whole(target: Path) -> int:
    """Look at an image as another program would; return how many timepoints it shows."""
    group = zarr.open_group(target, mode="r")
    if "ome" not in group.attrs:
        return 0
    n_times = group["0"].shape[0]
    ome_zarr_models.open_ome_zarr(group, version="0.5")
    assert group["labels"].attrs["ome"]["labels"] == ["megaseg"]
    for level in range(2):
        for array in (group[str(level)], group[f"labels/megaseg/{level}"]):
            assert array.shape[0] >= n_times
            for t in range(array.shape[0]):
                assert (Path(target) / array.path / f"c/{t}/0/0/0").exists()
    assert len(group.attrs["megaseg"]["normalization"]) <= n_times
    rows = pq.read_table(f"{target}.measurements.parquet")
    assert set(range(n_times)) <= set(rows["timepoint"].to_pylist())
    return n_times


def test_a_series_that_is_appended_to_ends_by_time(run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    taken = at_each_look(LiveImage(source, "append", 4).steps_of())
    result = run(source, tmp_path / "out.zarr", follow=True, time="1:3")
    assert result.status == "done"
    assert not any("t=3" in step and "c=1" in step for step in taken)
    assert zarr.open_group(tmp_path / "out.zarr", mode="r")["0"].shape[0] == 2


def test_a_writer_that_stops_early_is_told_and_taken_without_following(run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    target = tmp_path / "out.zarr"
    image = LiveImage(source, "full", 4)
    steps = [*image.create(), *image.write(0), *image.write(1)]
    assert steps
    # Of the third timepoint the second channel never comes, and of the fourth nothing.
    group = zarr.open_group(source, mode="r+")
    group["0"][2, 0, :, :, :32] = 7
    at_each_look(iter(()))
    result = run(source, target, follow=True, outputs="labels,scores")
    [warning] = result.warnings
    assert "2 timepoints of 4 that the source lists are absent or incomplete" in warning
    assert "t=2" in warning
    assert zarr.open_group(target, mode="r")["0"].shape[0] == 2
    [found] = status(str(target))
    assert found.timepoints == {"there": 2, "done": 2, "announced": 4}
    for t in (2, 3):
        list(image.write(t))
    [found] = status(str(target))
    assert found.timepoints == {"there": 4, "done": 2, "announced": 4}
    assert found.exit_code == 3
    result = run(source, target, settle=None, outputs="labels,scores")
    assert (result.status, result.warnings) == ("done", [])
    expected = tmp_path / "expected.zarr"
    run(source, expected, settle=None, outputs="labels,scores")
    assert not first_difference(files_of(target), files_of(expected))
    assert run(source, target, follow=True, outputs="labels,scores").already_done


def test_a_heartbeat_says_what_is_there(run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    at_each_look(LiveImage(source, "full", 2).steps_of())
    told = []
    result = run(
        source,
        tmp_path / "out.zarr",
        lambda event: told.append((time.monotonic(), event)),
        follow=True,
    )
    beats = [event for _, event in told if isinstance(event, Following)]
    times = [at for at, event in told if isinstance(event, Following)]
    # It took all steps, not the last one alone.
    assert result.wall_s > times[-1] - times[0] - 0.001
    assert (beats[-1].n_there, beats[-1].n_done, beats[-1].is_over) == (2, 2, True)
    assert not any(beat.is_over for beat in beats[:-1])
    assert "does not exist" in beats[0].reason or "live.zarr" in beats[0].reason
    assert (2, 1) in {(beat.n_there, beat.n_done) for beat in beats}
    assert beats[-1].to_json()["event"] == "following"


def test_nothing_that_comes_is_an_error_that_writes_nothing(run, at_each_look, tmp_path):
    at_each_look(iter(()))
    with pytest.raises(SourceError, match="no timepoint appeared"):
        run(tmp_path / "live.zarr", tmp_path / "out.zarr", follow=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization": "series"}, "--normalization series needs all volumes"),
        ({"where": "data"}, "--where needs the finished source"),
        ({"regions": "cells"}, "--regions needs the finished source"),
        ({"channel": "golgi"}, "has no such channel"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(options, reason, run, tmp_path):
    source = tmp_path / "live.zarr"
    image = LiveImage(source, "full", 2)
    assert [*image.create(), *image.write(0)]
    before = files_of(tmp_path)
    with pytest.raises(SettingsError, match=reason):
        run(source, tmp_path / "out.zarr", follow=True, **options)
    assert files_of(tmp_path) == before
    with pytest.raises(SettingsError, match="another TARGET"):
        run(source, source, follow=True, outputs="labels")


def test_a_run_of_another_source_or_way_is_not_gone_on_with(run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    target = tmp_path / "out.zarr"
    at_each_look(LiveImage(source, "full", 2).steps_of())
    run(source, target, follow=True)
    shutil.rmtree(source)
    at_each_look(LiveImage(source, "full", 2, shape=(16, 40, 40)).steps_of())
    with pytest.raises(TargetError, match="has other changes than new timepoints"):
        run(source, target, follow=True)
    plain = write_image(tmp_path / "plain.zarr", blobs((16, 32, 40)))
    run(plain, tmp_path / "plain-out.zarr", settle=None, channel=0)
    with pytest.raises(TargetError, match="without --follow"):
        run(plain, tmp_path / "plain-out.zarr", follow=True, channel=0)


# -- a command for each volume


@pytest.mark.parametrize("follows", [True, False])
def test_a_command_is_told_of_each_volume(follows, run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    image = LiveImage(source, "full", 3)
    at_each_look(iter(()))
    assert list(image.steps_of())
    told = tmp_path / "told $(touch x) .jsonl"
    command = f"tee -a '{told}'"
    options = {"follow": True} if follows else {"settle": None}
    result = run(source, tmp_path / "out.zarr", on_volume=command, time="0:3", **options)
    assert result.warnings == []
    lines = list(map(json.loads, told.read_text().splitlines()))
    assert [line["t"] for line in lines] == [0, 1, 2]
    assert sum(line["objects"] for line in lines) == result.n_objects > 0
    for line in lines:
        assert line["published"] is follows
        assert line["channel_names"] == ["dna"]
        assert (Path(line["labels"][0]) / "0/zarr.json").exists()
    again = run(source, tmp_path / "out.zarr", on_volume=command, time="0:3", settle=None)
    assert again.already_done
    assert len(told.read_text().splitlines()) == 3


def test_a_command_that_fails_is_a_warning(run, tmp_path):
    source = tmp_path / "live.zarr"
    assert list(LiveImage(source, "full", 2).steps_of())
    command = "sh -c 'echo no stage >&2; exit 3'"
    result = run(source, tmp_path / "out.zarr", on_volume=command, settle=None)
    assert result.exit_code == 0
    [warning] = result.warnings
    assert "2 of 2 calls failed, the first for t=0 (exit code 3: no stage)" in warning
    with pytest.raises(SettingsError, match="no program no-such-program is found"):
        run(source, tmp_path / "other.zarr", on_volume="no-such-program -x", settle=None)
    assert not (tmp_path / "other.zarr").exists()
