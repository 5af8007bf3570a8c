"""The stage of pyramid levels: each is computed from the level below it, over write units of its own."""

from operator import truediv
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.pyramids import Step, downsample
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.state import OutputState

Array = NDArray[Any]

# Voxels of the finer level that are reduced at a time: whole chunks of ours.
_DOWNSAMPLE_SHAPE = (64, 512, 512)


def downsample_block(plan: Plan, output: Output, number: int, *, level: int) -> OutputState:
    """Compute one block of a coarser level of every product, one write unit at a time."""
    step, block = _step(plan, level), plan.block_grid(level)[number]
    units = BlockGrid(step.coarse_shape, plan.layout(level).write_unit)
    for kind in workspace.read_state(plan, output.volume).outputs:
        below = workspace.product(plan, kind, output, level - 1)
        for box in (units.core(p) & block for p in units.iter_overlapping(block)):
            values = _coarser(below, box, step, mode=kind != "scores")
            workspace.write(plan, kind, output, box, values, level)
    return OutputState()


def _step(plan: Plan, level: int) -> Step:
    image = plan.target_image
    fine, coarse = (image.spatial(image.levels[i].scale) for i in (level - 1, level))
    # Some files say 0 for an unknown size.
    scaled = tuple(map(truediv, coarse, fine)) if all(fine) else None
    return Step(image.volume_shape(level - 1), image.volume_shape(level), scaled)


def _coarser(below: Volume, box: Box, step: Step, *, mode: bool) -> Array:
    """Compute one write unit of a coarser level in parts, so that its memory does not grow with the factor."""
    part_shape = tuple(
        max(n * c // f, 1)
        for n, c, f in zip(_DOWNSAMPLE_SHAPE, step.coarse_shape, step.fine_shape, strict=True)
    )
    parts = []
    for part in BlockGrid(box.shape, part_shape):
        here = part.shifted(box.start)
        source = step.source_box(here)
        parts.append((part, downsample(below.read(source), source, here, step, mode=mode)))
    result = np.empty(box.shape, parts[0][1].dtype)
    for part, values in parts:
        result[part.slices] = values
    return result


def write_coarser_levels(plan: Plan, output: Output, kind: str, values: Array) -> None:
    """Write all coarser levels of a product whose finest level is in memory."""
    for level in range(1, len(plan.target_image.levels)):
        step = _step(plan, level)
        box = Box.of(step.coarse_shape)
        source = step.source_box(box)
        values = downsample(values[source.slices], source, box, step, mode=kind != "scores")
        workspace.write(plan, kind, output, box, values, level)
