"""The stage ``segment``: the network predicts a block, which is written as scores and a mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.normalization import Normalization, require_finite
from megaseg_dask.inference.block import Block, BlockOutputs, Patches, Preparation, stack
from megaseg_dask.inference.engine import open_engine
from megaseg_dask.plan.resolved import Automatic, Fixed
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks.source import require_same_voxels
from megaseg_dask.run.tasks.thresholds import find_extremes, sum_above
from megaseg_dask.run.workspace import Source, Workspace

Array = NDArray[Any]


def segment_block(workspace: Workspace, volume: int, number: int) -> TaskSummary:
    """Predict one block and write its core's scores, and its mask or the logits to find it from.

    Raises:
        DataError: A voxel is not finite, or not what was measured.
        EngineError: The block does not fit the device, or a logit is not finite.
    """
    plan = workspace.plan
    core = plan.block_grid()[number]
    region = core.shifted(plan.region.start)
    channels = workspace.sources(volume)
    read_box = plan.patch_grid.read_box(region)
    values = stack([channel.read(read_box) for channel in channels])
    require_same_voxels(workspace, volume, read_box, values)
    n_absent = 0
    if plan.measure_level != 0:
        # Absent chunks are counted by the measure stage; if it is skipped, count them here.
        n_absent = _count_absent(channels, region, values[:, *region.within(read_box).slices])
    prediction = _predict(workspace, values, region, workspace.state(volume))
    for output, arrays in zip(plan.outputs_of(volume), prediction.arrays, strict=True):
        for kind, array in arrays.items():
            workspace.write(kind, output, core, array)
    intensity = values[0][region.within(read_box).slices]
    facts = [_facts_of(workspace, arrays, intensity) for arrays in prediction.arrays]
    return TaskSummary(absent=n_absent, batch=prediction.largest_batch, by_output=tuple(facts))


def _facts_of(workspace: Workspace, arrays: dict[str, Array], intensity: Array) -> OutputState:
    """Return what a block tells of its volume: extremes of logits, or sums above the threshold."""
    if "logits" in arrays:
        return find_extremes(arrays["logits"])
    if workspace.first_mask in arrays:
        return sum_above(arrays[workspace.first_mask], intensity)
    return OutputState()


def _count_absent(channels: list[Source], box: Box, values: Array) -> int:
    """Return how many stored objects of the source are absent in a box."""
    pairs = zip(channels, values, strict=True)
    return sum(channel.count_absent(box, voxels) for channel, voxels in pairs)


@dataclass(frozen=True, slots=True)
class _Prediction:
    """The arrays of a block to write, by kind, for each output of the network.

    ``largest_batch`` is what fits the device, if it ran out of memory.
    """

    arrays: list[dict[str, Array]]
    largest_batch: int | None


def _predict(workspace: Workspace, values: Array, region: Box, state: VolumeState) -> _Prediction:
    """Predict a region of the source; ``values`` are the voxels of its read box.

    NaN is background by request.
    """
    plan = workspace.plan
    read_box = plan.patch_grid.read_box(region)
    is_float = values.dtype.kind == "f"
    if is_float and plan.measure_level != 0 and not plan.resolved.nan_to_background:
        # Not every voxel was measured, and the network would take a NaN for the mean.
        for channel in values:
            require_finite(channel, read_box)
    background = None
    if is_float and plan.resolved.nan_to_background:
        background = ~np.isfinite(values[:, *region.within(read_box).slices]).all(axis=0)
    zscores = tuple(Normalization(channel.mean, channel.std) for channel in state.statistics)
    block = Block(
        core=region,
        values=values,
        patches=Patches(plan.patch_grid, plan.model.window, plan.batch),
        prepare=Preparation(plan.model.steps, zscores),
        background=background,
    )
    with open_engine(plan.model, plan.engine) as engine:
        outputs = engine.predict_block(block)
        # Arrays come down from a device before another thread computes on it: they would
        # otherwise wait for the inference of all that other threads have in hand.
        arrays = [_arrays_to_write(workspace, output) for output in outputs]
        return _Prediction(arrays, engine.largest_batch)


def _arrays_to_write(workspace: Workspace, output: BlockOutputs) -> dict[str, Array]:
    """Return scores, and a first mask or the logits to find a threshold from."""
    plan = workspace.plan
    resolved = plan.resolved
    arrays = {}
    if "scores" in resolved.outputs:
        arrays["scores"] = output.scores(resolved.scores_dtype)
    if not resolved.has_mask():
        return arrays
    match resolved.threshold:
        case Automatic():
            arrays["logits"] = output.logits()
        case Fixed(score):
            arrays[workspace.first_mask] = output.mask(score)
    return arrays
