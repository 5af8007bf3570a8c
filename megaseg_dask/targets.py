"""What a run finds and leaves at its target: create the arrays, publish the metadata at the end.

Until a run is complete its groups carry no OME metadata, so no reader can take
a part for the whole. Nothing is ever removed but what this run would write.
"""

import functools
import json
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from megaseg_dask import labelling
from megaseg_dask.errors import TargetError
from megaseg_dask.ngff.images import image_attributes, versioned
from megaseg_dask.ngff.plates import write_plate
from megaseg_dask.ngff.volumes import create_array
from megaseg_dask.plan import Plan, PlannedVolume
from megaseg_dask.products import SUMS, WORK, groups, groups_of, images
from megaseg_dask.stores import METADATA, Location, at_once, cached_array, naming

PROVENANCE = "megaseg"
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


def require_same(plan: Plan, recorded: Plan) -> None:
    """Raise :class:`TargetError` that lists what differs, if the recorded run would give another output."""
    if plan.fingerprint == recorded.fingerprint:
        if plan.source != recorded.source and plan.source_sample != recorded.source_sample:
            raise TargetError(
                f"{plan.target} belongs to a run on {recorded.source}, and {plan.source} is another image; "
                "choose another target, or start anew with --overwrite"
            )
        return
    old, new = recorded.determinants, plan.determinants
    changes = [f"{k}: was {_short(old.get(k))}, now {_short(new.get(k))}" for k in new if old.get(k) != new.get(k)]
    raise TargetError(
        f"{plan.target} belongs to another run ({'; '.join(changes)}); "
        "repeat its options to resume it, choose another target, or start anew with --overwrite"
    )


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def is_present(plan: Plan) -> bool:
    """Tell whether the arrays of a recorded run are still there: a missing one would read as background."""
    arrays = at_once(lambda group: (group.location(plan) / "0").exists(), groups(plan))
    return all(arrays) and all(_is_ours(plan, place) for place in _marked(plan)[:_MOST_LOOKED_AT])


def _marked(plan: Plan) -> list[Location]:
    """Return the groups that carry the provenance of a run."""
    root = [] if _is_in_place(plan) else [Location(plan.target)]
    return list(dict.fromkeys([*root, *(group.location(plan) for group in groups(plan))]))


def _is_in_place(plan: Plan) -> bool:
    """Tell whether labels go into the source, whose own group and image are not ours."""
    return Location(plan.target).is_same(Location(plan.source))


def _is_ours(plan: Plan, group: Location) -> bool:
    """Tell whether a group was made by a run of this plan, finished or not, and not put there by somebody else."""
    found = _provenance_at(group)
    return found is not None and (found == _mark(plan) or _identity(found) == _identity(_provenance(plan, [])))


def _provenance_at(group: Location) -> dict[str, Any] | None:
    """Return what a run left at a group, its mark or its provenance, if it did."""
    try:
        found: dict[str, Any] | None = group.ome_attributes()[0].get(PROVENANCE)
    except Exception:
        return None
    return found


def _mark(plan: Plan) -> dict[str, str]:
    return {"unfinished": plan.fingerprint}


def _identity(provenance: dict[str, Any]) -> str:
    source = provenance.get("source", {}).get("digest")
    return json.dumps([source, *(provenance.get(key) for key in ("model", "settings", "engine"))])


def require_free(plan: Plan) -> None:
    """Raise :class:`TargetError` if something that is not this run's stands where it would write."""
    # Somebody who agreed to --overwrite once, and was interrupted, need not agree again.
    recorded = Location(plan.run).get(PLAN) is not None
    for where in [g.location(plan) for g in groups(plan)] if _is_in_place(plan) else [Location(plan.target)]:
        if not where.exists() or (where.is_folder() and not where.children()):
            continue
        if not where.is_folder():
            raise TargetError(f"{where} is a file; choose another target")
        if _is_foreign(where):
            raise TargetError(
                f"{where} holds Zarr data that megaseg did not write, and is never replaced; choose another target"
            )
        ours = recorded and (_provenance_at(where) is None or _is_ours(plan, where))
        if not (ours or plan.options.overwrite):
            raise TargetError(
                f"{where} exists, without the record of a run; choose another target, or pass --overwrite"
            )
    at_once(lambda image: _require_one_version(plan, image), images(plan))


def _is_foreign(location: Location) -> bool:
    """Tell whether a folder has what a run would replace, without the mark or provenance that a run leaves."""
    names = set(location.children())
    arrays = any(map(str.isdigit, names))
    if not arrays and not names & {"zarr.json", ".zgroup", ".zarray"}:
        return False
    if _provenance_at(location) is not None:
        return False
    try:
        attributes, _ = location.ome_attributes()
    except Exception:
        return True
    # A bare group may be one whose mark was not yet written when its run was killed.
    return arrays or bool(attributes)


def _require_one_version(plan: Plan, image: str) -> None:
    """Raise :class:`TargetError` if what stays at an image is stored in another Zarr format: one holds all."""
    parent, version = Location(plan.target) / image, plan.target_image.version
    labels = parent / "labels"
    others = _folders(labels) - {g.name(plan) for g in groups_of(plan, image) if g.kind != "scores"}
    staying = ([labels] if others else []) + ([parent] if "scores" not in plan.arrays else [])
    for place in staying:
        place.require_version(version)


def clear(plan: Plan) -> None:
    """Remove what the plan would write at the target; nothing else."""
    if Location(plan.target).exists():
        at_once(lambda image: _clear_image(plan, image), images(plan))


def _clear_image(plan: Plan, image: str) -> None:
    for group in groups_of(plan, image):
        place, labels = group.location(plan), group.parent(plan) / "labels"
        if group.kind == "scores":
            _remove_levels(place)
        elif place.exists():
            place.remove()
            if _folders(labels):
                _list_labels(plan, labels, remove=group.name(plan))
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
    """Create groups and empty arrays of all outputs; until :func:`publish` the groups carry the run's mark alone."""
    cached_array.cache_clear()
    mark, version = {PROVENANCE: _mark(plan)}, plan.target_image.version
    Location(plan.target).write_group(version, {} if _is_in_place(plan) else mark)
    # The fields of a plate are alike: the first is made with care, and its metadata are copied.
    first, *others = images(plan)
    _create_image(plan, first)
    template = _metadata_of(plan, first) if others else {}

    def copy(image: str) -> None:
        for key, data in template.items():
            (Location(plan.target) / image).put(key, data)

    at_once(copy, others)


def _create_image(plan: Plan, image: str) -> None:
    mark, version = {PROVENANCE: _mark(plan)}, plan.target_image.version
    dtypes = {
        "scores": plan.options.scores_dtype,
        "mask": "uint8",
        "labels": str(labelling.label_dtype(plan.volume_shape)),
    }
    for group in groups_of(plan, image):
        place = group.location(plan)
        if group.kind != "scores":
            (group.parent(plan) / "labels").write_group(version, {})
        if not (_is_in_place(plan) and group.kind == "scores"):
            place.write_group(version, mark)
        written = plan.target_image if group.kind == "scores" else plan.label_image
        for level in range(len(written.levels)):
            with naming(place / str(level), "create"):
                create_array(place / str(level), written, level, dtypes[group.kind], plan.layout(level), version)


def _metadata_of(plan: Plan, image: str) -> dict[str, bytes]:
    """Return the metadata objects of what the run made of one image, by key below it."""
    parent, found = Location(plan.target) / image, {}
    groups_ = [g.location(plan) for g in groups_of(plan, image)]
    places = [*groups_, *(place / str(level) for place in groups_ for level in range(len(plan.target_image.levels)))]
    if any(kind != "scores" for kind in plan.arrays):
        places.append(parent / "labels")
    for place in places:
        for name in METADATA:
            if (data := place.get(name)) is not None:
                found[f"{place.url}/{name}".removeprefix(f"{parent.url}/")] = data
    return found


def withdraw(plan: Plan) -> None:
    """Take back what :func:`publish` wrote of a run with missing boxes, before these are written."""

    def withdraw_group(place: Location) -> None:
        if _provenance_at(place) != _mark(plan):
            place.write_group(plan.target_image.version, {PROVENANCE: _mark(plan)}, replace=True)

    def withdraw_image(image: str) -> None:
        for group in groups_of(plan, image):
            if group.kind != "scores" and _provenance_at(group.location(plan)) != _mark(plan):
                _list_labels(plan, group.parent(plan) / "labels", remove=group.name(plan))

    at_once(withdraw_image, images(plan))
    at_once(withdraw_group, _marked(plan))


def publish(plan: Plan, found: list[dict[str, Any]], missing_boxes: list[dict[str, Any]]) -> None:
    """Write the metadata that make the finished arrays an image, its labels and their provenance.

    ``found`` holds mean, std, minimum, maximum, and the threshold where it was
    searched, of each volume; ``missing_boxes`` what no task could write.
    """
    version = plan.target_image.version
    known, missing = defaultdict(list), defaultdict(list)
    for volume, of_volume in zip(plan.volumes, found, strict=True):
        known[volume.image].append((volume, of_volume))
    for box in missing_boxes:
        missing[box.get("image", "")].append({k: v for k, v in box.items() if k != "image"})
    scores, labels = image_attributes(plan.target_image), image_attributes(plan.label_image, label=True)

    def provenance_of(image: str) -> dict[str, Any]:
        return {PROVENANCE: {**_provenance(plan, known[image]), "missing_boxes": missing[image]}}

    def publish_image(image: str) -> None:
        provenance = provenance_of(image)
        # Labels first: whoever sees the image then sees all of it.
        for group in groups_of(plan, image):
            attributes = scores if group.kind == "scores" else labels
            group.location(plan).write_group(version, {**attributes, **provenance})
            if group.kind != "scores":
                _list_labels(plan, group.parent(plan) / "labels", add=group.name(plan))

    at_once(publish_image, images(plan))
    if plan.plate is not None and not _is_in_place(plan):
        write_plate(Location(plan.target), plan.plate, version)
        whole = {**_provenance(plan, []), "missing_boxes": missing_boxes}
        Location(plan.target).write_group(version, {PROVENANCE: whole})
    elif "scores" not in plan.arrays and not _is_in_place(plan):
        Location(plan.target).write_group(version, provenance_of(""))


def _list_labels(plan: Plan, labels: Location, *, add: str = "", remove: str = "") -> None:
    """Keep the list of label images in a ``labels`` group, which viewers go by."""
    version, (_, ome) = plan.target_image.version, labels.ome_attributes()
    names = [n for n in ome.get("labels") or [] if n not in (add, remove)] + ([add] if add else [])
    listed = versioned({"labels": names}, version)
    labels.write_group(version, {"ome": {**ome, **listed["ome"]}} if version == "0.5" else listed)


def _provenance(plan: Plan, found: list[tuple[PlannedVolume, dict[str, Any]]]) -> dict[str, Any]:
    """Return all that determines the result and nothing else: no times, hosts or workers.

    Without what was found in the volumes, which a run knows at its end, for comparison.
    """
    source, engine, threshold = plan.source_image, asdict(plan.engine), plan.options.threshold
    # Any block gives the same voxels, and the engine has an entry of its own.
    settings = {k: v for k, v in plan.options.result_options().items() if k not in engine and k != "block"}

    def per_volume(*names: str) -> list[dict[str, Any]]:
        return [{"t": v.t, "c": v.c, **{name: known.get(name) for name in names}} for v, known in found]

    return {
        "model": {"name": plan.model.name, "digest": plan.model.digest},
        "settings": settings,
        "engine": engine,
        "normalization": per_volume("mean", "std"),
        "threshold": per_volume("threshold") if plan.options.is_automatic and plan.has_mask else threshold,
        "source": {
            "digest": plan.source_digest,
            "shape": source.levels[0].shape,
            "dtype": source.dtype,
            "statistics": per_volume("minimum", "maximum"),
        },
        "versions": _versions(),
        "missing_boxes": [],
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("megaseg-dask", "torch", "monai", "numpy")}


def remove_work(plan: Plan) -> None:
    """Remove intermediate data; the plan, the journal and what was found in the volumes stay."""
    for name in (WORK, SUMS):
        (Location(plan.run) / name).remove()
