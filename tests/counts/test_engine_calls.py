"""How often the expensive things happen: exact counts, which no clock can blur."""

import shutil
import time

import numpy as np
import pytest
import zarr

from megaseg_dask.inference.engine import close_engine
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.job_array import record_plans, run_tasks
from megaseg_dask.run.runner import segment
from tests.fixtures.bundles import write_checkpoint
from tests.fixtures.engines import blur
from tests.fixtures.images import blobs, write_image


@pytest.fixture
def counted(monkeypatch):
    """Count forward passes, which are cheap ones, and reads of the source, in this process."""
    counts = {"forward": 0, "read_voxels": 0}

    def count(self, patches):
        counts["forward"] += 1
        return blur(patches)

    def read(self, box, original=Volume.read):
        if "image.zarr" in str(self.location):
            counts["read_voxels"] += box.size
        return original(self, box)

    monkeypatch.setattr(TorchEngine, "__call__", count)
    monkeypatch.setattr(Volume, "read", read)
    close_engine()
    return counts


ALL = {"threshold": "otsu", "fill_holes": 9, "outputs": "labels,measurements"}


@pytest.mark.parametrize(
    ("block", "options"),
    [("24,64,96", {}), ("24,32,48", {}), ("13,29,31", {}), ("24,64,96", ALL), ("24,32,48", ALL)],
)
def test_forward_passes_reads_and_intermediate_data_are_those_of_the_plan(
    block, options, tmp_path, tiny_bundle, counted
):
    image = blobs((24, 64, 96))
    source = write_image(tmp_path / "image.zarr", image)
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "block": block, **options}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    for stage in plan.stages:
        assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures
    summary = summarize(plan)
    assert counted["forward"] == round(summary["redundancy"] * summary["patches"])
    assert counted["read_voxels"] * image.itemsize == summary["bytes_read"]
    arrays = map(
        zarr.open_array, (path.parent for path in (tmp_path / "out.zarr.run").rglob("zarr.json"))
    )
    assert sum(array.nbytes for array in arrays) == summary["bytes_intermediate"]


@pytest.mark.parametrize("block", ["24,64,96", "24,32,48", "13,29,31"])
@pytest.mark.parametrize("options", [{}, {"voxel_size": "1,0.8,1.3"}, {"normalization": "900,300"}])
def test_only_patches_that_touch_the_mask_are_predicted_and_only_their_blocks_are_read(
    block, options, tmp_path, tiny_bundle, counted
):
    image = blobs((24, 64, 96))
    source = write_image(tmp_path / "image.zarr", image)
    mask = np.zeros(image.shape, "uint8")
    mask[2:9, 3:11, 4:30] = 1
    where = write_image(tmp_path / "mask.zarr", mask)
    settings = parse_settings(
        {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "block": block}
        | {"where": str(where), "unmarked": True, **options}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    for stage in plan.stages:
        assert not run_tasks(plan, stage.name, range(stage.n_tasks)).failures
    summary = summarize(plan)
    cores = [core for core in plan.block_grid() if mask[core.slices].any()]
    n_predicted = counted["forward"]
    assert n_predicted == summary["where"]["predictions"]
    assert n_predicted < 0.6 * plan.patch_grid.count_predicted(plan.block_shape)
    if "voxel_size" not in options:
        parts = [p & core for core in cores for p in plan.patch_grid.iter_touching(core)]
        assert n_predicted == sum(mask[part.slices].any() for part in parts)
    assert counted["read_voxels"] * image.itemsize == summary["bytes_read"]
    assert summary["where"]["blocks_left_out"] == len(plan.block_grid()) - len(cores)


@pytest.mark.parametrize(
    ("n_models", "tta", "n_passes"), [(1, True, 8), (2, False, 2), (2, True, 16)]
)
def test_averages_pass_each_patch_as_often_as_they_average(
    n_models, tta, n_passes, tmp_path, counted
):
    models = [
        str(write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed)) for seed in range(n_models)
    ]
    source = write_image(tmp_path / "image.zarr", blobs((16, 48, 48)))
    settings = parse_settings(
        {"model": models, "tta": tta, "engine": "torch", "threads": 1, "outputs": "scores"}
    )
    [plan] = record_plans(str(source), str(tmp_path / "out.zarr"), settings)
    assert not run_tasks(plan, "volume", [0]).failures
    assert counted["forward"] == n_passes * summarize(plan)["patches"]
    assert counted["read_voxels"] == 16 * 48 * 48


def test_a_second_run_computes_nothing_and_a_resumed_one_only_what_is_missing(
    tmp_path, tiny_bundle, client
):
    source = write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1, "block": "24,32,48"})
    undisturbed, interrupted = tmp_path / "a.zarr", tmp_path / "b.zarr"
    segment(str(source), str(undisturbed), settings, client=client)
    again = segment(str(source), str(undisturbed), settings, client=client)

    def interrupt(event):
        if event.kind == "progress" and event.stage == "label":
            raise KeyboardInterrupt

    events = []
    with pytest.raises(KeyboardInterrupt):
        segment(str(source), str(interrupted), settings, client=client, emit=interrupt)
    result = segment(str(source), str(interrupted), settings, client=client, emit=events.append)
    assert result.status == "done"
    assert {e.stage for e in events if e.kind == "progress"}.isdisjoint({"measure", "segment"})
    assert contents(interrupted) == contents(undisturbed)
    assert again.already_done


def test_lost_intermediate_data_are_computed_again_not_taken_for_background(
    tmp_path, tiny_bundle, client
):
    source = write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1, "block": "24,32,48"})
    undisturbed, robbed = tmp_path / "a.zarr", tmp_path / "b.zarr"
    segment(str(source), str(undisturbed), settings, client=client)

    def interrupt(event):
        if event.kind == "progress" and event.stage == "label":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(str(source), str(robbed), settings, client=client, emit=interrupt)
    while any(client.processing().values()):
        time.sleep(0.1)  # workers finish the tasks in hand
    shutil.rmtree(tmp_path / "b.zarr.run/megaseg/work")
    assert segment(str(source), str(robbed), settings, client=client).status == "done"
    assert contents(robbed) == contents(undisturbed)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
