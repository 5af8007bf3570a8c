"""Models: what a bundle is, and the forms in which cyto-dl leaves one on disk."""

from megaseg_dask.models.bundle import (
    Bundle,
    BundleFacts,
    Head,
    Preprocessing,
    Step,
    require_runnable,
)
from megaseg_dask.models.cytodl.read import load_bundle, read_bundle
from megaseg_dask.models.cytodl.write import NewBundle, save_bundle
from megaseg_dask.models.facts import read_facts
from megaseg_dask.models.network import NetworkSpec, require_patch

__all__ = [
    "Bundle",
    "BundleFacts",
    "Head",
    "NetworkSpec",
    "NewBundle",
    "Preprocessing",
    "Step",
    "load_bundle",
    "read_bundle",
    "read_facts",
    "require_patch",
    "require_runnable",
    "save_bundle",
]
