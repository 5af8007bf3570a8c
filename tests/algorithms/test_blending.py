import numpy as np
import pytest

from megaseg_dask.algorithms.blending import blend
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import EngineError

PATCH = Box((0, 0, 0), (2, 2, 2))


def test_a_voxel_that_no_patch_covers_is_an_error():
    logits = np.ones((1, 2, 2, 2), np.float32)
    with pytest.raises(EngineError, match="no patch covers"):
        blend([(PATCH, logits)], Box((0, 0, 0), (2, 2, 3)), np.ones((2, 2, 2), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_an_error(bad):
    logits = np.full((1, 2, 2, 2), bad, np.float32)
    with pytest.raises(EngineError, match="NaN or infinity"):
        blend([(PATCH, logits)], PATCH, np.ones((2, 2, 2), np.float32))
