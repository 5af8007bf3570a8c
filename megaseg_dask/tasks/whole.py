"""A volume that fits one block: all stages in memory, read once and written once, with the same arithmetic."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask import labelling, products
from megaseg_dask.geometry import Box
from megaseg_dask.intensity import Normalisation
from megaseg_dask.measurements import measure_block
from megaseg_dask.plan import Plan
from megaseg_dask.tasks import levels, objects, scores

Array = NDArray[Any]


def segment_volume(plan: Plan, volume: int, _: int) -> dict[str, Any]:
    """Do all stages of one volume."""
    whole, source = Box.of(plan.volume_shape), products.source(plan, volume)
    read_box = plan.patch_grid.read_box(plan.region)
    values = source.read(read_box)
    statistics = _measure(plan, volume, values)
    absent = scores.count_absent(source, read_box, values)
    logits = scores.predict(plan, values, plan.region, Normalisation(statistics["mean"], statistics["std"]))
    summary: dict[str, Any] = {"statistics": statistics, **absent, **scores.shrunk_batch(plan)}
    found = scores.scores_of(plan, logits)
    if plan.has_mask and plan.options.is_automatic:
        extremes = scores.extremes_of(found.pop("logits"))
        table = scores.tabulate(plan, logits, extremes)
        summary["threshold"] = scores.cutoff_of(plan, table, extremes)
        found["mask"] = scores.above(logits, summary["threshold"])
    elif plan.has_mask:
        found["mask"] = found.pop(products.first_mask(plan))
    del logits
    if plan.has_mask and plan.options.fill_holes:
        found["mask"] = _fill(plan, found["mask"], whole)
    if "labels" in plan.options.outputs:
        found["labels"], summary["n_objects"] = _label(plan, found["mask"], whole)
    if "measurements" in plan.options.outputs:
        inside = values[plan.region.within(read_box).slices]
        objects.write_sums(plan, volume, measure_block(found["labels"], inside, whole))
    for kind in plan.arrays:
        products.write(plan, kind, volume, whole, found[kind])
        levels.write_coarser_levels(plan, volume, kind, found[kind])
    return summary


def _measure(plan: Plan, volume: int, values: Array) -> dict[str, Any]:
    if plan.measure_level is None:
        return scores.describe_statistics(plan, ())
    box = Box.of(plan.measure_grid.volume_shape)
    if plan.measure_level:
        values = products.source(plan, volume, plan.measure_level).read(box)
    return scores.describe_statistics(plan, scores.measure_parts(plan, values, box))


def _label(plan: Plan, mask: Array, whole: Box) -> tuple[Array, int]:
    labels = labelling.label_block(mask, plan.options.connectivity)
    fragments = labelling.list_fragments(labels, whole, plan.volume_shape)
    final = labelling.join_fragments(fragments, _NO_PAIRS, min_size=plan.options.min_size)
    dtype = labelling.label_dtype(plan.volume_shape)
    return labelling.relabel(labels, final, dtype), int(final.max(initial=0))


def _fill(plan: Plan, mask: Array, whole: Box) -> Array:
    holes = labelling.label_block(mask == 0, plan.options.connectivity)
    fragments = labelling.list_fragments(holes, whole, plan.volume_shape)
    small = labelling.fill_table(fragments, _NO_PAIRS, plan.options.fill_holes)
    filled: Array = mask | labelling.relabel(holes, small.view(np.uint8), np.dtype(np.uint8))
    return filled


_NO_PAIRS = np.empty((0, 2), np.int64)
