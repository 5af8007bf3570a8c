"""How long a step of a training takes on this CPU, in float32 and in bfloat16.

    python -m benchmarks.training_step

A step is forward pass, loss, backward pass and Adam, of the network of MegaSeg_light on one
patch of 64×128×128. The cases take turns, so that other work on the machine falls on all.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from monai.losses import GeneralizedDiceFocalLoss
from monai.networks.nets import DynUNet

from benchmarks.machine import describe, keep
from megaseg_dask.tools.training.recipes import RECIPES

N_STEPS = 12
_CASES = {"float32": None, "bfloat16": torch.bfloat16}


def measure(n_steps: int = N_STEPS) -> dict[str, Any]:
    """Return the median seconds of a step, and the loss after the last one."""
    machine = describe()
    steps = {name: _make_step(case) for name, case in _CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for _ in range(n_steps):
        for name, step in steps.items():
            begun = time.perf_counter()
            losses[name] = step()
            seconds[name].append(time.perf_counter() - begun)
    # The first steps also choose kernels.
    cases = {
        name: {"median_s": round(statistics.median(taken[2:]), 3), "loss": round(losses[name], 4)}
        for name, taken in seconds.items()
    }
    return {"machine": machine, "steps": n_steps, "cases": cases}


def _make_step(dtype: torch.dtype | None) -> Callable[[], float]:
    torch.manual_seed(0)
    recipe = RECIPES["MegaSeg_light"]
    network = DynUNet(spatial_dims=3, **asdict(recipe.network))
    optimizer = torch.optim.Adam(network.parameters(), recipe.learning_rate)
    loss_of = GeneralizedDiceFocalLoss(sigmoid=True)
    image = torch.randn(1, 1, *recipe.patch_shape)
    truth = (torch.rand(image.shape) > 0.8).float()

    def step() -> float:
        context = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
        with context:
            loss = loss_of(network(image), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    keep("training_step", measure())
