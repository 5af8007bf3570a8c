"""Models: what a bundle is, and the forms in which cyto-dl leaves one on disk."""

from megaseg_dask.models.bundle import Bundle, NetworkSpec, build_network, require_patch
from megaseg_dask.models.cytodl import load_bundle, save_bundle

__all__ = ["Bundle", "NetworkSpec", "build_network", "load_bundle", "require_patch", "save_bundle"]
