"""A plan that labels again what was predicted: its scores or logits are those of an earlier run.

It is that run's plan with other options for what follows the scores. Volumes
and blocks are the same, so a part that was not predicted is missing here too.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.cluster_spec import cluster_of
from megaseg_dask.plan.companion import Companion, find_companion
from megaseg_dask.plan.memory import LEAST_SPLIT_VOXELS
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.planner import choose_split, memory_of, padded_voxels, require_memory
from megaseg_dask.plan.resolved import Automatic, Basis, Resolved, split_depth_of, threshold_of
from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import Location

# Options of what follows the scores, and of how the work is done. The others are the earlier run's.
RESULT = (
    "outputs",
    "regions",
    "table",
    "threshold",
    "connectivity",
    "min_size",
    "fill_holes",
    "split",
    "split_depth",
    "label_name",
)
WORK = (
    "unmarked",
    "overwrite",
    "memory",
    "workers",
    "scheduler",
    "cluster",
    "endpoint",
    "anon",
    "storage_option",
    "retries",
    "timeout",
    "on_volume",
)


def plan_relabelling(
    earlier: Plan, settings: Settings, recorded: Plan | None = None, *, is_only: bool = True
) -> Plan:
    """Return a plan that labels the scores of an earlier run again.

    Options that are not given are those of the earlier run, but for the outputs: labels.
    ``recorded`` is the plan of an earlier attempt. The earlier run ``is_only`` if no other part of
    its plate is labelled too.

    Raises:
        SettingsError: The earlier run did not keep what is needed, or an option does not fit.
    """
    merged = _merge(earlier, settings)
    basis = _choose_basis(earlier, merged)
    _require_fitting(earlier, settings, merged)
    values: dict[str, Any] = dict(earlier)
    old = earlier.resolved
    values["resolved"] = replace(
        old,
        outputs=merged.outputs,
        measure_channels=old.measure_channels if "measurements" in merged.outputs else (),
        regions=merged.regions,
        table=merged.table,
        threshold=threshold_of(merged),
        connectivity=merged.connectivity,
        min_size=merged.min_size,
        fill_holes=merged.fill_holes,
        split_depth=split_depth_of(merged),
        label_name=merged.label_name,
        keep_logits=False,
        basis=basis,
    )
    values["images"] = {
        path: replace(image, regions=_regions_of(earlier, path, merged, is_only=is_only))
        for path, image in earlier.images.items()
    }
    values["settings"] = merged.recorded()
    values["memory_bytes"] = memory_of(merged, cluster_of(merged))
    values["split_voxels"] = 0
    # It labels what there is, and does not grow.
    values["began_as"] = ""
    values["run"] = run_beside(earlier, merged.label_name)
    plan = Plan.model_construct(**values)
    plan.require_kept()
    if plan.resolved.splits_objects():
        plan = plan.with_split(min(LEAST_SPLIT_VOXELS, padded_voxels(plan)))
        plan = plan.with_split(choose_split(plan, recorded))
    require_memory(plan)
    return plan


def _regions_of(earlier: Plan, path: str, settings: Settings, *, is_only: bool) -> Companion | None:
    """Return the regions of an image, if there are any."""
    if settings.regions is None:
        return None
    location = earlier.source / path
    is_only = is_only and len(earlier.images) == 1
    return find_companion(
        location,
        earlier.source_image,
        settings.regions,
        "--regions",
        path,
        is_only=is_only,
        is_unmarked=settings.unmarked,
    )


def require_new_name(settings: Settings, taken: Collection[str]) -> None:
    """Raise :class:`SettingsError` if no label name is given, or that of a run that predicted."""
    if "label_name" not in settings.model_fields_set:
        raise SettingsError(
            "--label-name is needed, because the new labels are written beside those of the run"
        )
    if settings.label_name in taken:
        raise SettingsError(
            f"--label-name {settings.label_name} is the name of a run of megaseg segment; choose "
            "a new name"
        )


def run_beside(earlier: Plan, label_name: str) -> Location:
    """Return the folder of a run that labels the scores of an earlier one again.

    Of the parts of a plate each has its own.
    """
    suffix = earlier.run.basename.removeprefix(earlier.resolved.label_name)
    return earlier.run.parent / f"{label_name}{suffix}"


def can_be_basis(earlier: Plan) -> bool:
    """Return whether a run kept what can be labelled again, and not in a source."""
    resolved = earlier.resolved
    is_kept = "scores" in resolved.outputs or resolved.keep_logits
    return is_kept and not earlier.adds_labels


def outputs_again(resolved: Resolved) -> tuple[str, ...]:
    """Return the outputs of a run that are made of its scores."""
    return tuple(output for output in resolved.outputs if output != "scores")


def can_relabel(earlier: Plan, new: Plan) -> bool:
    """Return whether what a plan asks for can be made of what an earlier run on its target kept."""
    before = earlier.determinants
    names = {name for name, value in new.determinants.items() if before.get(name) != value}
    names |= before.keys() - new.determinants.keys()
    # They follow from --regions.
    names -= {"digest of regions"}
    needs_logits = isinstance(new.resolved.threshold, Automatic)
    if not can_be_basis(earlier) or (needs_logits and not earlier.resolved.keep_logits):
        return False
    if not names <= set(RESULT) - {"label_name"}:
        return False
    more = set(outputs_again(new.resolved)) - set(earlier.resolved.outputs)
    return bool(outputs_again(new.resolved)) and (names != {"outputs"} or bool(more))


def _merge(earlier: Plan, settings: Settings) -> Settings:
    """Return the earlier run's settings with those that are given, and its own for the work."""
    given = settings.model_fields_set
    options = earlier.resolved.options()
    changed: dict[str, Any] = {name: options[name] for name in RESULT}
    changed["outputs"] = ("labels",)
    changed |= {name: getattr(settings, name) for name in RESULT if name in given}
    changed |= {name: getattr(settings, name) for name in WORK}
    changed |= {"follow": False, "follow_timeout": None, "settle": None}
    if "regions" not in given:
        # What was said of the regions of the run is true still.
        changed["unmarked"] = settings.unmarked or earlier.settings.unmarked
    if "split" in given and settings.split == "none":
        changed["split_depth"] = None
    if "measurements" not in changed["outputs"]:
        # They are told of objects that are measured.
        changed |= {"regions": None, "measure_channels": None}
    return Settings.model_validate({**earlier.settings.model_dump(), **changed})


def _choose_basis(earlier: Plan, settings: Settings) -> Basis:
    resolved = earlier.resolved
    if can_be_basis(earlier) and resolved.keep_logits:
        return Basis(earlier.run.basename, earlier.fingerprint, "logits", "float32")
    if not can_be_basis(earlier):
        raise SettingsError(
            f"{earlier.target}: run {resolved.label_name} kept neither scores nor logits; segment "
            "into another TARGET, with scores among --outputs, or with --keep-logits"
        )
    if isinstance(threshold_of(settings), Automatic):
        raise SettingsError(
            f"--threshold {settings.threshold} needs logits, and run {resolved.label_name} kept "
            "only scores, which are rounded; give a number, or segment again with --keep-logits"
        )
    return Basis(earlier.run.basename, earlier.fingerprint, "scores", resolved.scores_dtype)


def _require_fitting(earlier: Plan, settings: Settings, merged: Settings) -> None:
    if "scores" in merged.outputs:
        raise SettingsError(
            "--outputs: the scores exist already; choose from labels, mask, measurements"
        )
    if settings.split_depth is not None and merged.split == "none":
        raise SettingsError(
            "--split-depth needs --split distance; add --split distance, or omit --split-depth"
        )
    unknown = earlier.target_image.unknown_size
    if merged.split != "none" and unknown is not None:
        raise SettingsError(
            f"--split {merged.split} measures in µm, and the voxel size of {earlier.target} is "
            f"unknown ({unknown}); omit --split"
        )
