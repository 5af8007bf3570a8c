"""Predict one block: the patches that touch its core, in batches of fixed shape, blended in grid order.

What an engine must offer is declared here, beside the code that uses it. An
engine is opened once per worker process and never replaced by another kind.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.blending import blend, window
from megaseg_dask.errors import BundleError
from megaseg_dask.geometry import Box, PatchGrid, Shape
from megaseg_dask.intensity import Normalisation
from megaseg_dask.models.bundle import Bundle, Step

Float32 = NDArray[np.float32]
T = TypeVar("T")

_MEASURE_S = 3.0


class Engine(Protocol):
    """Turns normalised patches into logits."""

    # Set once the device ran out of memory: larger batches go in parts of this size.
    largest_batch: int | None

    def __call__(self, patches: Float32) -> Float32:
        """Map ``(batch, channels in, z, y, x)`` to logits ``(batch, channels out, z, y, x)``, float32."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All of an engine that can change a bit of its output; resolved once, into the plan."""

    engine: str
    device: str
    precision: str
    batch: int
    threads: int


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A bundle by address and digest: workers load it themselves and check that it is the plan's.

    ``outputs`` are the names of the channels of its logits, ``steps`` what turns an image into its input.
    """

    path: str
    name: str
    digest: str
    window: str
    in_channels: int
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, path: str, bundle: Bundle) -> "ModelRef":
        """Return the reference to a bundle at an address."""
        return cls(path, bundle.name, bundle.digest, bundle.window, bundle.network.in_channels, bundle.outputs,
                   bundle.preprocessing.steps)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preparation:
    """How the channels of one volume become the network's input: a z-score first, if at all; one for each channel."""

    steps: tuple[Step, ...]
    zscores: tuple[Normalisation, ...]

    def __call__(self, values: NDArray[Any]) -> Float32:
        """Map voxels ``(c, z, y, x)`` to float32 of the same shape, as MONAI's transforms do; NaN is the mean, or 0."""
        if Step("zscore") not in self.steps:
            prepared = np.nan_to_num(values.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        else:
            prepared = np.stack([zscore(channel) for zscore, channel in zip(self.zscores, values, strict=True)])
        for step in self.steps:
            if step.name != "zscore":
                prepared = _VOXELWISE[step.name](prepared, *step.numbers)
        return prepared


_VOXELWISE: dict[str, Callable[..., Float32]] = {
    "subtract_divide": lambda values, subtrahend, divisor: (values - subtrahend) / divisor,
    "rescale": lambda values, a_min, a_max, b_min, b_max: (values - a_min) / (a_max - a_min) * (b_max - b_min) + b_min,
    "clip": np.clip,
}


def resolve_engine(*, device: str, batch: int | None, threads: int | None) -> EngineSpec:
    """Decide what ``auto`` means on this machine: a GPU if PyTorch sees one."""
    if device == "auto":
        from megaseg_dask.engines.pytorch import cuda_devices

        device = "cuda" if cuda_devices() else "cpu"
    return EngineSpec("torch", device, "fp32", batch or 1, threads or n_cores())


def n_cores() -> int:
    """Return the cores that this process may use, which a batch system may have restricted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def open_engine(model: ModelRef, spec: EngineSpec) -> Engine:
    """Load the bundle and put its network on the device, once per process.

    Raises :class:`BundleError` if the bundle at that address is no longer the plan's.
    """
    from megaseg_dask.engines.pytorch import TorchEngine
    from megaseg_dask.models import load_bundle

    bundle = load_bundle(model.path)
    if bundle.digest != model.digest:
        raise BundleError(f"{model.path} has digest {bundle.digest[:12]}, the plan was made with {model.digest[:12]}; "
                          "put the bundle back, or start anew with --overwrite")  # fmt: skip
    return TorchEngine(bundle, device=spec.device, threads=spec.threads)


def measure_patch_s(model: ModelRef, spec: EngineSpec, patch_shape: Shape) -> float:
    """Return the seconds of one patch on this machine: the quickest of a few forward passes, or of one that takes long.

    Raises :class:`EngineError` if this machine cannot run the engine.
    """
    engine = open_engine(model, spec)
    patches = np.zeros((spec.batch, model.in_channels, *patch_shape), np.float32)
    passes: list[float] = []
    started = time.perf_counter()
    # A heavy network shows its pace in one pass, a light one when it is warm.
    while not passes or (len(passes) < 4 and time.perf_counter() - started < _MEASURE_S):
        began = time.perf_counter()
        engine(patches)
        passes.append(time.perf_counter() - began)
    return min(passes[1:] or passes) / spec.batch


cached_window = functools.lru_cache(maxsize=2)(window)


def cut_patch(values: NDArray[Any], read_box: Box, patch: Box, prepare: Callable[[NDArray[Any]], Float32]) -> Float32:
    """Return one prepared patch, ``(c, z, y, x)``; beyond the volume it is zero, after a z-score the volume's mean.

    ``values`` are the voxels of ``read_box``. Padding comes after normalising, as in MONAI.
    """
    inside = patch & read_box
    result = np.zeros((len(values), *patch.shape), np.float32)
    result[:, *inside.within(patch).slices] = prepare(values[:, *inside.within(read_box).slices])
    return result


def predict_block(
    values: NDArray[Any], core: Box, grid: PatchGrid, prepare: Callable[[NDArray[Any]], Float32], engine: Engine,
    *, batch: int = 1, window_mode: str = "gaussian",
) -> Float32:  # fmt: skip
    """Return the blended logits of a core, float32 ``(channels out, z, y, x)``.

    ``values`` are the voxels ``(channels in, z, y, x)`` of ``grid.read_box(core)``: the core and its halo.
    """
    read_box = grid.read_box(core)
    patches = ((p, cut_patch(values, read_box, p, prepare)) for p in grid.iter_touching(core))
    return blend(_predict(patches, engine, batch), core, cached_window(grid.patch_shape, window_mode))


def _predict(patches: Iterable[tuple[Box, Float32]], engine: Engine, batch: int) -> Iterator[tuple[Box, Float32]]:
    for group in _batched(patches, batch):
        # The last batch is filled up: another batch shape may take another kernel, and change a bit.
        filled = np.zeros((batch, *group[0][1].shape), np.float32)
        for slot, (_, patch) in zip(filled, group, strict=False):
            slot[...] = patch
        yield from zip((box for box, _ in group), engine(filled), strict=False)


def _batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, n)):
        yield group
