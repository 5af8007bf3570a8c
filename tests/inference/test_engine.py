"""The PyTorch engine when its device has too little memory: smaller batches, the same patches."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from megaseg_dask.errors import EngineError
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.models import load_bundle


class SmallDevice(torch.nn.Module):
    """A network on a device that holds so many patches at a time."""

    def __init__(self, network: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room, self.seen = network, room, []

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(patches))
        if len(patches) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(patches)


@pytest.fixture
def engine(tiny_bundle) -> TorchEngine:
    return TorchEngine(load_bundle(tiny_bundle), EngineSpec("torch", "cpu", "fp32", threads=1))


def test_a_batch_that_does_not_fit_goes_in_parts_and_is_remembered(engine):
    patches = np.random.default_rng(0).standard_normal((5, 1, 16, 32, 32)).astype(np.float32)
    expected = engine(patches)
    assert engine.largest_batch is None
    engine._network = SmallDevice(engine._network, room=2)
    assert_allclose(engine(patches), expected, atol=1e-5)
    assert engine.largest_batch == 2
    engine._network.seen.clear()
    engine(patches)
    assert engine._network.seen == [2, 2, 1], (
        "the device was not asked again for what it had refused"
    )


def test_a_patch_that_does_not_fit_is_an_error_with_a_next_step(engine):
    engine._network = SmallDevice(engine._network, room=0)
    with pytest.raises(EngineError, match="smaller --patch"):
        engine(np.zeros((2, 1, 16, 32, 32), np.float32))


def test_another_error_of_the_device_is_not_taken_for_it(engine):
    class Broken(torch.nn.Module):
        def forward(self, patches):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine._network = Broken()
    with pytest.raises(RuntimeError, match="illegal"):
        engine(np.zeros((2, 1, 16, 32, 32), np.float32))
