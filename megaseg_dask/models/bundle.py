"""A model bundle: a network, its weights, how its images are prepared and its patches cut.

A bundle is data: nothing in it is imported or called. It is two values. ``BundleFacts`` is all
that planning needs, small and free of torch; ``Bundle`` adds the weights. What a bundle asks for
and no run carries out is refused here, by name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from typing import TYPE_CHECKING, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import one_line
from megaseg_dask.models.network import NetworkSpec, Triple

# torch takes a second to import; a process that reads only a bundle's facts does not pay for it.
if TYPE_CHECKING:
    import torch

HEADS = "task_heads."  # in the names of weights, before a head's name

# The smallest and the largest voxel size (z, y, x) of the images of a training, in µm.
VoxelRange: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]

# How MegaSeg_v1 is run, (z, y, x): patches in voxels, the overlap a fraction of them.
REFERENCE_PATCH_SHAPE: Triple = (64, 128, 128)
REFERENCE_OVERLAP = (0.25, 0.25, 0.25)
REFERENCE_WINDOW = "gaussian"

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
        arguments = STEPS.get(self.name)
        has_all = arguments is not None and len(arguments) == len(self.numbers)
        if not has_all or not all(map(math.isfinite, self.numbers)):
            expected = ", ".join(f"{name}{numbers}" for name, numbers in STEPS.items())
            raise BundleError(
                f"preprocessing step {self.name}{self.numbers}: expected one of {expected}, finite"
            )


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a volume becomes the network's input, step by step; the reference is one z-score."""

    steps: tuple[Step, ...] = (Step("zscore"),)

    @property
    def has_zscore(self) -> bool:
        """Whether mean and standard deviation of the volume are part of it."""
        return Step("zscore") in self.steps

    def __str__(self) -> str:
        return ", ".join(f"{step.name}{step.numbers or ''}" for step in self.steps) or "none"


@dataclass(frozen=True, slots=True)
class Head:
    """One output of a model; each gets its own scores and labels, called by its name.

    A head without ``n_blocks`` hands on ``channels`` channels of the backbone's output, beginning
    with channel ``first``. One with ``n_blocks`` is cyto-dl's ``ResBlocksHead``: that many residual
    blocks, then a convolution to ``channels``. ``threshold`` is what the bundle suggests: a score,
    or the name of a method.
    """

    name: str = "seg"
    channels: int = 1
    first: int = 0
    n_blocks: int | None = None
    activation: str = "sigmoid"
    threshold: float | str = 0.5

    def __post_init__(self) -> None:
        require_head_name(self.name)


def is_size(value: float) -> bool:
    """Return whether a number can be the size of something."""
    return 0 < value < math.inf


def require_head_name(name: object) -> None:
    """Check that a name can be part of a path, since the outputs of a head are called by it.

    Raises:
        BundleError: It cannot.

    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w -]{0,63}", name):
        shown = one_line(name) if isinstance(name, str) else type(name).__name__
        raise BundleError(
            f"a task head is called {shown!r}; expected up to 64 letters, digits, spaces, - and _"
        )


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """All that a bundle says, without its weights.

    ``patch_shape`` (voxels) and ``overlap`` (a fraction of the patch) are (z, y, x), ``window`` is
    the blending weight of a patch. A bundle without ``heads`` has one for all channels.
    ``precision`` is the one it was trained in. ``voxel_size_um`` (z, y, x) is that of its images,
    where it is known; ``voxel_range_um`` is the smallest and the largest, if there were several.
    ``origins`` names for each setting the file and the path that state it. ``digest`` is that of
    `content_digest`, which covers the weights too.
    """

    name: str
    digest: str
    network: NetworkSpec
    patch_shape: Triple = REFERENCE_PATCH_SHAPE
    overlap: tuple[float, float, float] = REFERENCE_OVERLAP
    window: str = REFERENCE_WINDOW
    origins: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing = Preprocessing()
    heads: tuple[Head, ...] = ()
    precision: str = "fp32"
    voxel_size_um: tuple[float, float, float] | None = None
    voxel_range_um: VoxelRange | None = None
    n_parameters: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", (Head(channels=self.network.out_channels),))
        if min(self.patch_shape) < 1:
            raise BundleError(f"patch_shape {self.patch_shape}: expected positive sizes")
        if not all(0 <= overlap < 1 for overlap in self.overlap):
            raise BundleError(f"overlap {self.overlap}: expected values from 0 to below 1")
        if self.window not in ("gaussian", "constant"):
            raise BundleError(f"blending mode {self.window!r}: expected 'gaussian' or 'constant'")
        if self.voxel_size_um is not None and not all(map(is_size, self.voxel_size_um)):
            raise BundleError(f"voxel_size_um {self.voxel_size_um}: expected sizes above 0, in µm")
        if self.voxel_range_um is not None:
            smallest, largest = self.voxel_range_um
            pairs = zip(smallest, largest, strict=True)
            if not all(is_size(low) and is_size(high) and low <= high for low, high in pairs):
                raise BundleError(
                    f"voxel_range_um {self.voxel_range_um}: expected the smallest and the largest "
                    "voxel size, in µm"
                )
        self._require_heads()

    def _require_heads(self) -> None:
        names: set[str] = set()
        for head in self.heads:
            n_channels = head.channels if head.n_blocks is not None else self.network.out_channels
            if head.channels < 1 or not 0 <= head.first <= n_channels - head.channels:
                raise BundleError(f"{head}: its channels are not among the {n_channels} there are")
            if head.name.casefold() in names:
                raise BundleError(f"two heads are called {head.name}")
            names.add(head.name.casefold())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name of each channel of the logits: its head's, numbered where the head has several."""
        names: list[str] = []
        for head in self.heads:
            if head.channels == 1:
                names.append(head.name)
            else:
                names += (f"{head.name}-{number}" for number in range(head.channels))
        return tuple(names)

    @property
    def is_plain(self) -> bool:
        """Whether the backbone's output is the model's output."""
        head = self.heads[0]
        covers_all = (head.first, head.channels) == (0, self.network.out_channels)
        return len(self.heads) == 1 and head.n_blocks is None and covers_all


@dataclass(frozen=True, slots=True)
class Bundle(BundleFacts):
    """A bundle's facts and its weights.

    ``weights`` are float32 tensors, each parameter once: under the parameter names of ``DynUNet``,
    and under ``task_heads.<name>.`` those of a head with layers.
    """

    weights: "Mapping[str, torch.Tensor]" = field(repr=False, kw_only=True)

    def __post_init__(self) -> None:
        BundleFacts.__post_init__(self)
        n_parameters = sum(math.prod(tensor.shape) for tensor in self.weights.values())
        object.__setattr__(self, "n_parameters", n_parameters)

    @property
    def facts(self) -> BundleFacts:
        """The same without the weights."""
        return BundleFacts(**{each.name: getattr(self, each.name) for each in fields(BundleFacts)})


def require_runnable(bundle: BundleFacts) -> None:
    """Check that a run can carry out what a bundle asks for.

    Raises:
        BundleError: A z-score is not the first step, or logits do not go through a sigmoid.

    """
    if any(step.name == "zscore" for step in bundle.preprocessing.steps[1:]):
        # Its statistics would be those of the prepared volume, which no run takes.
        origin = bundle.origins.get("preprocessing", "the bundle")
        raise BundleError(
            f"{origin} prepares images by: {bundle.preprocessing}; "
            "a zscore is only run as the first step"
        )
    for head in bundle.heads:
        if head.activation != "sigmoid":
            origin = bundle.origins.get(f"heads.{head.name}.activation", f"head {head.name}")
            raise BundleError(f"{origin}: activation {head.activation}; only a sigmoid is run")


def content_digest(bundle: Bundle) -> str:
    """Return the SHA-256 (hex) of all in a bundle that decides a result, however it is packed.

    Covers the network's arguments, patch shape, overlap, window, preprocessing and heads where they
    are not the reference's, and every tensor in the order of names: name, shape and little-endian
    float32 values. Leaves out the bundle's name, where settings came from, all that only training
    needs, and threshold, precision and the size of voxels, which are a run's to decide.
    """
    settings = [asdict(bundle.network), bundle.patch_shape, bundle.overlap, bundle.window]
    if bundle.preprocessing != Preprocessing():
        settings.append([(step.name, step.numbers) for step in bundle.preprocessing.steps])
    if not bundle.is_plain or bundle.heads[0].activation != "sigmoid":
        settings.append(
            [(h.name, h.channels, h.first, h.n_blocks, h.activation) for h in bundle.heads]
        )
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(bundle.weights.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
