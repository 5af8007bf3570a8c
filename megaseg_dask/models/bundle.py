"""A model bundle: network, weights, and how its images are prepared and its patches cut.

The bundle is data. Nothing in it is imported or called. What it says and a run
does not do is refused here, by name, not where it would be done.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import isfinite
from typing import TYPE_CHECKING

from megaseg_dask.errors import BundleError
from megaseg_dask.models.network import Head, NetworkSpec, Triple, assemble, is_plain

# torch takes a second to import; nobody who only reads a bundle's settings pays for it.
if TYPE_CHECKING:
    import torch

# Step of a preprocessing → names of its numbers. `zscore` takes mean and population standard
# deviation from each channel of the volume; all others are numbers applied to each voxel.
STEPS: Mapping[str, tuple[str, ...]] = {
    "zscore": (),
    "subtract_divide": ("subtrahend", "divisor"),
    "rescale": ("a_min", "a_max", "b_min", "b_max"),
    "clip": ("low", "high"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on every voxel of a volume, in float32: a name of ``STEPS`` and its numbers."""

    name: str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = STEPS.get(self.name)
        if names is None or len(names) != len(self.numbers) or not all(map(isfinite, self.numbers)):
            expected = ", ".join(f"{name}{numbers}" for name, numbers in STEPS.items())
            raise BundleError(
                f"preprocessing step {self.name}{self.numbers}: expected one of {expected}, finite"
            )


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a volume becomes the network's input, in this order; the default is the reference's z-score."""

    steps: tuple[Step, ...] = (Step("zscore"),)

    @property
    def has_zscore(self) -> bool:
        """Tell whether mean and standard deviation of the volume are part of it."""
        return Step("zscore") in self.steps

    def __str__(self) -> str:
        return ", ".join(f"{step.name}{step.numbers or ''}" for step in self.steps) or "none"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A network with its weights, and the settings that it was trained to be run with.

    ``weights`` are float32, each once: under the parameter names of ``DynUNet``, and
    under ``task_heads.<name>.`` those of a head with layers. ``patch_shape`` and
    ``overlap`` are (z, y, x), ``window`` is the blending weight of a patch. Without
    ``heads`` there is one for all channels. ``precision`` is the one it was trained
    in. ``origins`` says for each setting where it was found.
    """

    name: str
    digest: str
    network: NetworkSpec
    weights: "Mapping[str, torch.Tensor]" = field(repr=False)
    patch_shape: Triple = (64, 128, 128)
    overlap: tuple[float, float, float] = (0.25, 0.25, 0.25)
    window: str = "gaussian"
    origins: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing = Preprocessing()
    heads: tuple[Head, ...] = ()
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", (Head(channels=self.network.out_channels),))
        if min(self.patch_shape) < 1:
            raise BundleError(f"patch_shape {self.patch_shape}: expected positive sizes")
        if not all(0 <= overlap < 1 for overlap in self.overlap):
            raise BundleError(f"overlap {self.overlap}: expected values from 0 to below 1")
        if self.window not in ("gaussian", "constant"):
            raise BundleError(f"blending mode {self.window!r}: expected 'gaussian' or 'constant'")
        names: set[str] = set()
        for head in self.heads:
            stop = self.network.out_channels if head.n_blocks is None else head.channels
            if head.channels < 1 or not 0 <= head.first <= stop - head.channels:
                raise BundleError(f"{head}: its channels are not among the {stop} there are")
            if head.name.casefold() in names:
                raise BundleError(f"two heads are called {head.name}")
            names.add(head.name.casefold())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name of each channel of the logits: that of its head, with a number where the head has several."""
        return tuple(
            head.name if head.channels == 1 else f"{head.name}-{number}"
            for head in self.heads
            for number in range(head.channels)
        )


def require_runnable(bundle: Bundle) -> None:
    """Raise BundleError unless a z-score comes first, if at all, and all logits go through a sigmoid."""
    if any(step.name == "zscore" for step in bundle.preprocessing.steps[1:]):
        # Its statistics would be those of the prepared volume, which no run takes.
        origin = bundle.origins.get("preprocessing", "the bundle")
        raise BundleError(
            f"{origin} prepares images by: {bundle.preprocessing}; a zscore is only run as the first step"
        )
    for head in bundle.heads:
        if head.activation != "sigmoid":
            origin = bundle.origins.get(f"heads.{head.name}.activation", f"head {head.name}")
            raise BundleError(f"{origin}: activation {head.activation}; only a sigmoid is run")


def content_digest(bundle: Bundle) -> str:
    """SHA-256 (hex) of what a bundle says, however it is packed.

    Covers the network's arguments, patch shape, overlap, window, preprocessing and
    heads where they are not the reference's, and of every tensor in the order of
    names: name, shape and little-endian float32 values. Leaves out the bundle's
    name, where settings came from, all that only training needs, and threshold and
    precision, which are a run's to decide.
    """
    settings = [asdict(bundle.network), bundle.patch_shape, bundle.overlap, bundle.window]
    if bundle.preprocessing != Preprocessing():
        settings.append([(step.name, step.numbers) for step in bundle.preprocessing.steps])
    if not is_plain(bundle.network, bundle.heads) or bundle.heads[0].activation != "sigmoid":
        settings.append(
            [(h.name, h.channels, h.first, h.n_blocks, h.activation) for h in bundle.heads]
        )
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(bundle.weights.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def build_network(bundle: Bundle) -> "torch.nn.Module":
    """MONAI's ``DynUNet`` with the bundle's weights, and its heads: float32, on the CPU, in eval mode.

    Maps (n, in_channels, z, y, x) to logits (n, channels of all heads, z, y, x), heads
    in their order. Its parameters share memory with ``bundle.weights`` and take no
    gradients. Raises BundleError when the weights are not exactly those of the network.
    """
    return assemble(bundle.network, bundle.heads, bundle.weights)
