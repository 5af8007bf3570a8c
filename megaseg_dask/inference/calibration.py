"""How quick an engine is on this machine: seconds a patch, the quickest batch, what bfloat16 gains.

Figures are kept for an hour, so that a plan is made quickly. They belong to all that a forward
pass depends on: the weights, the engine, its packages, the patch, and the processor or GPU. A
ratio of two times changes less with what else a machine does, and is kept for good: it decides
the precision of runs.

A GPU is measured in a process of its own, which ends: the memory that it takes there would
otherwise be missing to the workers for as long as the run lasts. So is bfloat16, whose network may
have to be converted first.
"""

import json
import math
import os
import pickle
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import ENGINES, EngineSpec, close_engine, open_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.gpu import (
    first_line,
    installed_devices,
    is_out_of_memory,
    visible_devices,
)
from megaseg_dask.inference.machine import processor
from megaseg_dask.messages import version_of
from megaseg_dask.models.home import home, write_whole

# Of a GPU that cannot be measured: one patch leaves most of it idle, and where so many do not fit
# the batch is halved.
DEFAULT_GPU_BATCH = 4

# Other work on the machine may have slowed the passes down: they are timed again after this.
_KEPT_S = 3600.0

# Bfloat16 changes scores: it has to be worth it.
LEAST_GAIN = 1.3

# A heavy network shows its pace in one pass, a light one when it is warm. On a GPU a pass takes
# milliseconds, and the first ones choose kernels.
_MAX_PASSES = {"cpu": 3, "cuda": 12}
_MAX_S = 1.0

_LARGER_BATCHES = (2, 4, 8)
# A larger batch is taken if a patch then takes at most this share of the time.
_GAIN = 0.97

# For the start of a process, the libraries of CUDA, and a few passes.
_PROCESS_S = 600.0
_PROCESS = "from megaseg_dask.inference.calibration import measure_here; measure_here()"


@dataclass(frozen=True, slots=True)
class _Passes:
    """Forward passes on patches ``(z, y, x)`` whose time is wanted.

    Without a ``batch`` it is the quickest batch that is wanted.
    """

    model: ModelRef
    spec: EngineSpec
    patch_shape: Shape
    batch: int | None = None

    def measure(self) -> float:
        """Return the seconds of one patch, or the quickest batch, measured in this process."""
        shape = (self.model.in_channels, *self.patch_shape)
        try:
            with open_engine(self.model, self.spec) as engine:
                if self.batch is None:
                    return _choose_batch(engine, shape, self.spec.device)
                return _measure(engine, (self.batch, *shape), self.spec.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(f"the network does not fit the memory of the GPU: {error}") from error
        finally:
            close_engine()

    def known_or_measured(self) -> float:
        """Return what was measured less than an hour ago, or is measured now.

        Raises:
            EngineError: This machine cannot run the engine.
        """
        found = _find(self.key, _KEPT_S)
        if found is not None:
            return found
        found = _measure_apart(self) if self.spec.device == "cuda" else self.measure()
        before = _find(self.key, math.inf)
        if self.batch is not None and before is not None:
            found = min(found, before)
        _keep(self.key, found)
        return found

    @property
    def key(self) -> str:
        """SHA-256 of all that the time of a forward pass depends on."""
        packages = ("megaseg-dask", *ENGINES[self.spec.engine].versions)
        depends_on = {
            "model": self.model.digest,
            "engine": asdict(self.spec),
            "shape": (self.batch, self.model.in_channels, *self.patch_shape),
            "versions": {package: version_of(package) for package in packages},
            "processors": _gpus() if self.spec.device == "cuda" else processor(),
        }
        return sha256(json.dumps(depends_on).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Gain:
    """How many times as quick as float32 bfloat16 is, of which the time is wanted."""

    passes: _Passes

    def measure(self) -> float:
        """Return the ratio, measured in this process; 0 on a processor without bfloat16."""
        exact_s = self.passes.measure()
        half = replace(self.passes, spec=replace(self.passes.spec, precision="bf16"))
        try:
            return exact_s / half.measure()
        except EngineError:
            return 0.0


def measure_gain(model: ModelRef, spec: EngineSpec, batch: int, patch_shape: Shape) -> float:
    """Return how many times as quick as float32 bfloat16 is for patches ``(z, y, x)`` here.

    It is 0 on a processor without bfloat16, or where it cannot be measured.
    """
    gain = _Gain(_Passes(model, spec, patch_shape, batch))
    key = f"bf16-{gain.passes.key}"
    found = _find(key, math.inf)
    if found is None:
        try:
            found = _measure_apart(gain)
        except EngineError:
            return 0.0
        _keep(key, found)
    return found


def _measure_apart(question: _Passes | _Gain) -> float:
    """Return what is measured in a process that ends.

    Raises:
        EngineError: The device does not work, or has too little memory.
    """
    command = [sys.executable, "-c", _PROCESS]
    try:
        ended = subprocess.run(
            command,
            input=pickle.dumps(question),
            capture_output=True,
            timeout=_PROCESS_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the engine could not be measured: {error}") from error
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        raise EngineError(f"the engine could not be measured: {' '.join(lines[-1:])}")
    return float(json.loads(ended.stdout.splitlines()[-1]))


def measure_here() -> None:
    """Measure what standard input asks for, and write the figure to standard output."""
    question: _Passes | _Gain = pickle.load(sys.stdin.buffer)
    try:
        found = question.measure()
    except Exception as error:
        # The last line tells why.
        traceback.print_exc()
        sys.exit(first_line(error))
    sys.stdout.write(f"{json.dumps(found)}\n")


def measure_patch_s(model: ModelRef, spec: EngineSpec, batch: int, patch_shape: Shape) -> float:
    """Return the seconds of one patch ``(z, y, x)`` on this machine.

    That is the quickest of a few forward passes, or of one that takes long. They are timed again an
    hour later, and the shorter time counts.

    Raises:
        EngineError: This machine cannot run the engine.
    """
    _require_device(spec)
    return _Passes(model, spec, patch_shape, batch).known_or_measured()


def _require_device(spec: EngineSpec) -> None:
    if spec.device == "cuda" and not visible_devices():
        raise EngineError("this machine has no GPU that PyTorch sees")


def quickest_batch(model: ModelRef, spec: EngineSpec, patch_shape: Shape) -> int:
    """Return the batch that takes least time per patch on the GPU of this machine, and fits it.

    A machine without one that works gets :data:`DEFAULT_GPU_BATCH`: it plans for workers.
    """
    try:
        _require_device(spec)
        return int(_Passes(model, spec, patch_shape).known_or_measured())
    except EngineError:
        return DEFAULT_GPU_BATCH


def _gpus() -> list[str]:
    names = [device.name for device in installed_devices()]
    return [*names, os.environ.get("CUDA_VISIBLE_DEVICES", "")]


# -- kept figures


def _file(key: str) -> Path:
    return home() / "speeds" / f"{key}.json"


def _find(key: str, max_age_s: float) -> float | None:
    try:
        is_old = time.time() - _file(key).stat().st_mtime > max_age_s
        return None if is_old else float(json.loads(_file(key).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _keep(key: str, found: float) -> None:
    # A folder that cannot be written keeps nothing.
    with suppress(OSError):
        write_whole(_file(key), json.dumps(found).encode())


# -- forward passes


def _choose_batch(engine: Engine, patch_shape: tuple[int, ...], device: str) -> int:
    best = 1
    best_s = _measure(engine, (best, *patch_shape), device)
    for batch in _LARGER_BATCHES:
        patch_s = _measure(engine, (batch, *patch_shape), device)
        fits = engine.largest_batch is None
        if not fits or patch_s > _GAIN * best_s:
            break
        best = batch
        best_s = patch_s
    return best


def _measure(engine: Engine, shape: tuple[int, ...], device: str) -> float:
    """Return the seconds of one patch in batches of ``shape``, ``(batch, c, z, y, x)``."""
    run = engine.prepare_pass(shape)
    passes: list[float] = []
    started = time.perf_counter()
    while not passes or _goes_on(passes, started, device):
        began = time.perf_counter()
        run()
        passes.append(time.perf_counter() - began)
    warm = passes[1:] or passes
    return min(warm) / shape[0]


def _goes_on(passes: list[float], started: float, device: str) -> bool:
    return len(passes) < _MAX_PASSES[device] and time.perf_counter() - started < _MAX_S
