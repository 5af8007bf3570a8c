"""Model cards: what is published about the two MegaSegs, and what a bundle itself says.

The weights are the Allen Institute's. Their licence is not in the bundle, so none is stated here,
only where to look.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megaseg_dask.models.bundle import BundleFacts

MINIMUM_SHAPE = (16, 16, 16)  # published, of both MegaSegs: smaller volumes are refused

# Published: (z, y, x) of the images that both MegaSegs were trained on.
MEGASEG_VOXEL_SIZE_UM = (0.29, 0.108333, 0.108333)

_ALLEN = (
    "Allen Institute for Cell Science; its terms are not in the bundle, see where it publishes: "
    "https://allencell.github.io/allencell-segmenter-ml and https://www.allencell.org"
)
_SHARED = {
    "task": "structure-agnostic 3D segmentation, one channel in, one out",
    "loss": "generalized Dice focal loss (monai.losses.GeneralizedDiceFocalLoss)",
    "optimizer": "Adam",
    "epochs": "1000 at most; stopped when the validation loss had not improved for 100",
    "training data": "2600 open images of hiPSC lines, 100x spinning-disk confocal, z, y, x 55–75, "
    "600–624, 900–924",
    "structures": "actin bundles, ER (SERCA2, SEC61 beta), adherens junctions, desmosomes, gap "
    "junctions, myosin, nuclear pores, endosomes, nuclear speckles, Golgi, tight junctions, "
    "mitochondria",
    "made with": "cyto-dl 1.7.1, torch 2.4.0, one A100",
    "minimum input": "16,16,16 (z, y, x)",
    "voxel size": "0.29, 0.108333, 0.108333 µm (z, y, x)",
    "licence": _ALLEN,
}

# By name, the published table of each model.
PUBLISHED_CARDS: Mapping[str, Mapping[str, str]] = {
    "MegaSeg_v1": {
        **_SHARED,
        "architecture": "nnU-Net, MONAI DynUNet of 5 levels with filters 32 to 320: 16,670,177 "
        "parameters",
        "speed": "6.01 s for 65 × 624 × 924 on an A100 (published)",
        "bundle": "megaSeg.zip, its checkpoint 191 MB",
    },
    "MegaSeg_light": {
        **_SHARED,
        "architecture": "small nnU-Net with fewer kernels: trades accuracy for speed; about 0.4 "
        "million parameters",
        "speed": "2.32 s for 65 × 624 × 924 on an A100 (published)",
        "bundle": "a zip of the same form, its checkpoint 4.8 MB",
    },
}

_OURS = "that of this package"
_UNKNOWN = "not stated in the bundle; ask its author"


def card_of(name: str, path: Path, facts: BundleFacts) -> dict[str, object]:
    """Return what a bundle is, as JSON values.

    ``settings`` has for each setting its value and where it came from.
    """
    published = PUBLISHED_CARDS.get(name)
    licence = _UNKNOWN
    if name == "starter":
        licence = _OURS
    elif published:
        licence = published["licence"]
    return {
        "name": name,
        "path": str(path),
        "digest": facts.digest,
        "n_parameters": facts.n_parameters,
        "n_bytes": _size_of(path),
        "minimum_input": list(MINIMUM_SHAPE),
        "licence": licence,
        "settings": _settings_of(facts),
        "published": dict(published) if published else None,
    }


def _settings_of(facts: BundleFacts) -> dict[str, dict[str, object]]:
    """Return the network's arguments, and whatever else has an origin."""
    network = asdict(facts.network)
    values: dict[str, object] = {
        **network,
        "patch_shape": facts.patch_shape,
        "overlap": facts.overlap,
        "window": facts.window,
        "preprocessing": str(facts.preprocessing),
        "precision": facts.precision,
        "voxel_size_um": facts.voxel_size_um,
        "voxel_range_um": facts.voxel_range_um,
        "heads": [head.name for head in facts.heads],
    }
    for head in facts.heads:
        for key, value in asdict(head).items():
            values[f"heads.{head.name}.{key}"] = value
    settings = {}
    for key in dict.fromkeys([*values, *facts.origins]):
        if key in facts.origins or key in network:
            settings[key] = {"value": values.get(key), "origin": facts.origins.get(key, "")}
    return settings


def _size_of(path: Path) -> int:
    """Return the bytes of a bundle: of its file, or of all in its folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
