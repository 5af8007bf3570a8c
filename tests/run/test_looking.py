"""What is looked at has the bits of a run, and with a target is a part of it."""

import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import zarr

from megaseg_dask.errors import SettingsError, StoreError, TargetError
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.inference.remembering import PatchMemory, Turns, digest_of
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import looked_at, looking, runner
from megaseg_dask.run.lease import Leases, Timing
from megaseg_dask.run.looking import Looking
from megaseg_dask.run.tasks import statistics
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.prediction import Key
from tests.fixtures.images import blobs, write_image
from tests.fixtures.looking import WAIT_S, viewing
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

SHAPE = (40, 96, 160)
BLOCKS = ["40,96,160", "24,32,48", "16,64,64"]


def settings_of(bundle, **options):
    return parse_settings({"model": str(bundle), "engine": "torch", "threads": 1, **options})


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def wait_for(condition) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def source(tmp_path):
    image = blobs(SHAPE)
    return write_image(tmp_path / "image.zarr", image, image[:, ::2, ::2], image[:, ::4, ::4])


@pytest.fixture
def forward(cheap_engine, monkeypatch):
    """Count the forward passes of this process."""
    passes = []

    def count(self, patches, original=TorchEngine.__call__):
        passes.append(len(patches))
        return original(self, patches)

    monkeypatch.setattr(TorchEngine, "__call__", count)
    return passes


OPTIONS = [
    {},
    {"scores_dtype": "float32", "normalization": "900,300"},
    {"voxel_size": "1,0.8,1.3"},
    {"roi": "4:36,10:90,20:140"},
    {"normalization": "level:1"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_seen_is_what_a_run_writes_at_any_block(
    options, source, tmp_path, tiny_bundle, cheap_engine
):
    segment_here(str(source), str(tmp_path / "out.zarr"), settings_of(tiny_bundle, **options))
    written = zarr.open_group(tmp_path / "out.zarr", mode="r")
    # Of a block all kinds of boxes are the same: options are tried on one.
    for block in BLOCKS[1:2] if options else BLOCKS:
        settings = settings_of(tiny_bundle, block=block, **options)
        with viewing(source, None, settings) as viewer:
            assert viewer.chunk(0, 0, 0, level=2) is None
            for position in ((0, 1, 1), (0, 0, 0)):
                seen = viewer.chunk(*position)
                assert seen.tobytes() == written["0"][viewer.box(*position).slices].tobytes()


def test_what_is_seen_through_a_mask_is_what_a_run_writes(
    source, tmp_path, tiny_bundle, cheap_engine
):
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:20, 20:50, 30:80] = 1
    where = write_image(tmp_path / "mask.zarr", mask)
    options = {"where": str(where), "unmarked": True, "block": BLOCKS[1]}
    settings = settings_of(tiny_bundle, **options)
    segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    written = zarr.open_array(tmp_path / "out.zarr/0", mode="r")
    with viewing(source, None, settings) as viewer:
        for position in ((0, 0, 0), (0, 1, 2)):
            seen = viewer.chunk(*position)
            np.testing.assert_array_equal(seen, written[viewer.box(*position).slices])


def test_a_field_of_a_plate_is_seen_by_the_statistics_of_the_plate(
    tmp_path, tiny_bundle, cheap_engine
):
    fields = {path: FieldSpec(seed=n) for n, path in enumerate(["A/1/0", "B/2/0"])}
    plate = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    settings = settings_of(tiny_bundle, normalization="plate", channel="dna")
    segment_here(str(plate), str(tmp_path / "out.zarr"), settings)
    written = zarr.open_array(tmp_path / "out.zarr/B/2/0/0", mode="r")
    with viewing(plate, None, settings, field="B/2/0") as viewer:
        np.testing.assert_array_equal(viewer.chunk(0, 0, 0, 0)[None], written)


def test_coarse_levels_are_those_of_a_run_as_far_as_they_are_known(
    source, tmp_path, tiny_bundle, cheap_engine
):
    settings = settings_of(tiny_bundle)
    segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    written = zarr.open_group(tmp_path / "out.zarr", mode="r")
    with viewing(source, None, settings) as viewer:
        viewer.chunk(0, 0, 0)
        known = viewer.chunk(0, 0, 0, level=1)
        np.testing.assert_array_equal(known[:, :32, :32], written["1"][:, :32, :32])
        assert not known[:, 32:].any()
        assert not known[:, :, 32:].any()
        for position in ((0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)):
            viewer.chunk(*position)
        for level in (1, 2):
            whole = viewer.chunk(0, 0, 0, level=level)
            box = viewer.box(0, 0, 0, level=level)
            np.testing.assert_array_equal(whole, written[str(level)][box.slices])


@pytest.mark.parametrize(("block", "n_viewed"), [("40,96,160", 1), ("40,64,64", 2)])
def test_a_run_computes_the_rest_of_what_was_viewed_and_ends_in_the_same_bytes(
    block, n_viewed, source, tmp_path, tiny_bundle, forward
):
    settings = settings_of(tiny_bundle, block=block)
    undisturbed = tmp_path / "a.zarr"
    viewed = tmp_path / "b.zarr"
    segment_here(str(source), str(undisturbed), settings)
    n_whole = len(forward)
    forward.clear()
    with viewing(source, viewed, settings) as viewer:
        for position in ((0, 0, 1), (0, 1, 0))[:n_viewed]:
            seen = viewer.chunk(*position)
        run = viewer.looking.runs[0]
        name = "volume" if run.plan.is_one_task else "segment"
        wait_for(lambda: run.journal.done(name).sum() == n_viewed)
        assert not viewer.looking.problem
        grid = run.plan.patch_grid
        cores = [run.plan.block_grid()[n] for n in np.flatnonzero(run.journal.done(name))]
    n_of_viewed = sum(map(grid.count_touching, cores))
    # No patch was predicted twice: neither by looks, nor by the tasks of blocks.
    assert len(forward) <= n_of_viewed
    forward.clear()
    result = segment_here(str(source), str(viewed), settings)
    assert result.status == "done"
    assert len(forward) == n_whole - n_of_viewed
    assert contents(viewed) == contents(undisturbed)
    written = zarr.open_array(undisturbed / "0", mode="r")
    np.testing.assert_array_equal(seen, written[viewer.box(*position).slices])


def test_the_middle_is_there_before_anybody_asks_and_is_recorded_only_then(
    source, tmp_path, tiny_bundle, cheap_engine
):
    settings = settings_of(tiny_bundle, block="40,64,64")
    with viewing(source, tmp_path / "out.zarr", settings) as viewer:
        viewer.image.foresee()
        # Of those at the middle it takes the fewest patches.
        key = Key(0, True, 0, (0, 1, 1))
        run = viewer.looking.runs[0]
        wait_for(lambda: viewer.scores.find(run, key) is not None)
        assert not viewer.looking._work.tasks
        # It is answered without waiting, and is a task from now on.
        assert isinstance(viewer.image.chunk("0/c/0/1/1"), bytes)
        wait_for(lambda: run.journal.done("segment").sum() == 1)
    segment_here(str(source), str(tmp_path / "a.zarr"), settings)
    seen = viewer.scores.find(run, key)[0]
    written = zarr.open_array(tmp_path / "a.zarr/0", mode="r")
    np.testing.assert_array_equal(seen, written[viewer.box(0, 1, 1).slices])


def test_a_finished_target_is_read_and_nothing_is_predicted(source, tmp_path, tiny_bundle, forward):
    settings = settings_of(tiny_bundle, block="40,64,64")
    segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    before = contents(tmp_path / "out.zarr.run")
    forward.clear()
    with viewing(source, tmp_path / "out.zarr", settings) as viewer:
        seen = viewer.chunk(0, 1, 1)
        whole = viewer.chunk(0, 0, 0, level=2)
    written = zarr.open_group(tmp_path / "out.zarr", mode="r")
    np.testing.assert_array_equal(seen, written["0"][viewer.box(0, 1, 1).slices])
    np.testing.assert_array_equal(whole, written["2"])
    assert not forward
    assert contents(tmp_path / "out.zarr.run") == before


@pytest.mark.parametrize("target", [None, "out.zarr"])
def test_scores_of_a_large_volume_are_provisional_until_it_is_measured(
    target, source, tmp_path, tiny_bundle, cheap_engine, monkeypatch
):
    settings = settings_of(tiny_bundle, block="24,32,48")
    segment_here(str(source), str(tmp_path / "a.zarr"), settings)
    monkeypatch.setattr(looked_at, "QUICK_VOXELS", 0)
    may_measure = threading.Event()

    def wait(workspace, volume, number, original=looked_at.measure_block):
        assert may_measure.wait(WAIT_S)
        return original(workspace, volume, number)

    for module in (looked_at, statistics):
        monkeypatch.setattr(module, "measure_block", wait)
    target = target and tmp_path / target
    with viewing(source, target, settings) as viewer:
        viewer.looking.changed = viewer.image.refresh
        provisional = viewer.chunk(0, 0, 0)
        wait_for(lambda: viewer.looking.status)
        assert "Provisional scores: intensities are normalized by" in viewer.looking.status
        assert viewer.image.generation == 0
        may_measure.set()
        wait_for(lambda: viewer.image.generation)
        wait_for(lambda: not viewer.looking.status)
        exact = viewer.chunk(0, 0, 0)
    written = zarr.open_array(tmp_path / "a.zarr/0", mode="r")
    np.testing.assert_array_equal(exact, written[viewer.box(0, 0, 0).slices])
    assert (exact != provisional).any()


def test_a_second_client_is_refused_by_name_and_a_viewer_as_well(
    source, tmp_path, tiny_bundle, cheap_engine, monkeypatch
):
    for module in (looking, runner):
        monkeypatch.setattr(module, "LEASE_TIMING", Timing(beat_s=0.1))
    target = tmp_path / "out.zarr"
    settings = settings_of(tiny_bundle)
    with viewing(source, target, settings), pytest.raises(TargetError, match="is being written by"):
        segment_here(str(source), str(target), settings)
    with (
        Leases(Location.of(tmp_path / "out.zarr.run"), Timing(beat_s=0.1)).hold(),
        pytest.raises(TargetError, match="is being written by"),
        viewing(source, target, settings),
    ):
        pass


def test_a_wrong_request_writes_nothing(source, tmp_path, tiny_bundle, cheap_engine):
    with pytest.raises(SettingsError):
        Looking(str(source), str(tmp_path / "out.zarr"), settings_of(tiny_bundle, patch="7,7,7"))
    other = settings_of(tiny_bundle, threshold="0.3")
    segment_here(str(source), str(tmp_path / "b.zarr"), settings_of(tiny_bundle, outputs="scores"))
    with pytest.raises(TargetError):
        Looking(str(source), str(tmp_path / "b.zarr"), other)
    assert not (tmp_path / "out.zarr").exists()
    assert not (tmp_path / "out.zarr.run").exists()


def test_a_task_that_fails_is_named_and_what_else_is_looked_at_goes_on(
    source, tmp_path, tiny_bundle, cheap_engine, monkeypatch
):
    def fail(workspace, volume, number):
        raise RuntimeError("the disk is ill")

    settings = settings_of(tiny_bundle, block="40,64,64")
    with monkeypatch.context() as patch, viewing(source, tmp_path / "out.zarr", settings) as viewer:
        patch.setattr("megaseg_dask.run.tasks.scores.segment_block", fail)
        assert viewer.chunk(0, 0, 0) is not None
        wait_for(lambda: viewer.looking.problem)
        assert "t=0 c=0 0:40,0:64,0:64: RuntimeError: the disk is ill" in viewer.looking.problem
        assert viewer.chunk(0, 1, 1) is not None
    # A task that failed is tried again by the run.
    assert segment_here(str(source), str(tmp_path / "out.zarr"), settings).status == "done"


def test_a_source_that_is_gone_is_named_until_it_is_back(
    source, tmp_path, tiny_bundle, cheap_engine
):
    with viewing(source, None, settings_of(tiny_bundle)) as viewer:
        source.rename(tmp_path / "moved.zarr")
        with pytest.raises(StoreError, match="restore it") as raised:
            viewer.chunk(0, 0, 0)
        viewer.image.report(raised.value)
        assert "restore it" in viewer.looking.status
        (tmp_path / "moved.zarr").rename(source)
        assert viewer.chunk(0, 0, 1).any()
        # What failed is asked for again.
        assert not viewer.looking.is_problem
        assert viewer.image.generation == 1


def test_the_end_comes_between_two_patches_of_what_is_waited_for(
    source, tmp_path, tiny_bundle, cheap_engine, monkeypatch
):
    passes = []

    def predict(self, patches, original=TorchEngine.__call__):
        passes.append(len(patches))
        viewer.looking.stop()
        return original(self, patches)

    monkeypatch.setattr(TorchEngine, "__call__", predict)
    with viewing(source, None, settings_of(tiny_bundle)) as viewer:
        waiting = viewer.image.chunk("0/c/0/0/0")
        # Nobody gets a part of a chunk.
        assert waiting.future.result(WAIT_S) == b""
    assert len(passes) == 1


def test_memory_of_patches_is_bounded_and_forgets_what_was_not_used_for_longest():
    patches = [np.full((1, 2, 2, 2), n, np.float32) for n in range(4)]
    memory = PatchMemory(2 * patches[0].nbytes)
    for n, patch in enumerate(patches[:2]):
        memory.keep(digest_of(patch), patch)
        memory.name(n, digest_of(patch))
    assert memory.find_named(0) is patches[0]
    memory.keep(digest_of(patches[2]), patches[2])
    assert memory.n_bytes == 2 * patches[0].nbytes
    assert memory.find_named(1) is None
    assert memory.find(digest_of(patches[1])) is None
    assert memory.find_named(0) is patches[0]


def test_patient_work_waits_for_what_is_urgent_and_ends_when_it_has_to():
    turns = Turns()
    order = []

    def work():
        with suppress(KeyboardInterrupt):
            while True:
                with turns.take(is_patient=True):
                    order.append("patient")
                    time.sleep(0.001)

    with turns.urgent():
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(3):
            with turns.take(is_patient=False):
                order.append("urgent")
            time.sleep(0.01)
        assert order == ["urgent"] * 3
    wait_for(lambda: "patient" in order)
    turns.end()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    # What a person waits for ends too: a chunk of many patches takes long.
    with pytest.raises(KeyboardInterrupt), turns.take(is_patient=False):
        pass
