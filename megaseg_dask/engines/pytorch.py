"""The reference engine: eager PyTorch on CPU or CUDA, in full float32 or, on CUDA, with half precision inside."""

import numpy as np
import torch
from numpy.typing import NDArray

from megaseg_dask.errors import EngineError
from megaseg_dask.models import Bundle, build_network

Float32 = NDArray[np.float32]

# Autocast computes convolutions in it; instance norm takes its statistics in float32.
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """A network on its device; called with ``(batch, c, z, y, x)``, it returns logits of that shape."""

    def __init__(self, bundle: Bundle, *, device: str, precision: str, threads: int) -> None:
        """Build the network. Raises :class:`EngineError` if the device is not there: never another instead."""
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError("the plan runs on cuda, but this worker's PyTorch sees no GPU; "
                              "start workers with a GPU, or plan with --device cpu")  # fmt: skip
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
        self._device = device
        self.largest_batch: int | None = None

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of normalised patches; what does not fit the memory of the device goes in smaller parts.

        Raises :class:`EngineError` if a single patch does not fit.
        """
        # The thread count is part of the last bits, and PyTorch keeps it per calling thread.
        torch.set_num_threads(self._threads)
        n = min(self.largest_batch or len(patches), len(patches))
        try:
            return np.concatenate([self._forward(patches[i : i + n]) for i in range(0, len(patches), n)])
        except torch.OutOfMemoryError as error:
            if n == 1:
                raise EngineError(f"one patch of {patches.shape[2:]} voxels does not fit the memory of {self._device}; "
                                  "choose a smaller --patch, or another device") from error  # fmt: skip
        # Outside the handler, which holds what the failed pass had allocated. The grid of patches stays as it is.
        torch.cuda.empty_cache()
        self.largest_batch = n // 2
        return self(patches)

    def _forward(self, patches: Float32) -> Float32:
        with torch.inference_mode(), torch.autocast(self._device, self._half, enabled=bool(self._half)):
            logits = self._network(torch.from_numpy(patches).to(self._device, memory_format=self._layout))
        result: Float32 = logits.float().cpu().numpy()
        return result


def cuda_devices() -> list[str]:
    """Return the names of the GPUs that PyTorch can use here."""
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
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
