"""PyTorch: eager on a CPU, which is the reference; on a GPU blocks stay there, with half precision.

The arithmetic on a device is that of the reference: the same patches, cut,
prepared and summed in grid order in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megaseg_dask.algorithms.array_library import ArrayLibrary
from megaseg_dask.algorithms.blending import MAX_UINT8_SCORE
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import (
    Block,
    BlockOutputs,
    Engine,
    Preparation,
    blend_patches,
)
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import BundleRef
from megaseg_dask.inference.fused import Graphs, open_fused
from megaseg_dask.inference.gpu import is_out_of_memory, precision_problem
from megaseg_dask.models.build import build_network
from megaseg_dask.models.bundle import Bundle

Float32 = NDArray[np.float32]
P = ParamSpec("P")
T = TypeVar("T")

# Autocast computes convolutions in it; instance norm takes its statistics in float32.
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# TF32 keeps 10 bits of mantissa; promise 1 is about all 23. Deterministic kernels keep the last
# bit.
_CUDNN_FLAGS = {"allow_tf32": False, "deterministic": True, "benchmark": False}


def open_bundle(ref: BundleRef, spec: EngineSpec) -> Engine:
    """Open a bundle in eager PyTorch.

    Raises:
        BundleError: The bundle at its address is no longer the plan's.
        EngineError: The device is not there.
    """
    # On a CPU the reference stays as it is, bit for bit.
    engine = TorchEngine if spec.device == "cpu" else DeviceEngine
    return engine(ref.load(), spec)


class TorchEngine(Engine):
    """A network on its device; called with ``(batch, c, z, y, x)``, it returns logits of that form.

    PyTorch's global settings are changed for each batch and then put back: the
    process may be a user's own.
    """

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        """Build the network.

        Raises:
            EngineError: The device is not there, or does not have the precision; another one is
                never taken instead.
        """
        if spec.device == "cuda":
            _require_gpu(spec.precision)
        self._device = spec.device
        self._threads = spec.threads
        self._half = _HALVES.get(spec.precision)
        self._layout = torch.contiguous_format
        self._network = build_network(bundle).to(spec.device)
        if self._half:
            # Tensor cores need this layout; for float32 it may change the last bits.
            self._layout = torch.channels_last_3d
            self._network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._is_float32 = self._half is None
        self._fused: Graphs | None = None

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of prepared patches; in parts, if the device has too little memory.

        Raises:
            EngineError: A single patch does not fit the memory of the device.
        """
        with _exact_arithmetic(self._threads):
            logits: Float32 = self._predict(torch.from_numpy(patches)).cpu().numpy()
        return logits

    def close(self) -> None:
        """Free the memory of the network."""
        del self._network
        self._fused = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _predict(self, patches: torch.Tensor) -> torch.Tensor:
        n = min(self.largest_batch or len(patches), len(patches))
        try:
            return torch.cat([self._forward(part) for part in torch.split(patches, n)])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if n == 1:
                raise EngineError(
                    f"one patch of {patches.shape[2:]} voxels does not fit in the memory of "
                    f"{self._device}; choose a smaller --patch, or another device"
                ) from error
        # Outside the handler, which holds what the failed pass had allocated. The patch grid
        # stays as it is.
        torch.cuda.empty_cache()
        self.largest_batch = n // 2
        return self._predict(patches)

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self._fused is not None and not self._is_float32:
            with torch.inference_mode():
                # A copy: the next batch is written to the same place.
                return self._fused(patches.to(self._device)).clone()
        with (
            torch.inference_mode(),
            torch.autocast(self._device, self._half, enabled=not self._is_float32),
        ):
            inputs = patches.to(self._device, memory_format=self._layout)
            logits: torch.Tensor = self._network(inputs)
            return logits.float()

    def use_float32(self, *, is_used: bool) -> bool:
        """Compute in float32, or again in half precision, if that is this engine's."""
        self._is_float32 = is_used or self._half is None
        return self._half is not None


def _require_gpu(precision: str) -> None:
    if not torch.cuda.is_available():
        raise EngineError(
            "the plan needs a GPU, but the PyTorch of this worker finds none; start workers "
            "with a GPU, or plan with --device cpu"
        )
    if problem := precision_problem(precision):
        raise EngineError(f"{torch.cuda.get_device_name(0)}: {problem}")


@contextmanager
def _exact_arithmetic(n_threads: int) -> Iterator[None]:
    """Set what decides the last bits in PyTorch, and put it back as it was."""
    cudnn = torch.backends.cudnn
    old_flags = {name: getattr(cudnn, name) for name in _CUDNN_FLAGS}
    old_precision = torch.get_float32_matmul_precision()
    old_n_threads = torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("highest")
        for name, value in _CUDNN_FLAGS.items():
            setattr(cudnn, name, value)
        # PyTorch keeps the number of threads per calling thread.
        torch.set_num_threads(n_threads)
        yield
    finally:
        torch.set_num_threads(old_n_threads)
        for name, value in old_flags.items():
            setattr(cudnn, name, value)
        torch.set_float32_matmul_precision(old_precision)


# The one thread that launches kernels on a device, whichever asks for it: cuDNN chooses them for
# each thread anew, and a graph of launches belongs to one.
_launcher = ThreadPoolExecutor(1, thread_name_prefix="launcher")


def _launch(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Return what a function returns in the thread that launches kernels."""
    return _launcher.submit(function, *args, **options).result()


class DeviceEngine(TorchEngine):
    """An engine whose blocks stay on its device.

    Voxels go up once, as they are stored; outputs come down as they will be stored.
    """

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        """Build the network; in half precision with its fused forward pass, where it has one.

        Raises:
            EngineError: The device is not there; another one is never taken instead.
        """
        super().__init__(bundle, spec)
        if self._half:
            self._fused = _launch(open_fused, self._network, self._half)
            self.identity = "fused" if self._fused else ""

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of prepared patches; in parts, if the device has too little memory.

        Raises:
            EngineError: A single patch does not fit the memory of the device.
        """
        return _launch(super().__call__, patches)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Do the same on the device."""
        return self._predict(patches)

    def fall_back(self) -> bool:
        """Run the network as it is written from now on."""
        has_another = self._fused is not None
        self._fused = None
        self.identity = ""
        return has_another

    def prepare_pass(self, shape: tuple[int, ...]) -> Callable[[], None]:
        """Return a function that runs a batch as blocks do: on the device from end to end."""
        patches = torch.randn(shape, device=self._device)

        def run() -> None:
            with _exact_arithmetic(self._threads):
                self._predict(patches)
            if self._device == "cuda":
                torch.cuda.synchronize()

        return partial(_launch, run)

    def blend_block(
        self, block: Block, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> Sequence[BlockOutputs]:
        """Return the outputs of a block, of the patches that ``forward`` predicts.

        Raises:
            EngineError: The block does not fit the device, or a logit is not finite.
        """
        return _launch(self._blend_block, self._pinned(block), forward)

    def _blend_block(
        self, block: Block, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> Sequence[BlockOutputs]:
        library = ArrayLibrary(
            partial(torch.zeros, dtype=torch.float32, device=self._device),
            torch.isfinite,
            self._upload,
        )
        try:
            with _exact_arithmetic(self._threads), torch.inference_mode():
                weights = self._upload(block.patches.weights)
                logits = blend_patches(self._moved(block), forward, weights, library)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"a block of {block.core.shape} voxels does not fit in the memory of "
                f"{self._device}; choose a smaller --block, or another device"
            ) from error
        return [DeviceOutputs(channel) for channel in logits]

    def _pinned(self, block: Block) -> Block:
        """Return the block with its voxels ready to go up, prepared here or later on the device.

        In the thread that has the block: the device computes another one meanwhile.
        """
        background = block.background
        if background is not None:
            background = self._pin(background)
        prepare = block.prepare
        if isinstance(prepare, Preparation) and prepare.is_zscore and _is_small(block.values):
            values = self._pin(block.values)
            on_device = _DeviceZscores(prepare.zscores)
            return replace(block, values=values, prepare=on_device, background=background)
        values = self._pin(prepare(block.values))
        return replace(block, values=values, prepare=_as_it_is, background=background)

    def _moved(self, block: Block) -> Block:
        """Return a pinned block with its voxels on the device."""
        background = block.background
        if background is not None:
            background = background.to(self._device, non_blocking=True)
        values = block.values.to(self._device, non_blocking=True)
        return replace(block, values=values, background=background)

    def _upload(self, values: NDArray[Any]) -> torch.Tensor:
        return self._pin(values).to(self._device, non_blocking=True)

    def _pin(self, values: NDArray[Any]) -> torch.Tensor:
        # In the byte order of this machine, and writable: PyTorch takes no other array.
        native = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])
        tensor = torch.from_numpy(native)
        # From pinned memory the copy runs at the pace of the bus.
        return tensor if self._device == "cpu" else tensor.pin_memory()


def _is_small(values: NDArray[Any]) -> bool:
    # Wider integers are normalized in float64, and floats may be NaN: both on the host.
    return values.dtype.kind in "iu" and values.dtype.itemsize <= 2


def _as_it_is(voxels: torch.Tensor) -> torch.Tensor:
    return voxels


@dataclass(frozen=True, slots=True)
class _DeviceZscores:
    """The z-scores of the channels of a volume, on a device."""

    zscores: tuple[Normalization, ...]

    def __call__(self, voxels: torch.Tensor) -> torch.Tensor:
        prepared = voxels.float()
        for channel, zscore in zip(prepared, self.zscores, strict=True):
            channel.sub_(zscore.mean).div_(zscore.std or 1.0)
        return prepared


@dataclass(frozen=True, slots=True)
class DeviceOutputs:
    """One output of a block's core, from its blended logits ``(z, y, x)`` on a device."""

    blended: torch.Tensor

    def scores(self, dtype: str) -> NDArray[Any]:
        """Return the scores: ``float32`` from 0 to 1, or ``uint8`` as 255 times that, rounded."""
        return _unpinned(_launch(self._scores, dtype))

    def _scores(self, dtype: str) -> torch.Tensor:
        scores = torch.sigmoid(self.blended).nan_to_num_(nan=0.0)
        if dtype == "uint8":
            scores = scores.mul_(MAX_UINT8_SCORE).round_().to(torch.uint8)
        return _download(scores)

    def mask(self, threshold: float) -> NDArray[np.uint8]:
        """Return 1 where the float32 score is above ``threshold``, strictly, else 0."""
        return _unpinned(_launch(self._mask, threshold))

    def _mask(self, threshold: float) -> torch.Tensor:
        is_above = torch.sigmoid(self.blended) > np.float32(threshold).item()
        return _download(is_above.to(torch.uint8))

    def logits(self) -> Float32:
        """Return the blended logits."""
        return _unpinned(_launch(_download, self.blended))


def _download(values: torch.Tensor) -> torch.Tensor:
    """Return values of a device in memory of the host that is pinned."""
    if values.device.type == "cpu":
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values)


def _unpinned(values: torch.Tensor) -> NDArray[Any]:
    """Return values as an array, which is no pinned memory: that is scarce, and labels keep theirs.

    In the thread that asks for them: the device computes another block meanwhile.
    """
    return values.numpy().copy() if values.is_pinned() else values.numpy()
