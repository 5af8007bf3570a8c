from functools import partial

import numpy as np
import pytest
import torch

from megaseg_dask.algorithms.array_library import NUMPY, ArrayLibrary
from megaseg_dask.algorithms.blending import blend, window
from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.errors import EngineError

TORCH = ArrayLibrary(partial(torch.zeros, dtype=torch.float32), torch.isfinite, torch.from_numpy)
PATCH = Box((0, 0, 0), (2, 2, 2))
ONES = np.ones((2, 2, 2), np.float32)


def blend_torch(predictions, core, weights):
    tensors = [(patch, torch.from_numpy(logits)) for patch, logits in predictions]
    return blend(tensors, core, torch.from_numpy(weights), TORCH).numpy()


def blend_numpy(predictions, core, weights):
    return blend(predictions, core, weights, NUMPY)


both_libraries = pytest.mark.parametrize("blended", [blend_numpy, blend_torch])


@both_libraries
def test_a_voxel_that_no_patch_covers_is_an_error(blended):
    logits = np.ones((1, 2, 2, 2), np.float32)
    with pytest.raises(EngineError, match="no patch covers"):
        blended([(PATCH, logits)], Box((0, 0, 0), (2, 2, 3)), ONES)


@both_libraries
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_an_error(bad, blended):
    logits = np.full((1, 2, 2, 2), bad, np.float32)
    with pytest.raises(EngineError, match="NaN or infinity"):
        blended([(PATCH, logits)], PATCH, ONES)


@pytest.mark.parametrize("n_channels", [1, 2])
def test_numpy_and_torch_blend_to_the_same_bits(n_channels):
    rng = np.random.default_rng(0)
    grid = PatchGrid((9, 20, 20), (8, 16, 16), (0.5, 0.5, 0.5))
    core = Box((1, 2, 3), (9, 18, 20))
    predictions = [
        (patch, rng.normal(size=(n_channels, *grid.patch_shape)).astype(np.float32))
        for patch in grid.iter_touching(core)
    ]
    weights = window(grid.patch_shape)
    expected = blend_numpy(predictions, core, weights)
    np.testing.assert_array_equal(blend_torch(predictions, core, weights), expected)
