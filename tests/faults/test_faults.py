"""Promises 5 and 6.

A worker that dies or hangs, a block that kills, a block that fails; nothing is lost or hidden.
"""

import asyncio
import time
from functools import partial

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from skimage.measure import label

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster import start
from megaseg_dask.run.runner import segment
from megaseg_dask.run.status import status
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (40, 80, 100)
N_BLOCKS = 8


@pytest.fixture
def request_of(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(20, 40, 50))

    def make(target="out.zarr", **options):
        options = {
            "model": str(tiny_bundle),
            "engine": "openvino",
            "threads": 1,
            "block": "20,40,50",
            "overlap": 0,
            "outputs": "labels,scores,mask",
            **options,
        }
        return str(source), str(tmp_path / target), parse_settings(options)

    return make


def arrays(target) -> dict[str, np.ndarray]:
    group = zarr.open_group(target, mode="r")
    return {path: a[...] for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}


def provenance(target) -> dict:
    return dict(zarr.open_group(target, mode="r").attrs)["megaseg"]


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for path, values in one.items():
        assert_array_equal(values, other[path], err_msg=path)


@pytest.fixture
def undisturbed(request_of):
    source, target, settings = request_of("undisturbed.zarr")
    assert segment_here(source, target, settings).status == "done"
    return arrays(target)


def test_a_block_that_kills_workers_is_named_and_the_rest_is_finished(
    request_of, haunted, undisturbed
):
    source, target, settings = request_of(workers=2, retries=2)
    haunted.poison("segment", 5, "exit")
    events = []
    result = segment(source, target, settings, emit=events.append)
    assert (result.status, result.exit_code) == ("failed", 1)
    assert [(f.stage, f.index) for f in result.failures] == [("segment", 5)], result.failures
    notices = [event.text for event in events if event.kind == "notice"]
    assert any("segment 5: its worker died or hung; it runs again alone" in n for n in notices)
    assert "died or hung (attempt 3)" in result.failures[0].error
    assert haunted.calls["segment", 5] == 3
    # Its neighbours are finished, in their first attempts or, where they were blamed, in later
    # ones.
    (run,) = status(target)
    assert run.stages["segment"] == (N_BLOCKS - 1, N_BLOCKS)
    assert run.exit_code == 1

    # Labels are those of a mask without the block, and the output says what is missing.
    found = arrays(target)
    box = (slice(20, 40), slice(0, 40), slice(50, 100))
    expected = undisturbed["labels/megaseg_mask/0"].copy()
    expected[box] = 0
    assert_array_equal(found["labels/megaseg_mask/0"], expected)
    assert_array_equal(found["labels/megaseg/0"], label(expected, connectivity=1))
    assert provenance(target)["missing_boxes"] == [
        {"t": 0, "c": 0, "level": 0, "start": [20, 0, 50], "stop": [40, 40, 100]}
    ]

    # Once the fault is lifted, the next run predicts that block alone.
    haunted.lift()
    haunted.forget()
    assert segment(source, target, settings).status == "done"
    assert [task for task in haunted.calls if task[0] == "segment"] == [("segment", 5)]
    assert_same(arrays(target), undisturbed)
    assert provenance(target)["missing_boxes"] == []


# A job array does the same in one process, in tests/run/test_job_array.py.
@pytest.mark.slow
def test_a_block_that_still_fails_redoes_no_more_than_it_must(request_of, haunted):
    source, target, settings = request_of(workers=1, retries=0)
    haunted.poison("segment", 3, "bug")
    first = segment(source, target, settings)
    assert first.failures[0].error == "ZeroDivisionError: a bug"
    assert "Traceback" in first.failures[0].details
    haunted.forget()
    again = segment(source, target, settings)
    assert [f.index for f in again.failures] == [3]
    assert [task for task in haunted.calls if task[0] == "segment"] == [("segment", 3)]
    assert haunted.n_forward == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage",
    [
        "seams",
        pytest.param("join", marks=SLOW),
        pytest.param("relabel", marks=SLOW),
        pytest.param("downsample-1", marks=SLOW),
    ],
)
def test_a_stage_that_fails_is_named_and_mended(stage, request_of, haunted, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "wide.zarr", blobs((16, 64, 300)), chunks=(16, 64, 100))
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "block": "16,64,100",
        "overlap": 0,
        "retries": 0,
    }
    undisturbed, target = str(tmp_path / "undisturbed.zarr"), str(tmp_path / "out.zarr")
    assert segment_here(str(source), undisturbed, parse_settings(options)).status == "done"
    haunted.poison(stage, 0, "bug")
    settings = parse_settings({**options, "workers": 1})
    result = segment(str(source), target, settings)
    assert [f.stage for f in result.failures] == [stage]
    assert provenance(target)["missing_boxes"]
    labels = arrays(target).get("labels/megaseg/0")
    if stage in ("seams", "join"):
        assert not labels.any(), "labels without their seams are no labels"
    haunted.lift()
    haunted.forget()
    assert segment(str(source), target, settings).status == "done"
    assert not any(task[0] == "segment" for task in haunted.calls)
    assert_same(arrays(target), arrays(undisturbed))


# Below is the same in one process, with a volume that cannot be measured.
@pytest.mark.slow
def test_timepoints_that_failed_do_not_hold_back_the_others(tmp_path, tiny_bundle, haunted):
    image = np.stack([blobs((20, 40, 60), seed=s) for s in range(3)])
    source = write_image(tmp_path / "image.zarr", image, axes="tzyx")
    settings = parse_settings(
        {"model": str(tiny_bundle), "threads": 1, "overlap": 0, "workers": 1, "retries": 0}
    )
    haunted.poison("volume", 1, "bug")
    result = segment(str(source), str(tmp_path / "out.zarr"), settings)
    assert [f.volume for f in result.failures] == ["t=1 c=0"]
    found = arrays(tmp_path / "out.zarr")["labels/megaseg/0"]
    assert [bool(volume.any()) for volume in found] == [True, False, True]
    missing = provenance(tmp_path / "out.zarr")["missing_boxes"]
    assert missing == [{"t": 1, "c": 0, "level": 0, "start": [0, 0, 0], "stop": [20, 40, 60]}]
    haunted.lift()
    assert segment(str(source), str(tmp_path / "out.zarr"), settings).status == "done"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "sleep"])
def test_a_worker_that_hangs_is_given_up(fault, request_of, haunted, undisturbed):
    # On a busy machine a task that holds imports may pass for a hang: it is tried again.
    source, target, settings = request_of(workers=2, retries=9, timeout=15)
    haunted.poison("segment", 2, fault)
    started = time.monotonic()
    result = segment(source, target, settings)
    assert result.status == "done", result.failures
    assert haunted.calls["segment", 2] >= 2
    # Long before a worker that says nothing is given up by itself, and far from the hour of the
    # fault.
    assert time.monotonic() - started < 250
    assert_same(arrays(target), undisturbed)


def test_a_cluster_that_does_not_end_holds_back_nobody(monkeypatch):
    """Seen once, after a worker had hung on a very busy machine."""
    from distributed import LocalCluster

    monkeypatch.setattr(start, "_CLOSE_S", 0.5)
    with LocalCluster(0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as cluster:
        cluster._close = partial(asyncio.sleep, 3600)
        started = time.monotonic()
        start._close(cluster)
        assert time.monotonic() - started < 60
        del cluster._close


def test_numbers_that_float64_cannot_hold_fail_their_volume_and_no_other(request_of, tmp_path):
    image = np.stack([blobs(SHAPE), blobs(SHAPE)]).astype(np.uint64)
    image[1, 3, 4, 5] = 2**60
    source = write_image(tmp_path / "series.zarr", image, axes="tzyx", chunks=(1, 20, 40, 50))
    _, target, settings = request_of()
    result = segment_here(str(source), target, settings)
    assert result.status == "failed"
    assert {(f.stage, f.volume) for f in result.failures} == {("measure", "t=1 c=0")}
    assert "2^53" in str(result.failures[0].error)
    assert arrays(target)["labels/megaseg/0"][0].any()
