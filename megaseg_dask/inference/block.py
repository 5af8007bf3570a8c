"""One block through an engine: patches are cut, prepared, predicted in batches and blended.

The patch grid belongs to the volume, never to a block, and every batch has the
same shape; so the logits of a voxel are the same bits in any block. The same
code runs on NumPy arrays and on tensors of a device. What an engine offers is
declared here, beside the code that uses it.
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.array_library import NUMPY, ArrayLibrary
from megaseg_dask.algorithms.blending import (
    MAX_UINT8_SCORE,
    NotFiniteError,
    blend,
    in_slabs,
    sigmoid,
    window,
)
from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.models.bundle import Step

Array = NDArray[Any]
Float32 = NDArray[np.float32]
T = TypeVar("T")

_ZSCORE = Step("zscore")


class BlockOutputs(Protocol):
    """One output of the network for the core of a block, ``(z, y, x)``, on the host or a device.

    A voxel whose logit is NaN is background: its score is 0.
    """

    def scores(self, dtype: str) -> Array:
        """Return the scores: ``float32`` from 0 to 1, or ``uint8`` as 255 times that, rounded."""
        ...

    def mask(self, threshold: float) -> NDArray[np.uint8]:
        """Return 1 where the float32 score is above ``threshold``, strictly, else 0."""
        ...

    def logits(self) -> Float32:
        """Return the blended logits."""
        ...


@dataclass(frozen=True, slots=True)
class Preparation:
    """How the channels of one volume become the network's input: a z-score first, if any.

    ``zscores`` has one entry for each channel.
    """

    steps: tuple[Step, ...]
    zscores: tuple[Normalization, ...]

    @property
    def is_zscore(self) -> bool:
        """Whether it is a z-score and nothing else."""
        return self.steps == (_ZSCORE,)

    def __call__(self, values: Array) -> Float32:
        """Map voxels ``(c, z, y, x)`` to float32 of the same shape, as MONAI's transforms do.

        NaN becomes the volume's mean after a z-score, else 0.
        """
        prepared = self._normalize(values)
        for step in self.steps:
            if step != _ZSCORE:
                prepared = _VOXELWISE[step.name](prepared, *step.numbers)
        return prepared

    def _normalize(self, values: Array) -> Float32:
        if _ZSCORE not in self.steps:
            floats = values.astype(np.float32)
            return np.nan_to_num(floats, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        channels = zip(self.zscores, values, strict=True)
        return stack([zscore(channel) for zscore, channel in channels])


def _subtract_divide(values: Float32, subtrahend: float, divisor: float) -> Float32:
    return (values - subtrahend) / divisor


def _rescale(values: Float32, a_min: float, a_max: float, b_min: float, b_max: float) -> Float32:
    return (values - a_min) / (a_max - a_min) * (b_max - b_min) + b_min


_VOXELWISE: dict[str, Callable[..., Float32]] = {
    "subtract_divide": _subtract_divide,
    "rescale": _rescale,
    "clip": np.clip,
}


def stack(channels: Sequence[Array]) -> Array:
    """Return arrays as one, along a new first axis; of a single array it is a view."""
    if len(channels) == 1:
        return channels[0][None]
    return np.stack(channels)


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches of a volume: where they are, how they are weighted, how many go at a time."""

    grid: PatchGrid
    window: str = "gaussian"
    batch: int = 1

    @property
    def weights(self) -> Float32:
        """The weight of each voxel of a patch, float32 ``(z, y, x)``."""
        return _window(self.grid.patch_shape, self.window)


_window = functools.lru_cache(maxsize=2)(window)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a volume: its core, and the voxels that the patches of the core see.

    The core is a box of the source, also where patches lie on another grid. ``values`` are
    the voxels ``(c, z, y, x)`` of ``read_box``, on the host or a device; ``prepare`` turns
    them into the network's input. ``background`` marks the voxels of the core that are
    background whatever the network says. ``where`` marks those that are wanted, on the host,
    if not all are: no other patches are predicted than theirs.
    """

    core: Box
    values: Any
    patches: Patches
    prepare: Callable[[Any], Any]
    background: Any = None
    where: NDArray[np.bool_] | None = None

    @property
    def read_box(self) -> Box:
        """The core and its halo."""
        return self.patches.grid.read_box(self.core)


def blend_patches(
    block: Block, forward: Callable[[Any], Any], weights: Any, library: ArrayLibrary[Any]
) -> Any:
    """Return the blended logits ``(channels out, z, y, x)`` of a block's core, float32.

    ``forward`` maps a batch of prepared patches to logits. Its arrays, the block's
    voxels and ``weights`` are of one library, and on one device.

    Raises:
        EngineError: The network gave a logit that is not finite.
    """
    on_grid = resampled(block, library)
    touching = block.patches.grid.iter_touching(block.core, block.where)
    patches = ((patch, cut_patch(on_grid, patch, library)) for patch in touching)
    predictions = predict_patches(patches, forward, block.patches.batch, library)
    return blend_predictions(block, _told(predictions, block), weights, library)


# -- how far a block is

# Told how many patches of a block are predicted, of how many, and the seconds left.
Tell: TypeAlias = Callable[[int, int, float], None]
_TELL: ContextVar[Tell | None] = ContextVar("tell", default=None)
_TELL_PAUSE_S = 1.0


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Call ``tell`` about once a second for a block that is predicted in this thread."""
    token = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(token)


def _told(predictions: Iterator[tuple[Box, Any]], block: Block) -> Iterator[tuple[Box, Any]]:
    """Yield predictions, and tell how many there were."""
    tell = _TELL.get()
    if tell is None:
        yield from predictions
        return
    touching = block.patches.grid.iter_touching(block.core, block.where)
    n_patches = sum(1 for _ in touching)
    began_s = told_s = time.monotonic()
    for n_done, prediction in enumerate(predictions, 1):
        yield prediction
        now = time.monotonic()
        if now - told_s > _TELL_PAUSE_S:
            told_s = now
            tell(n_done, n_patches, (now - began_s) / n_done * (n_patches - n_done))


def blend_predictions(
    block: Block, predictions: Iterable[tuple[Box, Any]], weights: Any, library: ArrayLibrary[Any]
) -> Any:
    """Return the blended logits of a block's core from those of its patches, in grid order.

    Raises:
        EngineError: The network gave a logit that is not finite.
    """
    grid = block.patches.grid
    needed = None
    if block.where is not None:
        on_covered = grid.resampling.needed_on_grid(block.where, block.core.ranges)
        needed = library.asarray(on_covered)
    logits = blend(predictions, grid.covered(block.core), weights, library, needed)
    logits = grid.resampling.onto_source(logits, block.core.ranges, library)
    if block.background is not None:
        logits[:, block.background] = np.nan
    return logits


def resampled(block: Block, library: ArrayLibrary[Any]) -> Block:
    """Return a block whose values are those of the grid, prepared; itself if that is the source's.

    As in nnU-Net, voxels are normalized first: statistics are those of the source.
    """
    grid = block.patches.grid
    if grid.resampling.is_identity:
        return block
    seen = grid.seen_box(block.core).ranges
    values = grid.resampling.onto_grid(block.prepare(block.values), seen, library)
    return replace(block, values=values, prepare=_as_they_are)


def _as_they_are(values: Any) -> Any:
    return values


def cut_patch(block: Block, patch: Box, library: ArrayLibrary[Any]) -> Any:
    """Return one prepared patch ``(c, z, y, x)``; voxels beyond the volume are zero.

    The values of the block are those of the grid. After a z-score zero is the volume's
    mean. Padding comes after normalizing, as in MONAI.
    """
    seen = block.patches.grid.seen_box(block.core)
    inside = patch & seen
    prepared = library.zeros((len(block.values), *patch.shape))
    voxels = block.values[:, *inside.within(seen).slices]
    prepared[:, *inside.within(patch).slices] = block.prepare(voxels)
    return prepared


def predict_patches(
    patches: Iterable[tuple[Box, Any]],
    forward: Callable[[Any], Any],
    batch: int,
    library: ArrayLibrary[Any],
) -> Iterator[tuple[Box, Any]]:
    """Yield the logits of prepared patches, in batches of one size."""
    for group in _batched(patches, batch):
        boxes = [box for box, _ in group]
        # The last batch is filled up: another batch shape may take another kernel,
        # and change a bit.
        inputs = library.zeros((batch, *group[0][1].shape))
        for slot, (_, patch) in zip(inputs, group, strict=False):
            slot[...] = patch
        yield from zip(boxes, forward(inputs), strict=False)


def _batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, n)):
        yield group


def predict_block(block: Block, forward: Callable[[Float32], Float32]) -> "list[HostOutputs]":
    """Return each output of a network for the core of a block, by NumPy.

    Raises:
        EngineError: The network gave a logit that is not finite.
    """
    logits = blend_patches(block, forward, block.patches.weights, NUMPY)
    return [HostOutputs(channel) for channel in logits]


class Engine(ABC):
    """A network, or the mean of several, ready to predict.

    An engine whose arrays live on a device has its own ``forward`` and ``blend_block``.
    ``largest_batch`` is the largest that fits the memory of the device, known once a larger one
    did not. ``n_repeated`` counts the blocks that were predicted again in float32.
    """

    largest_batch: int | None = None
    n_repeated: int = 0
    # Of a network that was converted, or is computed in another way, what it is known by.
    identity: str = ""

    @abstractmethod
    def __call__(self, patches: Float32) -> Float32:
        """Map prepared patches ``(batch, channels in, z, y, x)`` to logits of the same form."""

    def forward(self, patches: Any) -> Any:
        """Do the same on arrays that live where the engine blends."""
        return self(patches)

    def predict_block(self, block: Block) -> Sequence[BlockOutputs]:
        """Return each output of the network for the core of a block.

        Half precision has numbers up to 65504 alone: a block in which they did not suffice is
        predicted again in float32.

        Raises:
            EngineError: The network gave a logit that is not finite.
        """
        try:
            return self.blend_block(block, self.forward)
        except NotFiniteError:
            if not self.use_float32(is_used=True):
                raise
        try:
            outputs = self.blend_block(block, self.forward)
        finally:
            self.use_float32(is_used=False)
        self.n_repeated += 1
        return outputs

    def blend_block(self, block: Block, forward: Callable[[Any], Any]) -> Sequence[BlockOutputs]:
        """Return the outputs of a block, of the patches that ``forward`` predicts.

        Raises:
            EngineError: The network gave a logit that is not finite.
        """
        return predict_block(block, forward)

    def use_float32(self, *, is_used: bool) -> bool:
        """Compute in float32, or again in half precision; return whether it has both."""
        return False

    def fall_back(self) -> bool:
        """Compute in a plainer way from now on; return whether there is one."""
        return False

    def prepare_pass(self, shape: tuple[int, ...]) -> Callable[[], object]:
        """Return a function that runs a batch of ``shape``, as blocks run it."""
        patches = np.zeros(shape, np.float32)
        return lambda: self(patches)

    def close(self) -> None:  # noqa: B027  # most engines hold nothing but themselves
        """Free the memory that the engine holds on a device."""


@dataclass(frozen=True, slots=True)
class HostOutputs:
    """One output of a block's core, from its blended logits ``(z, y, x)``.

    Scores are computed for each use, slab by slab: that is quicker than to keep
    them in memory of the size of the block.
    """

    blended: Float32

    def scores(self, dtype: str) -> Array:
        """Return the scores: ``float32`` from 0 to 1, or ``uint8`` as 255 times that, rounded."""
        if dtype == "uint8":
            return in_slabs(_rounded_scores, self.blended, np.dtype(np.uint8))
        return in_slabs(_scores, self.blended, np.dtype(np.float32))

    def mask(self, threshold: float) -> NDArray[np.uint8]:
        """Return 1 where the float32 score is above ``threshold``, strictly, else 0."""
        limit = np.float32(threshold)
        return in_slabs(lambda part: sigmoid(part) > limit, self.blended, np.dtype(np.uint8))

    def logits(self) -> Float32:
        """Return the blended logits."""
        return self.blended


def _scores(logits: Float32) -> Float32:
    # The larger of a NaN and a number is the number.
    return np.fmax(sigmoid(logits), np.float32(0))


def _rounded_scores(logits: Float32) -> Float32:
    rounded: Float32 = np.rint(_scores(logits) * np.float32(MAX_UINT8_SCORE))
    return rounded
