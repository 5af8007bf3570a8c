"""How quick an engine is on this machine: seconds a patch, and the quickest batch.

The seconds are kept for a day, so that a plan is made quickly. They belong to all that a forward
pass depends on: the weights, the engine, its packages, the patch, and the processor or GPU.
"""

import json
import platform
import time
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import ENGINES, EngineSpec, close_engine, open_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.gpu import cuda_devices
from megaseg_dask.messages import version_of
from megaseg_dask.models.home import home, write_whole

# Other work on the machine may have slowed the passes down: they are timed again the next day.
_KEPT_S = 24 * 3600.0

_MAX_PASSES = 3
_MAX_S = 1.0

_LARGER_BATCHES = (2, 4, 8)
# A larger batch is taken if a patch then takes at most this share of the time.
_GAIN = 0.97


def measure_patch_s(model: ModelRef, spec: EngineSpec, batch: int, patch_shape: Shape) -> float:
    """Return the seconds of one patch ``(z, y, x)`` on this machine.

    That is the quickest of a few forward passes, or of one that takes long; or what they took less
    than a day ago.

    Raises:
        EngineError: This machine cannot run the engine.
    """
    shape = (batch, model.in_channels, *patch_shape)
    file = home() / "speeds" / f"{_key_of(model, spec, shape)}.json"
    patch_s = _read_kept(file)
    if patch_s is not None:
        return patch_s
    try:
        with open_engine(model, spec) as engine:
            patch_s = _measure(engine, shape)
    finally:
        close_engine()
    # A folder that cannot be written keeps nothing.
    with suppress(OSError):
        write_whole(file, json.dumps(patch_s).encode())
    return patch_s


def _key_of(model: ModelRef, spec: EngineSpec, shape: tuple[int, ...]) -> str:
    """Return the SHA-256 of all that the time of a forward pass depends on."""
    packages = ("megaseg-dask", *ENGINES[spec.engine].versions)
    depends_on = {
        "model": model.digest,
        "engine": asdict(spec),
        "shape": shape,
        "versions": {package: version_of(package) for package in packages},
        "processors": cuda_devices() if spec.device == "cuda" else _processor(),
    }
    return sha256(json.dumps(depends_on).encode()).hexdigest()


def _processor() -> str:
    """Return the model of this machine's processor, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return f"{platform.processor()} {platform.machine()}"


def _read_kept(file: Path) -> float | None:
    try:
        is_old = time.time() - file.stat().st_mtime > _KEPT_S
        return None if is_old else float(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


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
