"""Weights and the torch module that they belong to: the one module here that needs torch and MONAI.

The network is always one that is built here from numbers; weights fit it key by key or not at all.
Whatever a file claims is compared before anything is allocated.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.nets.dynunet import DynUNet

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models.bundle import HEADS, Bundle, Head
from megaseg_dask.models.network import NetworkSpec

MAX_PARAMETERS = 2**28  # 1 GiB of float32, sixteen times MegaSeg_v1
_FETCH = "fetch the bundle again"

Weights = Mapping[str, torch.Tensor]


def build_network(bundle: Bundle) -> torch.nn.Module:
    """Return MONAI's ``DynUNet`` with the bundle's weights, and its heads.

    Float32, on the CPU, in eval mode. Maps (n, in_channels, z, y, x) to logits
    (n, channels of all heads, z, y, x), heads in their order. Its parameters share memory with
    ``bundle.weights`` and take no gradients.

    Raises:
        BundleError: The weights are not exactly those of the network.

    """
    modules = _skeletons(bundle.network, bundle.heads)
    states = _split(bundle.weights, modules)
    for prefix, module in modules.items():
        _fill(module, states[prefix])
    network = modules[""] if bundle.is_plain else _WithHeads(bundle.heads, modules)
    return network.eval().requires_grad_(False)


class _WithHeads(torch.nn.Module):
    """A backbone, and heads that each take some of its channels or have their own layers."""

    def __init__(self, heads: Sequence[Head], modules: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self._heads = heads
        self.backbone = modules[""]
        self.layers = torch.nn.ModuleList(
            modules.get(_prefix(head), torch.nn.Identity()) for head in heads
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches to the logits of all heads, one after the other."""
        features = self.backbone(patches)
        outputs = []
        for head, layers in zip(self._heads, self.layers, strict=True):
            outputs.append(layers(features)[:, head.first : head.first + head.channels])
        return torch.cat(outputs, dim=1)


def fit_weights(
    network: NetworkSpec, state: Weights, heads: Sequence[Head] = ()
) -> dict[str, torch.Tensor]:
    """Return the parameters of network and heads, each once, as contiguous finite float32.

    ``state`` is a state dict; the aliases ``skip_layers.*`` may be absent from it.

    Raises:
        BundleError: Keys are missing or too many, a shape differs, or a value is not finite.

    """
    modules = _skeletons(network, heads)
    states = _split(state, modules)
    weights: dict[str, torch.Tensor] = {}
    for prefix, module in modules.items():
        for key, value in _fit(module, states[prefix]).items():
            weights[prefix + key] = value
    return weights


def with_aliases(network: NetworkSpec, weights: Weights) -> dict[str, torch.Tensor]:
    """Return ``weights`` under every key of the network's state dict; aliases share a tensor."""
    return {key: weights[first] for key, first in _first_names(_backbone(network)).items()}


def require_stored(key: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is of floats, and holds as many values as its shape claims.

    Raises:
        BundleError: It is not, or does not: a view of few stored values can claim any shape.

    """
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    n_bytes = tensor.numel() * tensor.element_size()
    is_float = is_plain and tensor.is_floating_point()
    if not is_float or tensor.untyped_storage().nbytes() < n_bytes:
        kind = f"{tensor.dtype}, {tensor.layout}, {tuple(tensor.shape)}"
        raise BundleError(f"{one_line(key)} is not a plain tensor of floats ({kind}); {_FETCH}")


# -- modules without storage


def _skeletons(network: NetworkSpec, heads: Sequence[Head]) -> dict[str, torch.nn.Module]:
    """Return heads with layers and the backbone by the prefix of their weights, without storage."""
    modules = {_prefix(head): _layers(network, head) for head in heads if head.n_blocks is not None}
    # The last, so that keys of no head stay with the backbone, which refuses them.
    modules[""] = _backbone(network)
    n = 0
    for module in modules.values():
        n += sum(parameter.numel() for parameter in module.parameters())
    if n > MAX_PARAMETERS:
        raise BundleError(f"a network of {n} parameters; at most {MAX_PARAMETERS} are run")
    return modules


def _prefix(head: Head) -> str:
    return f"{HEADS}{head.name}."


def _backbone(network: NetworkSpec) -> torch.nn.Module:
    try:
        # Without storage: no time for initial values, and the global random state stays as it is.
        with torch.device("meta"):
            module: torch.nn.Module = DynUNet(spatial_dims=3, **asdict(network))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BundleError(f"{network} cannot be built: {one_line(error, 200)}") from error
    return module


def _layers(network: NetworkSpec, head: Head) -> torch.nn.Module:
    """Return a head's layers, with the parameter names of cyto-dl's ``ResBlocksHead``."""
    width = network.out_channels
    with torch.device("meta"):
        blocks = [
            UnetResBlock(3, width, width, 3, 1, "INSTANCE") for _ in range(head.n_blocks or 0)
        ]
        output = UnetOutBlock(3, width, head.channels)
        return torch.nn.Sequential(torch.nn.Identity(), *blocks, output)


# -- weights into them


def _split(state: Weights, prefixes: Mapping[str, object]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of each prefix, without it."""
    states: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in prefixes}
    for key, value in state.items():
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        states[prefix][key.removeprefix(prefix)] = value
    return states


def _fill(module: torch.nn.Module, state: Weights) -> None:
    weights = _fit(module, state)
    names = _first_names(module)
    module.load_state_dict({key: weights[first] for key, first in names.items()}, assign=True)


def _first_names(module: torch.nn.Module) -> dict[str, str]:
    """Return every key of the state dict → the first key of the same parameter."""
    first: dict[int, str] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    return {key: first.setdefault(id(parameter), key) for key, parameter in parameters}


def _fit(module: torch.nn.Module, state: Weights) -> dict[str, torch.Tensor]:
    names = _first_names(module)
    _require_keys(state.keys(), names)
    weights = {key: _float32(key, state[key], like) for key, like in module.named_parameters()}
    for key in state.keys() - weights.keys():
        weight = weights[names[key]]
        if not _float32(key, state[key], weight).equal(weight):
            raise BundleError(
                f"{key} and {names[key]} are one parameter but hold different values; {_FETCH}"
            )
    return weights


def _require_keys(keys: Set[str], names: Mapping[str, str]) -> None:
    """Check that every parameter is there, by its first name, and nothing else."""
    problems = []
    if missing := set(names.values()) - keys:
        problems.append(f"{len(missing)} missing ({first_few(missing)})")
    if unexpected := keys - names.keys():
        problems.append(f"{len(unexpected)} unexpected ({first_few(unexpected)})")
    if problems:
        raise BundleError(
            f"the weights do not fit the network, keys: {', '.join(problems)}; {_FETCH}"
        )


def _float32(key: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if tensor.shape != like.shape:
        raise BundleError(
            f"{key} has shape {tuple(tensor.shape)}, the network needs {tuple(like.shape)}; "
            f"{_FETCH}"
        )
    require_stored(key, tensor)
    values = tensor.detach().to(torch.float32).contiguous()
    if not values.isfinite().all():
        raise BundleError(
            f"{key} holds NaN or infinity; the training diverged, take an earlier checkpoint"
        )
    return values
