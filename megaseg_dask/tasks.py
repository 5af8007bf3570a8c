"""One function per stage: it reads what the stage before wrote, and writes its own objects.

A task gets its plan's address and its number, and returns a small summary;
no voxel travels through the scheduler. A task may run twice: it then writes
the same voxels to the same places. Intermediate data live in the run folder.
"""

import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask import labelling
from megaseg_dask.blending import sigmoid
from megaseg_dask.errors import TaskError
from megaseg_dask.geometry import BlockGrid, Box, Shape
from megaseg_dask.inference import open_engine, predict_block
from megaseg_dask.intensity import (
    PARTITION_SHAPE,
    Counts,
    Moments,
    Normalisation,
    Statistics,
    measure,
    merge_statistics,
)
from megaseg_dask.memory import peak_bytes, release, reset_peak
from megaseg_dask.ngff.pyramids import downsample, source_box
from megaseg_dask.ngff.volumes import Volume
from megaseg_dask.plan import Plan
from megaseg_dask.stores import Location, cached_array

Array = NDArray[Any]
Summary = dict[str, object]

WORK = "work"
STATISTICS = "statistics.json"

# Voxels of the finer level that are reduced at a time: whole chunks of ours.
_DOWNSAMPLE_SHAPE = (64, 512, 512)


# -- what a task reads and writes


def product(plan: Plan, kind: str, volume: int, level: int = 0) -> Volume:
    """Return where one volume of ``scores``, ``labels``, ``mask`` or ``fragments`` lives."""
    names = plan.target_image.axis_names
    return Volume(product_location(plan, kind) / str(level), names, t=plan.volumes[volume].target_t)


def product_location(plan: Plan, kind: str) -> Location:
    """Return the group that holds the levels of a product; what is not asked for lives in the run folder."""
    if kind not in plan.options.outputs:
        return Location(plan.run) / f"{WORK}/{kind}"
    if kind == "scores":
        return Location(plan.target)
    name = plan.options.label_name + ("_mask" if kind == "mask" else "")
    return Location(plan.target) / f"labels/{name}"


def _source(plan: Plan, volume: int) -> Volume:
    planned = plan.volumes[volume]
    level = Location(plan.source) / plan.source_image.levels[0].path
    return Volume(level, plan.source_image.axis_names, t=planned.t, c=planned.c)


def _save(plan: Plan, name: str, **arrays: Array) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    Location(plan.run).put(f"{WORK}/{name}.npz", buffer.getvalue())


def _load(plan: Plan, name: str) -> Mapping[str, Array]:
    data = Location(plan.run).get(f"{WORK}/{name}.npz")
    if data is None:
        raise TaskError(f"{plan.run}/{WORK}/{name}.npz is missing; an earlier stage has to run first")
    loaded: Mapping[str, Array] = np.load(io.BytesIO(data), allow_pickle=False)
    return loaded


# -- statistics


def _measure_parts(values: Array, box: Box, plan: Plan) -> list[Statistics]:
    """Return the statistics of each part of the fixed partition inside ``box``, in grid order."""
    parts = BlockGrid(plan.volume_shape, PARTITION_SHAPE)
    cores = map(parts.core, parts.iter_overlapping(box))
    ignore = plan.options.nan_to_background
    return [measure(values[core.within(box).slices], core, nan_to_background=ignore) for core in cores]


def measure_block(plan: Plan, volume: int, number: int) -> Summary:
    """Sum intensities; floats keep one entry per part of the partition, integers add up to one."""
    box = plan.measure_grid[number]
    parts = _measure_parts(_source(plan, volume).read(box), box, plan)
    if isinstance(parts[0], Counts):
        parts = [merge_statistics(parts)]
    partition = BlockGrid(plan.volume_shape, PARTITION_SHAPE)
    order = [partition.index(position) for position in partition.iter_overlapping(box)]
    return {"parts": [[place, asdict(part)] for place, part in zip(order, parts, strict=False)]}


def merge_measurements(plan: Plan, summaries: list[Mapping[str, object]]) -> None:
    """Add up what ``measure`` found, per volume in the partition's grid order, and record it for ``segment``."""
    kind = Moments if plan.source_image.dtype.startswith("float") else Counts
    per_volume: list[list[tuple[int, Statistics]]] = [[] for _ in plan.volumes]
    for index, summary in enumerate(summaries):
        volume, _ = plan.split_index("measure", index)
        per_volume[volume] += [(place, kind(**fields)) for place, fields in summary["parts"]]  # type: ignore[attr-defined]
    totals = [merge_statistics(part for _, part in sorted(parts, key=lambda p: p[0])) for parts in per_volume]
    text = json.dumps([_describe(total) for total in totals])
    Location(plan.run).put(STATISTICS, text.encode())


def _describe(statistics: Statistics) -> dict[str, float]:
    # JSON has no infinity, which is the minimum of a volume without one finite voxel.
    low, high = (statistics.minimum, statistics.maximum) if statistics.n else (0.0, 0.0)
    return {**asdict(Normalisation.of(statistics)), "minimum": low, "maximum": high}


def read_statistics(plan: Plan) -> list[dict[str, float]]:
    """Return mean, std, minimum and maximum of each volume."""
    data = Location(plan.run).get(STATISTICS)
    if data is None:
        raise TaskError(f"{plan.run}/{STATISTICS} is missing; stage measure has to run first")
    statistics: list[dict[str, float]] = json.loads(data)
    return statistics


# -- scores and mask


def _predict(plan: Plan, values: Array, core: Box, normalisation: Normalisation) -> NDArray[np.float32]:
    """Return the scores of a core, float32; ``values`` are the voxels of its read box."""
    engine = open_engine(plan.model, plan.engine)
    logits = predict_block(
        values,
        core,
        plan.patch_grid,
        normalisation,
        engine,
        batch=plan.engine.batch,
        window_mode=plan.model.window,
    )
    scores = sigmoid(logits)
    if plan.options.nan_to_background and values.dtype.kind == "f":
        inside = values[core.within(plan.patch_grid.read_box(core)).slices]
        scores[~np.isfinite(inside)] = 0
    return scores


def _as_stored(scores: NDArray[np.float32], dtype: str) -> Array:
    return np.rint(scores * np.float32(255)).astype(np.uint8) if dtype == "uint8" else scores


def _write_predictions(plan: Plan, volume: int, core: Box, scores: NDArray[np.float32]) -> dict[str, Array]:
    """Write scores and mask where they are wanted, and return what was written by kind."""
    products: dict[str, Array] = {}
    if "scores" in plan.options.outputs:
        products["scores"] = _as_stored(scores, plan.options.scores_dtype)
    if {"labels", "mask"} & set(plan.options.outputs):
        products["mask"] = (scores > np.float32(plan.options.threshold)).view(np.uint8)
    for kind, values in products.items():
        # A volume of one task labels its mask in memory: it is stored only if somebody asked for it.
        if kind in plan.options.outputs or not plan.is_one_task:
            product(plan, kind, volume).write(core, values)
    return products


def segment_block(plan: Plan, volume: int, number: int) -> Summary:
    """Predict one block and write its core's scores and mask."""
    core = plan.block_grid()[number]
    values = _source(plan, volume).read(plan.patch_grid.read_box(core))
    found = read_statistics(plan)[volume]
    scores = _predict(plan, values, core, Normalisation(found["mean"], found["std"]))
    _write_predictions(plan, volume, core, scores)
    return {}


# -- labels


def label_block(plan: Plan, volume: int, number: int) -> Summary:
    """Label one block by itself; write its provisional ids, fragment table and boundary planes."""
    core = plan.block_grid()[number]
    labels = labelling.label_block(product(plan, "mask", volume).read(core), plan.options.connectivity)
    fragments = labelling.list_fragments(labels, core, plan.volume_shape)
    product(plan, "fragments", volume).write(core, labels)
    _save(plan, f"{volume}/planes/{number}", **labelling.boundary_planes(labels))
    _save(plan, f"{volume}/fragments/{number}", first=fragments.first, size=fragments.size)
    return {"n_fragments": len(fragments)}


def pair_seams(plan: Plan, volume: int, number: int) -> Summary:
    """Write which fragments of a block touch which of its later neighbours."""
    grid = plan.block_grid()
    connectivity = plan.options.connectivity
    here, found = _load(plan, f"{volume}/planes/{number}"), {}
    for neighbour, direction in grid.iter_forward_neighbours(number, connectivity):
        there = _load(plan, f"{volume}/planes/{neighbour}")
        near, far = labelling.seam_keys(direction)
        found[str(neighbour)] = labelling.pair_across_seam(
            here[near], labelling.plane_box(grid[number], near), there[far], labelling.plane_box(grid[neighbour], far),
            connectivity,
        )  # fmt: skip
    _save(plan, f"{volume}/seams/{number}", **found)
    return {"n_pairs": sum(map(len, found.values()))}


def join_volume(plan: Plan, volume: int, _: int) -> Summary:
    """Join all fragments of a volume into components, and write the final id of each fragment."""
    n_blocks = len(plan.block_grid())
    tables = [_load(plan, f"{volume}/fragments/{i}") for i in range(n_blocks)]
    offsets = labelling.offsets_of([len(table["size"]) for table in tables])
    fragments = labelling.Fragments(
        np.concatenate([t["first"] for t in tables]).astype(np.uint64, copy=False),
        np.concatenate([t["size"] for t in tables]).astype(np.uint64, copy=False),
    )
    pairs = [np.empty((0, 2), np.int64)]
    for i in range(n_blocks):
        for neighbour, local in _load(plan, f"{volume}/seams/{i}").items():
            # Local ids start at 1, rows of the table at 0.
            pairs.append(local.astype(np.int64) + (np.array([offsets[i], offsets[int(neighbour)]]) - 1))
    final = labelling.join_fragments(fragments, np.concatenate(pairs), min_size=plan.options.min_size)
    for i in range(n_blocks):
        _save(plan, f"{volume}/tables/{i}", final=final[offsets[i] : offsets[i + 1]])
    return {"n_objects": int(final.max(initial=0))}


def relabel_block(plan: Plan, volume: int, number: int) -> Summary:
    """Write the final ids of one block to the target."""
    core = plan.block_grid()[number]
    provisional = product(plan, "fragments", volume).read(core)
    table = _load(plan, f"{volume}/tables/{number}")["final"]
    labels = product(plan, "labels", volume)
    labels.write(core, labelling.relabel(provisional, table, labelling.label_dtype(plan.volume_shape)))
    return {}


# -- pyramids


def downsample_block(plan: Plan, volume: int, number: int, *, level: int) -> Summary:
    """Compute one block of a coarser level of every product, one write unit at a time."""
    fine, coarse = plan.target_image.volume_shape(level - 1), plan.target_image.volume_shape(level)
    block = plan.block_grid(level)[number]
    units = BlockGrid(coarse, plan.layout(level).write_unit)
    for kind in plan.options.outputs:
        below, here = product(plan, kind, volume, level - 1), product(plan, kind, volume, level)
        for box in (units.core(p) & block for p in units.iter_overlapping(block)):
            here.write(box, _coarser(below, box, fine, coarse, mode=kind != "scores"))
    return {}


def _coarser(below: Volume, box: Box, fine: Shape, coarse: Shape, *, mode: bool) -> Array:
    """Compute one write unit of a coarser level in parts, so that its memory does not grow with the factor."""
    part_shape = tuple(max(n * c // f, 1) for n, c, f in zip(_DOWNSAMPLE_SHAPE, coarse, fine, strict=True))
    parts = []
    for part in BlockGrid(box.shape, part_shape):
        here = part.shifted(box.start)
        source = source_box(here, fine, coarse)
        parts.append((part, downsample(below.read(source), source, here, fine, coarse, mode=mode)))
    result = np.empty(box.shape, parts[0][1].dtype)
    for part, values in parts:
        result[part.slices] = values
    return result


# -- a volume that fits one block


def segment_volume(plan: Plan, volume: int, _: int) -> Summary:
    """Do all stages of one volume in memory: read once, written once, with the arithmetic of the staged path."""
    whole = Box.of(plan.volume_shape)
    values = _source(plan, volume).read(whole)
    statistics = merge_statistics(_measure_parts(values, whole, plan))
    scores = _predict(plan, values, whole, Normalisation.of(statistics))
    products = _write_predictions(plan, volume, whole, scores)
    del values, scores
    summary: Summary = {"statistics": _describe(statistics)}
    if "labels" in plan.options.outputs:
        products["labels"], summary["n_objects"] = _label_whole(plan, products["mask"], whole)
        product(plan, "labels", volume).write(whole, products["labels"])
    for kind in plan.options.outputs:
        _write_coarser_levels(plan, volume, kind, products[kind])
    return summary


def _label_whole(plan: Plan, mask: Array, whole: Box) -> tuple[Array, int]:
    labels = labelling.label_block(mask, plan.options.connectivity)
    fragments = labelling.list_fragments(labels, whole, plan.volume_shape)
    final = labelling.join_fragments(fragments, np.empty((0, 2), np.int64), min_size=plan.options.min_size)
    dtype = labelling.label_dtype(plan.volume_shape)
    return labelling.relabel(labels, final, dtype), int(final.max(initial=0))


def _write_coarser_levels(plan: Plan, volume: int, kind: str, values: Array) -> None:
    for level in range(1, len(plan.target_image.levels)):
        fine, coarse = plan.target_image.volume_shape(level - 1), plan.target_image.volume_shape(level)
        box = Box.of(coarse)
        source = source_box(box, fine, coarse)
        values = downsample(values[source.slices], source, box, fine, coarse, mode=kind != "scores")
        product(plan, kind, volume, level).write(box, values)


# -- dispatch

_STAGES: dict[str, Callable[[Plan, int, int], Summary]] = {
    "volume": segment_volume,
    "measure": measure_block,
    "segment": segment_block,
    "label": label_block,
    "seams": pair_seams,
    "join": join_volume,
    "relabel": relabel_block,
}


@functools.lru_cache(maxsize=1)
def load_plan(run: str, fingerprint: str) -> Plan:
    """Read the plan of a run, once per process; raises :class:`TaskError` if it is another by now."""
    # Arrays of an earlier run may have been replaced by others at the same place.
    cached_array.cache_clear()
    plan = Plan.model_validate_json(Location(run).get("plan.json") or b"{}")
    if plan.fingerprint != fingerprint:
        raise TaskError(f"{run}/plan.json was replaced by another plan while this run was going on")
    return plan


@functools.lru_cache(maxsize=1)
def enter_stage(stage: str) -> None:
    """Once per stage and process: what the last stage held is not this one's memory."""
    release()


def run_task(run: str, fingerprint: str, stage: str, index: int) -> Summary:
    """Run one task of a recorded plan and return its summary; what workers call."""
    enter_stage(stage)
    reset_peak()
    plan = load_plan(run, fingerprint)
    volume, number = plan.split_index(stage, index)
    name, _, level = stage.partition("-")
    if level:
        summary = downsample_block(plan, volume, number, level=int(level))
    else:
        summary = _STAGES[name](plan, volume, number)
    return {**summary, "peak_bytes": peak_bytes()}


def task_box(plan: Plan, stage: str, index: int) -> tuple[str, str]:
    """Return volume and box of a task, for messages."""
    volume, number = plan.split_index(stage, index)
    planned = plan.volumes[volume]
    name, _, level = stage.partition("-")
    grids = {"measure": plan.measure_grid, "join": None, "volume": None}
    grid = grids.get(name, plan.block_grid(int(level or 0)))
    return f"t={planned.t} c={planned.c}", str(grid[number] if grid else Box.of(plan.volume_shape))
