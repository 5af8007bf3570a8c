"""The heads of a cyto-dl model: what each puts out, and how that is read.

Most heads hand on the backbone's output as it is, whatever their name; then only
their loss and their postprocessing say what it means. ``ResBlocksHead`` has layers
of its own. A head that is neither is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models.bundle import HEADS, Head, require_head_name
from megaseg_dask.models.cytodl.config import Fixed, Source, Statement, class_name, require_known
from megaseg_dask.models.cytodl.safe_loading import short
from megaseg_dask.models.network import NetworkSpec

if TYPE_CHECKING:
    import torch

REFERENCE = "reference value"
MAX_HEADS = 32
PACKAGES = ("cyto_dl", "aics_im2im")
RES_BLOCKS: Fixed = {
    "resolution": ("lr",),
    "spatial_dims": (3,),
    "dense": (False,),
    "first_layer": ({"_target_": "torch.nn.Identity"},),
    "final_act": ({"_target_": "torch.nn.Identity"},),
}
# The numbers among these are those of the weights.
RES_BLOCKS_FREE = {
    "_target_",
    "loss",
    "postprocess",
    "in_channels",
    "out_channels",
    "n_convs",
    "dropout",
    "upsample_method",
    "upsample_ratio",
}
POSTPROCESSING = {"ActThreshLabel", "AutoThreshold", "detach", "rescale", "sigmoid_rescale"}
ACTIVATIONS = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Identity": "identity"}
# Losses of segmentation; their networks put out logits, whichever way an image of them is saved.
SEGMENTATION = re.compile(r"Dice|Focal|CrossEntropy|CE(Loss|With)|Tversky|Jaccard")


@dataclass(frozen=True, slots=True)
class _Described:
    """A head's name, and where its arguments are: a source, and their path there."""

    name: str
    source: Source
    path: str

    def __call__(self, argument: str) -> Statement | None:
        return self.source.statement(f"{self.path}.{argument}")


def read_heads(
    network: NetworkSpec, hyper: Source, config: Source, state: "Mapping[str, torch.Tensor]"
) -> tuple[tuple[Head, ...], dict[str, str]]:
    """The heads that predict, and who states what about them.

    ``state`` has the weights of heads under ``task_heads.<name>.``. Raises
    BundleError for heads whose output would not be what their layers make of it.
    """
    described, origin = _described(hyper, config)
    with_layers = {key.split(".")[1] for key in state if key.startswith(HEADS)}
    if lost := with_layers - {head.name for head in described}:
        keys = [key for key in state if key.startswith(HEADS) and key.split(".")[1] in lost]
        raise BundleError(
            f"weights outside the backbone ({first_few(keys)}): no file describes their head, so it is not run"
        )
    if not described:
        described = [_Described("seg", hyper, "hyper_parameters.task_heads.seg")]
    heads, origins = [], {"heads": origin}
    for each in _predicting(described, hyper, config):
        activation, from_activation = _activation(each)
        threshold, from_threshold = _threshold(each, activation)
        layers = _layers(each, state) if each.name in with_layers else _no_layers(each, network)
        heads.append(Head(each.name, **layers, activation=activation, threshold=threshold))
        origins[f"heads.{each.name}.activation"] = from_activation
        origins[f"heads.{each.name}.threshold"] = from_threshold
    return tuple(heads), origins


def _described(hyper: Source, config: Source) -> tuple[list[_Described], str]:
    for source, path in ((hyper, "hyper_parameters.task_heads"), (config, "model.task_heads")):
        names = source.at(path)
        if isinstance(names, Mapping) and names:
            if len(names) > MAX_HEADS:
                raise BundleError(
                    f"{source.name}: {len(names)} {path}; at most {MAX_HEADS} are run"
                )
            for name in names:
                require_head_name(name)
            return [
                _Described(name, source, f"{path}.{name}") for name in names
            ], f"{source.name}: {path}"
    return [], REFERENCE


def _predicting(described: list[_Described], hyper: Source, config: Source) -> list[_Described]:
    """The heads that cyto-dl runs to predict: those of ``inference_heads``, else all."""
    for source, path in (
        (hyper, "hyper_parameters.inference_heads"),
        (config, "model.inference_heads"),
    ):
        wanted = source.at(path)
        if isinstance(wanted, list) and wanted:
            chosen = [
                head
                for name in wanted
                for head in described
                if isinstance(name, str) and head.name == name
            ]
            if len(chosen) != len(wanted) or len({head.name for head in chosen}) != len(wanted):
                there = first_few(head.name for head in described)
                raise BundleError(
                    f"{source.name}: {path} is {short(wanted)}; the heads are {there}"
                )
            return chosen
    return described


def _no_layers(head: _Described, network: NetworkSpec) -> dict[str, int]:
    """A head that hands on what the backbone puts out, all of it or one channel."""
    target = head("_target_")
    name = class_name(target.value, PACKAGES) if target else "BaseHead"
    if name is None:
        raise BundleError(
            f"{target}; only heads of {' or '.join(PACKAGES)} are known, so this model is not run"
        )
    if name == "ResBlocksHead":
        raise BundleError(f"{target}; the checkpoint lacks its weights, fetch it again")
    channel = head("postprocess.prediction.ch")
    number = channel.value if channel and type(channel.value) is int else -2
    if channel is None or number == -1 or network.out_channels == 1:
        return {"channels": network.out_channels}
    # To cyto-dl 0 means all channels, which is hardly what was meant.
    if not 0 < number < network.out_channels:
        raise BundleError(
            f"{channel}; expected -1 for all channels, or one from 1 to {network.out_channels - 1}"
        )
    return {"channels": 1, "first": number}


def _layers(head: _Described, state: "Mapping[str, torch.Tensor]") -> dict[str, int]:
    """A head with layers of its own; how many of what size their shapes say."""
    prefix = f"{HEADS}{head.name}."
    own = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    target = head("_target_")
    if not target or class_name(target.value, PACKAGES) != "ResBlocksHead":
        raise BundleError(
            f"weights outside the backbone ({first_few(prefix + key for key in own)}): "
            f"of the heads with layers only cyto_dl.nn.head.ResBlocksHead is run; {target or 'this one has no name'}"
        )
    require_known(head.source.section(head.path), RES_BLOCKS, RES_BLOCKS_FREE)
    if channel := head("postprocess.prediction.ch"):
        raise BundleError(f"{channel}; only all channels of a head with layers are run")
    n_blocks = sum(bool(re.fullmatch(r"\d+\.conv1\.conv\.weight", key)) for key in own)
    last = own.get(f"{n_blocks + 1}.conv.conv.weight")
    if last is None or last.ndim != 5:
        raise BundleError(
            f"head {one_line(head.name)}: its weights ({first_few(own)}) are not of a ResBlocksHead; not run"
        )
    return {"channels": last.shape[0], "n_blocks": n_blocks}


def _activation(head: _Described) -> tuple[str, str]:
    """What turns logits into scores, and who says so: the postprocessing, else the loss."""
    prediction = head("postprocess.prediction._target_")
    name = class_name(prediction.value, PACKAGES) if prediction else None
    if prediction and name not in POSTPROCESSING:
        known = ", ".join(sorted(POSTPROCESSING))
        raise BundleError(
            f"{prediction}; of all postprocessing only {known} is understood, so this model is not run"
        )
    stated = head("postprocess.prediction.activation._target_")
    if stated:
        activation = ACTIVATIONS.get(class_name(stated.value, ("torch.nn",)) or "")
        if activation is None:
            raise BundleError(
                f"{stated}; only {', '.join(ACTIVATIONS)} are understood, so this model is not run"
            )
        if activation != "identity":
            return activation, stated.origin
    for kind in ("sigmoid", "softmax"):
        if (applied := head(f"loss.{kind}")) and applied.value is True:
            return kind, applied.origin
    loss = head("loss._target_")
    other = loss and not (isinstance(loss.value, str) and SEGMENTATION.search(loss.value))
    if prediction and name == "ActThreshLabel" and other:
        return "identity", f"{prediction.origin}, without an activation"
    return "sigmoid", REFERENCE


def _threshold(head: _Described, activation: str) -> tuple[float | str, str]:
    """The score above which a voxel is foreground, or the method that finds it; what is none of ours is only told."""
    method, fixed = head("postprocess.prediction.method"), head("postprocess.prediction.threshold")
    stated = method or fixed
    if stated is None:
        return 0.5, REFERENCE
    value = stated.value
    if method and isinstance(value, str) and value.removeprefix("threshold_") in METHODS:
        return value.removeprefix("threshold_"), stated.origin
    if type(value) in (int, float) and activation == "sigmoid":
        # AutoThreshold compares logits, ActThreshLabel what the activation made of them.
        score = 1 / (1 + math.exp(-value)) if method and abs(value) < 100 else value
        if 0 <= score < 1:
            return float(score), stated.origin
    return 0.5, f"{REFERENCE} ({stated})"
