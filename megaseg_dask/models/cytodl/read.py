"""Bundles as cyto-dl leaves them: a folder, a zip of it, or a bare Lightning checkpoint.

The weights say which network they belong to; what a file states about it must
agree with them. A statement that would change the result and cannot be carried
out here is refused by name. What no file states falls to the reference's value.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few
from megaseg_dask.models.bundle import HEADS, Bundle, content_digest, require_runnable
from megaseg_dask.models.cytodl.config import (
    REFERENCE,
    Fixed,
    Source,
    Statement,
    reference,
    require_known,
    same,
)
from megaseg_dask.models.cytodl.files import CONFIG, Files, read_files
from megaseg_dask.models.cytodl.heads import read_heads
from megaseg_dask.models.cytodl.transforms import read_preprocessing
from megaseg_dask.models.network import NetworkSpec, Triple

if TYPE_CHECKING:
    import torch

SHAPES = "shapes of the weights"

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
INFERENCE: Fixed = {
    "padding_mode": ("constant",),
    "cval": (0,),
    "sigma_scale": (0.125,),
    "with_coord": (False,),
}
INFERENCE_FREE = {
    "roi_size",
    "overlap",
    "mode",
    "sw_batch_size",
    "sw_device",
    "device",
    "progress",
    "buffer_steps",
    "buffer_dim",
}
SETTINGS = {
    "patch_shape": "roi_size",
    "overlap": "overlap",
    "window": "mode",
}  # of a Bundle → of MONAI
# cyto-dl hands inference_args on to MONAI's sliding_window_inference, so these hold where they lack the key.
MONAI_DEFAULTS = {"overlap": 0.25, "mode": "constant"}
PRECISIONS: Mapping[str | int, str] = {
    16: "fp16",
    "16": "fp16",
    "16-mixed": "fp16",
    "16-true": "fp16",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    32: "fp32",
    "32": "fp32",
    "32-true": "fp32",
}


def load_bundle(path: str | Path, checkpoint: str | None = None) -> Bundle:
    """The bundle in a folder, a zip or a ``.ckpt``, if a run can take it: see `require_runnable`.

    Raises BundleError like `read_bundle`, and for the bundles that only that reads.
    """
    bundle = read_bundle(path, checkpoint)
    with _naming(path):
        require_runnable(bundle)
    return bundle


def read_bundle(path: str | Path, checkpoint: str | None = None) -> Bundle:
    """The bundle in a folder, a zip or a ``.ckpt``, with any number of channels and heads.

    ``<x>/checkpoints/*.ckpt`` and ``<x>/train_config.yaml`` may lie one level
    deeper. Of several checkpoints ``checkpoint`` names one; else the highest epoch
    is taken. Settings come from ``hyper_parameters``, else train_config.yaml, else
    the reference of MegaSeg_v1. Raises BundleError for whatever is not such a
    bundle, with the reason.
    """
    path = Path(path)
    with _naming(path):
        return _bundle(bundle_name(path), read_files(path, checkpoint))


def bundle_name(path: Path) -> str:
    """Return what a bundle is called: its file or folder, without the suffix of a file."""
    return path.stem if path.is_file() else path.resolve().name


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
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

    from megaseg_dask.models.build import fit_weights, with_aliases

    dtype = torch.float16 if half else torch.float32
    weights = {name: tensor.to(dtype) for name, tensor in fit_weights(network, state_dict).items()}
    # Through JSON, so that tuples become lists, which every reader of YAML knows.
    arguments = json.loads(json.dumps(asdict(network)))
    backbone = {"_target_": TARGETS[0], "spatial_dims": 3, **arguments, "dropout": 0.0}
    inference = {
        "sw_batch_size": 1,
        "roi_size": list(patch_shape),
        "overlap": overlap,
        "mode": "gaussian",
    }
    content = {
        "epoch": epoch,
        "pytorch-lightning_version": "2.6.6",  # the one that cyto-dl's own checkpoints were measured with
        # With the aliases, which cyto-dl insists on; they share their tensor's storage in the file.
        "state_dict": {
            f"backbone.{key}": value for key, value in with_aliases(network, weights).items()
        },
        "hyper_parameters": {"backbone": backbone, "inference_args": inference},
    }
    checkpoint = Path(folder, "checkpoints", f"epoch_{epoch:03d}.ckpt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, checkpoint)
    config = yaml.safe_dump(_train_config(backbone, inference), sort_keys=False)
    Path(folder, "train_config.yaml").write_text(config, encoding="utf-8")
    return checkpoint


def _train_config(backbone: dict[str, Any], inference: dict[str, Any]) -> dict[str, Any]:
    normalize = {
        "_target_": "monai.transforms.NormalizeIntensityd",
        "keys": "raw",
        "channel_wise": True,
    }
    # The napari plugin looks in _aux. Lists are copied, or YAML would write references.
    model_aux = {"filters": [*backbone["filters"]], "overlap": inference["overlap"]}
    data_aux = {"patch_shape": [*inference["roi_size"]]}
    return {
        "model": {"backbone": backbone, "inference_args": inference, "_aux": model_aux},
        "data": {"transforms": {"predict": {"transforms": [normalize]}}, "_aux": data_aux},
    }


# --- what they say


def _bundle(name: str, files: Files) -> Bundle:
    from megaseg_dask.models.build import fit_weights

    hyper, config = Source(files.checkpoint, files.content), Source(CONFIG, files.config)
    state = _tensors(files.content["state_dict"])
    backbone = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    network = NetworkSpec.of_weights({key: tuple(value.shape) for key, value in backbone.items()})
    from_network = _network_origins(network, hyper, config)
    heads, from_heads = read_heads(network, hyper, config, state)
    settings, from_settings = _settings(hyper, config)
    preprocessing, from_preprocessing = read_preprocessing(config, network.in_channels)
    precision, from_precision = _precision(config)
    origins = {
        "weights": f"{files.checkpoint}: state_dict ({files.reason})",
        **from_network,
        **from_heads,
        **from_settings,
        "preprocessing": from_preprocessing,
        "precision": from_precision,
    }
    # A head that does not predict may have layers.
    used = backbone | {
        k: v
        for k, v in state.items()
        if k.startswith(tuple(f"{HEADS}{head.name}." for head in heads))
    }
    bundle = Bundle(
        name,
        "",
        network,
        **settings,
        weights=fit_weights(network, used, heads),
        origins=origins,
        preprocessing=preprocessing,
        heads=heads,
        precision=precision,
    )
    return replace(bundle, digest=content_digest(bundle))


def _tensors(state: Mapping[Any, Any]) -> "dict[str, torch.Tensor]":
    """The weights that predict, under the names of `fit_weights`; each holds the values that its shape claims."""
    import torch

    from megaseg_dask.models.build import require_stored

    # A loss keeps class weights in its head; they say nothing about prediction.
    kept = {
        key: value
        for key, value in state.items()
        if not re.match(r"task_heads\..*\bloss\.", str(key))
    }
    if foreign := [key for key in kept if not str(key).startswith(("backbone.", HEADS))]:
        raise BundleError(
            f"weights outside the backbone ({first_few(foreign)}): only a DynUNet is run"
        )
    if broken := [key for key, value in kept.items() if not isinstance(value, torch.Tensor)]:
        raise BundleError(
            f"the state_dict holds more than tensors ({first_few(broken)}); fetch the bundle again"
        )
    # The heads of deep supervision are for training; the last output is the same without them.
    unused = re.compile(r"deep_supervision_heads\.|.*\.super_head\.")
    named = {_name(key): value for key, value in kept.items()}
    if len(named) < len(kept):
        raise BundleError(
            "the state_dict has the same weights under two prefixes; fetch the bundle again"
        )
    weights = {key: value for key, value in named.items() if not unused.match(key)}
    for key, value in weights.items():
        require_stored(key, value)
    return weights


def _name(key: str) -> str:
    """A key without what cyto-dl and ``torch.compile`` put before it; ResBlocksHead has all below ``model.model``."""
    key = key.removeprefix("backbone.").removeprefix("_orig_mod.")
    return re.sub(r"^(task_heads\.[^.]+\.)(?:_orig_mod\.)?(?:model\.model\.)?", r"\1", key)


def _network_origins(network: NetworkSpec, hyper: Source, config: Source) -> dict[str, str]:
    """Who states each argument of the network; all must agree with the weights."""
    stated = hyper.section("hyper_parameters.backbone")
    if not stated:
        auxiliary = config.section("model._aux")
        in_config = {key: auxiliary[key] for key in NETWORK_ARGUMENTS if key in auxiliary}
        stated = in_config | config.section("model.backbone")
    require_known(stated, BACKBONE, BACKBONE_FREE)
    for argument in NETWORK_ARGUMENTS:
        if argument in stated:
            _require_agreement(argument, stated[argument], getattr(network, argument))
    return {
        argument: stated[argument].origin if argument in stated else SHAPES
        for argument in NETWORK_ARGUMENTS
    }


def _require_agreement(argument: str, stated: Statement, found: Any) -> None:
    value = stated.value
    if argument == "filters" and isinstance(value, list | tuple):
        value = value[: len(found)]  # as DynUNet does
    if not same(value, found):
        raise BundleError(
            f"{stated}, the weights are of {found}; one is wrong, fetch the bundle again"
        )


def _settings(hyper: Source, config: Source) -> tuple[dict[str, Any], dict[str, str]]:
    """Patch, overlap and window as far as stated, and who states each; else the Bundle's defaults hold."""
    sections = ((config, "model.inference_args"), (hyper, "hyper_parameters.inference_args"))
    plugins = {"roi_size": "data._aux.patch_shape", "overlap": "model._aux.overlap"}
    stated = {
        argument: found for argument, path in plugins.items() if (found := config.statement(path))
    }
    for source, path in sections:
        section = source.section(path)
        require_known(section, INFERENCE, INFERENCE_FREE)
        stated |= section
    given = [(source, path) for source, path in sections if source.section(path)]
    for argument, default in MONAI_DEFAULTS.items() if given else ():
        if argument not in stated and not any(
            source.mentions(path, argument) for source, path in given
        ):
            source, path = given[-1]
            stated[argument] = Statement(
                default, f"MONAI's default, as {source.name}: {path} has no {argument}"
            )
    settings = {
        name: _parsed(name, stated[argument])
        for name, argument in SETTINGS.items()
        if argument in stated
    }
    origins = {}
    for name, argument in SETTINGS.items():
        places = [(source, f"{path}.{argument}") for source, path in reversed(sections)]
        places += [(config, plugins[argument])] if argument in plugins else []
        origins[name] = stated[argument].origin if argument in stated else reference(*places)
    return settings, origins


def _parsed(setting: str, statement: Statement) -> str | tuple[Any, ...]:
    value = statement.value
    if setting == "window":
        if not isinstance(value, str) or value not in ("gaussian", "constant"):
            raise BundleError(f"{statement}; blending mode expected 'gaussian' or 'constant'")
        return value
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    kind = int if setting == "patch_shape" else int | float
    if len(values) != 3 or not all(
        isinstance(each, kind) and not isinstance(each, bool) for each in values
    ):
        raise BundleError(f"{statement}; {setting} expected as three numbers, or one for all axes")
    if not all(0 < each < 2**20 if kind is int else 0 <= each < 1 for each in values):
        limits = "positive sizes below 2^20" if kind is int else "values from 0 to below 1"
        raise BundleError(f"{statement}; {setting} expected as {limits}")
    return tuple(values) if kind is int else tuple(map(float, values))


def _precision(config: Source) -> tuple[str, str]:
    """The precision of training and prediction in cyto-dl; one that is not offered here is only told."""
    stated = config.statement("trainer.precision")
    if stated is None:
        return "fp32", REFERENCE
    precision = PRECISIONS.get(stated.value) if isinstance(stated.value, int | str) else None
    return (precision, stated.origin) if precision else ("fp32", f"{REFERENCE} ({stated})")
