"""How quick an engine is on this machine: seconds a patch, and the quickest batch."""

import time

import numpy as np

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import EngineSpec, close_engine, open_engine
from megaseg_dask.inference.ensemble import ModelRef

_MAX_PASSES = 3
_MAX_S = 1.0

_LARGER_BATCHES = (2, 4, 8)
# A larger batch is taken if a patch then takes at most this share of the time.
_GAIN = 0.97


def measure_patch_s(model: ModelRef, spec: EngineSpec, batch: int, patch_shape: Shape) -> float:
    """Return the seconds of one patch ``(z, y, x)`` on this machine.

    That is the quickest of a few forward passes, or of one that takes long.

    Raises:
        EngineError: This machine cannot run the engine.
    """
    try:
        with open_engine(model, spec) as engine:
            return _measure(engine, (batch, model.in_channels, *patch_shape))
    finally:
        close_engine()


def quickest_batch(model: ModelRef, spec: EngineSpec, patch_shape: Shape) -> int:
    """Return the batch that takes least time per patch here, and fits the device.

    A machine that cannot run the engine gets 1: it plans for workers that can.
    """
    try:
        with open_engine(model, spec) as engine:
            return _choose_batch(engine, (model.in_channels, *patch_shape))
    except EngineError:
        return 1
    finally:
        # The workers on this machine need the memory of the device.
        close_engine()


def _choose_batch(engine: Engine, patch_shape: tuple[int, ...]) -> int:
    best = 1
    best_s = _measure(engine, (best, *patch_shape))
    for batch in _LARGER_BATCHES:
        patch_s = _measure(engine, (batch, *patch_shape))
        fits = engine.largest_batch is None
        if not fits or patch_s > _GAIN * best_s:
            break
        best = batch
        best_s = patch_s
    return best


def _measure(engine: Engine, shape: tuple[int, ...]) -> float:
    """Return the seconds of one patch in batches of ``shape``, ``(batch, c, z, y, x)``."""
    patches = np.zeros(shape, np.float32)
    passes: list[float] = []
    started = time.perf_counter()
    # A heavy network shows its pace in one pass, a light one when it is warm.
    while not passes or _goes_on(passes, started):
        began = time.perf_counter()
        engine(patches)
        passes.append(time.perf_counter() - began)
    warm = passes[1:] or passes
    return min(warm) / shape[0]


def _goes_on(passes: list[float], started: float) -> bool:
    return len(passes) < _MAX_PASSES and time.perf_counter() - started < _MAX_S
