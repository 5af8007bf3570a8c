"""Bundles as cyto-dl leaves them: a folder, a zip of it, or a bare Lightning checkpoint.

Names such as ``_target_`` are compared, never imported. The weights say which
network they belong to; what a file states about it must agree with them. A
statement that would change the result and is not carried out here is refused
by name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import (
    Bundle,
    NetworkSpec,
    Triple,
    content_digest,
    first_few,
    fit_weights,
    with_aliases,
)
from megaseg_dask.models.files import read_files, short

if TYPE_CHECKING:
    import torch

Fixed: TypeAlias = Mapping[str, tuple[object, ...]]

TARGETS = ("monai.networks.nets.DynUNet", "monai.networks.nets.dynunet.DynUNet")
NETWORK_ARGUMENTS = tuple(field.name for field in fields(NetworkSpec))

# Of each section: the arguments with the only values that are carried out here
# (the defaults of MONAI and of the reference), and those that change no result.
BACKBONE: Fixed = {
    "_target_": TARGETS,
    "spatial_dims": (3,),
    "trans_bias": (False,),
    "norm_name": (("INSTANCE", {"affine": True}), ("instance", {"affine": True})),
    "act_name": ("leakyrelu", ("leakyrelu", {"inplace": True, "negative_slope": 0.01})),
}
BACKBONE_FREE = {*NETWORK_ARGUMENTS, "dropout", "deep_supervision", "deep_supr_num"}
INFERENCE: Fixed = {"padding_mode": ("constant",), "cval": (0,), "sigma_scale": (0.125,)}
INFERENCE_FREE = {"roi_size", "overlap", "mode", "sw_batch_size", "sw_device", "device", "progress"}
NORMALIZE: Fixed = {
    "channel_wise": (True,),
    "nonzero": (False,),
    "dtype": ("float32", "numpy.float32", "torch.float32"),
}
NORMALIZE_FREE = {"_target_", "keys", "allow_missing_keys"}
# Transforms that load an image or change its container, not its values.
ORDINARY_TRANSFORMS = {
    "RemoveNaNKeysd", "LoadImaged", "BioIOImageLoaderd", "AICSImageLoaderd", "EnsureChannelFirstd",
    "ToTensord", "EnsureTyped", "CastToTyped", "SelectItemsd", "DeleteItemsd",
}  # fmt: skip
SETTINGS = {"patch_shape": "roi_size", "overlap": "overlap", "window": "mode"}  # of a Bundle → of MONAI


def load_bundle(path: str | Path, *, checkpoint: str | None = None) -> Bundle:
    """The bundle in a folder, a zip or a ``.ckpt``; one channel in and one out.

    ``<x>/checkpoints/*.ckpt`` and ``<x>/train_config.yaml`` may lie one level
    deeper. Of several checkpoints ``checkpoint`` names one; else the highest epoch
    is taken. Settings come from ``hyper_parameters``, else train_config.yaml, else
    the reference of MegaSeg_v1. Raises BundleError for whatever is not such a
    bundle, with the reason.
    """
    path = Path(path)
    try:
        config, content = read_files(path, checkpoint)
        return _bundle(path.stem if path.is_file() else path.resolve().name, config, content)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error


def save_bundle(
    folder: str | Path,
    network: NetworkSpec,
    state_dict: "Mapping[str, torch.Tensor]",
    *,
    patch_shape: Triple,
    overlap: float,
    epoch: int,
    half: bool = False,
) -> Path:
    """Write a bundle that cyto-dl and `load_bundle` read; returns the checkpoint's path.

    ``state_dict`` is the network's own, with or without its aliases; ``half``
    stores float16. Raises BundleError when it does not fit ``network``.
    """
    import torch
    import yaml

    dtype = torch.float16 if half else torch.float32
    weights = {name: tensor.to(dtype) for name, tensor in fit_weights(network, state_dict).items()}
    # Through JSON, so that tuples become lists, which every reader of YAML knows.
    arguments = json.loads(json.dumps(asdict(network)))
    backbone = {"_target_": TARGETS[0], "spatial_dims": 3, **arguments, "dropout": 0.0}
    inference = {"sw_batch_size": 1, "roi_size": list(patch_shape), "overlap": overlap, "mode": "gaussian"}
    content = {
        "epoch": epoch,
        "pytorch-lightning_version": "2.6.6",  # the one that cyto-dl's own checkpoints were measured with
        # With the aliases, which cyto-dl insists on; they share their tensor's storage in the file.
        "state_dict": {f"backbone.{key}": value for key, value in with_aliases(network, weights).items()},
        "hyper_parameters": {"backbone": backbone, "inference_args": inference},
    }
    checkpoint = Path(folder, "checkpoints", f"epoch_{epoch:03d}.ckpt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, checkpoint)
    config = yaml.safe_dump(_train_config(backbone, inference), sort_keys=False)
    Path(folder, "train_config.yaml").write_text(config, encoding="utf-8")
    return checkpoint


def _train_config(backbone: dict[str, Any], inference: dict[str, Any]) -> dict[str, Any]:
    normalize = {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "raw", "channel_wise": True}
    # The napari plugin looks in _aux. Lists are copied, or YAML would write references.
    model_aux = {"filters": [*backbone["filters"]], "overlap": inference["overlap"]}
    data_aux = {"patch_shape": [*inference["roi_size"]]}
    return {
        "model": {"backbone": backbone, "inference_args": inference, "_aux": model_aux},
        "data": {"transforms": {"predict": {"transforms": [normalize]}}, "_aux": data_aux},
    }


# --- what they say


def _bundle(name: str, config: Mapping[str, Any], content: Mapping[str, Any]) -> Bundle:
    hyper = _given(content.get("hyper_parameters"))
    state = _backbone_state(content["state_dict"])
    network = NetworkSpec.of_weights({key: tuple(tensor.shape) for key, tensor in state.items()})
    origins = _network_origins(network, hyper, config) | {"normalization": _normalization_origin(config)}
    if (network.in_channels, network.out_channels) != (1, 1):
        raise BundleError(
            f"in_channels {network.in_channels}, out_channels {network.out_channels}: "
            "only networks with one channel in and one out are run"
        )
    _require_one_head(hyper.get("task_heads"), _at(config, "model", "task_heads"))
    settings, found = _settings(hyper, config)
    bundle = Bundle(name, "", network, fit_weights(network, state), **settings, origins=origins | found)
    return replace(bundle, digest=content_digest(bundle))


def _at(config: object, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _given(section: object) -> dict[str, Any]:
    """What a section states; a value saved as an unresolved ``${...}`` states nothing."""
    items = section.items() if isinstance(section, Mapping) else ()
    return {str(key): value for key, value in items if value is not None and not _unresolved(value)}


def _unresolved(value: object) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def _backbone_state(state: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    import torch

    # A loss keeps class weights in its head; they say nothing about prediction.
    kept = {key: value for key, value in state.items() if not re.match(r"task_heads\..*\bloss\.", str(key))}
    if foreign := [key for key in kept if not str(key).startswith("backbone.")]:
        raise BundleError(f"weights outside the backbone ({first_few(foreign)}): only a DynUNet is run")
    if broken := [key for key, value in kept.items() if not isinstance(value, torch.Tensor)]:
        raise BundleError(f"the state_dict holds more than tensors ({first_few(broken)})")
    named = {key.removeprefix("backbone.").removeprefix("_orig_mod."): value for key, value in kept.items()}
    # The heads of deep supervision are for training; the last output is the same without them.
    heads = re.compile(r"deep_supervision_heads\.|.*\.super_head\.")
    return {key: value for key, value in named.items() if not heads.match(key)}


def _network_origins(network: NetworkSpec, hyper: Mapping[str, Any], config: object) -> dict[str, str]:
    """Who states each argument of the network; all must agree with the weights."""
    source, stated = "hyper_parameters", _given(hyper.get("backbone"))
    if not stated:
        auxiliary = _given(_at(config, "model", "_aux"))
        in_config = {key: auxiliary[key] for key in NETWORK_ARGUMENTS if key in auxiliary}
        source, stated = "train_config.yaml", in_config | _given(_at(config, "model", "backbone"))
    _require_known(f"backbone in {source}", stated, BACKBONE, BACKBONE_FREE)
    for argument in NETWORK_ARGUMENTS:
        _require_agreement(source, argument, stated.get(argument), getattr(network, argument))
    return {argument: source if argument in stated else "state dict" for argument in NETWORK_ARGUMENTS}


def _require_agreement(source: str, argument: str, stated: Any, found: Any) -> None:
    if argument == "filters" and isinstance(stated, list | tuple):
        stated = stated[: len(found)]  # as DynUNet does
    if stated is not None and not _same(stated, found):
        raise BundleError(f"{argument}: {source} says {short(stated)}, the weights are of {found}; one is wrong")


def _same(value: object, expected: object) -> bool:
    """Equality that cannot fail on a foreign value; one size stands for every axis."""
    if isinstance(expected, Mapping):
        known = isinstance(value, Mapping) and value.keys() == expected.keys()
        return known and all(_same(_at(value, key), expected[key]) for key in expected)
    if not isinstance(expected, tuple):
        return isinstance(value, bool | int | float | str) and value == expected
    if isinstance(value, int):
        return all(_same(value, each) for each in expected)
    if not isinstance(value, list | tuple) or len(value) != len(expected):
        return False
    return all(map(_same, value, expected))


def _require_known(section: str, stated: Mapping[str, Any], fixed: Fixed, free: set[str]) -> None:
    for argument, value in stated.items():
        if argument in free or any(_same(value, accepted) for accepted in fixed.get(argument, ())):
            continue
        reason = f"only {fixed[argument][0]} is run" if argument in fixed else "not an argument known here"
        raise BundleError(f"{section}: {argument:.80} is {short(value)}; {reason}")


def _require_one_head(*stated: object) -> None:
    for heads in stated:
        if isinstance(heads, Mapping) and len(heads) > 1:
            raise BundleError(f"{len(heads)} task heads ({first_few(heads)}): only bundles with one are run")


def _normalization_origin(config: object) -> str:
    """Who states the preprocessing; it must be the reference's, `NormalizeIntensityd` per channel."""
    transforms = _at(config, "data", "transforms", "predict", "transforms")
    if not isinstance(transforms, list) or any(map(_unresolved, transforms)):
        return "reference"
    names = [_class_name(_at(transform, "_target_")) for transform in transforms]
    for name, transform in zip(names, transforms, strict=True):
        if name == "NormalizeIntensityd":
            _require_known(name, {"channel_wise": False, **_given(transform)}, NORMALIZE, NORMALIZE_FREE)
        elif name not in ORDINARY_TRANSFORMS:
            raise BundleError(f"predict transform {name} is not carried out here, only NormalizeIntensityd is")
    if "NormalizeIntensityd" not in names:
        raise BundleError("the predict transforms lack NormalizeIntensityd; only networks with it are run")
    return "train_config.yaml"


def _class_name(target: object) -> str:
    return target.rpartition(".")[2][:80] if isinstance(target, str) else short(target)


def _settings(hyper: Mapping[str, Any], config: object) -> tuple[dict[str, Any], dict[str, str]]:
    """Patch, overlap and window as far as stated, and who states each; else the Bundle's defaults hold."""
    auxiliary = {
        "roi_size": _at(config, "data", "_aux", "patch_shape"),
        "overlap": _at(config, "model", "_aux", "overlap"),
    }
    in_config = _given(auxiliary) | _given(_at(config, "model", "inference_args"))
    sources = {"hyper_parameters": _given(hyper.get("inference_args")), "train_config.yaml": in_config}
    for source, stated in sources.items():
        _require_known(f"inference_args in {source}", stated, INFERENCE, INFERENCE_FREE)
    settings, origins = {}, {}
    for setting, argument in SETTINGS.items():
        origins[setting] = next((name for name in sources if argument in sources[name]), "reference")
        if origins[setting] in sources:
            settings[setting] = _parsed(setting, sources[origins[setting]][argument])
    return settings, origins


def _parsed(setting: str, value: Any) -> str | tuple[Any, ...]:
    if setting == "window":
        return value if isinstance(value, str) else short(value)
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    kind = int if setting == "patch_shape" else int | float
    if len(values) != 3 or not all(isinstance(each, kind) and not isinstance(each, bool) for each in values):
        raise BundleError(f"{setting} is {short(value)}; expected three numbers, or one for all axes")
    return tuple(values) if kind is int else tuple(map(float, values))
