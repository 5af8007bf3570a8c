"""The stage of pyramid levels: each is computed from the level below it, over its write units."""

from operator import truediv
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.pyramids import Step, downsample
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.workspace import Readable, Workspace

# Voxels of the finer level that are reduced at a time: whole chunks of ours.
_DOWNSAMPLE_SHAPE = (64, 512, 512)


def downsample_block(workspace: Workspace, output: Output, number: int, level: int) -> OutputState:
    """Compute one block of a coarser level of every output, one write unit at a time."""
    plan = workspace.plan
    step = _step(plan, level)
    block = plan.block_grid(level)[number]
    units = BlockGrid(step.coarse_shape, plan.layout(level).write_unit)
    state = workspace.state(output.volume)
    for kind in state.outputs:
        # Where tasks failed, the finer level has holes.
        below = workspace.array(kind, output, level - 1, is_whole=not state.missing)
        for position in units.iter_overlapping(block):
            box = units.core(position) & block
            values = reduce_box(below, box, step, by_mode=kind != "scores")
            workspace.write(kind, output, box, values, level)
    return OutputState()


def _step(plan: Plan, level: int) -> Step:
    image = plan.target_image
    fine = image.spatial(image.levels[level - 1].scale)
    coarse = image.spatial(image.levels[level].scale)
    # Some files say 0 for an unknown size.
    factors = tuple(map(truediv, coarse, fine)) if all(fine) else None
    return Step(image.volume_shape(level - 1), image.volume_shape(level), factors)


def reduce_box(below: Readable, box: Box, step: Step, *, by_mode: bool) -> NDArray[Any]:
    """Compute one write unit of a coarser level in parts.

    Its memory then does not grow with the factor between the levels.
    """
    sizes = zip(_DOWNSAMPLE_SHAPE, step.coarse_shape, step.fine_shape, strict=True)
    part_shape = tuple(max(n * coarse // fine, 1) for n, coarse, fine in sizes)
    reduced = []
    parts = list(BlockGrid(box.shape, part_shape))
    for part in parts:
        coarse_box = part.shifted(box.start)
        fine_box = step.source_box(coarse_box)
        values = below.read(fine_box)
        reduced.append(downsample(values, fine_box, coarse_box, step, mode=by_mode))
    result = np.empty(box.shape, reduced[0].dtype)
    for part, values in zip(parts, reduced, strict=True):
        result[part.slices] = values
    return result
