"""What a run finds at its target: what it may write there, what others did; and the empty arrays that it makes.

Nothing is ever removed but what this run would write.
"""

import json
from collections.abc import Sequence
from typing import Any

from megaseg_dask.algorithms import components
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import TargetError
from megaseg_dask.ngff.group import read_attributes, require_version, write_group
from megaseg_dask.ngff.volume import create_array
from megaseg_dask.plan.plan import Plan, run_names, runs_folder
from megaseg_dask.run.target.publish import (
    PROVENANCE,
    is_in_place,
    is_whole_plate,
    list_fields,
    list_labels,
    mark_of,
    marked,
    provenance_at,
    provenance_by,
)
from megaseg_dask.run.workspace import SUMS, WORK, groups, groups_of, images, places
from megaseg_dask.stores import METADATA, Location, clear_array_cache, naming

PLAN = "plan.json"

# Of a plate's thousands of fields, whose marks are asked for before a run goes on.
_MOST_LOOKED_AT = 16


def read_recorded(run: Location) -> Plan | None:
    """Return the plan that an earlier run recorded, if any; raises :class:`TargetError` if it cannot be read."""
    data = run.get(PLAN)
    if data is None:
        return None
    try:
        return Plan.model_validate_json(data)
    except ValueError as error:
        raise TargetError(
            f"{run}/{PLAN} is damaged, or of another version of megaseg; start anew with --overwrite"
        ) from error


def read_parts(target: Location, label_name: str) -> list[Plan]:
    """Return the plans of all runs that made, or are to make, one label name at a target; of a plate there are several.

    Raises :class:`TargetError` if one cannot be read.
    """
    runs = runs_folder(target)
    names = sorted(filter(run_names(label_name).fullmatch, runs.children()), key=len)
    return [
        plan
        for plan in map_threaded(lambda name: read_recorded(runs / name), names)
        if plan is not None
    ]


def forget_replaced(plans: Sequence[Plan]) -> None:
    """Remove the records of runs whose fields are made anew by others: these plans replace them."""
    replaced = {image for plan in plans for image in images(plan)}
    for earlier in read_parts(plans[0].target, plans[0].options.label_name):
        if earlier.run not in {plan.run for plan in plans} and not replaced.isdisjoint(
            images(earlier)
        ):
            earlier.run.remove()


def require_alike(plan: Plan, other: Plan) -> None:
    """Raise :class:`TargetError` if a part of a plate would be made in another way than one that is there already."""
    if plan.source != other.source:
        raise TargetError(
            f"{plan.target} has fields of {other.source}; choose another target for those of {plan.source}"
        )
    own = {"source", "block", "time", "channel"}
    old, new = ({k: v for k, v in p.determinants.items() if k not in own} for p in (other, plan))
    if old != new:
        advice = (
            "--overwrite all of them (without --wells, --fields and --acquisition)"
            if plan.options.overwrite
            else "repeat its options to add fields"
        )
        raise TargetError(
            f"{plan.target} has other fields, made in another way ({_changes(old, new)}); {advice}, choose "
            f"{_elsewhere(plan)}{'' if plan.options.overwrite else ', or start anew with --overwrite'}"
        )


def require_same(plan: Plan, recorded: Plan) -> None:
    """Raise :class:`TargetError` that lists what differs, if the recorded run would give another output."""
    if plan.fingerprint == recorded.fingerprint:
        if plan.source != recorded.source and plan.source_sample != recorded.source_sample:
            raise TargetError(
                f"{plan.target} belongs to a run on {recorded.source}, and {plan.source} is another image; "
                f"choose {_elsewhere(plan)}, or start anew with --overwrite"
            )
        return
    raise TargetError(
        f"{plan.target} belongs to another run ({_changes(recorded.determinants, plan.determinants)}); "
        f"repeat its options to resume it, choose {_elsewhere(plan)}, or start anew with --overwrite"
    )


def _elsewhere(plan: Plan) -> str:
    # The labels of a source have no other place, but may have another name.
    return "another --label-name" if is_in_place(plan) else "another target"


def _changes(old: dict[str, object], new: dict[str, object]) -> str:
    return "; ".join(
        f"{k}: was {_short(old.get(k))}, now {_short(new[k])}" for k in new if old.get(k) != new[k]
    )


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def is_present(plan: Plan) -> bool:
    """Tell whether the arrays of a recorded run are still there: a missing one would read as background."""
    arrays = map_threaded(lambda group: (group.location(plan) / "0").exists(), groups(plan))
    if is_whole_plate(plan) and provenance_at(plan.target) is None:
        return False
    return all(arrays) and all(_is_ours(plan, place) for place in marked(plan)[:_MOST_LOOKED_AT])


def _is_ours(plan: Plan, group: Location) -> bool:
    """Tell whether a group was made by a run of this plan, finished or not, and not put there by somebody else."""
    found = provenance_at(group)
    return found is not None and (
        found == mark_of(plan) or _identity(found) == _identity(provenance_by(plan, []))
    )


def _identity(provenance: dict[str, Any]) -> str:
    source = provenance.get("source", {}).get("digest")
    return json.dumps([source, *(provenance.get(key) for key in ("model", "settings", "engine"))])


def require_free(plan: Plan, *, is_joining: bool = False) -> None:
    """Raise :class:`TargetError` if something that is not this run's stands where it would write.

    A run that is joining others adds fields to their plate.
    """
    # Somebody who agreed to --overwrite once, and was interrupted, need not agree again.
    recorded = plan.run.get(PLAN) is not None
    is_within = is_in_place(plan) or is_joining
    places = [g.location(plan) for g in groups(plan)] if is_within else [plan.target]
    map_threaded(lambda where: _require_free_place(plan, where, recorded), places)
    map_threaded(lambda image: _require_one_version(plan, image), images(plan))


def _require_free_place(plan: Plan, where: Location, recorded: bool) -> None:
    if not where.exists() or (where.is_folder() and not where.children()):
        return
    if not where.is_folder():
        raise TargetError(f"{where} is a file; choose another target")
    if _is_foreign(where):
        raise TargetError(
            f"{where} holds Zarr data that megaseg did not write, and is never replaced; choose another target"
        )
    ours = recorded and (provenance_at(where) is None or _is_ours(plan, where))
    # Of a plate, the root is of all its runs.
    ours = ours or (recorded and is_whole_plate(plan) and where == plan.target)
    if not (ours or plan.options.overwrite):
        raise TargetError(
            f"{where} exists, without the record of a run; choose {_elsewhere(plan)}, or pass --overwrite"
        )


def _is_foreign(location: Location) -> bool:
    """Tell whether a folder has what a run would replace, without the mark or provenance that a run leaves."""
    names = set(location.children())
    arrays = any(map(str.isdigit, names))
    if not arrays and not names & {"zarr.json", ".zgroup", ".zarray"}:
        return False
    if provenance_at(location) is not None:
        return False
    try:
        attributes = read_attributes(location)
    except Exception:
        return True
    # A bare group may be one whose mark was not yet written when its run was killed.
    return arrays or bool(attributes)


def _require_one_version(plan: Plan, image: str) -> None:
    """Raise :class:`TargetError` if what stays at an image is stored in another Zarr format: one holds all."""
    parent, version = plan.target / image, plan.target_image.version
    labels = parent / "labels"
    others = _folders(labels) - {g.name(plan) for g in groups_of(plan, image) if g.kind != "scores"}
    staying = ([labels] if others else []) + ([parent] if "scores" not in plan.arrays else [])
    for place in staying:
        require_version(place, version)


def clear(plan: Plan) -> None:
    """Remove what the plan would write at the target; nothing else."""
    if plan.target.exists():
        map_threaded(lambda image: _clear_image(plan, image), images(plan))


def _clear_image(plan: Plan, image: str) -> None:
    for group in groups_of(plan, image):
        place, labels = group.location(plan), group.parent(plan) / "labels"
        if group.kind == "scores":
            _remove_levels(place)
        elif place.exists():
            place.remove()
            if _folders(labels):
                list_labels(plan, labels, remove=group.name(plan))
            else:
                labels.remove()


def _remove_levels(group: Location) -> None:
    """Remove the numbered arrays of an image and its metadata; labels and files beside them stay."""
    for name in group.children():
        if name.isdigit():
            (group / name).remove()
        elif name in ("zarr.json", ".zattrs", ".zgroup"):
            group.delete(name)


def _folders(group: Location) -> set[str]:
    return {name for name in group.children() if (group / name).is_folder()}


def create(plan: Plan) -> None:
    """Create groups and empty arrays of all outputs; until they are published the groups carry the run's mark alone."""
    clear_array_cache()
    mark, version = {PROVENANCE: mark_of(plan)}, plan.target_image.version
    if is_whole_plate(plan):
        list_fields(plan, own=False)
    else:
        write_group(plan.target, version, {} if is_in_place(plan) else mark)
    # The fields of a plate are alike: the first is made with care, and its metadata are copied.
    first, *others = images(plan)
    _create_image(plan, first)
    template = _metadata_of(plan, first) if others else {}

    def copy(image: str) -> None:
        for key, data in template.items():
            (plan.target / image).put(key, data)

    map_threaded(copy, others)


def _create_image(plan: Plan, image: str) -> None:
    mark, version = {PROVENANCE: mark_of(plan)}, plan.target_image.version
    dtypes = {
        "scores": plan.options.scores_dtype,
        "mask": "uint8",
        "labels": str(components.label_dtype(plan.volume_shape)),
    }
    for group in groups_of(plan, image):
        place = group.location(plan)
        if group.kind != "scores":
            write_group(group.parent(plan) / "labels", version, {})
        if not (is_in_place(plan) and group.kind == "scores"):
            write_group(place, version, mark)
        written = plan.target_image if group.kind == "scores" else plan.label_image
        for level in range(len(written.levels)):
            with naming(place / str(level), "create"):
                create_array(
                    place / str(level),
                    written,
                    level,
                    dtypes[group.kind],
                    plan.layout(level),
                    version,
                )


def _metadata_of(plan: Plan, image: str) -> dict[str, bytes]:
    """Return the metadata objects of what the run made of one image, by key below it."""
    parent, found = plan.target / image, {}
    for place in places(plan, image):
        for name in METADATA:
            if (data := place.get(name)) is not None:
                found[f"{place.url}/{name}".removeprefix(f"{parent.url}/")] = data
    return found


def remove_work(plan: Plan) -> None:
    """Remove intermediate data; the plan, the journal and what was found in the volumes stay."""
    for name in (WORK, SUMS):
        (plan.run / name).remove()
