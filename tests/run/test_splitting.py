"""``--split distance`` through whole runs: every output, in any block, with any workers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.cli.console import print_plan
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.job_array import join_run, record_plans, run_tasks
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.run.tasks import worker
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import write_image
from tests.fixtures.runs import segment_here
from tests.oracle.test_splitting_oracle import split_whole

SHAPE = (24, 64, 96)
SCALE = {"z": 0.3, "y": 0.2, "x": 0.2}
ONE = "24,64,96"
MANY = "10,30,40"
OPTIONS = {"threads": 1, "overlap": 0, "split": "distance", "split_depth": 0.2, "min_size": 20}


def touching_balls(shape=SHAPE, seed=0) -> np.ndarray:
    """Bright balls that touch in chains, some at the border of the volume."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    image = rng.integers(100, 140, shape).astype(np.uint16)
    for _ in range(5):
        center = rng.uniform(0, shape)
        for _ in range(4):
            radius = rng.uniform(4, 8)
            distance = sum((a - c) ** 2 for a, c in zip(grid, center, strict=True))
            image[distance < radius**2] += 900
            center = center + rng.normal(0, 1, 3) * (2, 9, 9)
    return image


@pytest.fixture
def source(tmp_path):
    image = touching_balls()
    return write_image(tmp_path / "image.zarr", image, image[::2, ::2, ::2], scale=SCALE)


@pytest.fixture
def run(source, tmp_path, tiny_bundle, cheap_engine):
    """Segment into a target by name."""

    def segment_into(name, source=source, **options):
        settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, **options})
        result = segment_here(str(source), str(tmp_path / name), settings)
        assert result.status == "done", result.failures
        return zarr.open_group(tmp_path / name, mode="r"), result

    return segment_into


def expected_of(mask, **options):
    given = {**OPTIONS, **options}
    spacing_um = tuple(SCALE.values())
    return split_whole(mask, 1, given["split_depth"], spacing_um, given["min_size"])


@pytest.mark.parametrize("block", [ONE, MANY])
def test_labels_pyramids_and_measurements_are_those_of_the_parts(block, run, tmp_path):
    outputs = "labels,scores,mask,measurements"
    out, result = run("out.zarr", block=block, outputs=outputs)
    labels = out["labels/megaseg/0"][...]
    mask = out["labels/megaseg_mask/0"][...]
    expected = expected_of(mask)
    assert_array_equal(labels, expected)
    whole, n_whole = run("whole.zarr", block=block, outputs=outputs, split="none", split_depth=None)
    assert_array_equal(mask, whole["labels/megaseg_mask/0"][...])
    assert result.n_objects == expected.max() > n_whole.n_objects > 1
    table = pq.read_table(tmp_path / "out.zarr.measurements.parquet").to_pydict()
    assert table["label"] == list(range(1, result.n_objects + 1))
    assert table["volume_voxels"] == np.bincount(labels.ravel())[1:].tolist()
    coarse = out["labels/megaseg/1"][...]
    assert 1 < len(np.unique(coarse)) <= result.n_objects + 1
    settings = out["labels/megaseg"].attrs["megaseg"]["settings"]
    assert settings["split"] == "distance"
    assert settings["split_depth"] == 0.2


@pytest.mark.parametrize("n_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_write_the_bytes_of_this_process(
    n_workers, source, run, tmp_path, tiny_bundle, monkeypatch
):
    settings = parse_settings(
        {"model": str(tiny_bundle), **OPTIONS, "block": MANY, "workers": n_workers}
    )
    monkeypatch.undo()  # workers are other processes: the network runs in both
    assert segment(str(source), str(tmp_path / "workers.zarr"), settings).status == "done"
    here = settings.model_copy(update={"workers": 0})
    assert segment(str(source), str(tmp_path / "here.zarr"), here).status == "done"
    assert contents(tmp_path / "workers.zarr") == contents(tmp_path / "here.zarr")


def test_in_place_a_region_several_channels_and_filled_holes(run, tmp_path):
    region, _ = run("roi.zarr", roi="4:24,0:50,20:90", block="9,30,30", outputs="labels,mask")
    mask = region["labels/megaseg_mask/0"][...]
    assert_array_equal(region["labels/megaseg/0"][...], expected_of(mask))
    channels = np.stack([touching_balls(), touching_balls(seed=1)])
    source = write_image(tmp_path / "two.zarr", channels, axes="czyx", scale=SCALE)
    own, _ = run(
        "two.zarr",
        source,
        channel="0,1",
        block=MANY,
        outputs="labels,mask",
        fill_holes=50,
        min_size=0,
    )
    for channel in "01":
        mask = own[f"labels/megaseg_{channel}_mask/0"][...]
        labels = own[f"labels/megaseg_{channel}/0"][...]
        assert_array_equal(labels, expected_of(mask, min_size=0))


def test_an_interrupted_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    run("a.zarr", block=MANY)
    calls = []

    def stop(workspace, stage, index, original=worker.run_task):
        calls.append((stage, index))
        stops = ("split", 3), ("rank", 0), ("relabel", 2)
        if calls[-1] in stops and calls.count(calls[-1]) == 1:
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    monkeypatch.setattr(worker, "run_task", stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run("b.zarr", block=MANY)
    run("b.zarr", block=MANY)
    n_split = sum(stage == "split" for stage, _ in calls)
    n_blocks = 3 * 3 * 3
    assert n_split == n_blocks + 1
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_lost_pieces_are_made_again(source, run, tmp_path, monkeypatch, tiny_bundle):
    run("a.zarr", block=MANY)

    def stop(workspace, stage, index, original=worker.run_task):
        if (stage, index) == ("relabel", 0):
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_task", stop)
        with pytest.raises(KeyboardInterrupt):
            run("b.zarr", block=MANY)
    pieces = sorted((tmp_path / "b.zarr.run").rglob("objects/pieces/*/*"))
    assert pieces
    for piece in pieces[::2]:
        piece.unlink()
    run("b.zarr", block=MANY)
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_job_arrays_split_too(source, run, tmp_path, tiny_bundle):
    run("a.zarr", block=MANY)
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "block": MANY})
    target = str(tmp_path / "b.zarr")
    [plan] = record_plans(str(source), target, settings)
    for stage in plan.stages:
        assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures
    assert join_run(target, "megaseg").status == "done"
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


@pytest.mark.parametrize("block", [ONE, MANY])
def test_an_object_larger_than_the_budget_is_named_and_kept_by_a_resume(
    block, source, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("megaseg_dask.plan.planner.LEAST_SPLIT_VOXELS", 4000)
    monkeypatch.setattr("megaseg_dask.plan.memory.SPLIT_BYTES", 400_000)
    out, result = run("out.zarr", block=block, outputs="labels,mask", memory="3GB")
    provenance = out["labels/megaseg"].attrs["megaseg"]
    max_voxels = provenance["left_whole"]["max_voxels"]
    [volume] = provenance["left_whole"]["volumes"]
    assert 4000 <= max_voxels < 8000
    objects = f"{volume['n_objects']} object"
    assert objects in result.warnings[0]
    assert f"(label {volume['labels'][0]}" in result.warnings[0]
    mask = out["labels/megaseg_mask/0"][...]
    expected = split_whole(mask, 1, 0.2, tuple(SCALE.values()), 20, max_voxels)
    assert_array_equal(out["labels/megaseg/0"][...], expected)
    assert not np.array_equal(expected, expected_of(mask))
    again, _ = run("out.zarr", block=block, outputs="labels,mask", memory="4GB")
    assert again["labels/megaseg"].attrs["megaseg"] == provenance


def test_a_run_that_resumes_with_more_memory_splits_the_same_objects(
    source, run, tmp_path, tiny_bundle
):
    options = {"model": str(tiny_bundle), **OPTIONS, "block": MANY, "memory": "2GB"}
    target = str(tmp_path / "out.zarr")
    [plan] = record_plans(str(source), target, parse_settings(options))
    for memory in ("2GB", "3GB"):
        settings = parse_settings({**options, "memory": memory})
        [(again, _)] = plan_runs(str(source), target, settings)
        assert again.split_voxels == plan.split_voxels
    assert max(plan.projected_bytes.values()) <= 2e9


@pytest.mark.parametrize(("split_bytes", "told"), [(400_000, "Mvoxel"), (1, "objects of any size")])
def test_a_plan_says_which_objects_can_be_split(
    split_bytes, told, source, tmp_path, tiny_bundle, monkeypatch, capsys
):
    monkeypatch.setattr("megaseg_dask.plan.planner.LEAST_SPLIT_VOXELS", 4000)
    monkeypatch.setattr("megaseg_dask.plan.memory.SPLIT_BYTES", split_bytes)
    options = {"model": str(tiny_bundle), **OPTIONS, "block": ONE, "memory": "3GB"}
    [(plan, _)] = plan_runs(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    summary = summarize(plan)
    assert summary["split_voxels"] == plan.split_voxels
    print_plan(
        {**summary, "patch_s": None, "projected_s": None, "time_unknown": "", "tasks_done": 0}
    )
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("split")]
    assert told in row


def test_wrong_requests(run, tmp_path):
    with pytest.raises(SettingsError, match="needs --split distance"):
        run("a.zarr", split="none")
    unknown = write_image(tmp_path / "unknown.zarr", touching_balls())
    path = unknown / "zarr.json"
    path.write_text(path.read_text().replace('"micrometer"', '"pixel"'))
    with pytest.raises(SettingsError, match=r"measures in µm.*omit --split"):
        run("b.zarr", unknown)
    assert not (tmp_path / "b.zarr").exists()
    for depth in ("0", "-1", "nan", "inf"):
        with pytest.raises(SettingsError, match="--split-depth"):
            run("c.zarr", split_depth=depth)
