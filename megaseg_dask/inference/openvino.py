"""OpenVINO on a CPU: the same network, several times faster than eager PyTorch.

It is converted once per machine and kept, with a digest of its files.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import BundleRef
from megaseg_dask.models.home import HOME, home, sha256_of

Float32 = NDArray[np.float32]

# Raised when the conversion changes, so that an older kept one is not used.
_RULES = 5
_MODEL = "model.xml"
_WEIGHTS = "model.bin"
_DIGEST = "sha256"
_LOG = logging.getLogger(__name__)

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def open_bundle(ref: BundleRef, spec: EngineSpec) -> "OpenVinoEngine":
    """Open a bundle in OpenVINO; convert it unless an earlier conversion was kept.

    Raises:
        BundleError: The bundle at its address is no longer the plan's.
        EngineError: This CPU cannot compute in the precision.
    """
    return OpenVinoEngine(ref, spec)


class OpenVinoEngine(Engine):
    """A network compiled for one shape; called with ``(batch, c, z, y, x)``, it returns logits."""

    def __init__(self, bundle: BundleRef, spec: EngineSpec) -> None:
        """Convert the network, or read what an earlier conversion kept.

        Raises:
            BundleError: The bundle at its address is no longer the plan's.
            EngineError: This CPU cannot compute in the precision.
        """
        if spec.precision == "bf16" and not has_bfloat16():
            raise EngineError(
                "the plan needs bfloat16 arithmetic, which this CPU does not have; use --precision "
                "fp32"
            )
        self._core = openvino.Core()
        self._model, self.identity = _read_model(self._core, bundle)
        self._options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[spec.precision],
            "INFERENCE_NUM_THREADS": spec.threads,
            "NUM_STREAMS": "1",
            # Workers share the cores: pinned threads of two of them would sit on the same ones.
            "ENABLE_CPU_PINNING": False,
        }
        self._shape: tuple[int, ...] = ()
        self._request: Any = None

    def __call__(self, patches: Float32) -> Float32:
        """Predict one batch of prepared patches; another shape than before is compiled first."""
        if patches.shape != self._shape:
            self._compile(patches.shape)
        outputs = self._request.infer({0: patches}, share_inputs=True, share_outputs=True)
        # The buffer of the output belongs to the request, which the next batch overwrites.
        logits: Float32 = outputs[0].copy()
        return logits

    def _compile(self, shape: tuple[int, ...]) -> None:
        self._model.reshape(list(shape))
        compiled = self._core.compile_model(self._model, "CPU", self._options)
        self._request = compiled.create_infer_request()
        self._shape = shape


def has_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _read_model(core: openvino.Core, bundle: BundleRef) -> tuple[Any, str]:
    """Return the converted network, and the digest under which it is kept, if it is.

    The first process on a machine keeps it for later ones.
    """
    # The digest of the weights, the version of the converter, and that of our own rules.
    name = f"{bundle.digest[:32]}-{openvino.get_version().split('-')[0]}-{_RULES}"
    kept = home() / "openvino" / name
    if digest := _find_whole(kept):
        bundle.require_unchanged()
        return core.read_model(kept / _MODEL), digest
    # PyTorch and MONAI take seconds to import.
    from megaseg_dask.inference.conversion import convert

    model = convert(bundle.load())
    try:
        _keep(model, kept)
    # OpenVINO's own error is that of a full disk.
    except (OSError, RuntimeError) as error:
        if not _find_whole(kept):
            _LOG.warning(
                "the converted network cannot be stored in %s (%s), so each worker converts it "
                "again; free some space there, or set %s to another folder",
                kept.parent,
                str(error).strip().rpartition("\n")[2],
                HOME,
            )
    return model, _find_whole(kept)


def _find_whole(kept: Path) -> str:
    """Return the digest of a kept conversion; empty if it is not what was written.

    A damaged one predicts nothing.
    """
    try:
        digest = (kept / _DIGEST).read_text()
        return digest if digest == _digest_of(kept) else ""
    except (OSError, ValueError):
        return ""


def _digest_of(folder: Path) -> str:
    return " ".join(sha256_of(folder / name) for name in (_MODEL, _WEIGHTS))


def _keep(model: openvino.Model, kept: Path) -> None:
    """Write a conversion whole or not at all, in the place of a damaged one."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        saved = Path(folder) / kept.name
        openvino.save_model(model, saved / _MODEL, compress_to_fp16=False)
        (saved / _DIGEST).write_text(_digest_of(saved))
        # Another process may have replaced it by now.
        if not _find_whole(kept):
            shutil.rmtree(kept, ignore_errors=True)
            saved.rename(kept)
