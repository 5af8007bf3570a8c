"""A volume that fits one block: all stages in memory, read once and written once, with the same arithmetic."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import components
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import measure_block
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.state import ChannelStatistics, OutputState, TaskSummary
from megaseg_dask.run.tasks import measurements, pyramids, scores

Array = NDArray[Any]


def segment_volume(plan: Plan, volume: int, _: int) -> TaskSummary:
    """Do all stages of one volume."""
    channels, read_box = workspace.sources(plan, volume), plan.patch_grid.read_box(plan.region)
    values = scores.read_channels(channels, read_box)
    statistics = _measure(plan, volume, values)
    absent = scores.count_absent(channels, read_box, values)
    prediction = scores.predict(plan, values, plan.region, statistics)
    intensity = values[0][plan.region.within(read_box).slices]
    # Arrays leave the list as they are used: nothing else holds them.
    by_output = tuple(
        _finish(plan, output, prediction.arrays.pop(0), intensity)
        for output in plan.outputs_of(volume)
    )
    return TaskSummary(
        statistics=statistics,
        absent=absent,
        batch=prediction.largest_batch,
        by_output=by_output,
    )


def _finish(plan: Plan, output: Output, found: dict[str, Array], intensity: Array) -> OutputState:
    """Write scores, mask, labels and measurements of one output; return its threshold and number of objects."""
    whole = Box.of(plan.volume_shape)
    threshold = None
    n_objects = None
    if plan.has_mask and plan.options.is_automatic:
        values = found.pop("logits")
        extremes = scores.extremes_of(values)
        table = scores.tabulate(plan, values, extremes)
        threshold = scores.cutoff_of(plan, table, extremes)
        found["mask"] = scores.above(values, threshold)
        del values
    elif plan.has_mask:
        found["mask"] = found.pop(workspace.first_mask(plan))
    if plan.has_mask and plan.options.fill_holes:
        found["mask"] = _fill(plan, found["mask"], whole)
    if "labels" in plan.options.outputs:
        found["labels"], n_objects = _label(plan, found["mask"], whole)
    if "measurements" in plan.options.outputs:
        measurements.write_sums(plan, output, measure_block(found["labels"], intensity, whole))
    for kind in plan.arrays:
        workspace.write(plan, kind, output, whole, found[kind])
        pyramids.write_coarser_levels(plan, output, kind, found[kind])
    return OutputState(threshold=threshold, n_objects=n_objects)


def _measure(plan: Plan, volume: int, values: Array) -> tuple[ChannelStatistics, ...]:
    if plan.measure_level is None:
        return scores.describe_volume(plan, ())
    box = Box.of(plan.measure_grid.volume_shape)
    if plan.measure_level:
        values = scores.read_channels(workspace.sources(plan, volume, plan.measure_level), box)
    parts = tuple(scores.measure_parts(plan, channel, box) for channel in values)
    return scores.describe_volume(plan, [TaskSummary(parts=parts)])


def _label(plan: Plan, mask: Array, whole: Box) -> tuple[Array, int]:
    labels = components.label_block(mask, plan.options.connectivity)
    fragments = components.list_fragments(labels, whole, plan.volume_shape)
    final = components.join_fragments(fragments, _NO_PAIRS, min_size=plan.options.min_size)
    dtype = components.label_dtype(plan.volume_shape)
    return components.relabel(labels, final, dtype), int(final.max(initial=0))


def _fill(plan: Plan, mask: Array, whole: Box) -> Array:
    holes = components.label_block(mask == 0, plan.options.connectivity)
    fragments = components.list_fragments(holes, whole, plan.volume_shape)
    small = components.fill_table(fragments, _NO_PAIRS, plan.options.fill_holes)
    filled: Array = mask | components.relabel(holes, small.view(np.uint8), np.dtype(np.uint8))
    return filled


_NO_PAIRS = np.empty((0, 2), np.int64)
