"""Stages about scores: measure, segment, and the threshold of each volume where it is found from all of it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import thresholds
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Counts,
    Normalization,
    Statistics,
    measure,
    merge_statistics,
    require_finite,
)
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import DataError
from megaseg_dask.inference.block import Block, BlockOutputs, Patches, Preparation, stack
from megaseg_dask.inference.engine import open_engine
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.memory import TABLES_READ_AHEAD
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.state import ChannelStatistics, OutputState, PartStatistics, TaskSummary

Array = NDArray[Any]
Float32 = NDArray[np.float32]


# -- statistics


def measure_block(plan: Plan, volume: int, number: int) -> TaskSummary:
    """Sum intensities of each channel; floats keep one entry per part of the partition, integers add up to one."""
    box = plan.measure_grid[number]
    n_absent = 0
    parts = []
    for channel in workspace.sources(plan, volume, plan.measure_level or 0):
        values = channel.read(box)
        n_absent += channel.count_absent(box, values)
        parts.append(measure_parts(plan, values, box))
        # What cannot be normalised is said of this block, rather than of the run.
        describe_statistics(plan, parts[-1])
    return TaskSummary(parts=tuple(parts), absent=n_absent)


def read_channels(channels: Sequence[Volume], box: Box) -> Array:
    """Return a box of all channels of a volume, ``(c, z, y, x)``."""
    return stack([channel.read(box) for channel in channels])


def count_absent(channels: Sequence[Volume], box: Box, values: Array) -> int:
    """Return how many stored objects of the source are absent in a box, whose ``values`` were read."""
    pairs = zip(channels, values, strict=True)
    return sum(channel.count_absent(box, read) for channel, read in pairs)


def measure_parts(plan: Plan, values: Array, box: Box) -> tuple[PartStatistics, ...]:
    """Return the statistics of a channel's parts of the fixed partition inside ``box``."""
    partition = BlockGrid(plan.measure_grid.volume_shape, PARTITION_SHAPE)
    places = list(partition.iter_overlapping(box))
    ignore = plan.options.nan_to_background
    parts = [
        measure(values[core.within(box).slices], core, nan_to_background=ignore)
        for core in map(partition.core, places)
    ]
    if isinstance(parts[0], Counts):
        parts = [merge_statistics(parts)]
    order = map(partition.index, places)
    return tuple(map(PartStatistics, order, parts))


def merge_parts(parts: Iterable[PartStatistics]) -> Statistics:
    """Add up statistics of a channel in the partition's grid order."""
    in_order = sorted(parts, key=lambda part: part.place)
    return merge_statistics(part.statistics for part in in_order)


def describe_statistics(plan: Plan, parts: Iterable[PartStatistics]) -> ChannelStatistics:
    """Return mean, std, minimum and maximum of a channel; the last two are unknown where the settings give the rest."""
    if isinstance(given := plan.options.normalization, tuple):
        return ChannelStatistics(*given)
    found = merge_parts(parts)
    # JSON has no infinity, which is the minimum of a volume without one finite voxel.
    low, high = (found.minimum, found.maximum) if found.n else (0.0, 0.0)
    return ChannelStatistics(**asdict(Normalization.of(found)), minimum=low, maximum=high)


def describe_volume(plan: Plan, summaries: Sequence[TaskSummary]) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel of a volume, from the summaries of its ``measure`` tasks."""

    def describe(channel: int) -> ChannelStatistics:
        of_blocks = (summary.parts[channel] for summary in summaries)
        return describe_statistics(plan, chain.from_iterable(of_blocks))

    return tuple(map(describe, range(plan.model.in_channels)))


# -- scores


def segment_block(plan: Plan, volume: int, number: int) -> TaskSummary:
    """Predict one block and write its core's scores, and its mask or, for an automatic threshold, its logits."""
    core = plan.block_grid()[number]
    place = core.shifted(plan.region.start)
    channels, read_box = workspace.sources(plan, volume), plan.patch_grid.read_box(place)
    values = read_channels(channels, read_box)
    # Who measures the volume counts them; here nobody does.
    absent = (
        0
        if plan.measure_level == 0
        else count_absent(channels, place, values[:, *place.within(read_box).slices])
    )
    statistics = workspace.read_state(plan, volume).statistics
    prediction = predict(plan, values, place, statistics)
    for output, arrays in zip(plan.outputs_of(volume), prediction.arrays, strict=True):
        for kind, array in arrays.items():
            workspace.write(plan, kind, output, core, array)
    by_output: tuple[OutputState, ...] = ()
    if "logits" in plan.intermediates:
        by_output = tuple(extremes_of(arrays["logits"]) for arrays in prediction.arrays)
    return TaskSummary(absent=absent, batch=prediction.largest_batch, by_output=by_output)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The arrays of a block to write, by kind, for each output of the network.

    ``largest_batch`` is what fits the device, if it ran out of memory.
    """

    arrays: list[dict[str, Array]]
    largest_batch: int | None


def predict(
    plan: Plan, values: Array, core: Box, statistics: Iterable[ChannelStatistics]
) -> Prediction:
    """Predict a core of the source; ``values`` are the voxels of its read box.

    ``statistics`` are those of each channel. NaN is background by request.

    Raises:
        DataError: A voxel is not finite.
        EngineError: The block does not fit the device, or a logit is not finite.
    """
    read_box = plan.patch_grid.read_box(core)
    is_float = values.dtype.kind == "f"
    if is_float and plan.measure_level != 0 and not plan.options.nan_to_background:
        # Not every voxel was measured, and the network would take a NaN for the mean.
        for channel in values:
            require_finite(channel, read_box)
    background = None
    if is_float and plan.options.nan_to_background:
        background = ~np.isfinite(values[:, *core.within(read_box).slices]).all(axis=0)
    zscores = tuple(Normalization(found.mean, found.std) for found in statistics)
    block = Block(
        core=core,
        values=values,
        patches=Patches(plan.patch_grid, plan.model.window, plan.batch),
        prepare=Preparation(plan.model.steps, zscores),
        background=background,
    )
    with open_engine(plan.model, plan.engine) as engine:
        outputs = engine.predict_block(block)
        # Arrays come down from a device before another thread computes on it: they would
        # otherwise wait for the inference of all that other threads have in hand.
        arrays = [_arrays_to_write(plan, output) for output in outputs]
        return Prediction(arrays, engine.largest_batch)


def _arrays_to_write(plan: Plan, output: BlockOutputs) -> dict[str, Array]:
    """Return scores, and a first mask or the logits to find a threshold from."""
    arrays = {}
    if "scores" in plan.options.outputs:
        arrays["scores"] = output.scores(plan.options.scores_dtype)
    if plan.has_mask and plan.options.is_automatic:
        arrays["logits"] = output.logits()
    elif plan.has_mask:
        arrays[workspace.first_mask(plan)] = output.mask(float(plan.options.threshold))
    return arrays


# -- a threshold for each volume


def extremes_of(logits: Float32) -> OutputState:
    """Return lowest and highest logit of a block; nothing if it has no number."""
    known = logits[~np.isnan(logits)] if np.isnan(logits.min(initial=0)) else logits
    if not known.size:
        return OutputState()
    return OutputState(low=float(known.min()), high=float(known.max()))


def merge_extremes(of_blocks: Sequence[OutputState]) -> OutputState:
    """Return lowest and highest logit of a volume from those of its blocks."""
    lows = [block.low for block in of_blocks if block.low is not None]
    highs = [block.high for block in of_blocks if block.high is not None]
    return OutputState(low=min(lows, default=None), high=max(highs, default=None))


def tabulate_block(plan: Plan, output: Output, number: int) -> OutputState:
    """Write the table of one block's logits over the range of the whole volume."""
    logits = workspace.product(plan, "logits", output).read(plan.block_grid()[number])
    table = tabulate(plan, logits, workspace.read_known(plan, output))
    workspace.save(plan, output, f"histograms/{number}.npz", table)
    return OutputState()


def tabulate(plan: Plan, logits: Float32, extremes: OutputState) -> thresholds.Table:
    """Return the table of logits that the threshold is found from."""
    if extremes.low is None or extremes.high is None:
        raise DataError(
            "no voxel of the volume is a number, so it has no threshold; give one with --threshold"
        )
    known = logits[~np.isnan(logits)] if plan.options.nan_to_background else logits.ravel()
    return thresholds.tabulate(known, extremes.low, extremes.high, str(plan.options.threshold))


def find_cutoff(plan: Plan, output: Output, _: int) -> OutputState:
    """Find the threshold of a volume from the tables of its blocks."""
    blocks = workspace.read_state(plan, output.volume).present(len(plan.block_grid()))
    tables = read_ahead(
        lambda n: workspace.load(plan, output, f"histograms/{n}.npz"), blocks, TABLES_READ_AHEAD
    )
    merged = thresholds.merge_tables(table for _, table in tables)
    cutoff = cutoff_of(plan, merged, workspace.read_known(plan, output))
    return OutputState(threshold=cutoff)


def cutoff_of(plan: Plan, table: thresholds.Table, extremes: OutputState) -> float:
    """Return the threshold of a volume: a logit."""
    assert extremes.low is not None
    assert extremes.high is not None
    return thresholds.find_threshold(
        table, extremes.low, extremes.high, str(plan.options.threshold)
    )


def threshold_block(plan: Plan, output: Output, number: int) -> OutputState:
    """Write the mask of one block from its logits and the volume's threshold."""
    core = plan.block_grid()[number]
    logits = workspace.product(plan, "logits", output).read(core)
    cutoff = workspace.read_known(plan, output).threshold
    assert cutoff is not None
    workspace.write(plan, workspace.first_mask(plan), output, core, above(logits, cutoff))
    return OutputState()


def above(logits: Float32, cutoff: float) -> NDArray[np.uint8]:
    """Return 1 where a logit is above the threshold, strictly; a NaN never is."""
    return (logits > np.float32(cutoff)).view(np.uint8)
