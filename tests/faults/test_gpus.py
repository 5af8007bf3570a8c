"""GPUs that fail, are not there, or are too small: pretended devices, real workers.

What each run did is in the asserts: which devices were opened by which process, what
was said, and that the arrays are those of an undisturbed run.
"""

import os

import numpy as np
import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.gpus import Gpu
from tests.fixtures.images import blobs, write_image

pytestmark = pytest.mark.slow

N_TIMES = 12


@pytest.fixture
def request_of(tmp_path, tiny_bundle):
    """Twelve timepoints, each of them one task."""
    values = np.stack([blobs((16, 32, 40), t) for t in range(N_TIMES)])
    source = write_image(tmp_path / "image.zarr", values, axes="tzyx")

    def make(target="out.zarr", **options):
        options = {
            "model": str(tiny_bundle),
            "device": "cuda",
            "engine": "torch",
            "precision": "fp32",
            "batch": 2,
            "overlap": 0,
            **options,
        }
        return str(source), str(tmp_path / target), parse_settings(options)

    return make


@pytest.fixture
def run(request_of):
    """Return a function that runs, and returns the result, notices, and the workers that joined."""

    def run(target="out.zarr", *, client=None, **options):
        events = []
        source, target, settings = request_of(target, **options)
        result = segment(source, target, settings, client=client, emit=events.append)
        notices = [event.text for event in events if event.kind == "notice"]
        return result, notices, [event for event in events if event.kind == "worker"]

    return run


def test_one_dead_gpu_of_two_costs_no_volume(machine, run):
    machine.has(Gpu("GPU-a"), Gpu("GPU-b", fails="forward"))
    result, notices, joined = run(workers=2)
    assert result.status == "done", result.failures
    assert {worker.uuid for worker in joined} >= {"GPU-a", "GPU-b"}
    assert any("the GPU of its worker failed: CUDA error" in text for text in notices)
    passes = machine.noted("forward")
    good = [used for used in passes.values() if "GPU-a" in used]
    assert [set(used) for used in good] == [{"GPU-a"}]
    assert len(good[0]) >= N_TIMES
    # A process that failed was not asked again and again: it has three tasks at once.
    assert all(len(used) <= 6 for used in passes.values() if "GPU-b" in used)
    # No process of a client holds a device.
    assert os.getpid() not in machine.noted("context")
    assert result.device_peak_bytes == {"volume": 123_000_000}
