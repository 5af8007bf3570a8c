"""OpenVINO on CPU: the same network, converted once and kept, several times faster than eager PyTorch."""

import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool3d

from megaseg_dask.errors import EngineError
from megaseg_dask.models.build import build_network
from megaseg_dask.models.bundle import Bundle
from megaseg_dask.models.home import home

Float32 = NDArray[np.float32]

# Raised when the conversion changes, so that what an older one kept is not used.
_RULES = 3

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """A network compiled for the shape of its first batch; called with ``(batch, c, z, y, x)``, it returns logits."""

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        """Convert the network, or read what an earlier conversion kept.

        Raises :class:`EngineError` if this CPU cannot compute in that precision.
        """
        self._core = openvino.Core()
        if precision == "bf16" and not has_bfloat16():
            raise EngineError(
                "this CPU has no bfloat16 arithmetic, and the plan asks for it; use --precision fp32"
            )
        self._model = _read_model(self._core, bundle)
        self._options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            # Workers share the cores: pinned threads of two of them would sit on the same ones.
            "ENABLE_CPU_PINNING": False,
        }
        self._shape: tuple[int, ...] = ()
        self._request: Any = None
        self.largest_batch: int | None = None

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of normalised patches; another shape than before compiles anew."""
        if patches.shape != self._shape:
            self._model.reshape(list(patches.shape))
            self._request = self._core.compile_model(
                self._model, "CPU", self._options
            ).create_infer_request()
            self._shape = patches.shape
        # The buffer of the result belongs to the request, which the next batch overwrites.
        logits: Float32 = self._request.infer({0: patches}, share_inputs=True, share_outputs=True)[
            0
        ].copy()
        return logits


def has_bfloat16() -> bool:
    """Tell whether this CPU computes in bfloat16."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _read_model(core: openvino.Core, bundle: Bundle) -> Any:
    """Return the converted network; the first process on a machine keeps it for those that follow."""
    # The digest of the weights, what converted them, and the version of this module's own rules.
    name = f"{bundle.digest[:32]}-{openvino.get_version().split('-')[0]}-{_RULES}"
    kept = home() / "openvino" / name
    if (kept / "model.xml").is_file():
        return core.read_model(kept / "model.xml")
    model = _convert(bundle)
    # A cache that cannot be written, or that another process has written by now, is no failure.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / name
            openvino.save_model(model, made / "model.xml", compress_to_fp16=False)
            made.rename(kept)
    return model


def _convert(bundle: Bundle) -> Any:
    # Traced at the least shape, which is quick; what comes of it takes any.
    least = (2 * n for n in bundle.network.patch_multiple)
    example = torch.zeros((1, bundle.network.in_channels, *least))
    network = build_network(bundle)
    _pool_norms(network)
    with warnings.catch_warnings(), torch.inference_mode():
        # The tracer warns of each check of a shape.
        warnings.simplefilter("ignore")
        return openvino.convert_model(network, example_input=example)


class _PooledNorm(torch.nn.Module):
    """Instance norm whose sums are taken over windows first.

    OpenVINO's own adds up the million voxels of a channel one after the other in float32, and was 1e-3 off where
    large values are rare; this is 1e-6 off, and as fast.
    """

    def __init__(self, norm: torch.nn.InstanceNorm3d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map ``(n, c, z, y, x)`` to the same shape; traced at the least shape, so that windows fit all others."""
        window = [min(8, int(extent) // 2) for extent in values.shape[2:]]
        space = (-3, -2, -1)
        mean = avg_pool3d(values, window).mean(space, keepdim=True)
        variance = avg_pool3d((values - mean) ** 2, window).mean(space, keepdim=True)
        gain = self.norm.weight[:, None, None, None] * torch.rsqrt(variance + self.norm.eps)
        # From the values once more, not from what they were less the mean: that would be kept in memory for it.
        return values * gain + (self.norm.bias[:, None, None, None] - mean * gain)


def _pool_norms(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.InstanceNorm3d):
            setattr(module, name, _PooledNorm(child))
        elif not isinstance(child, _PooledNorm):
            _pool_norms(child)
