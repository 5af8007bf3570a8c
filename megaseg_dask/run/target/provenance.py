"""What the groups of a run say of its making: all that determines the result, and nothing else.

No times, hosts or workers: those are in the run folder. Until a run is
complete its groups carry a mark in the place of the provenance.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import TargetError
from megaseg_dask.inference.certificate import MAX_DIFFERENCE, MIN_DICE
from megaseg_dask.messages import version_of
from megaseg_dask.ngff.group import PROVENANCE, find_attributes
from megaseg_dask.plan.plan import Plan, PlannedVolume
from megaseg_dask.plan.resolved import Resolved
from megaseg_dask.run.state import OutputState, VolumeState
from megaseg_dask.stores import Location

Json = dict[str, Any]
# A volume, and its state at the end of a run; none if all of it is missing.
Measured = tuple[PlannedVolume, VolumeState | None]


def provenance_at(group: Location) -> Json | None:
    """Return the mark or the provenance that a run left at a group, ``None`` if none did.

    Raises:
        TargetError: The metadata of the group are damaged.
        StoreError: The store failed.
    """
    found = (find_attributes(group) or {}).get(PROVENANCE)
    return found if isinstance(found, dict) else None


def missing_at(group: Location) -> list[tuple[int, Box]]:
    """Return what the finest level of an image lacks because tasks failed.

    It is a list of timepoints of the image and boxes ``(z, y, x)``; of all channels together.

    Raises:
        TargetError: The metadata of the group are damaged.
        StoreError: The store failed.
    """
    provenance = provenance_at(group) or {}
    try:
        times = sorted({row["t"] for row in provenance.get("normalization", ())})
        return [
            (times.index(box["t"]), Box(tuple(box["start"]), tuple(box["stop"])))
            for box in provenance.get("missing_boxes", ())
            if box["level"] == 0
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f"{group}: its attributes under {PROVENANCE} are damaged; restore it from a "
            "copy, or compute it again with --overwrite"
        ) from error


def provenance_by(
    plan: Plan, volumes: Sequence[Measured] = (), missing_boxes: Sequence[Json] = ()
) -> Json:
    """Return the provenance of some volumes of a run; without volumes, that of the whole run."""
    # Any block gives the same voxels, and the engine has its own entry.
    engine = plan.engine.record(plan.batch)
    options = plan.resolved.options()
    settings = {
        name: value for name, value in options.items() if name not in engine and name != "block"
    }
    threshold = options["threshold"]
    if plan.resolved.finds_threshold():
        threshold = _thresholds(plan.model.outputs, volumes)
    found: Json = {
        "model": _model(plan),
        "settings": settings,
        "engine": engine,
        "certificate": _required_certificate(plan),
        "normalization": _per_channel(volumes, "mean", "std"),
        "threshold": threshold,
        "source": {
            "digest": plan.source_digest,
            "shape": plan.source_image.levels[0].shape,
            "dtype": plan.source_image.dtype,
            "statistics": _per_channel(volumes, "minimum", "maximum"),
        },
        "versions": _versions(),
        "missing_boxes": list(missing_boxes),
    }
    if plan.resolved.where is not None:
        found["where"] = [_mask_of(plan, planned) for planned, _ in volumes]
    if plan.resolved.basis is not None:
        found["basis"] = _basis(plan.resolved)
    left_whole = _left_whole(plan.model.outputs, volumes)
    if left_whole:
        # Larger boxes than this are not split.
        found["left_whole"] = {"max_voxels": plan.split_voxels, "volumes": left_whole}
    return found


def _mask_of(plan: Plan, planned: PlannedVolume) -> Json:
    """Return which mask a volume had, and what it left out: blocks are not told, as ever."""
    mask = plan.images[planned.image].mask
    assert mask is not None
    n_patches = plan.survey_of(planned).n_patches
    return {
        "t": planned.t,
        "c": planned.c,
        "digest": mask.digest_at(planned.target_t),
        "patches": n_patches,
        "patches_left_out": plan.patch_grid.count_touching(plan.region) - n_patches,
    }


def is_of_run(plan: Plan, provenance: Mapping[str, Any] | None) -> bool:
    """Return whether a group was made by a run of this plan, finished or not."""
    if provenance is None:
        return False
    if provenance == {"unfinished": plan.identity}:
        return True
    return _identity(plan, provenance) == _identity(plan, provenance_by(plan))


def _identity(plan: Plan, provenance: Mapping[str, Any]) -> str:
    source = provenance.get("source", {}).get("digest")
    settings = provenance.get("settings")
    if plan.grows and isinstance(settings, dict):
        # It may have been published when the source had fewer timepoints or fields.
        source = None
        settings = {**settings, "time": None}
    rest = [provenance.get(key) for key in ("model", "engine", "basis")]
    return json.dumps([source, settings, *rest])


def _model(plan: Plan) -> Json:
    model: Json = {"name": plan.model.name, "digest": plan.model.digest}
    if len(plan.model.bundles) > 1:
        model["averaged"] = [
            {"name": bundle.name, "digest": bundle.digest} for bundle in plan.model.bundles
        ]
    return model


def _required_certificate(plan: Plan) -> Json | None:
    """Return what the engine had to prove against float32 PyTorch; ``None`` if it is that.

    The figures themselves are those of a worker, and in the run folder.
    """
    if plan.engine.is_reference:
        return None
    return {
        "against": "torch fp32",
        "min_dice": MIN_DICE,
        "max_difference": MAX_DIFFERENCE[plan.engine.precision],
    }


def _per_channel(volumes: Sequence[Measured], *names: str) -> list[Json]:
    """Return some statistics of each channel of each volume; ``None`` where it was not measured."""
    rows = []
    for planned, state in volumes:
        statistics = state.statistics if state else ()
        for number, channel in enumerate(planned.channels):
            row: Json = {"t": planned.t, "c": channel}
            for name in names:
                row[name] = getattr(statistics[number], name) if statistics else None
            rows.append(row)
    return rows


def _thresholds(outputs: Sequence[str], volumes: Sequence[Measured]) -> list[Json]:
    """Return the threshold of each output of each volume; ``None`` where none was found.

    It is a logit: labels are where the blended logit is above it. The score says what that means.
    """
    rows = []
    for planned, state in volumes:
        for number, name in enumerate(outputs):
            row: Json = {"t": planned.t, "c": planned.c}
            if len(outputs) > 1:
                row["output"] = name
            known = state.output(number) if state else OutputState()
            row |= {"threshold": known.threshold, "unit": "logit", "score": None}
            if known.threshold is not None:
                # Rounded, so that it is the same on every machine.
                row["score"] = round(0.5 * (1 + math.tanh(known.threshold / 2)), 6)
            rows.append(row)
    return rows


def _basis(resolved: Resolved) -> Json:
    """Return what was labelled again, and what a threshold means where that is not exact."""
    assert resolved.basis is not None
    found = asdict(resolved.basis)
    if resolved.has_rounded_basis():
        found["foreground"] = "score_u8 > 255 * threshold"
    return found


def _left_whole(outputs: Sequence[str], volumes: Sequence[Measured]) -> list[Json]:
    """Return how many objects were too large to be split, and the first ones by id."""
    rows = []
    for planned, state in volumes:
        for number, known in enumerate(state.by_output if state else ()):
            if not known.n_whole:
                continue
            row: Json = {"t": planned.t, "c": planned.c}
            if len(outputs) > 1:
                row["output"] = outputs[number]
            labels = [object_id for object_id, *_ in known.whole]
            rows.append({**row, "n_objects": known.n_whole, "labels": labels})
    return rows


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("megaseg-dask", "torch", "monai", "numpy")}
