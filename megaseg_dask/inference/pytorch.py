"""PyTorch: eager on a CPU, which is the reference, and blocks that stay on their GPU, with half precision inside."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import EngineError
from megaseg_dask.models.build import build_network
from megaseg_dask.models.bundle import Bundle

Float32 = NDArray[np.float32]

# Autocast computes convolutions in it; instance norm takes its statistics in float32.
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """A network on its device; called with ``(batch, c, z, y, x)``, it returns logits of that shape."""

    def __init__(
        self, bundle: Bundle, *, device: str, precision: str, threads: int, compiled: bool = False
    ) -> None:
        """Build the network, and compile it for its shapes if asked to.

        Raises :class:`EngineError` if the device is not there: never another instead.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                "the plan runs on cuda, but this worker's PyTorch sees no GPU; "
                "start workers with a GPU, or plan with --device cpu"
            )
        # TF32 keeps 10 bits of mantissa; promise 1 is about all 23. Deterministic kernels keep the last bit.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self._threads = threads
        # Half precision needs this layout for its tensor cores; for float32 it may change the last bits.
        self._half = _HALVES.get(precision)
        self._layout = torch.channels_last_3d if self._half else torch.contiguous_format
        self._network = build_network(bundle).to(device)
        if self._half:
            self._network = self._network.to(memory_format=self._layout)  # type: ignore[call-overload]
        if compiled:
            self._network = torch.compile(self._network, dynamic=False)  # type: ignore[assignment]
        self._device = device
        self.largest_batch: int | None = None

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of normalised patches; what does not fit the memory of the device goes in smaller parts.

        Raises :class:`EngineError` if a single patch does not fit.
        """
        logits: Float32 = self._logits(torch.from_numpy(patches)).cpu().numpy()
        return logits

    def _logits(self, patches: torch.Tensor) -> torch.Tensor:
        # The thread count is part of the last bits, and PyTorch keeps it per calling thread.
        torch.set_num_threads(self._threads)
        n = min(self.largest_batch or len(patches), len(patches))
        try:
            return torch.cat([self._forward(patches[i : i + n]) for i in range(0, len(patches), n)])
        except torch.OutOfMemoryError as error:
            if n == 1:
                raise EngineError(
                    f"one patch of {patches.shape[2:]} voxels does not fit the memory of {self._device}; "
                    "choose a smaller --patch, or another device"
                ) from error
        # Outside the handler, which holds what the failed pass had allocated. The grid of patches stays as it is.
        torch.cuda.empty_cache()
        self.largest_batch = n // 2
        return self._logits(patches)

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(self._device, self._half, enabled=bool(self._half)),
        ):
            logits: torch.Tensor = self._network(
                patches.to(self._device, memory_format=self._layout)
            )
            return logits.float()


class Preparation(Protocol):
    """What turns voxels into the network's input; one that is a z-score alone says so."""

    @property
    def zscores(self) -> tuple[Normalization, ...]:
        """Those of the channels."""
        ...

    @property
    def is_zscore(self) -> bool:
        """Whether it is nothing else."""
        ...

    def __call__(self, values: NDArray[Any]) -> Float32:
        """Do all of it on the host."""
        ...


class DeviceEngine(TorchEngine):
    """An engine whose blocks go up once, as they are stored, and come down once, as they will be.

    Its arithmetic is that of the reference: the same patches, summed in grid order in float32.
    """

    def predict_block(
        self,
        values: NDArray[Any],
        core: Box,
        grid: PatchGrid,
        prepare: Preparation,
        batch: int,
        weights: Float32,
    ) -> "list[DeviceLogits]":
        """Return the blended logits of a core, one for each output; ``values`` are the voxels of its read box.

        Raises :class:`EngineError` for a block that does not fit the device, or logits that are no numbers.
        """
        try:
            with torch.inference_mode():
                return self._blend(values, core, grid, prepare, batch, weights)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"a block of {core.shape} voxels does not fit the memory of {self._device}; choose a "
                "smaller --block, or another device"
            ) from error

    def _blend(
        self,
        values: NDArray[Any],
        core: Box,
        grid: PatchGrid,
        prepare: Preparation,
        batch: int,
        weights: Float32,
    ) -> "list[DeviceLogits]":
        on_device = (
            _Field(self._up(values), prepare.zscores)
            if _is_small(values) and prepare.is_zscore
            else None
        )
        field = on_device or _Field(self._up(prepare(values)), ())
        read_box, window = grid.read_box(core), self._up(weights)
        weight_sum = torch.zeros(core.shape, device=self._device)
        total: torch.Tensor | None = None
        patches = list(grid.iter_touching(core))
        # Filled up to one shape: each further one would be compiled, and take memory, anew.
        inputs = torch.zeros((batch, len(values), *grid.patch_shape), device=self._device)
        for start in range(0, len(patches), batch):
            group = patches[start : start + batch]
            for slot, patch in zip(inputs, group, strict=False):
                field.cut(read_box, patch, slot)
            for patch, logits in zip(group, self._logits(inputs), strict=False):
                total = (
                    torch.zeros((len(logits), *core.shape), device=self._device)
                    if total is None
                    else total
                )
                shared = patch & core
                here, there = shared.within(patch).slices, shared.within(core).slices
                weight_sum[there] += window[here]
                total[:, *there] += logits[:, *here] * window[here]
        if total is None or not weight_sum.all():
            raise EngineError(
                f"block {core} has voxels that no patch covers; the patch grid skips voxels"
            )
        total /= weight_sum
        if not torch.isfinite(total).all():
            raise EngineError(
                f"the network gave NaN or infinity in block {core}; the image's extremes may overflow it"
            )
        return [DeviceLogits(logits) for logits in total]

    def _up(self, values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        # From pinned memory the copy runs at the pace of the bus.
        return (
            tensor
            if self._device == "cpu"
            else tensor.pin_memory().to(self._device, non_blocking=True)
        )


def _is_small(values: NDArray[Any]) -> bool:
    # Wider numbers are normalised in float64 and floats may be NaN: both on the host, as ever.
    return values.dtype.kind in "iu" and values.dtype.itemsize <= 2


@dataclass(frozen=True, slots=True)
class _Field:
    """The voxels of a read box on the device, and the z-score of each channel, or none if they are normalised."""

    values: torch.Tensor
    zscores: tuple[Normalization, ...]

    def cut(self, read_box: Box, patch: Box, slot: torch.Tensor) -> None:
        """Write one normalised patch into a slot of a batch; beyond the volume it is zero."""
        inside = patch & read_box
        slot.zero_()
        voxels = self.values[:, *inside.within(read_box).slices].float()
        for channel, zscore in zip(voxels, self.zscores, strict=False):
            channel.sub_(zscore.mean).div_(zscore.std or 1.0)
        slot[:, *inside.within(patch).slices] = voxels


@dataclass(frozen=True, slots=True)
class DeviceLogits:
    """The logits of one output of a block, ``(z, y, x)``, on the device."""

    tensor: torch.Tensor

    def stored(self, dtype: str) -> NDArray[Any]:
        """Return the scores: 255 times the score, rounded, or as they are."""
        scores = torch.sigmoid(self.tensor)
        return _down(scores if dtype != "uint8" else scores.mul_(255).round_().to(torch.uint8))

    def above(self, threshold: float) -> NDArray[np.uint8]:
        """Return 1 where the score is above a threshold, strictly."""
        return _down((torch.sigmoid(self.tensor) > np.float32(threshold).item()).to(torch.uint8))

    def logits(self) -> Float32:
        """Return the logits."""
        return _down(self.tensor)


def _down(values: torch.Tensor) -> NDArray[Any]:
    if values.device.type == "cpu":
        return values.numpy()
    result = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    result.copy_(values)
    # A copy: pinned memory is scarce, and labelling holds on to its input.
    return result.numpy().copy()


def cuda_devices() -> list[str]:
    """Return the names of the GPUs that PyTorch can use here."""
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )


def cuda_identity() -> tuple[str, str] | None:
    """Return name and UUID of the GPU that this process computes on, if it sees one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, str(found.uuid)


def cuda_version() -> str | None:
    """Return the CUDA version that PyTorch was built with, if any."""
    return torch.version.cuda
