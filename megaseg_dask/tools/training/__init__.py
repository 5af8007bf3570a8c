"""Training through cyto-dl: recipes, images and labels in, a bundle with its model card out."""

from megaseg_dask.tools.training.environment import install
from megaseg_dask.tools.training.request import Request
from megaseg_dask.tools.training.training import train

__all__ = ["Request", "install", "train"]
