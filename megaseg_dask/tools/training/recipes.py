"""Recipes: how the two MegaSegs are trained, as data.

The published facts of a model are here: network, loss, optimizer, epochs and
stopping. The rest is the default of cyto-dl's experiment for segmentation:
random crops and no other augmentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megaseg_dask.models.network import NetworkSpec, Triple


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is made of images and labels; the defaults are those of both MegaSegs.

    ``decay`` multiplies the learning rate after each epoch. An epoch cuts
    ``patches_per_image`` crops of ``patch_shape`` (z, y, x) from each image, at random;
    the crops of an image are one batch. Training ends after ``max_epochs``, or once the
    validation loss has not improved for ``patience`` epochs.
    """

    name: str
    network: NetworkSpec
    loss: str = "monai.losses.GeneralizedDiceFocalLoss"
    optimizer: str = "torch.optim.Adam"
    # Not published: these three are cyto-dl's own defaults.
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    decay: float = 0.995
    max_epochs: int = 1000
    patience: int = 100
    patch_shape: Triple = (64, 128, 128)
    overlap: float = 0.25
    patches_per_image: int = 1


# The filters of the published MegaSeg_light are not known, but the size of its checkpoint is:
# 4.8 MB, with Adam's state 12 bytes per parameter. These filters give one that is no larger;
# they are also those of `starter`.
LIGHT_FILTERS = (8, 16, 24, 32, 48)

RECIPES: Mapping[str, Recipe] = {
    "MegaSeg_v1": Recipe("MegaSeg_v1", NetworkSpec()),
    "MegaSeg_light": Recipe("MegaSeg_light", NetworkSpec(filters=LIGHT_FILTERS)),
}
