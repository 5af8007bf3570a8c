"""Stages about scores: measure, segment, and the threshold of each volume where it is found from all of it."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import thresholds
from megaseg_dask.algorithms.blending import in_slabs, sigmoid
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Counts,
    Moments,
    Normalisation,
    Statistics,
    measure,
    merge_statistics,
    require_finite,
)
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import DataError
from megaseg_dask.inference.engine import (
    BlockEngine,
    BlockLogits,
    Preparation,
    cached_window,
    open_engine,
    predict_block,
    stack,
)
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.memory import TABLES_READ_AHEAD
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Summary = dict[str, Any]

# Held by the one of a worker's threads that computes; meanwhile others read the next block and write the last one.
_device = threading.Lock()


# -- statistics


def measure_block(plan: Plan, volume: int, number: int) -> Summary:
    """Sum intensities of each channel; floats keep one entry per part of the partition, integers add up to one."""
    box, n_absent, parts = plan.measure_grid[number], 0, []
    for channel in workspace.sources(plan, volume, plan.measure_level or 0):
        values = channel.read(box)
        n_absent += channel.count_absent(box, values)
        parts.append(measure_parts(plan, values, box))
        # What cannot be normalised is said of this block, rather than of the run.
        describe_statistics(plan, parts[-1])
    return {"parts": parts, **_told(absent=n_absent)}


def read_channels(channels: Sequence[Volume], box: Box) -> Array:
    """Return a box of all channels of a volume, ``(c, z, y, x)``."""
    return stack([channel.read(box) for channel in channels])


def count_absent(channels: Sequence[Volume], box: Box, values: Array) -> Summary:
    """Return how many stored objects of the source are absent in a box, if any are; ``values`` is what was read."""
    return _told(absent=sum(c.count_absent(box, v) for c, v in zip(channels, values, strict=True)))


def _told(**counts: int | None) -> Summary:
    """Return those of the counts that there is something to say of."""
    return {name: n for name, n in counts.items() if n}


def measure_parts(plan: Plan, values: Array, box: Box) -> list[tuple[int, dict[str, Any]]]:
    """Return place and statistics of a channel's parts of the fixed partition inside ``box``, as JSON values."""
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
    return [(place, asdict(part)) for place, part in zip(order, parts, strict=False)]


def merge_parts(plan: Plan, parts: Iterable[tuple[int, Mapping[str, Any]]]) -> Statistics:
    """Add up statistics of a channel in the partition's grid order."""
    kind = Moments if plan.source_image.dtype.startswith("float") else Counts
    return merge_statistics(kind(**fields) for _, fields in sorted(parts, key=lambda part: part[0]))


def describe_statistics(
    plan: Plan, parts: Iterable[tuple[int, Mapping[str, Any]]]
) -> dict[str, float | None]:
    """Return mean, std, minimum and maximum of a channel; the last two are unknown where the settings give the rest."""
    if isinstance(given := plan.options.normalization, tuple):
        return {"mean": given[0], "std": given[1], "minimum": None, "maximum": None}
    found = merge_parts(plan, parts)
    # JSON has no infinity, which is the minimum of a volume without one finite voxel.
    low, high = (found.minimum, found.maximum) if found.n else (0.0, 0.0)
    return {**asdict(Normalisation.of(found)), "minimum": low, "maximum": high}


def describe_volume(
    plan: Plan, summaries: Sequence[Mapping[str, Any]]
) -> list[dict[str, float | None]]:
    """Return the statistics of each channel of a volume, from what measuring its blocks gave."""
    return [
        describe_statistics(
            plan, [part for summary in summaries for part in summary["parts"][channel]]
        )
        for channel in range(plan.model.in_channels)
    ]


# -- scores


def segment_block(plan: Plan, volume: int, number: int) -> Summary:
    """Predict one block and write its core's scores, and its mask or, for an automatic threshold, its logits."""
    core = plan.block_grid()[number]
    place = core.shifted(plan.region.start)
    channels, read_box = workspace.sources(plan, volume), plan.patch_grid.read_box(place)
    values = read_channels(channels, read_box)
    # Who measures the volume counts them; here nobody does.
    absent = (
        {}
        if plan.measure_level == 0
        else count_absent(channels, place, values[:, *place.within(read_box).slices])
    )
    predicted = predict(plan, values, place, workspace.read_state(plan, volume)["statistics"])
    for output, logits in zip(plan.outputs_of(volume), predicted, strict=True):
        for kind, array in scores_of(plan, logits).items():
            workspace.write(plan, kind, output, core, array)
    summary = {**absent, **shrunk_batch(plan)}
    if "logits" in plan.intermediates:
        summary[workspace.BY_OUTPUT] = [
            extremes_of(found) for found in predicted if isinstance(found, np.ndarray)
        ]
    return summary


def shrunk_batch(plan: Plan) -> Summary:
    """Return the batch that this worker's engine came down to when its device ran out of memory, if it did."""
    return _told(batch=open_engine(plan.model, plan.engine).largest_batch)


def predict(
    plan: Plan, values: Array, core: Box, statistics: Iterable[Mapping[str, Any]]
) -> list[Float32 | dict[str, Array]]:
    """Return the logits of a core for each output, in the source's voxels; ``values`` are those of its read box.

    ``statistics`` are those of each channel. NaN is background by request. Of an engine that keeps blocks on its
    device, it is what :func:`scores_of` makes of them.
    """
    read_box, is_float = plan.patch_grid.read_box(core), values.dtype.kind == "f"
    if is_float and plan.measure_level != 0 and not plan.options.nan_to_background:
        # Nobody has looked at every voxel yet, and the network would take a NaN for the mean.
        for channel in values:
            require_finite(channel, read_box)
    zscores = tuple(Normalisation(found["mean"], found["std"]) for found in statistics)
    prepare = Preparation(plan.model.steps, zscores)
    with _device:
        engine = open_engine(plan.model, plan.engine)
        if isinstance(engine, BlockEngine) and not (is_float and plan.options.nan_to_background):
            weights = cached_window(plan.patch_grid.patch_shape, plan.model.window)
            on_device = engine.predict_block(
                values, core, plan.patch_grid, prepare, plan.engine.batch, weights
            )
            # What looks for a threshold works on the logits; all else comes down as it is stored. It does so at once:
            # who let go of the device first would wait for the inference of all that other threads have in hand.
            return [
                found.logits() if plan.options.is_automatic else _bring_down(plan, found)
                for found in on_device
            ]
        logits = predict_block(
            values,
            core,
            plan.patch_grid,
            prepare,
            engine,
            batch=plan.engine.batch,
            window_mode=plan.model.window,
        )
    if is_float and plan.options.nan_to_background:
        logits[:, ~np.isfinite(values[:, *core.within(read_box).slices]).all(axis=0)] = np.nan
    return list(logits)


def scores_of(plan: Plan, logits: Float32 | dict[str, Array]) -> dict[str, Array]:
    """Return what segmenting a block writes of an output: scores, and a first mask or the logits to find one from."""
    outputs, found = plan.options.outputs, {}
    if isinstance(logits, dict):
        return logits
    scores = sigmoid(logits)
    if plan.options.nan_to_background:
        np.nan_to_num(scores, copy=False)
    if "scores" in outputs:
        found["scores"] = as_stored(scores, plan.options.scores_dtype)
    if plan.has_mask:
        if plan.options.is_automatic:
            found["logits"] = logits
        else:
            found[workspace.first_mask(plan)] = (scores > np.float32(plan.options.threshold)).view(
                np.uint8
            )
    return found


def _bring_down(plan: Plan, logits: BlockLogits) -> dict[str, Array]:
    found = {}
    if "scores" in plan.options.outputs:
        found["scores"] = logits.stored(plan.options.scores_dtype)
    if plan.has_mask:
        found[workspace.first_mask(plan)] = logits.above(float(plan.options.threshold))
    return found


def as_stored(scores: Float32, dtype: str) -> Array:
    """Return scores as they are written: 255 times the score, rounded, or as they are."""
    if dtype != "uint8":
        return scores
    return in_slabs(lambda part: np.rint(part * np.float32(255)), scores, np.dtype(np.uint8))


# -- a threshold for each volume


def extremes_of(logits: Float32) -> Summary:
    """Return lowest and highest logit of a block; nothing if it has no number."""
    known = logits[~np.isnan(logits)] if np.isnan(logits.min(initial=0)) else logits
    return {"low": float(known.min()), "high": float(known.max())} if known.size else {}


def merge_extremes(of_blocks: Iterable[Mapping[str, Any]]) -> Summary:
    """Return lowest and highest logit of a volume from those of its blocks."""
    known = [s for s in of_blocks if "low" in s]
    return (
        {"low": min(s["low"] for s in known), "high": max(s["high"] for s in known)}
        if known
        else {}
    )


def tabulate_block(plan: Plan, output: Output, number: int) -> Summary:
    """Write the table of one block's logits over the range of the whole volume."""
    logits = workspace.product(plan, "logits", output).read(plan.block_grid()[number])
    table = tabulate(plan, logits, workspace.read_known(plan, output))
    workspace.save(plan, output, f"histograms/{number}.npz", table)
    return {}


def tabulate(plan: Plan, logits: Float32, extremes: Mapping[str, Any]) -> thresholds.Table:
    """Return the table of logits that the threshold is found from."""
    if "low" not in extremes:
        raise DataError(
            "no voxel of the volume is a number, so it has no threshold; give one with --threshold"
        )
    known = logits[~np.isnan(logits)] if plan.options.nan_to_background else logits.ravel()
    return thresholds.tabulate(
        known, extremes["low"], extremes["high"], str(plan.options.threshold)
    )


def find_cutoff(plan: Plan, output: Output, _: int) -> Summary:
    """Find the threshold of a volume from the tables of its blocks."""
    missing = set(workspace.read_state(plan, output.volume)["missing"])
    blocks = [n for n in range(len(plan.block_grid())) if n not in missing]
    tables = read_ahead(
        lambda n: workspace.load(plan, output, f"histograms/{n}.npz"), blocks, TABLES_READ_AHEAD
    )
    merged = thresholds.merge_tables(table for _, table in tables)
    return {"threshold": cutoff_of(plan, merged, workspace.read_known(plan, output))}


def cutoff_of(plan: Plan, table: thresholds.Table, extremes: Mapping[str, Any]) -> float:
    """Return the threshold of a volume: a logit."""
    return thresholds.find_threshold(
        table, extremes["low"], extremes["high"], str(plan.options.threshold)
    )


def threshold_block(plan: Plan, output: Output, number: int) -> Summary:
    """Write the mask of one block from its logits and the volume's threshold."""
    core = plan.block_grid()[number]
    logits = workspace.product(plan, "logits", output).read(core)
    mask = above(logits, workspace.read_known(plan, output)["threshold"])
    workspace.write(plan, workspace.first_mask(plan), output, core, mask)
    return {}


def above(logits: Float32, cutoff: float) -> NDArray[np.uint8]:
    """Return 1 where a logit is above the threshold, strictly; a NaN never is."""
    return (logits > np.float32(cutoff)).view(np.uint8)
