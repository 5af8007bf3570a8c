"""The precision on a CPU where it is left open: bfloat16, if that is worth it.

It is decided once, when a run is planned, and recorded. A run has to be long: a short one would not
gain what measuring takes, and its scores stay those of float32. What is measured is a ratio, which
other work on the machine changes little, and it is kept; so the same command makes the same
choice the next time.
"""

import math
from collections.abc import Sequence

from megaseg_dask.inference.calibration import LEAST_GAIN, measure_gain
from megaseg_dask.inference.engine import ENGINES
from megaseg_dask.plan.plan import Plan

# Of all patches: about a quarter of a minute with a light network on two cores.
LEAST_VOXELS = 2**26


def gain_by_bfloat16(plans: Sequence[Plan], growth: float = 1.0) -> float:
    """Return how many times as quick bfloat16 is for plans in float32, if that is worth it.

    It is 0 where it is not. There will be ``growth`` times as much to predict as is planned.
    """
    first = plans[0]
    is_exact = (first.engine.device, first.engine.precision) == ("cpu", "fp32")
    if not is_exact or not ENGINES[first.engine.engine].offers("cpu", "bf16"):
        return 0.0
    n_voxels = sum(plan.n_predicted * math.prod(plan.resolved.patch) for plan in plans)
    if n_voxels * growth < LEAST_VOXELS:
        return 0.0
    gain = measure_gain(first.model, first.engine, first.batch, first.resolved.patch)
    return gain if gain >= LEAST_GAIN else 0.0
