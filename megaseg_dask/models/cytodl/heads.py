"""The heads of a cyto-dl model: what each puts out, and how that is read.

Most heads hand on the backbone's output as it is, whatever their name; then only their loss and
their postprocessing say what it means. ``ResBlocksHead`` has its own layers. A head that is neither
is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models.bundle import HEADS, Head, require_head_name
from megaseg_dask.models.cytodl.config import (
    CYTODL_PACKAGES,
    REFERENCE,
    Accepted,
    Source,
    Statement,
    class_name,
    require_accepted,
)
from megaseg_dask.models.cytodl.safe_loading import short
from megaseg_dask.models.network import NetworkSpec

MAX_HEADS = 32
RES_BLOCKS: Accepted = {
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

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Described:
    """A head's name, and where its arguments are: a source, and their path there."""

    name: str
    source: Source
    path: str

    def __call__(self, argument: str) -> Statement | None:
        return self.source.statement(f"{self.path}.{argument}")


def read_heads(
    network: NetworkSpec, hyper: Source, config: Source, shapes: Shapes
) -> tuple[tuple[Head, ...], dict[str, str]]:
    """Return the heads that predict, and the origin of each of their settings.

    ``shapes`` are those of the weights; of heads, under ``task_heads.<name>.``.

    Raises:
        BundleError: A head's output would not be what its layers make of it.
    """
    described, origin = _described(hyper, config)
    layers = _layers_by_head(shapes)
    _require_described(layers, described)
    if not described:
        described = [_Described("seg", hyper, "hyper_parameters.task_heads.seg")]
    heads = []
    origins = {"heads": origin}
    for each in _predicting(described, hyper, config):
        if each.name in layers:
            head = _with_layers(each, layers[each.name])
        else:
            head = _without_layers(each, network)
        activation, activation_origin = _activation(each)
        threshold, threshold_origin = _threshold(each, activation)
        heads.append(replace(head, activation=activation, threshold=threshold))
        origins[f"heads.{each.name}.activation"] = activation_origin
        origins[f"heads.{each.name}.threshold"] = threshold_origin
    return tuple(heads), origins


def _layers_by_head(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the weights of each head that has some, without their prefix."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if key.startswith(HEADS):
            name, _, rest = key.removeprefix(HEADS).partition(".")
            layers.setdefault(name, {})[rest] = shape
    return layers


def _require_described(layers: Mapping[str, Shapes], described: list[_Described]) -> None:
    lost: list[str] = []
    for name in layers.keys() - {head.name for head in described}:
        lost += (f"{HEADS}{name}.{key}" for key in layers[name])
    if lost:
        raise BundleError(
            f"weights outside the backbone ({first_few(lost)}): no file describes their head, so "
            "it is not run"
        )


def _described(hyper: Source, config: Source) -> tuple[list[_Described], str]:
    """Return the heads that a file describes, in its order, and where that is."""
    for source, path in ((hyper, "hyper_parameters.task_heads"), (config, "model.task_heads")):
        names = source.at(path)
        if not isinstance(names, Mapping) or not names:
            continue
        if len(names) > MAX_HEADS:
            raise BundleError(f"{source.name}: {len(names)} {path}; at most {MAX_HEADS} are run")
        for name in names:
            require_head_name(name)
        heads = [_Described(name, source, f"{path}.{name}") for name in names]
        return heads, f"{source.name}: {path}"
    return [], REFERENCE


def _predicting(described: list[_Described], hyper: Source, config: Source) -> list[_Described]:
    """Return the heads that cyto-dl runs to predict: those of ``inference_heads``, else all."""
    heads = {head.name: head for head in described}
    for source, path in (
        (hyper, "hyper_parameters.inference_heads"),
        (config, "model.inference_heads"),
    ):
        names = source.at(path)
        if isinstance(names, list) and names:
            chosen = [heads[name] for name in names if isinstance(name, str) and name in heads]
            n_different = len({head.name for head in chosen})
            if n_different != len(names):
                raise BundleError(
                    f"{source.name}: {path} is {short(names)}; the heads are {first_few(heads)}"
                )
            return chosen
    return described


def _without_layers(described: _Described, network: NetworkSpec) -> Head:
    """Return a head that hands on what the backbone puts out, all of it or one channel."""
    target = described("_target_")
    name = class_name(target.value, CYTODL_PACKAGES) if target else "BaseHead"
    if name is None:
        raise BundleError(
            f"{target}; only heads of {' or '.join(CYTODL_PACKAGES)} are known, so this model is "
            "not run"
        )
    if name == "ResBlocksHead":
        raise BundleError(f"{target}; the checkpoint lacks its weights, fetch it again")
    n_channels = network.out_channels
    channel = described("postprocess.prediction.ch")
    # No bool, which Python counts as a number.
    number = channel.value if channel and type(channel.value) is int else 0
    if channel is None or number == -1 or n_channels == 1:
        return Head(described.name, n_channels)
    # To cyto-dl 0 means all channels, which is hardly what was meant.
    if not 0 < number < n_channels:
        raise BundleError(
            f"{channel}; expected -1 for all channels, or one from 1 to {n_channels - 1}"
        )
    return Head(described.name, 1, first=number)


def _with_layers(described: _Described, layers: Shapes) -> Head:
    """Return a head with its own layers; the shapes of their weights say how many of what size."""
    target = described("_target_")
    if not target or class_name(target.value, CYTODL_PACKAGES) != "ResBlocksHead":
        keys = first_few(f"{HEADS}{described.name}.{key}" for key in layers)
        raise BundleError(
            f"weights outside the backbone ({keys}): of the heads with layers only "
            f"cyto_dl.nn.head.ResBlocksHead is run; {target or 'this one has no name'}"
        )
    require_accepted(described.source.section(described.path), RES_BLOCKS, RES_BLOCKS_FREE)
    if channel := described("postprocess.prediction.ch"):
        raise BundleError(f"{channel}; only all channels of a head with layers are run")
    n_blocks = sum(bool(re.fullmatch(r"\d+\.conv1\.conv\.weight", key)) for key in layers)
    last = layers.get(f"{n_blocks + 1}.conv.conv.weight", ())
    if len(last) != 5:
        raise BundleError(
            f"head {one_line(described.name)}: its weights ({first_few(layers)}) are not of a "
            "ResBlocksHead; not run"
        )
    return Head(described.name, last[0], n_blocks=n_blocks)


def _activation(head: _Described) -> tuple[str, str]:
    """Return what turns logits into scores, and its origin: the postprocessing, else the loss."""
    prediction = head("postprocess.prediction._target_")
    name = class_name(prediction.value, CYTODL_PACKAGES) if prediction else None
    if prediction and name not in POSTPROCESSING:
        known = ", ".join(sorted(POSTPROCESSING))
        raise BundleError(
            f"{prediction}; of all postprocessing only {known} is understood, so this model is not "
            "run"
        )
    stated = _stated_activation(head)
    if stated:
        return stated
    loss = head("loss._target_")
    is_other_loss = loss and not (isinstance(loss.value, str) and SEGMENTATION.search(loss.value))
    if prediction and name == "ActThreshLabel" and is_other_loss:
        return "identity", f"{prediction.origin}, without an activation"
    return "sigmoid", REFERENCE


def _stated_activation(head: _Described) -> tuple[str, str] | None:
    stated = head("postprocess.prediction.activation._target_")
    if stated:
        activation = ACTIVATIONS.get(class_name(stated.value, ("torch.nn",)) or "")
        if activation is None:
            raise BundleError(
                f"{stated}; only {', '.join(ACTIVATIONS)} are understood, so this model is not run"
            )
        if activation != "identity":
            return activation, stated.origin
    for activation in ("sigmoid", "softmax"):
        applied = head(f"loss.{activation}")
        if applied and applied.value is True:
            return activation, applied.origin
    return None


def _threshold(head: _Described, activation: str) -> tuple[float | str, str]:
    """Return the score above which a voxel is foreground, or the method that finds it.

    One that is not offered here is only told, in its origin.
    """
    method = head("postprocess.prediction.method")
    stated = method or head("postprocess.prediction.threshold")
    if stated is None:
        return 0.5, REFERENCE
    value = stated.value
    if method and isinstance(value, str) and value.removeprefix("threshold_") in METHODS:
        return value.removeprefix("threshold_"), stated.origin
    score = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool) and activation == "sigmoid":
        # AutoThreshold compares logits, ActThreshLabel what the activation made of them.
        score = 1 / (1 + math.exp(-value)) if method and abs(value) < 100 else value
    if 0 <= score < 1:
        return float(score), stated.origin
    return 0.5, f"{REFERENCE} ({stated})"
