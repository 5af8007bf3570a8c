"""Bundles that cyto-dl, its napari plugin and this package read, from a network and its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaseg_dask.models.bundle import VoxelRange
from megaseg_dask.models.cytodl.files import CONFIG
from megaseg_dask.models.cytodl.read import TARGETS
from megaseg_dask.models.network import NetworkSpec, Triple

if TYPE_CHECKING:
    import torch

# The one that cyto-dl's own checkpoints were measured with.
_LIGHTNING_VERSION = "2.6.6"


@dataclass(frozen=True, slots=True)
class NewBundle:
    """All that a new bundle says: patches in voxels (z, y, x), ``overlap`` a fraction of them.

    ``voxel_size_um`` (z, y, x) is that of the images it was trained on, where it is known, and
    ``voxel_range_um`` the smallest and the largest, where there were several.
    """

    network: NetworkSpec
    patch_shape: Triple
    overlap: float
    epoch: int
    voxel_size_um: tuple[float, float, float] | None = None
    voxel_range_um: VoxelRange | None = None


def save_bundle(
    folder: str | Path,
    new: NewBundle,
    state_dict: "Mapping[str, torch.Tensor]",
    *,
    half: bool = False,
) -> Path:
    """Write a bundle that cyto-dl and `load_bundle` read, and return the checkpoint's path.

    ``state_dict`` is the network's, with or without its aliases; ``half`` stores float16.

    Raises:
        BundleError: The weights do not fit the network.
    """
    import torch
    import yaml

    from megaseg_dask.models.build import fit_weights, with_aliases

    dtype = torch.float16 if half else torch.float32
    fitted = fit_weights(new.network, state_dict)
    weights = {name: tensor.to(dtype) for name, tensor in fitted.items()}
    # With the aliases, which cyto-dl insists on; they share their tensor's storage in the file.
    state = {f"backbone.{key}": value for key, value in with_aliases(new.network, weights).items()}
    backbone = _backbone(new.network)
    inference = {
        "sw_batch_size": 1,
        "roi_size": list(new.patch_shape),
        "overlap": new.overlap,
        "mode": "gaussian",
    }
    content = {
        "epoch": new.epoch,
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "state_dict": state,
        "hyper_parameters": {"backbone": backbone, "inference_args": inference},
    }
    checkpoint = Path(folder, "checkpoints", f"epoch_{new.epoch:03d}.ckpt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, checkpoint)
    # Copied, or YAML would write references.
    copied = json.loads(json.dumps(_train_config(backbone, inference)))
    sized = with_voxel_size(copied, new.voxel_size_um, new.voxel_range_um)
    config = yaml.safe_dump(sized, sort_keys=False)
    Path(folder, CONFIG).write_text(config, encoding="utf-8")
    return checkpoint


def with_voxel_size(
    config: dict[str, Any],
    voxel_size_um: tuple[float, float, float] | None,
    voxel_range_um: VoxelRange | None = None,
) -> dict[str, Any]:
    """Return a training's configuration that says of which voxels the images were."""
    said: dict[str, Any] = {}
    if voxel_size_um is not None:
        said["voxel_size_um"] = list(voxel_size_um)
    if voxel_range_um is not None:
        said["voxel_range_um"] = [list(size) for size in voxel_range_um]
    if not said:
        return config
    data = config["data"]
    return {**config, "data": {**data, "_aux": {**data.get("_aux", {}), **said}}}


def _backbone(network: NetworkSpec) -> dict[str, object]:
    # Through JSON, so that tuples become lists, which every reader of YAML knows.
    arguments = json.loads(json.dumps(asdict(network)))
    return {"_target_": TARGETS[0], "spatial_dims": 3, **arguments, "dropout": 0.0}


def _train_config(
    backbone: Mapping[str, object], inference: Mapping[str, object]
) -> dict[str, object]:
    normalize = {
        "_target_": "monai.transforms.NormalizeIntensityd",
        "keys": "raw",
        "channel_wise": True,
    }
    # The napari plugin looks in _aux.
    model = {
        "backbone": backbone,
        "inference_args": inference,
        "_aux": {"filters": backbone["filters"], "overlap": inference["overlap"]},
    }
    data = {
        "transforms": {"predict": {"transforms": [normalize]}},
        "_aux": {"patch_shape": inference["roi_size"]},
    }
    return {"model": model, "data": data}
