"""The stage ``segment``: the network predicts a block, which is written as scores and a mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.normalization import Normalization, require_finite
from megaseg_dask.inference.block import (
    Block,
    BlockOutputs,
    HostOutputs,
    Patches,
    Preparation,
    stack,
)
from megaseg_dask.inference.engine import open_engine
from megaseg_dask.ngff.volume import Absent
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.resolved import Fixed
from megaseg_dask.run.state import ChannelStatistics, OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks.source import require_same_voxels, wanted_voxels
from megaseg_dask.run.tasks.thresholds import find_extremes, sum_above
from megaseg_dask.run.workspace import Source, Workspace

Array = NDArray[Any]


def segment_block(workspace: Workspace, volume: int, number: int) -> TaskSummary:
    """Predict one block and write its core's scores, and its mask or the logits to find it from.

    A block that a mask leaves out is background: nothing of it is read or predicted.

    Raises:
        DataError: A voxel is not finite, or the source or the mask is not what it was.
        EngineError: The block does not fit the device, or a logit is not finite.
    """
    plan = workspace.plan
    core = plan.block_grid()[number]
    region = core.shifted(plan.region.start)
    channels = workspace.sources(volume)
    wanted = wanted_voxels(workspace, volume, number, region)
    if wanted is not None and not wanted.any():
        return _leave_out(workspace, volume, core, region)
    read_box = plan.patch_grid.read_box(region)
    values = stack([channel.read(read_box) for channel in channels])
    require_same_voxels(workspace, volume, read_box, values)
    absent = Absent()
    if plan.measure_level != 0:
        # Absent chunks are counted by the measure stage; if it is skipped, count them here.
        absent = _count_absent(channels, region, values[:, *region.within(read_box).slices])
    prediction = _predict(workspace, values, region, wanted, workspace.state(volume))
    intensity = values[0][region.within(read_box).slices]
    facts = _write(workspace, volume, core, prediction.arrays, intensity)
    return TaskSummary(
        absent=absent.objects,
        absent_inner=absent.inner,
        batch=prediction.largest_batch,
        repeated=prediction.n_repeated,
        by_output=facts,
    )


def _leave_out(workspace: Workspace, volume: int, core: Box, region: Box) -> TaskSummary:
    """Write a block of background."""
    plan = workspace.plan
    unknown = HostOutputs(np.full(core.shape, np.nan, np.float32))
    arrays = [_arrays_to_write(workspace, unknown) for _ in plan.model.outputs]
    # Nothing of it lies above a threshold.
    intensity = np.broadcast_to(np.zeros((), plan.source_image.dtype), core.shape)
    facts = _write(workspace, volume, core, arrays, intensity)
    absent = Absent()
    if plan.measure_level != 0:
        each = (channel.count_absent(region) for channel in workspace.sources(volume))
        absent = sum(each, absent)
    return TaskSummary(absent=absent.objects, by_output=facts)


def _write(
    workspace: Workspace,
    volume: int,
    core: Box,
    by_output: list[dict[str, Array]],
    intensity: Array,
) -> tuple[OutputState, ...]:
    """Write the arrays of a block, and return what they tell of the volume."""
    outputs = workspace.plan.outputs_of(volume)
    for output, arrays in zip(outputs, by_output, strict=True):
        for kind, array in arrays.items():
            workspace.write(kind, output, core, array)
    return tuple(_facts_of(workspace, arrays, intensity) for arrays in by_output)


def _facts_of(workspace: Workspace, arrays: dict[str, Array], intensity: Array) -> OutputState:
    """Return what a block tells of its volume: extremes of logits, or sums above the threshold."""
    if workspace.first_mask in arrays:
        return sum_above(arrays[workspace.first_mask], intensity)
    if "logits" in arrays:
        return find_extremes(arrays["logits"])
    return OutputState()


def _count_absent(channels: list[Source], box: Box, values: Array) -> Absent:
    """Return what of the source is absent in a box."""
    pairs = zip(channels, values, strict=True)
    each = (channel.count_absent(box, voxels) for channel, voxels in pairs)
    return sum(each, Absent())


@dataclass(frozen=True, slots=True)
class _Prediction:
    """The arrays of a block to write, by kind, for each output of the network.

    ``largest_batch`` is what fits the device, if it ran out of memory. ``n_repeated`` is 1 if the
    block was predicted again, in float32.
    """

    arrays: list[dict[str, Array]]
    largest_batch: int | None
    n_repeated: int


def _predict(
    workspace: Workspace,
    values: Array,
    region: Box,
    wanted: NDArray[np.bool_] | None,
    state: VolumeState,
) -> _Prediction:
    """Predict a region of the source; ``values`` are the voxels of its read box.

    Background is what is not ``wanted``, and by request what is NaN.
    """
    plan = workspace.plan
    read_box = plan.patch_grid.read_box(region)
    is_float = values.dtype.kind == "f"
    if is_float and plan.measure_level != 0 and not plan.resolved.nan_to_background:
        # Not every voxel was measured, and the network would take a NaN for the mean.
        for channel in values:
            require_finite(channel, read_box)
    unknown = None
    if is_nan_background(plan):
        unknown = find_unknown(values[:, *region.within(read_box).slices])
    block = replace(block_of(plan, region, state.statistics, wanted, unknown), values=values)
    with open_engine(plan.model, plan.engine) as engine:
        n_repeated = engine.n_repeated
        outputs = engine.predict_block(block)
        # Arrays come down from a device before another thread computes on it: they would
        # otherwise wait for the inference of all that other threads have in hand.
        arrays = [_arrays_to_write(workspace, output) for output in outputs]
        return _Prediction(arrays, engine.largest_batch, engine.n_repeated - n_repeated)


def is_nan_background(plan: Plan) -> bool:
    """Return whether voxels of the source may be NaN, and are background then."""
    is_float = np.dtype(plan.source_image.dtype).kind == "f"
    return is_float and plan.resolved.nan_to_background


def find_unknown(values: Array) -> NDArray[np.bool_]:
    """Return the voxels ``(z, y, x)`` that are not finite in some channel of ``values``."""
    return ~np.asarray(np.isfinite(values).all(axis=0))


def block_of(
    plan: Plan,
    region: Box,
    statistics: Sequence[ChannelStatistics],
    wanted: NDArray[np.bool_] | None,
    unknown: NDArray[np.bool_] | None,
) -> Block:
    """Return a region of the source as it is predicted, without its voxels.

    Patches lie on the grid of the volume, and are normalized by its ``statistics``. Background is
    what is not ``wanted``, and what is ``unknown``.
    """
    background: Any = None if wanted is None else ~wanted
    if unknown is not None:
        background = unknown if background is None else background | unknown
    zscores = tuple(Normalization(channel.mean, channel.std) for channel in statistics)
    return Block(
        core=region,
        values=None,
        patches=Patches(plan.patch_grid, plan.model.window, plan.batch),
        prepare=Preparation(plan.model.steps, zscores),
        background=background,
        where=wanted,
    )


def _arrays_to_write(workspace: Workspace, output: BlockOutputs) -> dict[str, Array]:
    """Return scores, and a first mask or the logits to find a threshold from."""
    plan = workspace.plan
    resolved = plan.resolved
    arrays = {}
    if "scores" in resolved.outputs:
        arrays["scores"] = output.scores(resolved.scores_dtype)
    if resolved.finds_threshold() or resolved.keep_logits:
        arrays["logits"] = output.logits()
    if resolved.has_mask() and isinstance(resolved.threshold, Fixed):
        arrays[workspace.first_mask] = output.mask(resolved.threshold.score)
    return arrays
