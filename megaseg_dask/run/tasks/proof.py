"""The engine of this process proves itself on patches of the run's own data.

They follow from the plan, so all workers are asked the same, whichever task comes first. What
float32 differs in does not depend on the image, so one patch does; half precision is proven on
several, of several volumes.
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import add

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import DataError, SourceError, StoreError
from megaseg_dask.inference.block import Preparation, stack
from megaseg_dask.inference.certificate import Certificate, Claim
from megaseg_dask.plan.plan import Plan, PlannedVolume
from megaseg_dask.plan.resolved import Fixed, Given
from megaseg_dask.run.workspace import Workspace

Float32 = NDArray[np.float32]

# A plate may have fields that cannot be read; their tasks will say so.
_MAX_VOLUMES = 8
# Where patches lie along each axis of what is segmented, each in another volume if there are some.
_PLACES = (1 / 2, 1 / 4, 3 / 4)
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
    plan = sample_of(plan)
    worst = None
    for place in range(1 if plan.engine.precision == "fp32" else len(_PLACES)):
        certificate = claim.prove(partial(read_patch, plan, place))
        if certificate is None or not certificate.holds:
            return certificate
        if worst is None or certificate.dice < worst.dice:
            worst = certificate
    return worst


def sample_of(plan: Plan) -> Plan:
    """Return a plan with the volumes that a proof may read alone: a plate has very many."""
    volumes = _spread(plan.volumes, _MAX_VOLUMES)
    images = {volume.image: plan.images[volume.image] for volume in volumes}
    return Plan.model_construct(**{**dict(plan), "volumes": volumes, "images": images})


def _spread(volumes: Sequence[PlannedVolume], n_most: int) -> tuple[PlannedVolume, ...]:
    """Return all volumes, or some from the first to the last one."""
    if len(volumes) <= n_most:
        return tuple(volumes)
    last = len(volumes) - 1
    return tuple(volumes[i * last // (n_most - 1)] for i in range(n_most))


def read_patch(plan: Plan, place: int = 0) -> Float32:
    """Return a patch of the volumes of a sample, ``(c, z, y, x)``; there are three places.

    It is prepared by its own mean and standard deviation: those of its volume are not known yet.
    A volume that cannot be read gives way to the next one. Without any it is zeros.
    """
    patch = np.zeros((plan.model.in_channels, *plan.proof_patch), np.float32)
    box = _box_at(plan, _PLACES[place])
    workspace = Workspace(plan)
    n_volumes = len(plan.volumes)
    first = place * (n_volumes - 1) // (len(_PLACES) - 1)
    for number in range(first, first + n_volumes):
        try:
            channels = workspace.sources(number % n_volumes)
            values = stack([channel.read(box) for channel in channels])
        except (DataError, SourceError, StoreError):
            continue
        zscores = tuple(_zscore(plan, channel) for channel in values)
        inside = tuple(slice(0, n) for n in box.shape)
        patch[:, *inside] = Preparation(plan.model.steps, zscores)(values)
        break
    return patch


def _box_at(plan: Plan, share: float) -> Box:
    """Return as many voxels as the patch has, around a place in the region of a volume."""
    start = []
    limits = zip(plan.region.start, plan.region.stop, plan.proof_patch, strict=True)
    for first, last, n in limits:
        start.append(first + int(share * max(last - first - n, 0)))
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
