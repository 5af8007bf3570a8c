"""Predict one block: the patches that touch its core, in batches of fixed shape, blended in grid order.

What an engine must offer is declared here, beside the code that uses it. An
engine is opened once per worker process and never replaced by another kind.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import combinations, islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import NUMPY, blend, window
from megaseg_dask.algorithms.geometry import Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import BundleError, EngineError, SettingsError
from megaseg_dask.models.bundle import BundleFacts, Step

Float32 = NDArray[np.float32]
T = TypeVar("T")

_MEASURE_S = 3.0


class Engine(Protocol):
    """Turns normalised patches into logits."""

    @property
    def largest_batch(self) -> int | None:
        """Set once the device ran out of memory: larger batches go in parts of this size."""
        ...

    def __call__(self, patches: Float32) -> Float32:
        """Map ``(batch, channels in, z, y, x)`` to logits ``(batch, channels out, z, y, x)``, float32."""
        ...


class BlockLogits(Protocol):
    """The blended logits of one output of a block, on a device; what is asked of them comes down."""

    def stored(self, dtype: str) -> NDArray[Any]:
        """Return the scores as they are written, ``float32`` or ``uint8``."""
        ...

    def above(self, threshold: float) -> NDArray[np.uint8]:
        """Return 1 where the score is above a threshold."""
        ...

    def logits(self) -> Float32:
        """Return the logits ``(z, y, x)``."""
        ...


@runtime_checkable
class BlockEngine(Engine, Protocol):
    """An engine that keeps a block on its device: voxels go up once, and results come down once."""

    def predict_block(
        self,
        values: NDArray[Any],
        core: Box,
        grid: PatchGrid,
        prepare: "Preparation",
        batch: int,
        weights: Float32,
    ) -> Sequence[BlockLogits]:
        """Do what :func:`predict_block` does, on the device, and return one result for each output."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All of an engine that can change a bit of its output; resolved once, into the plan."""

    engine: str
    device: str
    precision: str
    batch: int
    threads: int
    tta: bool = False


@dataclass(frozen=True, slots=True)
class BundleRef:
    """A bundle by address and digest: workers load it themselves and check that it is the plan's."""

    path: str
    name: str
    digest: str
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRef:
    """One bundle, or several whose logits are averaged, and what they have in common.

    ``outputs`` are the names of the channels of the logits, ``steps`` what turns an image into the input.
    """

    bundles: tuple[BundleRef, ...]
    window: str
    in_channels: int
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, bundles: Mapping[str, BundleFacts], checkpoint: str | None = None) -> "ModelRef":
        """Return the reference to bundles by their addresses; raises :class:`BundleError` if they are not alike."""
        refs = tuple(
            BundleRef(path, bundle.name, bundle.digest, checkpoint)
            for path, bundle in bundles.items()
        )
        found = [
            cls(refs, b.window, b.network.in_channels, b.outputs, b.preprocessing.steps)
            for b in bundles.values()
        ]
        for ref, other in zip(refs, found, strict=True):
            for field in fields(cls):
                mine, theirs = getattr(found[0], field.name), getattr(other, field.name)
                if mine != theirs:
                    raise BundleError(
                        f"{ref.path} has {field.name} {theirs}, {refs[0].path} has {mine}; models are "
                        "averaged only where they agree in it"
                    )
        return found[0]

    @property
    def name(self) -> str:
        """The names of all bundles."""
        return " + ".join(bundle.name for bundle in self.bundles)

    @property
    def digest(self) -> str:
        """The bundle's digest, or that of all digests."""
        digests = [bundle.digest for bundle in self.bundles]
        return digests[0] if len(digests) == 1 else sha256(" ".join(digests).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Preparation:
    """How the channels of one volume become the network's input: a z-score first, if at all; one for each channel."""

    steps: tuple[Step, ...]
    zscores: tuple[Normalization, ...]

    @property
    def is_zscore(self) -> bool:
        """Whether it is a z-score and nothing else."""
        return self.steps == (Step("zscore"),)

    def __call__(self, values: NDArray[Any]) -> Float32:
        """Map voxels ``(c, z, y, x)`` to float32 of the same shape, as MONAI's transforms do; NaN is the mean, or 0."""
        if Step("zscore") not in self.steps:
            prepared = np.nan_to_num(
                values.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0
            )
        else:
            prepared = stack(
                [zscore(channel) for zscore, channel in zip(self.zscores, values, strict=True)]
            )
        for step in self.steps:
            if step.name != "zscore":
                prepared = _VOXELWISE[step.name](prepared, *step.numbers)
        return prepared


def stack(channels: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays as one, along a first axis; of a single one it is a view."""
    return channels[0][None] if len(channels) == 1 else np.stack(channels)


_VOXELWISE: dict[str, Callable[..., Float32]] = {
    "subtract_divide": lambda values, subtrahend, divisor: (values - subtrahend) / divisor,
    "rescale": lambda values, a_min, a_max, b_min, b_max: (
        (values - a_min) / (a_max - a_min) * (b_max - b_min) + b_min
    ),
    "clip": np.clip,
}


def resolve_engine(
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    tta: bool = False,
) -> EngineSpec:
    """Decide what ``auto`` means on this machine: a GPU if PyTorch sees one; on a CPU, OpenVINO if it is installed.

    Raises :class:`SettingsError` for an engine that is not installed, or a precision that it does not have.
    """
    if device == "auto" and engine != "openvino":
        from megaseg_dask.inference.pytorch import cuda_devices

        device = "cuda" if cuda_devices() else "cpu"
    elif device == "auto":
        device = "cpu"
    has_openvino = importlib.util.find_spec("openvino") is not None
    if engine == "auto":
        engine = "openvino" if device == "cpu" and has_openvino and precision != "fp16" else "torch"
    if precision == "auto":
        # Of the halves, that with more bits of mantissa; normalised activations are far from its largest number.
        precision = "fp16" if device == "cuda" else "fp32"
    if engine == "openvino" and not has_openvino:
        raise SettingsError(
            "--engine openvino: not installed; pip install 'megaseg-dask[openvino]', or use "
            "--engine torch"
        )
    if precision not in _PRECISIONS[engine, device]:
        takes = "; ".join(f"{e} on {d}: {', '.join(p)}" for (e, d), p in _PRECISIONS.items() if p)
        raise SettingsError(
            f"--precision {precision}: {engine} on {device} does not have it ({takes})"
        )
    return EngineSpec(engine, device, precision, batch or 1, threads or n_cores(), tta)


# What each engine computes in, on each device.
_PRECISIONS = {
    ("torch", "cpu"): ("fp32",),
    ("torch", "cuda"): ("fp32", "bf16", "fp16"),
    ("openvino", "cpu"): ("fp32", "bf16"),
    ("openvino", "cuda"): (),
}


def n_cores() -> int:
    """Return the cores that this process may use, which a batch system may have restricted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def open_engine(model: ModelRef, spec: EngineSpec) -> Engine:
    """Load the bundles and put their networks on the device, once per process.

    Raises :class:`BundleError` if a bundle at its address is no longer the plan's.
    """
    engines = [_open_one(bundle, spec) for bundle in model.bundles]
    return (
        Averaged(engines, MIRRORS if spec.tta else MIRRORS[:1])
        if spec.tta or len(engines) > 1
        else engines[0]
    )


def _open_one(ref: BundleRef, spec: EngineSpec) -> Engine:
    from megaseg_dask.models import load_bundle
    from megaseg_dask.models.staging import path_of

    bundle = load_bundle(path_of(ref.path, ref.digest), ref.checkpoint)
    if bundle.digest != ref.digest:
        raise BundleError(
            f"{ref.path} has digest {bundle.digest[:12]}, the plan was made with {ref.digest[:12]}; "
            "put the bundle back, or start anew with --overwrite"
        )
    if spec.engine == "openvino":
        try:
            from megaseg_dask.inference.openvino import OpenVinoEngine
        except ImportError as error:
            raise EngineError(
                "the plan runs on OpenVINO, which this worker does not have; install it there: "
                "pip install 'megaseg-dask[openvino]'"
            ) from error
        return OpenVinoEngine(bundle, precision=spec.precision, threads=spec.threads)
    from megaseg_dask.inference.pytorch import DeviceEngine, TorchEngine

    # On a CPU the reference path stays as it is, bit for bit.
    engine = TorchEngine if spec.device == "cpu" else DeviceEngine
    return engine(bundle, device=spec.device, precision=spec.precision, threads=spec.threads)


# Axes to mirror a batch along, from none to all three of space.
MIRRORS = tuple(axes for n in range(4) for axes in combinations((2, 3, 4), n))


@dataclass(frozen=True, slots=True)
class Averaged:
    """An engine: the mean of the logits of several engines, each for the patches and their mirror images.

    Patches stay where they are, so what is averaged does not depend on blocks either.
    """

    engines: Sequence[Engine]
    mirrors: Sequence[tuple[int, ...]]

    @property
    def largest_batch(self) -> int | None:
        """The smallest of the engines'."""
        return min(
            (engine.largest_batch for engine in self.engines if engine.largest_batch), default=None
        )

    def __call__(self, patches: Float32) -> Float32:
        """Map ``(batch, channels in, z, y, x)`` to the mean logits, float32."""
        found = (
            np.flip(engine(np.ascontiguousarray(np.flip(patches, axes))), axes)
            for engine in self.engines
            for axes in self.mirrors
        )
        total: Float32 = functools.reduce(np.add, found)
        return total / np.float32(len(self.engines) * len(self.mirrors))


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


_BATCHES, _WORTH_IT = (2, 4, 8), 0.97


def with_quickest_batch(model: ModelRef, spec: EngineSpec, patch_shape: Shape) -> EngineSpec:
    """Return the spec with the batch whose forward passes take least per patch here, and fit the device.

    A machine that cannot run the engine keeps the spec: it plans for workers that can.
    """
    try:
        best_s = measure_patch_s(model, spec, patch_shape)
        for batch in _BATCHES:
            larger = replace(spec, batch=batch)
            patch_s = measure_patch_s(model, larger, patch_shape)
            if open_engine(model, larger).largest_batch is not None or patch_s > _WORTH_IT * best_s:
                break
            spec, best_s = larger, patch_s
    except EngineError:
        pass
    return spec


cached_window = functools.lru_cache(maxsize=2)(window)


def cut_patch(
    values: NDArray[Any], read_box: Box, patch: Box, prepare: Callable[[NDArray[Any]], Float32]
) -> Float32:
    """Return one prepared patch, ``(c, z, y, x)``; beyond the volume it is zero, after a z-score the volume's mean.

    ``values`` are the voxels of ``read_box``. Padding comes after normalising, as in MONAI.
    """
    inside = patch & read_box
    result = np.zeros((len(values), *patch.shape), np.float32)
    result[:, *inside.within(patch).slices] = prepare(values[:, *inside.within(read_box).slices])
    return result


def predict_block(
    values: NDArray[Any],
    core: Box,
    grid: PatchGrid,
    prepare: Callable[[NDArray[Any]], Float32],
    engine: Engine,
    *,
    batch: int = 1,
    window_mode: str = "gaussian",
) -> Float32:
    """Return the blended logits of a core, float32 ``(channels out, z, y, x)``.

    ``values`` are the voxels ``(channels in, z, y, x)`` of ``grid.read_box(core)``: the core and its halo.
    """
    read_box = grid.read_box(core)
    patches = ((p, cut_patch(values, read_box, p, prepare)) for p in grid.iter_touching(core))
    return blend(
        _predict(patches, engine, batch),
        core,
        cached_window(grid.patch_shape, window_mode),
        NUMPY,
    )


def _predict(
    patches: Iterable[tuple[Box, Float32]], engine: Engine, batch: int
) -> Iterator[tuple[Box, Float32]]:
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
