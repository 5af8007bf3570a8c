"""Bundles for tests: the files that cyto-dl would leave, written with torch alone.

Not through `save_bundle`, so that reading is tested against another writer.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.nets.dynunet import DynUNet

from megaseg_dask.models import NetworkSpec

TINY = NetworkSpec(filters=(4, 4, 8, 8, 8))
PATCH_SHAPE = (16, 32, 32)
OVERLAP = 0.5


def seeded_network(network: NetworkSpec = TINY, seed: int = 0) -> DynUNet:
    """MONAI's network in eval mode; norms and biases are random too, so that each one matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = DynUNet(spatial_dims=3, dropout=0.0, **asdict(network))
        for parameter in built.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return built.eval().requires_grad_(False)


def seeded_head(width: int, n_blocks: int, channels: int, seed: int = 0) -> torch.nn.Sequential:
    """The layers of a ResBlocksHead: residual blocks of one width, then a convolution to its channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [UnetResBlock(3, width, width, 3, 1, "INSTANCE") for _ in range(n_blocks)]
        built = torch.nn.Sequential(torch.nn.Identity(), *blocks, UnetOutBlock(3, width, channels))
    return built.eval().requires_grad_(False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: tiny networks only wait for a second one on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def backbone(network: NetworkSpec = TINY) -> dict[str, Any]:
    arguments = asdict(network)
    arguments["strides"] = [list(stride) for stride in network.strides]
    arguments["kernel_size"] = [list(kernel) for kernel in network.kernel_size]
    arguments["upsample_kernel_size"] = [list(kernel) for kernel in network.upsample_kernel_size]
    arguments["filters"] = list(network.filters)
    return {"_target_": "monai.networks.nets.DynUNet", "spatial_dims": 3, "dropout": 0.0, **arguments}


def inference_args(patch_shape=PATCH_SHAPE, overlap=OVERLAP) -> dict[str, Any]:
    return {"sw_batch_size": 1, "roi_size": list(patch_shape), "overlap": overlap, "mode": "gaussian"}


def checkpoint_content(
    network: NetworkSpec = TINY,
    *,
    seed: int = 0,
    prefix: str = "backbone.",
    hyper_parameters: bool | dict[str, Any] = True,
    aliases: bool = True,
    patch_shape=PATCH_SHAPE,
    overlap=OVERLAP,
    heads: dict[str, tuple[int, int] | None] | None = None,
) -> dict[str, Any]:
    """What a Lightning checkpoint of cyto-dl holds; ``hyper_parameters=False`` leaves them out.

    ``heads`` are by name: None hands on what the backbone puts out, two numbers are
    the residual blocks and the channels of a ResBlocksHead, see `seeded_head`.
    """
    state = seeded_network(network, seed).state_dict()
    if not aliases:
        state = {key: value for key, value in state.items() if not key.startswith("skip_layers.")}
    content: dict[str, Any] = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {prefix + key: value for key, value in state.items()},
    }
    described = {}
    for name, layers in (heads or {"seg": None}).items():
        described[name] = {"_target_": f"cyto_dl.nn.head.{'ResBlocksHead' if layers else 'BaseHead'}"}
        if layers:
            own = seeded_head(network.out_channels, *layers, seed).state_dict()
            content["state_dict"] |= {f"task_heads.{name}.model.model.{key}": value for key, value in own.items()}
    if hyper_parameters is True:
        hyper_parameters = {
            "backbone": backbone(network),
            "task_heads": described,
            "inference_args": inference_args(patch_shape, overlap),
        }
    if hyper_parameters:
        content["hyper_parameters"] = hyper_parameters
    return content


def write_checkpoint(path: str | Path, network: NetworkSpec = TINY, **options: Any) -> Path:
    """A bare ``.ckpt``; the options are those of `checkpoint_content`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint_content(network, **options), path)
    return path


def train_config(network: NetworkSpec = TINY, patch_shape=PATCH_SHAPE, overlap=OVERLAP) -> dict[str, Any]:
    """A train_config.yaml as the napari plugin saves it, unresolved."""
    unresolved = {
        "in_channels": "${raw_im_channels}",
        "filters": "${model._aux.filters}",
        "spatial_dims": "${dims}",
    }
    mode = {"roi_size": "${data._aux.patch_shape}", "overlap": "${model._aux.overlap}", "mode": "gaussian"}
    return {
        "spatial_dims": 3,
        "model": {
            "_aux": {"filters": list(network.filters), "overlap": overlap},
            "backbone": {**backbone(network), **unresolved},
            "inference_args": mode,
            "task_heads": "${kv_to_dict:${model._aux._tasks}}",
        },
        "data": {
            "_aux": {"patch_shape": list(patch_shape)},
            "transforms": {
                "predict": {
                    "_target_": "monai.transforms.Compose",
                    "transforms": [
                        {"_target_": "monai.transforms.LoadImaged", "keys": "${source_col}"},
                        {
                            "_target_": "monai.transforms.NormalizeIntensityd",
                            "keys": "${source_col}",
                            "channel_wise": True,
                        },
                        {"_target_": "monai.transforms.ToTensord", "keys": ["${source_col}"]},
                    ],
                }
            },
        },
    }


def write_folder(
    folder: str | Path,
    network: NetworkSpec = TINY,
    *,
    config: dict[str, Any] | None = None,
    epochs: tuple[int, ...] = (3,),
    **options: Any,
) -> Path:
    """cyto-dl's layout: train_config.yaml and checkpoints/epoch_NNN.ckpt."""
    folder = Path(folder)
    for epoch in epochs:
        write_checkpoint(folder / "checkpoints" / f"epoch_{epoch:03d}.ckpt", network, **options)
    sizes = {key: options[key] for key in ("patch_shape", "overlap") if key in options}
    config = train_config(network, **sizes) if config is None else config
    (folder / "train_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_zip(path: str | Path, network: NetworkSpec = TINY, *, inside: str = "megaSeg/", **options: Any) -> Path:
    """The zip of `write_folder`, with everything below the folder ``inside``."""
    path = Path(path)
    folder = write_folder(path.with_suffix(".unpacked"), network, **options)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, inside + file.relative_to(folder).as_posix())
    return path
