"""Models: what a bundle is, and the forms in which cyto-dl leaves one on disk."""

from megaseg_dask.models.bundle import Bundle, Preprocessing, Step, build_network, require_runnable
from megaseg_dask.models.cytodl.read import load_bundle, read_bundle, save_bundle
from megaseg_dask.models.network import Head, NetworkSpec, require_patch

__all__ = [
    "Bundle",
    "Head",
    "NetworkSpec",
    "Preprocessing",
    "Step",
    "build_network",
    "load_bundle",
    "read_bundle",
    "require_patch",
    "require_runnable",
    "save_bundle",
]
