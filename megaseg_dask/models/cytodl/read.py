"""Bundles as cyto-dl leaves them: a folder, a zip of it, or a bare Lightning checkpoint.

The weights say which network they belong to; what a file states about it must agree with them. A
statement that would change the result and cannot be carried out here is refused by name. What no
file states falls to the reference's value.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few
from megaseg_dask.models.bundle import (
    HEADS,
    REFERENCE_OVERLAP,
    REFERENCE_PATCH_SHAPE,
    REFERENCE_WINDOW,
    Bundle,
    Head,
    VoxelRange,
    content_digest,
    is_size,
    require_runnable,
)
from megaseg_dask.models.cytodl.config import (
    REFERENCE,
    Accepted,
    Section,
    Source,
    Statement,
    is_same,
    reference_origin,
    require_accepted,
)
from megaseg_dask.models.cytodl.files import CONFIG, Files, read_files
from megaseg_dask.models.cytodl.heads import read_heads
from megaseg_dask.models.cytodl.transforms import read_preprocessing
from megaseg_dask.models.network import NetworkSpec, Triple

# torch takes a second to import; only the functions that handle tensors pay for it.
if TYPE_CHECKING:
    import torch

SHAPES = "shapes of the weights"

TARGETS = ("monai.networks.nets.DynUNet", "monai.networks.nets.dynunet.DynUNet")
NETWORK_ARGUMENTS = tuple(field.name for field in fields(NetworkSpec))

# Of each section: the arguments with the only values that are carried out here (the defaults of
# MONAI and of the reference), and those that change no result.
BACKBONE: Accepted = {
    "_target_": TARGETS,
    "spatial_dims": (3,),
    "trans_bias": (False,),
    "norm_name": (("INSTANCE", {"affine": True}), ("instance", {"affine": True})),
    "act_name": ("leakyrelu", ("leakyrelu", {"inplace": True, "negative_slope": 0.01})),
}
BACKBONE_FREE = {*NETWORK_ARGUMENTS, "dropout", "deep_supervision", "deep_supr_num"}
INFERENCE: Accepted = {
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
# Where the sections of a prediction are, the first that counts first.
INFERENCE_PATHS = ("hyper_parameters.inference_args", "model.inference_args")
# Where the napari plugin keeps what it fills in, by argument of MONAI.
PLUGIN_PATHS = {"roi_size": "data._aux.patch_shape", "overlap": "model._aux.overlap"}
# The size of the voxels that the network was trained on; cyto-dl and the plugin know none.
VOXEL_SIZE = "data._aux.voxel_size_um"
VOXEL_RANGE = "data._aux.voxel_range_um"
# cyto-dl hands inference_args on to MONAI's sliding_window_inference, so these hold where they lack
# the key.
MONAI_DEFAULTS: Mapping[str, object] = {"overlap": 0.25, "mode": "constant"}
PRECISIONS: Mapping[object, str] = {
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
_PARTS_OF_DYNUNET = (
    "input_block.",
    "downsamples.",
    "bottleneck.",
    "upsamples.",
    "output_block.",
    "skip_layers.",
    "deep_supervision_heads.",
)
# The heads of deep supervision are for training; the last output is the same without them.
_UNUSED = re.compile(r"deep_supervision_heads\.|.*\.super_head\.")


def load_bundle(path: str | Path, checkpoint: str | None = None) -> Bundle:
    """Return the bundle in a folder, a zip or a ``.ckpt``, if a run can take it.

    Raises:
        BundleError: As for `read_bundle`, and for what `require_runnable` refuses.
    """
    bundle = read_bundle(path, checkpoint)
    with _naming(path):
        require_runnable(bundle)
    return bundle


def read_bundle(path: str | Path, checkpoint: str | None = None) -> Bundle:
    """Return the bundle in a folder, a zip or a ``.ckpt``, with any number of channels and heads.

    ``<x>/checkpoints/*.ckpt`` and ``<x>/train_config.yaml`` may lie one level deeper. Of several
    checkpoints ``checkpoint`` names one; else the best is taken, as far as names or callbacks tell
    it, or the highest epoch. Settings come from
    ``hyper_parameters``, else train_config.yaml, else the reference of MegaSeg_v1.

    Raises:
        BundleError: It is no such bundle; the message has the reason.
    """
    path = Path(path)
    with _naming(path):
        return _bundle_of(bundle_name(path), read_files(path, checkpoint))


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


def _bundle_of(name: str, files: Files) -> Bundle:
    from megaseg_dask.models.build import fit_weights

    hyper = Source(files.checkpoint, files.content)
    config = Source(CONFIG, files.config)
    state = _named_tensors(files.content["state_dict"])
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    backbone = {key: shape for key, shape in shapes.items() if not key.startswith(HEADS)}
    network = NetworkSpec.of_weights(backbone)
    origins = {"weights": f"{files.checkpoint}: state_dict ({files.reason})"}
    origins |= _network_origins(network, hyper, config)
    heads, head_origins = read_heads(network, hyper, config, shapes)
    window = _read_window(hyper, config)
    preprocessing, preprocessing_origin = read_preprocessing(config, network.in_channels)
    precision, precision_origin = _read_precision(config)
    voxel_size = config.statement(VOXEL_SIZE)
    voxel_range = config.statement(VOXEL_RANGE)
    origins |= head_origins | window.origins
    origins["preprocessing"] = preprocessing_origin
    origins["precision"] = precision_origin
    if voxel_size is not None:
        origins["voxel_size_um"] = voxel_size.origin
    if voxel_range is not None:
        origins["voxel_range_um"] = voxel_range.origin
    bundle = Bundle(
        name,
        digest="",
        network=network,
        patch_shape=window.patch_shape,
        overlap=window.overlap,
        window=window.mode,
        origins=origins,
        preprocessing=preprocessing,
        heads=heads,
        precision=precision,
        voxel_size_um=_parse_voxel_size(voxel_size) if voxel_size else None,
        voxel_range_um=_parse_voxel_range(voxel_range) if voxel_range else None,
        weights=fit_weights(network, _without_other_heads(state, heads), heads),
    )
    return replace(bundle, digest=content_digest(bundle))


# -- weights


def _named_tensors(state: Mapping[object, object]) -> "dict[str, torch.Tensor]":
    """Return the weights that predict, under the names of `fit_weights`.

    Each is a tensor of floats that holds as many values as its shape claims.
    """
    import torch

    from megaseg_dask.models.build import require_stored

    # A loss keeps class weights in its head; they say nothing about prediction.
    kept = {
        key: value
        for key, value in _without_wrappers(state).items()
        if not re.match(r"task_heads\..*\bloss\.", key)
    }
    if averages := [key for key in kept if "ema" in re.split(r"[._]", key)]:
        raise BundleError(
            f"the state_dict holds moving averages of weights ({first_few(averages)}) beside "
            "others; save those to predict with as backbone.*, alone"
        )
    if foreign := [key for key in kept if not key.startswith(("backbone.", HEADS))]:
        raise BundleError(
            f"weights outside the backbone ({first_few(foreign)}): only a DynUNet is run"
        )
    tensors: dict[str, torch.Tensor] = {}
    others = []
    for key, value in kept.items():
        if isinstance(value, torch.Tensor):
            tensors[_without_prefixes(key)] = value
        else:
            others.append(key)
    if others:
        raise BundleError(
            f"the state_dict holds more than tensors ({first_few(others)}); fetch the bundle again"
        )
    if len(tensors) < len(kept):
        raise BundleError(
            "the state_dict has the same weights under two prefixes; fetch the bundle again"
        )
    weights = {key: tensor for key, tensor in tensors.items() if not _UNUSED.match(key)}
    for key, tensor in weights.items():
        require_stored(key, tensor)
    return weights


def _without_wrappers(state: Mapping[object, object]) -> dict[str, object]:
    """Return the entries as cyto-dl names them, without what other programs put before all keys.

    That is ``module.`` of data parallel training, ``model.`` or ``net.`` of a LightningModule; what
    is left may be a bare DynUNet.
    """
    entries = {str(key): value for key, value in state.items()}
    for wrapper in ("module.", "model.", "net."):
        if entries and all(key.startswith(wrapper) for key in entries):
            entries = {key.removeprefix(wrapper): value for key, value in entries.items()}
    if entries and all(key.startswith(_PARTS_OF_DYNUNET) for key in entries):
        return {f"backbone.{key}": value for key, value in entries.items()}
    return entries


def _without_prefixes(key: str) -> str:
    """Return a key without what cyto-dl and ``torch.compile`` put before it.

    A ResBlocksHead has all its weights below ``model.model``.
    """
    key = key.removeprefix("backbone.").removeprefix("_orig_mod.")
    return re.sub(r"^(task_heads\.[^.]+\.)(?:_orig_mod\.)?(?:model\.model\.)?", r"\1", key)


def _without_other_heads(
    state: "Mapping[str, torch.Tensor]", heads: tuple[Head, ...]
) -> "dict[str, torch.Tensor]":
    """Return the weights without those of heads that do not predict."""
    prefixes = tuple(f"{HEADS}{head.name}." for head in heads)
    return {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(HEADS) or key.startswith(prefixes)
    }


# -- statements about the network


def _network_origins(network: NetworkSpec, hyper: Source, config: Source) -> dict[str, str]:
    """Return the origin of each argument of the network; all must agree with the weights."""
    section = hyper.section("hyper_parameters.backbone")
    if not section:
        auxiliary = config.section("model._aux")
        section = {key: auxiliary[key] for key in NETWORK_ARGUMENTS if key in auxiliary}
        section |= config.section("model.backbone")
    require_accepted(section, BACKBONE, BACKBONE_FREE)
    origins = dict.fromkeys(NETWORK_ARGUMENTS, SHAPES)
    for argument in NETWORK_ARGUMENTS:
        if argument in section:
            _require_agreement(argument, section[argument], getattr(network, argument))
            origins[argument] = section[argument].origin
    return origins


def _require_agreement(argument: str, statement: Statement, found: object) -> None:
    value = statement.value
    if argument == "filters" and isinstance(value, list | tuple) and isinstance(found, tuple):
        value = value[: len(found)]  # as DynUNet does
    if not is_same(value, found):
        raise BundleError(
            f"{statement}, the weights are of {found}; one is wrong, fetch the bundle again"
        )


# -- statements about the sliding window


@dataclass(frozen=True, slots=True)
class _Window:
    """Patch, overlap and blending mode of the sliding window, with the origin of each."""

    patch_shape: Triple
    overlap: tuple[float, float, float]
    mode: str
    origins: dict[str, str]


def _read_window(hyper: Source, config: Source) -> _Window:
    sections = list(zip((hyper, config), INFERENCE_PATHS, strict=True))
    section = _inference_section(sections, config)
    patch_shape = REFERENCE_PATCH_SHAPE
    overlap = REFERENCE_OVERLAP
    mode = REFERENCE_WINDOW
    if "roi_size" in section:
        patch_shape = _parse_patch_shape(section["roi_size"])
    if "overlap" in section:
        overlap = _parse_overlap(section["overlap"])
    if "mode" in section:
        mode = _parse_mode(section["mode"])
    origins = {}
    arguments = {"patch_shape": "roi_size", "overlap": "overlap", "window": "mode"}
    for setting, argument in arguments.items():
        if argument in section:
            origins[setting] = section[argument].origin
            continue
        places = [(source, f"{path}.{argument}") for source, path in sections]
        if argument in PLUGIN_PATHS:
            places.append((config, PLUGIN_PATHS[argument]))
        origins[setting] = reference_origin(places)
    return _Window(patch_shape, overlap, mode, origins)


def _inference_section(sections: list[tuple[Source, str]], config: Source) -> Section:
    """Return what the files state of a prediction; of two statements the first section's counts."""
    merged: Section = {}
    for argument, path in PLUGIN_PATHS.items():
        if statement := config.statement(path):
            merged[argument] = statement
    given = []
    for source, path in sections:
        section = source.section(path)
        require_accepted(section, INFERENCE, INFERENCE_FREE)
        if section:
            given.append((source, path, section))
    for _, _, section in reversed(given):
        merged |= section
    if not given:
        return merged
    first_source, first_path, _ = given[0]
    for argument, default in MONAI_DEFAULTS.items():
        is_mentioned = any(source.mentions(path, argument) for source, path, _ in given)
        if argument not in merged and not is_mentioned:
            origin = f"MONAI's default, as {first_source.name}: {first_path} has no {argument}"
            merged[argument] = Statement(default, origin)
    return merged


def _parse_mode(statement: Statement) -> str:
    mode = statement.value
    if not isinstance(mode, str) or mode not in ("gaussian", "constant"):
        raise BundleError(f"{statement}; blending mode expected 'gaussian' or 'constant'")
    return mode


def _parse_patch_shape(statement: Statement) -> Triple:
    values = _three_values(statement)
    z, y, x = (value if type(value) is int else None for value in values)
    if z is None or y is None or x is None:
        raise BundleError(
            f"{statement}; patch_shape expected as three numbers, or one for all axes"
        )
    if not 0 < min(z, y, x) <= max(z, y, x) < 2**20:
        raise BundleError(f"{statement}; patch_shape expected as positive sizes below 2^20")
    return z, y, x


def _parse_overlap(statement: Statement) -> tuple[float, float, float]:
    values = _three_values(statement)
    numbers = [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if len(numbers) != 3:
        raise BundleError(f"{statement}; overlap expected as three numbers, or one for all axes")
    if not all(0 <= number < 1 for number in numbers):
        raise BundleError(f"{statement}; overlap expected as values from 0 to below 1")
    z, y, x = map(float, numbers)
    return z, y, x


def _parse_voxel_size(statement: Statement) -> tuple[float, float, float]:
    values = _three_values(statement)
    sizes = [Statement(value, statement.origin).number() for value in values]
    if not all(map(is_size, sizes)):
        raise BundleError(f"{statement}; voxel_size_um expected as sizes above 0, in µm")
    z, y, x = sizes
    return z, y, x


def _parse_voxel_range(statement: Statement) -> VoxelRange:
    value = statement.value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise BundleError(
            f"{statement}; voxel_range_um expected as the smallest and the largest voxel size"
        )
    smallest, largest = (_parse_voxel_size(Statement(size, statement.origin)) for size in value)
    return smallest, largest


def _three_values(statement: Statement) -> list[object]:
    """Return a value for each of three axes; anything but three values becomes Nones."""
    value = statement.value
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    return values if len(values) == 3 else [None] * 3


def _read_precision(config: Source) -> tuple[str, str]:
    """Return the precision of training in cyto-dl; one that is not offered here is only told."""
    statement = config.statement("trainer.precision")
    if statement is None:
        return "fp32", REFERENCE
    value = statement.value
    precision = PRECISIONS.get(value) if isinstance(value, int | str) else None
    if precision is None:
        return "fp32", f"{REFERENCE} ({statement})"
    return precision, statement.origin
