"""The network: its numbers, what its weights must be, and the torch module that the two give.

The network is always the one built here from numbers; weights fit it key by key
or not at all. Whatever a file claims is compared before anything is allocated.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import chain, product
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from megaseg_dask.errors import BundleError, SettingsError
from megaseg_dask.messages import first_few, one_line

# torch takes a second to import; nobody who only reads a NetworkSpec pays for it.
if TYPE_CHECKING:
    import torch

Triple: TypeAlias = tuple[int, int, int]

HEADS = "task_heads."  # in the names of weights, before a head's name
FETCH = "fetch the bundle again"
MAX_PARAMETERS = 2**28  # 1 GiB of float32, sixteen times MegaSeg_v1
MAX_LEVELS = 10  # a patch would be a multiple of 2^9 voxels


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Arguments of MONAI's ``DynUNet`` (nnU-Net), the one architecture of MegaSeg.

    The defaults are MegaSeg_v1. Sizes are (z, y, x), one per level from full
    resolution to the bottleneck. Raises BundleError for a network whose output
    would not have the shape of its input.
    """

    in_channels: int = 1
    out_channels: int = 1
    filters: tuple[int, ...] = (32, 64, 128, 256, 320)
    strides: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernel_size: tuple[Triple, ...] = ((3, 3, 3),) * 5
    upsample_kernel_size: tuple[Triple, ...] = ((2, 2, 2),) * 4
    res_block: bool = True

    def __post_init__(self) -> None:
        levels = {len(self.filters), len(self.strides), len(self.kernel_size)}
        if len(levels) != 1 or not 3 <= len(self.filters) <= MAX_LEVELS:
            raise BundleError(
                f"filters, strides and kernel_size need an entry for each of 3 or more levels, "
                f"{MAX_LEVELS} at most; found {len(self.filters)}, {len(self.strides)} and {len(self.kernel_size)}"
            )
        if self.strides[0] != (1, 1, 1) or self.upsample_kernel_size != self.strides[1:]:
            raise BundleError(
                f"strides {self.strides} must begin with (1, 1, 1) and go on like upsample_kernel_size "
                f"{self.upsample_kernel_size}, or the output has another shape than the input"
            )
        if any(size % 2 == 0 for kernel in self.kernel_size for size in kernel):
            raise BundleError(
                f"kernel_size {self.kernel_size}: even sizes shift the image; only odd ones are run"
            )
        if min(self.in_channels, self.out_channels, *self.filters, *chain(*self.strides)) < 1:
            raise BundleError(f"channels, filters and strides must be positive: {self}")

    @property
    def patch_multiple(self) -> Triple:
        """Voxels (z, y, x) of the image in one voxel of the bottleneck."""
        z, y, x = (prod(axis) for axis in zip(*self.strides, strict=True))
        return z, y, x

    @classmethod
    def of_weights(cls, shapes: Mapping[str, tuple[int, ...]]) -> "NetworkSpec":
        """The only network here that has tensors of these names and shapes.

        A transposed convolution's kernel is its stride, and must be the stride of
        its level; so the shapes determine everything. Raises BundleError for the
        weights of anything else.
        """
        n_up = sum(fnmatchcase(name, "upsamples.*.transp_conv.conv.weight") for name in shapes)
        if n_up >= MAX_LEVELS:
            raise BundleError(f"the weights are of {n_up + 1} levels; at most {MAX_LEVELS} are run")
        blocks = ["input_block", *(f"downsamples.{i}" for i in range(n_up - 1)), "bottleneck"]
        convs = [_conv_shape(shapes, f"{block}.conv1") for block in blocks]
        ups = [_conv_shape(shapes, f"upsamples.{i}.transp_conv")[2:] for i in reversed(range(n_up))]
        return cls(
            in_channels=convs[0][1],
            out_channels=_conv_shape(shapes, "output_block.conv")[0],
            filters=tuple(conv[0] for conv in convs),
            strides=((1, 1, 1), *ups),
            kernel_size=tuple(conv[2:] for conv in convs),
            upsample_kernel_size=tuple(ups),
            res_block=any(".conv3." in name for name in shapes),
        )


def _conv_shape(
    shapes: Mapping[str, tuple[int, ...]], layer: str
) -> tuple[int, int, int, int, int]:
    key = f"{layer}.conv.weight"
    if key not in shapes:
        raise BundleError(f"the weights are not of a DynUNet, which alone is run: no {key}")
    if len(shapes[key]) != 5:
        raise BundleError(f"the weights are not of a 3D network: {key} has shape {shapes[key]}")
    a, b, z, y, x = shapes[key]
    return a, b, z, y, x


@dataclass(frozen=True, slots=True)
class Head:
    """One output of a model; each gets scores and labels of its own, called by its name.

    A head without ``n_blocks`` hands on ``channels`` channels of the backbone's
    output, from ``first`` on. One with ``n_blocks`` has layers of its own, cyto-dl's
    ``ResBlocksHead``: that many residual blocks, then a convolution to ``channels``.
    ``threshold`` is what the bundle suggests: above this score, or a method's name.
    """

    name: str = "seg"
    channels: int = 1
    first: int = 0
    n_blocks: int | None = None
    activation: str = "sigmoid"
    threshold: float | str = 0.5

    def __post_init__(self) -> None:
        require_name(self.name)


def require_name(name: object) -> None:
    """Raise BundleError unless a head may be called so: its name becomes a part of paths."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w -]{0,63}", name):
        shown = one_line(name) if isinstance(name, str) else type(name).__name__
        raise BundleError(
            f"a task head is called {shown!r}; expected up to 64 letters, digits, spaces, - and _"
        )


def is_plain(network: NetworkSpec, heads: Sequence[Head]) -> bool:
    """Whether the backbone's output is the model's."""
    return [(head.first, head.channels, head.n_blocks) for head in heads] == [
        (0, network.out_channels, None)
    ]


def assemble(
    network: NetworkSpec, heads: Sequence[Head], weights: "Mapping[str, torch.Tensor]"
) -> "torch.nn.Module":
    """The network that maps (n, in_channels, z, y, x) to the logits of all heads, one after the other."""
    import torch

    parts = {
        prefix: _filled(layers, state) for prefix, layers, state in _parts(network, heads, weights)
    }

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = parts[""]
            self.layers = torch.nn.ModuleList(
                parts.get(_prefix(head), torch.nn.Identity()) for head in heads
            )

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            features = self.backbone(patches)
            outputs = (
                (head, layers(features)) for head, layers in zip(heads, self.layers, strict=True)
            )
            return torch.cat(
                [output[:, head.first : head.first + head.channels] for head, output in outputs],
                dim=1,
            )

    model = parts[""] if is_plain(network, heads) else Heads()
    return model.eval().requires_grad_(False)


def fit_weights(
    network: NetworkSpec, state: "Mapping[str, torch.Tensor]", heads: Sequence[Head] = ()
) -> "dict[str, torch.Tensor]":
    """The parameters of network and heads out of a state dict, each once, finite, as contiguous float32.

    The aliases ``skip_layers.*`` may be absent. Raises BundleError for keys that
    are missing or too many, another shape, and values that are no finite numbers.
    """
    return {
        prefix + key: value
        for prefix, layers, own in _parts(network, heads, state)
        for key, value in _fit(layers, own).items()
    }


def with_aliases(
    network: NetworkSpec, weights: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """``weights`` under every key of the network's state dict; aliases share their tensor."""
    return {key: weights[name] for key, name in _names(_skeleton(network)).items()}


def _skeleton(spec: NetworkSpec) -> "torch.nn.Module":
    import torch
    from monai.networks.nets.dynunet import DynUNet

    try:
        # Without storage: no time for initial values, and the global random state stays as it is.
        with torch.device("meta"):
            network: torch.nn.Module = DynUNet(spatial_dims=3, **asdict(spec))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BundleError(f"{spec} cannot be built: {one_line(error, 200)}") from error
    return network


def _prefix(head: Head) -> str:
    return f"{HEADS}{head.name}."


def _parts(
    network: NetworkSpec, heads: Sequence[Head], state: "Mapping[str, torch.Tensor]"
) -> "Iterator[tuple[str, torch.nn.Module, dict[str, torch.Tensor]]]":
    """Backbone and heads with layers: prefix of their weights, module without storage, weights without the prefix.

    Keys of no head stay with the backbone, which refuses them.
    """
    modules = {_prefix(head): _layers(network, head) for head in heads if head.n_blocks is not None}
    modules[""] = _skeleton(network)
    n = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
    if n > MAX_PARAMETERS:
        raise BundleError(f"a network of {n} parameters; at most {MAX_PARAMETERS} are run")
    found: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in modules}
    for key, value in state.items():
        prefix = next(prefix for prefix in modules if key.startswith(prefix))
        found[prefix][key.removeprefix(prefix)] = value
    for prefix, module in modules.items():
        yield prefix, module, found[prefix]


def _layers(spec: NetworkSpec, head: Head) -> "torch.nn.Module":
    """The layers of a head, with the parameter names that cyto-dl's ``ResBlocksHead`` has for them."""
    import torch
    from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock

    width, n_blocks = spec.out_channels, head.n_blocks or 0
    with torch.device("meta"):
        blocks = [UnetResBlock(3, width, width, 3, 1, "INSTANCE") for _ in range(n_blocks)]
        return torch.nn.Sequential(
            torch.nn.Identity(), *blocks, UnetOutBlock(3, width, head.channels)
        )


def _filled(network: "torch.nn.Module", state: "Mapping[str, torch.Tensor]") -> "torch.nn.Module":
    weights = _fit(network, state)
    network.load_state_dict(
        {key: weights[name] for key, name in _names(network).items()}, assign=True
    )
    return network


def _names(network: "torch.nn.Module") -> dict[str, str]:
    """Every key of the state dict → the first key of the same parameter."""
    first: dict[int, str] = {}
    parameters = network.named_parameters(remove_duplicate=False)
    return {key: first.setdefault(id(parameter), key) for key, parameter in parameters}


def _fit(
    network: "torch.nn.Module", state: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    names = _names(network)
    _require_keys(missing=set(names.values()) - set(state), unexpected=set(state) - set(names))
    weights = {key: _float32(key, state[key], like) for key, like in network.named_parameters()}
    for key in set(state) - set(weights):
        if not _float32(key, state[key], weights[names[key]]).equal(weights[names[key]]):
            raise BundleError(
                f"{key} and {names[key]} are one parameter but hold different values; {FETCH}"
            )
    return weights


def _require_keys(*, missing: set[str], unexpected: set[str]) -> None:
    found = {"missing": missing, "unexpected": unexpected}
    problems = [f"{len(keys)} {kind} ({first_few(keys)})" for kind, keys in found.items() if keys]
    if problems:
        raise BundleError(
            f"the weights do not fit the network, keys: {', '.join(problems)}; {FETCH}"
        )


def _float32(key: str, tensor: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
    import torch

    if tensor.shape != like.shape:
        raise BundleError(
            f"{key} has shape {tuple(tensor.shape)}, the network needs {tuple(like.shape)}; {FETCH}"
        )
    require_stored(key, tensor)
    values = tensor.detach().to(torch.float32).contiguous()
    if not values.isfinite().all():
        raise BundleError(
            f"{key} holds NaN or infinity; the training diverged, take an earlier checkpoint"
        )
    return values


def require_stored(key: str, tensor: "torch.Tensor") -> None:
    """Raise BundleError unless a tensor is of floats, and holds as many values as its shape claims."""
    import torch

    # A view of few stored values can claim any shape; a file must hold what it claims.
    plain = (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
    )
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        kind = f"{tensor.dtype}, {tensor.layout}, {tuple(tensor.shape)}"
        raise BundleError(f"{one_line(key)} is not a plain tensor of floats ({kind}); {FETCH}")


def require_patch(network: NetworkSpec, patch_shape: tuple[int, ...]) -> None:
    """Raise SettingsError unless ``network`` can take patches of this shape (z, y, x).

    Every axis must be a multiple of the product of its strides, and two voxels
    must be left at the bottleneck, since instance norm cannot normalise one.
    """
    multiple = network.patch_multiple
    if not _takes(multiple, patch_shape):
        raise SettingsError(
            f"patch {_join(patch_shape)}: expected z,y,x in multiples of {_join(multiple)}, two voxels or "
            f"more at the bottleneck; the nearest that works is {_join(_nearest(multiple, patch_shape))}"
        )


def _takes(multiple: Triple, patch_shape: tuple[int, ...]) -> bool:
    fits = len(patch_shape) == 3 and all(
        size % step == 0 for size, step in zip(patch_shape, multiple, strict=True)
    )
    return fits and min(patch_shape) > 0 and prod(patch_shape) > prod(multiple)


def _nearest(multiple: Triple, patch_shape: tuple[int, ...]) -> tuple[int, ...]:
    wanted = (patch_shape + multiple)[:3]  # also for a shape of too few or too many axes
    lower = [max(size // step, 1) * step for size, step in zip(wanted, multiple, strict=True)]
    candidates = product(*((low, low + step) for low, step in zip(lower, multiple, strict=True)))
    return min(
        (candidate for candidate in candidates if _takes(multiple, candidate)),
        key=lambda candidate: sum(abs(a - b) for a, b in zip(candidate, wanted, strict=True)),
    )


def _join(sizes: Iterable[int]) -> str:
    return ",".join(map(str, sizes))
