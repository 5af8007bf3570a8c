"""``megaseg view``: image, scores and labels of a target in a browser."""

from megaseg_dask.tools.view.viewer import view

__all__ = ["view"]
