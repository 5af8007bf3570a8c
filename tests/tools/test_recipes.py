"""Recipes: the published numbers of the two MegaSegs."""

import pytest
import torch
from monai.losses import GeneralizedDiceFocalLoss
from monai.networks.nets import DynUNet

from megaseg_dask.tools.training.recipes import RECIPES
from tests.fixtures.bundles import seeded_network

BYTES_PER_PARAMETER = 12  # its value, and Adam's two moments


def n_parameters(name: str) -> int:
    return sum(
        parameter.numel() for parameter in seeded_network(RECIPES[name].network).parameters()
    )


def test_megaseg_v1_is_the_published_network():
    assert n_parameters("MegaSeg_v1") == 16_670_177
    published = DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        strides=[1, 2, 2, 2, 2],
        kernel_size=[3] * 5,
        upsample_kernel_size=[2] * 4,
        dropout=0.0,
        res_block=True,
    )
    ours = seeded_network(RECIPES["MegaSeg_v1"].network)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }


def test_the_published_sizes_are_those_of_weights_and_adams_state():
    assert n_parameters("MegaSeg_v1") * BYTES_PER_PARAMETER / 2**20 == pytest.approx(191, abs=0.5)
    assert n_parameters("MegaSeg_light") == 372_265
    assert n_parameters("MegaSeg_light") * BYTES_PER_PARAMETER < 4.8e6


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_what_is_published(recipe):
    assert (recipe.max_epochs, recipe.patience) == (1000, 100)
    module, _, name = recipe.loss.rpartition(".")
    assert (module, name) == ("monai.losses", GeneralizedDiceFocalLoss.__name__)
    module, _, name = recipe.optimizer.rpartition(".")
    assert (module, name) == ("torch.optim", torch.optim.Adam.__name__)
