"""The certificate of an engine: it predicted one patch as float32 PyTorch does, on this machine.

Rounding is what engines may differ in, so a certificate in float32 says what it has to say of all
images, and is kept for the next runs: float32 PyTorch takes seconds to import. Half precision
depends on the image, so it is proven on each run's own. Nothing is kept of a patch without
contrast, which any engine predicts alike.
"""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.errors import EngineError
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import ENGINES, EngineSpec, open_apart, open_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.machine import processor
from megaseg_dask.messages import version_of
from megaseg_dask.models.home import home, write_whole

Float32 = NDArray[np.float32]
_LOG = logging.getLogger(__name__)

MIN_DICE = 0.999
# In float32 only the order of sums differs: more than this is another network.
MAX_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.5}
# A mask of few voxels has a low Dice if one voxel lies at the threshold.
_MAX_VOXELS = 8

# Raised when what is compared changes, so that older certificates are not believed.
_RULES = 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """How an engine differs from float32 PyTorch on one patch.

    ``dice`` compares the masks of scores above ``threshold``, and is 1 where both are empty;
    ``n_voxels`` is how many voxels differ in them. ``largest_difference`` is that of the scores.
    """

    engine: str
    precision: str
    threshold: float
    dice: float
    n_voxels: int
    largest_difference: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Certificate":
        """Return the value whose fields are these.

        Raises:
            ValueError: They are others, as TypeError and KeyError tell too.
        """
        certificate = cls(**fields)
        numbers = (certificate.threshold, certificate.dice, certificate.largest_difference)
        if not all(0 <= number <= 1 for number in numbers) or certificate.n_voxels < 0:
            raise ValueError(f"no certificate: {fields}")
        if certificate.precision not in MAX_DIFFERENCE:
            raise ValueError(f"a certificate of an unknown precision: {fields}")
        return certificate

    @property
    def holds(self) -> bool:
        """Whether the engine may be used."""
        is_alike = self.dice >= MIN_DICE or self.n_voxels <= _MAX_VOXELS
        return is_alike and self.largest_difference <= MAX_DIFFERENCE[self.precision]

    def __str__(self) -> str:
        return (
            f"{self.engine} in {self.precision} against float32 PyTorch on one patch: Dice "
            f"{self.dice:.6f}, largest difference of a score {self.largest_difference:.2g}"
        )

    @property
    def refusal(self) -> str:
        """Why the engine may not be used, and the next step."""
        advice = "choose --precision fp32"
        if self.precision == "fp32":
            advice = "choose --engine torch"
        return (
            f"{self}; expected are at least {MIN_DICE} and at most "
            f"{MAX_DIFFERENCE[self.precision]}: {advice}"
        )

    def require(self) -> None:
        """Check that the engine may be used.

        Raises:
            EngineError: It may not.
        """
        if not self.holds:
            raise EngineError(self.refusal)


@dataclass(frozen=True, slots=True)
class Claim:
    """What is to be proven: an engine as a run uses it; ``patch_shape`` is ``(z, y, x)``."""

    model: ModelRef
    spec: EngineSpec
    batch: int
    patch_shape: tuple[int, ...]
    threshold: float = 0.5

    def prove(self, read_patch: Callable[[], Float32]) -> Certificate | None:
        """Return the certificate of this process's engine; none is needed of the reference.

        ``read_patch`` returns one prepared patch ``(c, z, y, x)``, and is called only where no
        certificate is kept.

        Raises:
            BundleError: A bundle at its address is no longer the plan's.
            EngineError: This machine cannot run the engine.
        """
        if self.spec.is_reference:
            return None
        with open_engine(self.model, self.spec) as engine:
            certificate = self._prove(engine, read_patch)
            if not certificate.holds and engine.fall_back():
                _LOG.warning("%s: the network runs as it is written, which is slower", certificate)
                certificate = self._prove(engine, read_patch)
        return certificate

    def _prove(self, engine: Engine, read_patch: Callable[[], Float32]) -> Certificate:
        patch = None
        if self.spec.precision != "fp32":
            patch = read_patch()
        key = self._key(engine, patch)
        known = _find(key)
        if known is not None:
            return known
        if patch is None:
            patch = read_patch()
        certificate = self._compare(engine, patch)
        if np.ptp(patch) > 0:
            _keep(key, certificate)
        return certificate

    def _compare(self, engine: Engine, patch: Float32) -> Certificate:
        reference = replace(self.spec, engine="torch", precision="fp32")
        with open_apart(self.model, reference) as exact:
            expected = exact(patch[None])[0]
        # As a run fills a batch: another batch shape may take other kernels.
        batch = np.repeat(patch[None], self.batch, axis=0)
        found = engine(batch)
        return compare(expected, found, self.spec, self.threshold)

    def _key(self, engine: Engine, patch: Float32 | None) -> str:
        """Return the SHA-256 of all that a certificate depends on."""
        packages = ("megaseg-dask", "torch", *ENGINES[self.spec.engine].versions)
        depends_on = {
            "rules": _RULES,
            "model": self.model.digest,
            "engine": asdict(self.spec),
            "identity": engine.identity,
            "shape": (self.batch, *self.patch_shape),
            "threshold": self.threshold,
            "versions": {package: version_of(package) for package in packages},
            "processor": _device() if self.spec.device == "cuda" else processor(),
            "patch": "" if patch is None else sha256(patch.tobytes()).hexdigest(),
        }
        return sha256(json.dumps(depends_on).encode()).hexdigest()


def compare(
    expected: Float32, found: Float32, spec: EngineSpec, threshold: float = 0.5
) -> Certificate:
    """Return the certificate of logits ``(n, c, z, y, x)`` against those of one patch."""
    exact = sigmoid(expected)
    limit = np.float32(threshold)
    mask = exact > limit
    worst = Certificate(spec.engine, spec.precision, threshold, 1.0, 0, 0.0)
    for logits in found:
        scores = sigmoid(logits)
        if not np.isfinite(logits).all():
            return replace(worst, dice=0.0, n_voxels=logits.size, largest_difference=1.0)
        other = scores > limit
        n_both = int(np.count_nonzero(mask & other))
        n_sum = int(np.count_nonzero(mask)) + int(np.count_nonzero(other))
        dice = 2 * n_both / n_sum if n_sum else 1.0
        difference = float(np.abs(scores - exact).max())
        worst = replace(
            worst,
            dice=min(worst.dice, round(dice, 6)),
            n_voxels=max(worst.n_voxels, n_sum - 2 * n_both),
            largest_difference=max(worst.largest_difference, float(f"{difference:.3g}")),
        )
    return worst


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0)


# -- kept ones

# Of this process, also where the folder of kept ones cannot be written.
_made: dict[str, Certificate] = {}


def _file(key: str) -> Path:
    return home() / "certificates" / f"{key}.json"


def _find(key: str) -> Certificate | None:
    if key in _made:
        return _made[key]
    try:
        fields: dict[str, Any] = json.loads(_file(key).read_bytes())
        digest = fields.pop("digest")
        known = Certificate.from_json(fields)
    # Absent, or damaged: it is made again.
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return known if digest == _digest(known) else None


def _keep(key: str, certificate: Certificate) -> None:
    _made[key] = certificate
    fields = {**asdict(certificate), "digest": _digest(certificate)}
    # A folder that cannot be written keeps nothing.
    with suppress(OSError):
        write_whole(_file(key), json.dumps(fields).encode())


def _digest(certificate: Certificate) -> str:
    return sha256(json.dumps(asdict(certificate)).encode()).hexdigest()
