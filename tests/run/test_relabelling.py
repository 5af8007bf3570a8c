"""``megaseg relabel``: labels of what was predicted are those of a new run, and no network runs."""

import errno
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_array_equal
from skimage.measure import label
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app, main
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Notice, ignore
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.runner import relabel
from megaseg_dask.run.status import status
from megaseg_dask.run.tasks import worker
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.write import write_report
from megaseg_dask.tools.view.gallery import Gallery
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here
from tests.run.test_splitting import MANY, ONE, SCALE, touching_balls

OPTIONS = {"threads": 1, "overlap": 0, "scores_dtype": "float32"}


@pytest.fixture
def source(tmp_path):
    return write_image(tmp_path / "image.zarr", touching_balls(), scale=SCALE)


@pytest.fixture
def run(source, tmp_path, tiny_bundle, cheap_engine):
    """Segment into a target by name."""

    def segment_into(name, source=source, emit=ignore, **options):
        settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, **options})
        result = segment_here(str(source), str(tmp_path / name), settings, emit=emit)
        assert result.status == "done", result.failures
        return zarr.open_group(tmp_path / name, mode="r")

    return segment_into


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Label again, in this process, without bundle and network."""

    def relabel_into(name, label_name="again", **options):
        with monkeypatch.context() as patch:

            def refuse(*_, **__):
                raise AssertionError("a bundle is read")

            patch.setattr("megaseg_dask.run.tasks.scores.open_engine", refuse)
            patch.setattr("megaseg_dask.models.registry.describe", refuse)
            patch.setattr("megaseg_dask.plan.planner.describe", refuse)
            settings = parse_settings({"workers": 0, "label_name": label_name, **options})
            result = relabel(str(tmp_path / name), settings)
        group = zarr.open_group(tmp_path / name, mode="r")
        return group, result

    return relabel_into


CHANGES = [
    {"threshold": 0.8},
    {"threshold": 0.7, "connectivity": 3, "min_size": 40, "fill_holes": 30},
    {"split": "distance", "split_depth": 0.2, "min_size": 20},
]


@pytest.mark.parametrize(
    ("block", "changes", "keep_logits"),
    [
        (ONE, CHANGES[0], False),
        (MANY, CHANGES[1], False),
        (MANY, CHANGES[2], False),
        (ONE, CHANGES[2], True),
        (MANY, CHANGES[0], True),
    ],
)
def test_labels_are_those_of_a_new_run(block, changes, keep_logits, run, again):
    run("out.zarr", block=block, keep_logits=keep_logits)
    found, result = again("out.zarr", outputs="labels,mask", **changes)
    assert result.status == "done", result.failures
    new = run("new.zarr", block=block, outputs="labels,scores,mask", **changes)
    for kind in ("", "_mask"):
        expected = new[f"labels/megaseg{kind}/0"][...]
        assert_array_equal(found[f"labels/again{kind}/0"][...], expected)
    assert 1 < result.n_objects == new["labels/megaseg/0"][...].max()
    levels = sorted(new["labels/megaseg"].array_keys())
    assert sorted(found["labels/again"].array_keys()) == levels
    ours = dict(found["labels/again"].attrs["megaseg"])
    theirs = new["labels/megaseg"].attrs["megaseg"]
    assert ours.pop("basis")["kind"] == ("logits" if keep_logits else "scores")
    for key in ("model", "engine", "normalization", "threshold", "source"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize("block", [ONE, MANY])
def test_automatic_thresholds_come_from_kept_logits(block, run, again, tmp_path):
    run("out.zarr", block=block, keep_logits=True)
    for method in ("otsu", "li"):
        found, _ = again("out.zarr", method, threshold=method)
        assert again("out.zarr", method, threshold=method)[1].already_done
        new = run(f"{method}.zarr", block=block, threshold=method)
        assert_array_equal(found[f"labels/{method}/0"][...], new["labels/megaseg/0"][...])
        [threshold] = found[f"labels/{method}"].attrs["megaseg"]["threshold"]
        assert [threshold] == new["labels/megaseg"].attrs["megaseg"]["threshold"]
        assert threshold["unit"] == "logit"
        score = 1 / (1 + np.exp(-threshold["threshold"]))
        assert threshold["score"] == pytest.approx(score, abs=1e-6)


def test_automatic_thresholds_need_kept_logits(run, again):
    run("out.zarr")
    with pytest.raises(SettingsError, match=r"kept only scores.*--keep-logits"):
        again("out.zarr", threshold="otsu")


def test_scores_of_eight_bits_are_above_255_times_the_threshold(run, again):
    scores = run("out.zarr", scores_dtype="uint8")["0"][...]
    for threshold in (0.0, 0.3, 0.5, 0.6, 1.0):
        name = f"at-{threshold}"
        found, result = again("out.zarr", name, threshold=threshold)
        expected = label(scores.astype(float) > 255 * threshold, connectivity=1)
        assert_array_equal(found[f"labels/{name}/0"][...], expected)
        assert "within 1/510" in result.warnings[0]
        basis = found[f"labels/{name}"].attrs["megaseg"]["basis"]
        assert basis["foreground"] == "score_u8 > 255 * threshold"


def test_the_run_itself_is_left_as_it_was(run, again, tmp_path):
    run("out.zarr", outputs="labels,scores,measurements", block=MANY)
    folder = tmp_path / "out.zarr"
    table = tmp_path / "out.zarr.measurements.parquet"
    before = {**contents(folder), "table": table.read_bytes()}
    outputs = "labels,measurements"
    found, result = again("out.zarr", outputs=outputs, threshold=0.6, min_size=9)
    after = {**contents(folder), "table": table.read_bytes()}
    changed = {path for path in before if before[path] != after[path]}
    shared = {"labels/zarr.json", "tables/zarr.json"}
    assert {str(path) for path in changed} <= shared
    new = set(after) - set(before)
    assert all(str(path).startswith(("labels/again/", "tables/again/")) for path in new)
    assert set(found["labels"].attrs["ome"]["labels"]) == {"megaseg", "again"}
    rows = pq.read_table(tmp_path / "out.zarr.again.measurements.parquet").to_pydict()
    assert rows["label"] == list(range(1, result.n_objects + 1))
    other = run("new.zarr", outputs="labels,scores,measurements", threshold=0.6, min_size=9)
    expected = pq.read_table(tmp_path / "new.zarr.measurements.parquet").to_pydict()
    assert rows == expected
    assert other["0"].shape == found["0"].shape
    # The run is still believed, and resumes as done.
    run("out.zarr", outputs="labels,scores,measurements", block=MANY)


def test_it_resumes_to_the_same_bytes_and_is_done_once(run, again, tmp_path, monkeypatch):
    changes = {"split": "distance", "split_depth": 0.2, "threshold": 0.6, "workers": 0}
    run("a.zarr", block=MANY)
    run("b.zarr", block=MANY)
    again("a.zarr", **changes)
    calls = []

    def stop(workspace, stage, index, original=worker.run_task):
        calls.append((stage, index))
        if calls[-1] in [("reread", 4), ("relabel", 5)] and calls.count(calls[-1]) == 1:
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    monkeypatch.setattr(worker, "run_task", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            again("b.zarr", **changes)
    _, result = again("b.zarr", **changes)
    assert sum(stage == "reread" for stage, _ in calls) == 27 + 1
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")
    assert not result.already_done
    assert again("b.zarr", **changes)[1].already_done
    with pytest.raises(TargetError, match="belongs to another run"):
        again("b.zarr", threshold=0.9)
    found, _ = again("b.zarr", threshold=0.9, overwrite=True)
    assert found["labels/again"].attrs["megaseg"]["settings"]["threshold"] == 0.9
    names = {each.label_name: each.done for each in status(str(tmp_path / "b.zarr"))}
    assert names == {"megaseg": True, "again": True}


@pytest.mark.parametrize("label_name", ["megaseg", "strict", "other"])
def test_labels_go_with_the_scores_that_they_were_made_of(label_name, run, again, tmp_path):
    run("out.zarr")
    measured = {"outputs": "labels,mask,measurements", "threshold": 0.6}
    again("out.zarr", "strict", **measured)
    again("out.zarr", "csv", table="csv", **measured)
    # Another program put its own labels where a run had been.
    again("out.zarr", "foreign", threshold=0.6)
    foreign = zarr.open_group(tmp_path / "out.zarr/labels/foreign", mode="w")
    foreign.create_array("0", data=np.ones(3))
    notices = []
    options = {"label_name": label_name, "overlap": 0.5, "overwrite": True}
    found = run("out.zarr", emit=notices.append, **options)
    text = " ".join(event.text for event in notices if isinstance(event, Notice))
    assert "labels csv were made from scores that this run replaces" in text
    assert "labels strict were made from scores that this run replaces" in text
    kept = {"foreign", "megaseg", label_name}
    assert set(found["labels"].group_keys()) == kept
    assert set(found["labels"].attrs["ome"]["labels"]) == kept
    assert list(tmp_path.glob("out.zarr.*measurements*")) == []
    assert list(tmp_path.glob("out.zarr/tables/*/")) == []
    assert [each.label_name for each in status(str(tmp_path / "out.zarr"))] == [label_name]
    assert again("out.zarr", "csv", table="csv", **measured)[1].already_done is False


def test_tables_go_with_the_labels_that_are_made_again_without_them(run, again, tmp_path):
    run("out.zarr", outputs="labels,scores,measurements")
    table = tmp_path / "out.zarr.measurements.parquet"
    before = table.read_bytes()
    again("out.zarr", threshold=0.6, outputs="labels,measurements")
    assert (tmp_path / "out.zarr.again.measurements.parquet").exists()
    again("out.zarr", threshold=0.7, outputs="labels", overwrite=True)
    assert list(tmp_path.glob("out.zarr.*measurements*")) == [table]
    assert table.read_bytes() == before


def test_labels_of_fields_whose_scores_stay_are_kept(run, again, tmp_path):
    fields = {path: FieldSpec(shape=(16, 40, 40)) for path in ("A/1/0", "A/2/0")}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    run("out.zarr", source, channel="dna")
    again("out.zarr", "strict", threshold=0.6)
    found = run("out.zarr", source, channel="dna", wells="A/2", overwrite=True)
    assert set(found["A/1/0/labels"].group_keys()) == {"megaseg", "strict"}
    assert set(found["A/2/0/labels"].group_keys()) == {"megaseg"}
    assert "strict" not in {each.label_name for each in status(str(tmp_path / "out.zarr"))}


def test_what_was_lost_is_made_again(run, again, tmp_path):
    run("out.zarr", block=MANY)
    again("out.zarr", threshold=0.6)
    expected = contents(tmp_path / "out.zarr")
    chunks = (tmp_path / "out.zarr/labels/again/0").rglob("c/**/*")
    next(path for path in sorted(chunks) if path.is_file()).unlink()
    again("out.zarr", threshold=0.6)
    assert contents(tmp_path / "out.zarr") == expected


def test_scores_that_are_lost_are_no_background(run, again, tmp_path):
    run("out.zarr", block=MANY)
    chunks = [path for path in (tmp_path / "out.zarr/0/c").rglob("*") if path.is_file()]
    chunks[0].unlink()
    with pytest.raises(TargetError, match="are missing; first run"):
        again("out.zarr", threshold=0.6)
    assert not (tmp_path / "out.zarr/labels/again").exists()


def test_a_block_that_was_not_predicted_is_missing_again_until_it_is(
    source, run, again, tmp_path, tiny_bundle, monkeypatch
):
    def fail(workspace, stage, index, original=worker.run_task):
        if (stage, index) == ("segment", 5):
            raise ValueError("no")
        return original(workspace, stage, index)

    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "block": MANY})
    target = str(tmp_path / "out.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_task", fail)
        assert segment_here(str(source), target, settings).status == "failed"
    with pytest.raises(TargetError, match="belongs to another run") as refused:
        segment_here(str(source), target, settings.model_copy(update={"threshold": 0.6}))
    # Another threshold of what is not complete is no answer.
    assert "relabel" not in str(refused.value)
    found, result = again("out.zarr", threshold=0.6)
    assert result.status == "failed"
    assert "is missing: that run did not make it, or it was removed" in result.failures[0].error
    assert "finish that run" in result.failures[0].error
    shown = CliRunner().invoke(build_app(), ["status", target, "--label-name", "again"])
    assert (shown.exit_code, "run the same relabel command again" in shown.output) == (1, True)
    [missing] = found["labels/again"].attrs["megaseg"]["missing_boxes"]
    theirs = found["labels/megaseg"].attrs["megaseg"]["missing_boxes"]
    assert missing == theirs[0]
    run("out.zarr", block=MANY)
    found, result = again("out.zarr", threshold=0.6)
    assert result.status == "done", result.failures
    new = run("new.zarr", threshold=0.6)
    assert_array_equal(found["labels/again/0"][...], new["labels/megaseg/0"][...])


def test_timepoints_channels_and_a_region(run, again, tmp_path):
    frames = [np.stack([touching_balls(seed=t), touching_balls(seed=t + 7)]) for t in range(2)]
    source = write_image(tmp_path / "series.zarr", np.stack(frames), axes="tczyx", scale=SCALE)
    options = {"channel": "0,1", "roi": "4:24,0:50,20:90", "block": "9,30,30"}
    run("out.zarr", source, **options)
    found, result = again("out.zarr", threshold=0.6)
    assert not result.already_done
    assert again("out.zarr", threshold=0.6)[1].already_done
    new = run("new.zarr", source, threshold=0.6, **options)
    for channel in "01":
        expected = new[f"labels/megaseg_{channel}/0"][...]
        assert_array_equal(found[f"labels/again_{channel}/0"][...], expected)
        assert expected.max() > 1


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_whose_fields_took_several_runs(version, run, again, tmp_path):
    fields = {
        "A/1/0": FieldSpec(shape=(16, 40, 40)),
        "A/1/1": FieldSpec(shape=(16, 40, 40), seed=3),
        "B/2/0": FieldSpec(shape=(16, 32, 56), seed=5),
    }
    source = write_fields(tmp_path / "plate.zarr", version, fields)
    options = {"channel": "dna", "ome_zarr": version}
    run("out.zarr", source, **options)
    outputs = "labels,measurements"
    found, result = again("out.zarr", threshold=0.6, outputs=outputs)
    assert result.status == "done", result.failures
    new = run("new.zarr", source, threshold=0.6, **options)
    for path in fields:
        expected = new[f"{path}/labels/megaseg/0"][...]
        assert expected.max() > 1
        assert_array_equal(found[f"{path}/labels/again/0"][...], expected)
    table = pq.read_table(tmp_path / "out.zarr.again.measurements.parquet").to_pydict()
    assert len(table["label"]) == result.n_objects
    assert set(table["well"]) == {"A/1", "B/2"}
    done = {each.label_name: each.done for each in status(str(tmp_path / "out.zarr"))}
    assert done == dict.fromkeys(["again", "again+2", "megaseg", "megaseg+2"], True)


def test_the_viewer_shows_the_image_and_the_scores_once(run, again, tmp_path):
    run("out.zarr", block=ONE)
    again("out.zarr", threshold=0.6)
    target = str(tmp_path / "out.zarr")
    layers = Gallery(target).scene("").layers
    assert [layer.kind for layer in layers].count("image") == 1
    assert [layer.kind for layer in layers].count("scores") == 1
    names = [layer.name for layer in layers if layer.kind == "labels"]
    assert names == ["labels megaseg", "labels again"]
    assert [layer.threshold for layer in layers if layer.kind == "scores"] == [0.5]
    # One name alone has the scores too, and the threshold of its labels.
    gallery = Gallery(target, "again")
    image, labels, scores = gallery.scene("").layers
    assert (image.kind, labels.name, scores.kind) == ("image", "labels again", "scores")
    assert (scores.threshold, scores.location) == (0.6, Location.of(target))
    assert gallery.command("") == f"megaseg relabel {target}"
    with pytest.raises(TargetError, match=r"agian is recorded at .*; choose one of again, megaseg"):
        Gallery(target, "agian")


def test_a_report_of_it(run, again, tmp_path):
    run("out.zarr", outputs="labels,scores,measurements", block=MANY)
    again("out.zarr", threshold=0.6, outputs="labels,measurements", min_size=9)
    file = write_report(str(tmp_path / "out.zarr"), label_name="again")
    assert file == Location.of(tmp_path / "out.zarr.again.report.html")
    text = file.path.read_text()
    # Each part of the command stays on one line.
    assert "<span>relabel</span>" in text
    assert "<span>--threshold 0.6</span>" in text
    # Without a name it is about the run that predicted, and has a file of its own.
    file = write_report(str(tmp_path / "out.zarr"))
    assert file == Location.of(tmp_path / "out.zarr.report.html")
    assert "megaseg relabel" not in file.path.read_text().split("Provenance")[0]


def test_logits_that_nothing_could_be_made_of_are_not_kept(run, source):
    before = contents(source)
    with pytest.raises(SettingsError, match="--keep-logits needs another target"):
        run("image.zarr", outputs="labels", keep_logits=True)
    assert contents(source) == before


def test_wrong_requests_write_nothing(run, again, source, tmp_path):
    run("out.zarr")
    before = contents(tmp_path / "out.zarr")
    with pytest.raises(SettingsError, match="scores exist already"):
        again("out.zarr", outputs="labels,scores")
    with pytest.raises(SettingsError, match="choose a new name"):
        again("out.zarr", "megaseg", threshold=0.6)
    with pytest.raises(SettingsError, match="--label-name is needed"):
        relabel(str(tmp_path / "out.zarr"), parse_settings({"threshold": 0.6}))
    with pytest.raises(TargetError, match="no run is recorded"):
        again("image.zarr")
    with pytest.raises(TargetError, match=r"does not exist \(out.zarr is there\); give the TARGET"):
        again("ut.zarr")
    run("labels.zarr", outputs="labels")
    with pytest.raises(SettingsError, match="kept neither scores nor logits"):
        again("labels.zarr", threshold=0.6)
    zarr.open_array(source / "0", mode="r+")[0, 0, 0] += 1
    with pytest.raises(SourceError, match="changed since it was predicted"):
        again("out.zarr", outputs="labels,measurements")
    again_in_place = {"outputs": "labels", "label_name": "own"}
    run("image.zarr", **again_in_place)
    with pytest.raises(SettingsError, match="kept neither"):
        again("image.zarr", threshold=0.6)
    assert contents(tmp_path / "out.zarr") == before


def test_a_target_that_cannot_be_written_is_refused_unless_all_is_done(
    run, again, tmp_path, monkeypatch
):
    run("out.zarr")
    again("out.zarr", "first")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    before = contents(tmp_path)
    with pytest.raises(TargetError, match=r"out\.zarr cannot be written: Read-only .*; choose"):
        again("out.zarr", "second")
    assert again("out.zarr", "first")[1].already_done
    assert contents(tmp_path) == before


def test_segment_names_the_command_and_the_command_works(run, tmp_path, capsys):
    run("out.zarr", min_size=5)
    with pytest.raises(TargetError, match="only --threshold differs") as refused:
        run("out.zarr", min_size=5, threshold=0.7)
    command = str(refused.value).rsplit(": ", 1)[1]
    words = shlex.split(command.replace("NEW", "strict"))
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--workers", "0", "--json"])
    assert ended.value.code == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["status"]) == ("result", "done")
    new = run("new.zarr", min_size=5, threshold=0.7)
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert_array_equal(found["labels/strict/0"][...], new["labels/megaseg/0"][...])
    with pytest.raises(TargetError) as refused:
        run("out.zarr", min_size=5, threshold="otsu")
    assert "relabel" not in str(refused.value)


def test_segment_names_the_command_for_measurements_that_were_forgotten(run, again, tmp_path):
    run("out.zarr")
    measured = {"outputs": "labels,scores,measurements"}
    with pytest.raises(TargetError, match="only --outputs differs") as refused:
        run("out.zarr", **measured)
    assert str(refused.value).endswith("--label-name NEW --outputs labels,measurements")
    again("out.zarr", outputs="labels,measurements")
    run("new.zarr", **measured)
    names = ("out.zarr.again", "new.zarr")
    found, expected = (
        pq.read_table(tmp_path / f"{name}.measurements.parquet").to_pydict() for name in names
    )
    assert found == expected
    # The table is asked for again, though it does not differ.
    with pytest.raises(TargetError, match=r"--threshold 0.6 --outputs|--outputs .*--threshold 0.6"):
        run("new.zarr", threshold=0.6, **measured)
    for less in ("labels", "scores"):
        with pytest.raises(TargetError) as refused:
            run("out.zarr", outputs=less)
        assert "relabel" not in str(refused.value)


def test_nothing_is_named_that_an_unfinished_run_cannot_do(run, source, tmp_path, tiny_bundle):
    options = {"model": str(tiny_bundle), **OPTIONS, "block": MANY}
    record_plans(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    with pytest.raises(TargetError, match="belongs to another run") as refused:
        run("out.zarr", block=MANY, threshold=0.6)
    assert "relabel" not in str(refused.value)


def test_a_target_that_was_moved_with_its_runs(run, again, tmp_path):
    run("out.zarr", keep_logits=True, block=MANY)
    for suffix in ("", ".run"):
        Path(tmp_path / f"out.zarr{suffix}").rename(tmp_path / f"moved.zarr{suffix}")
    (tmp_path / "image.zarr").rename(tmp_path / "gone.zarr")
    found, result = again("moved.zarr", threshold="otsu")
    assert result.n_objects == found["labels/again/0"][...].max() > 1
    plan = RunFolder(Location.of(str(tmp_path / "moved.zarr.run/again"))).read_plan()
    assert Journal.read(plan).result is not None
