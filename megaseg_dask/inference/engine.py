"""Engines: which there are, which one ``auto`` means here, and the one that a process has open.

A new engine is one file in this folder and one row of ``ENGINES``. An engine is
opened once per worker process and never replaced by another kind. One thread at
a time computes with it: two would share its cores, or hold twice the memory of
its GPU.
"""

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from megaseg_dask.errors import EngineError, SettingsError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.inference.ensemble import Averaged, BundleRef, ModelRef
from megaseg_dask.inference.gpu import visible_devices
from megaseg_dask.inference.machine import n_cores
from megaseg_dask.messages import install_command

E = TypeVar("E", bound=Engine)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What is opened: with the batch, all of an engine that can change a bit of its output."""

    engine: EngineName
    device: str
    precision: str
    threads: int
    tta: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether it is float32 PyTorch, which others are compared with."""
        return (self.engine, self.precision) == ("torch", "fp32")

    def record(self, batch: int) -> dict[str, str | int | bool]:
        """Return what plans show and outputs record of an engine that predicts such batches."""
        return {**asdict(self), "batch": batch}


@dataclass(frozen=True, slots=True)
class Forward:
    """What the memory of a forward pass depends on; sizes are those of the largest bundle."""

    patch_voxels: int
    batch: int
    n_filters: int
    n_inputs: int
    n_outputs: int
    n_models: int
    n_parameters: int
    is_averaged: bool


@dataclass(frozen=True, slots=True)
class ForwardMemory:
    """The memory of an engine's forward passes on a CPU; its numbers were measured.

    ``n_maps`` are the float32 maps at full resolution, per filter, at the peak.
    ``n_weights`` are the copies of the weights. With ``is_kept`` an engine plans
    its buffers once and keeps them from one pass to the next, each network its own.
    """

    n_maps: int
    min_filters: int
    n_weights: int
    fixed_bytes: int
    is_kept: bool

    def forward_bytes(self, forward: Forward) -> int:
        """Return the memory of one forward pass, weights included."""
        n_networks = forward.n_models if self.is_kept else 1
        n_ends = forward.n_inputs + forward.n_outputs
        n_maps = n_networks * (self.n_maps * max(forward.n_filters, self.min_filters) + n_ends)
        if forward.is_averaged:
            # Mirrored patches, and beside the logits of one pass their sum, the next sum
            # and a mirror image.
            n_maps += forward.n_inputs + 3 * forward.n_outputs
        map_values = forward.patch_voxels * forward.batch * n_maps
        weight_values = forward.n_parameters * self.n_weights
        return 4 * (map_values + weight_values) + n_networks * self.fixed_bytes


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine: what it runs on, what it needs, and what its forward passes cost.

    ``module`` has a function ``open_bundle(ref, spec)`` that returns the engine.
    ``precisions`` are those of each device. ``extra`` is the extra of this package that
    installs ``package``; it is empty if ``package`` is always installed. ``versions``
    says of each package that can change a bit how many leading parts of its version
    must agree between a client and its workers.
    """

    title: str
    module: str
    package: str
    extra: str
    precisions: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, int]
    memory: ForwardMemory

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported here."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def install_command(self) -> str:
        """The command that installs it."""
        if not self.extra:
            return f"pip install {self.package}"
        return install_command(self.extra)

    def offers(self, device: str, precision: str) -> bool:
        """Return whether it computes in a precision, or in any for ``auto``, on a device."""
        precisions = self.precisions.get(device, ())
        return precision in precisions or (precision == "auto" and bool(precisions))


# From the reference to the quickest: `auto` takes the last one that offers what is asked for.
ENGINES: Mapping[EngineName, EngineKind] = {
    "torch": EngineKind(
        title="PyTorch",
        module="megaseg_dask.inference.pytorch",
        package="torch",
        extra="",
        precisions={"cpu": ("fp32",), "cuda": ("fp32", "bf16", "fp16")},
        versions={"torch": 9},
        # Skip connection, concatenation, residual, convolution buffers, and what the heap loses
        # between them: measured 9 to 11. oneDNN stores channels in blocks of 16, also where
        # there are fewer. Compiled kernels and scratch space do not depend on the size.
        memory=ForwardMemory(
            n_maps=12,
            min_filters=16,
            n_weights=1,
            fixed_bytes=250 * 10**6,
            is_kept=False,
        ),
    ),
    "openvino": EngineKind(
        title="OpenVINO",
        module="megaseg_dask.inference.openvino",
        package="openvino",
        extra="openvino",
        precisions={"cpu": ("fp32", "bf16")},
        versions={"torch": 1, "openvino": 9},
        # The weights as they were and repacked, and kernels. Measured with filters from 4 to 32.
        memory=ForwardMemory(
            n_maps=5,
            min_filters=1,
            n_weights=3,
            fixed_bytes=100 * 10**6,
            is_kept=True,
        ),
    ),
}


# -- what `auto` means


def resolve_engine(
    engine: EngineName | Literal["auto"] = "auto",
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    tta: bool = False,
) -> EngineSpec:
    """Decide what ``auto`` and ``None`` mean on this machine.

    The device is a GPU if PyTorch sees one. On a CPU the engine is OpenVINO if it is
    installed. The precision is float16 on a GPU, else float32. The threads are the
    cores.

    Raises:
        SettingsError: The engine is not installed, or does not have the precision.
    """
    if device == "auto":
        runs_on_gpu = engine == "auto" or ENGINES[engine].offers("cuda", "auto")
        device = "cuda" if runs_on_gpu and visible_devices() else "cpu"
    if engine == "auto":
        engine = _choose_engine(device, precision)
    kind = ENGINES[engine]
    if not kind.offers(device, "auto"):
        raise SettingsError(
            f"--engine {engine}: it does not run on {device}; use --engine torch, or another "
            "--device"
        )
    if precision == "auto":
        precision = _choose_precision(device)
    if not kind.is_installed:
        raise SettingsError(
            f"--engine {engine}: not installed; run {kind.install_command}, or use --engine torch"
        )
    if not kind.offers(device, precision):
        offers = "; ".join(map(_list_precisions, ENGINES))
        raise SettingsError(
            f"--precision {precision}: not available with {engine} on {device} ({offers})"
        )
    return EngineSpec(engine, device, precision, threads or n_cores(), tta)


def _choose_engine(device: str, precision: str) -> EngineName:
    chosen: EngineName = "torch"
    for name, kind in ENGINES.items():
        if kind.is_installed and kind.offers(device, precision):
            chosen = name
    return chosen


def _choose_precision(device: str) -> str:
    # Of the halves, float16 has more bits of mantissa; normalized activations are far from its
    # largest number.
    return "fp16" if device == "cuda" else "fp32"


def _list_precisions(engine: EngineName) -> str:
    return "; ".join(
        f"{engine} on {device}: {', '.join(precisions)}"
        for device, precisions in ENGINES[engine].precisions.items()
    )


# -- the engine of this process

# Held by the one thread that computes; meanwhile others read the next block and write the last.
_lock = threading.Lock()


@contextmanager
def open_engine(model: ModelRef, spec: EngineSpec) -> Iterator[Engine]:
    """Give the calling thread this process's engine; other threads wait for it.

    The bundles are loaded, and their networks put on the device, once per process,
    and again only when another model or engine is asked for.

    Raises:
        BundleError: A bundle at its address is no longer the plan's.
        EngineError: This machine cannot run the engine.
    """
    key = (model, spec)
    with _lock:
        if key not in _opened:
            # The one before first: a device may not have the memory of both.
            _close_all()
            _opened[key] = _open(model, spec)
        yield _opened[key]


@contextmanager
def replaced_engine(
    model: ModelRef, spec: EngineSpec, replace: Callable[[Engine], E]
) -> Iterator[E]:
    """Give all threads another engine, made of this process's one, in its place meanwhile.

    What is yielded may be used without :func:`open_engine`, if it takes care of threads itself.

    Raises:
        BundleError: A bundle at its address is no longer the plan's.
        EngineError: This machine cannot run the engine.
    """
    with open_engine(model, spec) as engine:
        replacement = replace(engine)
        _opened[model, spec] = replacement
    try:
        yield replacement
    finally:
        close_engine()


@contextmanager
def open_apart(model: ModelRef, spec: EngineSpec) -> Iterator[Engine]:
    """Give the thread that has this process's engine another one beside it, for a moment.

    Raises:
        BundleError: A bundle at its address is no longer the plan's.
        EngineError: This machine cannot run the engine.
    """
    engine = _open(model, spec)
    try:
        yield engine
    finally:
        engine.close()


def close_engine() -> None:
    """Free the memory of this process's engine, on its device too."""
    with _lock:
        _close_all()


# At most one.
_opened: dict[tuple[ModelRef, EngineSpec], Engine] = {}


def _close_all() -> None:
    for engine in _opened.values():
        engine.close()
    _opened.clear()


def _open(model: ModelRef, spec: EngineSpec) -> Engine:
    engines = [_open_bundle(bundle, spec) for bundle in model.bundles]
    if spec.tta or len(engines) > 1:
        return Averaged(engines, is_mirrored=spec.tta)
    return engines[0]


def _open_bundle(ref: BundleRef, spec: EngineSpec) -> Engine:
    kind = ENGINES[spec.engine]
    try:
        module = importlib.import_module(kind.module)
    except ImportError as error:
        raise EngineError(
            f"the plan needs {kind.title}, which this worker does not have; install it there: "
            f"{kind.install_command}"
        ) from error
    open_bundle: Callable[[BundleRef, EngineSpec], Engine] = module.open_bundle
    return open_bundle(ref, spec)
