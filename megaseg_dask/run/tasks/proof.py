"""The engine of this process proves itself on one patch of the run's own data.

The patch follows from the plan, so all workers are asked the same, whichever task comes first.
"""

import math
from operator import add

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import DataError, SourceError, StoreError
from megaseg_dask.inference.block import Preparation, stack
from megaseg_dask.inference.certificate import Certificate, Claim
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.resolved import Fixed, Given
from megaseg_dask.run.workspace import Workspace

Float32 = NDArray[np.float32]

# A plate may have fields that cannot be read; their tasks will say so.
_MAX_VOLUMES = 8
_DEFAULT_THRESHOLD = 0.5


def prove_engine(plan: Plan) -> Certificate | None:
    """Return the certificate of this process's engine, whether it holds or not.

    Float32 PyTorch needs none. An automatic threshold is only known at the end of a volume:
    masks are then compared at 0.5.

    Raises:
        BundleError: A bundle at its address is no longer the plan's.
        EngineError: This machine cannot run the engine.
    """
    threshold = _DEFAULT_THRESHOLD
    match plan.resolved.threshold:
        case Fixed(score):
            threshold = score
    claim = Claim(plan.model, plan.engine, plan.batch, plan.proof_patch, threshold)
    return claim.prove(lambda: read_patch(plan))


def sample_of(plan: Plan) -> Plan:
    """Return a plan with the volumes that a proof may read alone: a plate has very many."""
    volumes = plan.volumes[:_MAX_VOLUMES]
    images = {volume.image: plan.images[volume.image] for volume in volumes}
    return Plan.model_construct(**{**dict(plan), "volumes": volumes, "images": images})


def read_patch(plan: Plan) -> Float32:
    """Return a patch in the middle of the first volume that can be read, ``(c, z, y, x)``.

    It is prepared by its own mean and standard deviation: those of its volume are not known yet.
    Without such a volume it is zeros.
    """
    patch = np.zeros((plan.model.in_channels, *plan.proof_patch), np.float32)
    box = _middle(plan)
    workspace = Workspace(plan)
    for volume in range(min(len(plan.volumes), _MAX_VOLUMES)):
        try:
            values = stack([channel.read(box) for channel in workspace.sources(volume)])
        except (DataError, SourceError, StoreError):
            continue
        zscores = tuple(_zscore(plan, channel) for channel in values)
        inside = tuple(slice(0, n) for n in box.shape)
        patch[:, *inside] = Preparation(plan.model.steps, zscores)(values)
        break
    return patch


def _middle(plan: Plan) -> Box:
    """Return the voxels in the middle of the region of a volume, as many as the patch has."""
    start = []
    limits = zip(plan.region.start, plan.region.stop, plan.proof_patch, strict=True)
    for first, last, n in limits:
        start.append(max((first + last - n) // 2, first))
    stop = tuple(map(add, start, plan.proof_patch))
    return Box(tuple(start), stop) & plan.region


def _zscore(plan: Plan, values: NDArray[np.generic]) -> Normalization:
    match plan.resolved.normalization:
        case Given(mean, std):
            return Normalization(mean, std)
    known = values[np.isfinite(values)].astype(np.float64)
    if not known.size:
        return Normalization(0.0, 1.0)
    return Normalization(float(known.mean()), math.sqrt(float(known.var())))
