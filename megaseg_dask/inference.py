"""Predict one block: the patches that touch its core, in batches of fixed shape, blended in grid order.

What an engine must offer is declared here, beside the code that uses it. An
engine is opened once per worker process and never replaced by another kind.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.blending import blend, window
from megaseg_dask.errors import BundleError, EngineError, SettingsError
from megaseg_dask.geometry import Box, PatchGrid, Shape
from megaseg_dask.intensity import Normalisation

Float32 = NDArray[np.float32]
T = TypeVar("T")

_MEASURE_S = 3.0


class Engine(Protocol):
    """Turns normalised patches into logits."""

    # Set once the device ran out of memory: larger batches go in parts of this size.
    largest_batch: int | None

    def __call__(self, patches: Float32) -> Float32:
        """Map ``(batch, 1, z, y, x)`` to logits of the same shape, float32."""
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
    """A bundle by address and digest: workers load it themselves and check that it is the plan's."""

    path: str
    name: str
    digest: str
    window: str


def resolve_engine(
    *, engine: str = "auto", device: str = "auto", precision: str = "auto", batch: int | None = None,
    threads: int | None = None,
) -> EngineSpec:  # fmt: skip
    """Decide what ``auto`` means on this machine: a GPU if PyTorch sees one; on a CPU, OpenVINO if it is installed.

    Raises :class:`SettingsError` for an engine that is not installed, or a precision that it does not have.
    """
    if device == "auto" and engine != "openvino":
        from megaseg_dask.engines.pytorch import cuda_devices

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
        raise SettingsError("--engine openvino: not installed; pip install 'megaseg-dask[openvino]', or use "
                            "--engine torch")  # fmt: skip
    if precision not in _PRECISIONS[engine, device]:
        takes = "; ".join(f"{e} on {d}: {', '.join(p)}" for (e, d), p in _PRECISIONS.items() if p)
        raise SettingsError(f"--precision {precision}: {engine} on {device} does not have it ({takes})")
    return EngineSpec(engine, device, precision, batch or 1, threads or n_cores())


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
    """Load the bundle and put its network on the device, once per process.

    Raises :class:`BundleError` if the bundle at that address is no longer the plan's.
    """
    from megaseg_dask.models import load_bundle

    bundle = load_bundle(model.path)
    if bundle.digest != model.digest:
        raise BundleError(f"{model.path} has digest {bundle.digest[:12]}, the plan was made with {model.digest[:12]}; "
                          "put the bundle back, or start anew with --overwrite")  # fmt: skip
    if spec.engine == "openvino":
        try:
            from megaseg_dask.engines.openvino import OpenVinoEngine
        except ImportError as error:
            raise EngineError("the plan runs on OpenVINO, which this worker does not have; install it there: "
                              "pip install 'megaseg-dask[openvino]'") from error  # fmt: skip
        return OpenVinoEngine(bundle, precision=spec.precision, threads=spec.threads)
    from megaseg_dask.engines.pytorch import TorchEngine

    return TorchEngine(bundle, device=spec.device, precision=spec.precision, threads=spec.threads)


def measure_patch_s(model: ModelRef, spec: EngineSpec, patch_shape: Shape) -> float:
    """Return the seconds of one patch on this machine: the quickest of a few forward passes, or of one that takes long.

    Raises :class:`EngineError` if this machine cannot run the engine.
    """
    engine = open_engine(model, spec)
    patches = np.zeros((spec.batch, 1, *patch_shape), np.float32)
    passes: list[float] = []
    started = time.perf_counter()
    # A heavy network shows its pace in one pass, a light one when it is warm.
    while not passes or (len(passes) < 4 and time.perf_counter() - started < _MEASURE_S):
        began = time.perf_counter()
        engine(patches)
        passes.append(time.perf_counter() - began)
    return min(passes[1:] or passes) / spec.batch


cached_window = functools.lru_cache(maxsize=2)(window)


def cut_patch(values: NDArray[np.generic], read_box: Box, patch: Box, normalisation: Normalisation) -> Float32:
    """Return one normalised patch; beyond the volume it is zero, which is the volume's mean.

    ``values`` are the voxels of ``read_box``. Padding comes after normalising, as in MONAI.
    """
    inside = patch & read_box
    result = np.zeros(patch.shape, np.float32)
    result[inside.within(patch).slices] = normalisation(values[inside.within(read_box).slices])
    return result


def predict_block(
    values: NDArray[np.generic], core: Box, grid: PatchGrid, normalisation: Normalisation, engine: Engine,
    *, batch: int = 1, window_mode: str = "gaussian",
) -> Float32:  # fmt: skip
    """Return the blended logits of a core, float32 ``(z, y, x)``.

    ``values`` are the voxels of ``grid.read_box(core)``: the core and its halo.
    """
    read_box = grid.read_box(core)
    patches = ((p, cut_patch(values, read_box, p, normalisation)) for p in grid.iter_touching(core))
    logits: Float32 = blend(_predict(patches, engine, batch), core, cached_window(grid.patch_shape, window_mode))[0]
    return logits


def _predict(patches: Iterable[tuple[Box, Float32]], engine: Engine, batch: int) -> Iterator[tuple[Box, Float32]]:
    for group in _batched(patches, batch):
        # The last batch is filled up: another batch shape may take another kernel, and change a bit.
        filled = np.zeros((batch, 1, *group[0][1].shape), np.float32)
        for slot, (_, patch) in zip(filled, group, strict=False):
            slot[0] = patch
        yield from zip((box for box, _ in group), engine(filled), strict=False)


def _batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, n)):
        yield group
