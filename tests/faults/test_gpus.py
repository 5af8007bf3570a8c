"""GPUs that fail, are not there, or are too small: pretended devices, real workers.

What each run did is in the asserts: which devices were opened by which process, what
was said, and that the arrays are those of an undisturbed run.
"""

import os

import numpy as np
import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.faults.test_faults import arrays, assert_same
from tests.fixtures.gpus import Gpu
from tests.fixtures.images import blobs, write_image

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
    """Return a function that runs, and returns the result and what was said."""

    def run(target="out.zarr", *, client=None, **options):
        events = []
        source, target, settings = request_of(target, **options)
        result = segment(source, target, settings, client=client, emit=events.append)
        return result, [event.text for event in events if event.kind == "notice"], events

    return run


def test_one_dead_gpu_of_two_is_left_out_and_named(machine, run):
    machine.has(Gpu("GPU-a"), Gpu("GPU-b", fails="forward"))
    result, notices, events = run(workers=2)
    print(notices)
    assert result.status == "done", result.failures
    assert any("GPU GPU-b is left out: two processes failed on it" in text for text in notices)
