"""A model bundle: network, weights, and how its images are prepared and its patches cut.

The bundle is data. Nothing in it is imported or called: the network is always
the one built here from numbers, and the weights fit it key by key or not at all.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import chain, product
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from megaseg_dask.errors import BundleError, SettingsError

# torch takes a second to import; nobody who only reads a NetworkSpec pays for it.
if TYPE_CHECKING:
    import torch

Triple: TypeAlias = tuple[int, int, int]


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
        if len(levels) != 1 or len(self.filters) < 3:
            raise BundleError(f"filters, strides and kernel_size need an entry for each of 3 or more levels: {self}")
        if self.strides[0] != (1, 1, 1) or self.upsample_kernel_size != self.strides[1:]:
            raise BundleError(
                f"strides {self.strides} must begin with (1, 1, 1) and go on like upsample_kernel_size "
                f"{self.upsample_kernel_size}, or the output has another shape than the input"
            )
        if any(size % 2 == 0 for kernel in self.kernel_size for size in kernel):
            raise BundleError(f"kernel_size {self.kernel_size}: even sizes shift the image; only odd ones are run")
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


def _conv_shape(shapes: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, int, int, int, int]:
    key = f"{layer}.conv.weight"
    if key not in shapes:
        raise BundleError(f"the weights are not of a DynUNet: no {key}")
    if len(shapes[key]) != 5:
        raise BundleError(f"the weights are not of a 3D network: {key} has shape {shapes[key]}")
    a, b, z, y, x = shapes[key]
    return a, b, z, y, x


@dataclass(frozen=True, slots=True)
class Bundle:
    """A network with its weights, and the settings that it was trained to be run with.

    ``weights`` are float32 under the parameter names of ``DynUNet``, each once.
    ``patch_shape`` and ``overlap`` are (z, y, x), ``window`` is the blending weight
    of a patch. ``origins`` says for each setting where it was found.
    """

    name: str
    digest: str
    network: NetworkSpec
    weights: "Mapping[str, torch.Tensor]" = field(repr=False)
    patch_shape: Triple = (64, 128, 128)
    overlap: tuple[float, float, float] = (0.25, 0.25, 0.25)
    window: str = "gaussian"
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.patch_shape) < 1:
            raise BundleError(f"patch_shape {self.patch_shape}: expected positive sizes")
        if not all(0 <= overlap < 1 for overlap in self.overlap):
            raise BundleError(f"overlap {self.overlap}: expected values from 0 to below 1")
        if self.window not in ("gaussian", "constant"):
            raise BundleError(f"blending mode {self.window!r}: expected 'gaussian' or 'constant'")


def content_digest(bundle: Bundle) -> str:
    """SHA-256 (hex) of what a bundle says, however it is packed.

    Covers the network's arguments, patch shape, overlap, window, and of every
    tensor in the order of names: name, shape and little-endian float32 values.
    Leaves out the bundle's name, where settings came from, and all that only
    training needs.
    """
    settings = [asdict(bundle.network), bundle.patch_shape, bundle.overlap, bundle.window]
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(bundle.weights.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def build_network(bundle: Bundle) -> "torch.nn.Module":
    """MONAI's ``DynUNet`` with the bundle's weights: float32, on the CPU, in eval mode.

    Maps (n, in_channels, z, y, x) to logits (n, out_channels, z, y, x). Its
    parameters share memory with ``bundle.weights`` and take no gradients. Raises
    BundleError when the weights are not exactly those of the network.
    """
    network = _skeleton(bundle.network)
    weights = _fit(network, bundle.weights)
    network.load_state_dict({key: weights[name] for key, name in _names(network).items()}, assign=True)
    return network.eval().requires_grad_(False)


def fit_weights(network: NetworkSpec, state: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The network's parameters out of a state dict, each once, finite, as contiguous float32.

    The aliases ``skip_layers.*`` may be absent. Raises BundleError for keys that
    are missing or too many, another shape, and values that are no finite numbers.
    """
    return _fit(_skeleton(network), state)


def with_aliases(network: NetworkSpec, weights: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """``weights`` under every key of the network's state dict; aliases share their tensor."""
    return {key: weights[name] for key, name in _names(_skeleton(network)).items()}


def _skeleton(spec: NetworkSpec) -> "torch.nn.Module":
    import torch
    from monai.networks.nets.dynunet import DynUNet

    try:
        # Without storage: no time for initial values, and the global random state stays as it is.
        with torch.device("meta"):
            network: torch.nn.Module = DynUNet(spatial_dims=3, **asdict(spec))
    except (AssertionError, ValueError) as error:
        raise BundleError(f"{spec} cannot be built: {error}") from error
    return network


def _names(network: "torch.nn.Module") -> dict[str, str]:
    """Every key of the state dict → the first key of the same parameter."""
    first: dict[int, str] = {}
    parameters = network.named_parameters(remove_duplicate=False)
    return {key: first.setdefault(id(parameter), key) for key, parameter in parameters}


def _fit(network: "torch.nn.Module", state: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    names = _names(network)
    _require_keys(missing=set(names.values()) - set(state), unexpected=set(state) - set(names))
    weights = {key: _float32(key, state[key], like) for key, like in network.named_parameters()}
    for key in set(state) - set(weights):
        if not _float32(key, state[key], weights[names[key]]).equal(weights[names[key]]):
            raise BundleError(f"{key} and {names[key]} are one parameter but hold different values")
    return weights


def _require_keys(*, missing: set[str], unexpected: set[str]) -> None:
    found = {"missing": missing, "unexpected": unexpected}
    problems = [f"{len(keys)} {kind} ({first_few(keys)})" for kind, keys in found.items() if keys]
    if problems:
        raise BundleError(f"the weights do not fit the network, keys: {', '.join(problems)}")


def first_few(names: Iterable[object], n: int = 3) -> str:
    """The first names of many, for a message of one line; foreign ones can be of any length."""
    listed = sorted(" ".join(f"{name!s:.80}".split()) for name in names)
    return ", ".join(listed[:n]) + (", …" if len(listed) > n else "")


def _float32(key: str, tensor: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
    import torch

    if tensor.shape != like.shape:
        raise BundleError(f"{key} has shape {tuple(tensor.shape)}, the network needs {tuple(like.shape)}")
    # A view of few stored values can claim any shape; a file must hold what it claims.
    stored = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_floating_point()
    if not stored or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise BundleError(f"{key} is not a plain tensor of floats ({tensor.dtype}, {tensor.layout})")
    values = tensor.detach().to(torch.float32).contiguous()
    if not values.isfinite().all():
        raise BundleError(f"{key} holds NaN or infinity; the training diverged, take an earlier checkpoint")
    return values


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
    fits = len(patch_shape) == 3 and all(size % step == 0 for size, step in zip(patch_shape, multiple, strict=True))
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
