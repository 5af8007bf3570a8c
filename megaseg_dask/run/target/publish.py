"""What a run says about itself at its target: a mark while it goes on, metadata and provenance at its end.

Until a run is complete its groups carry no OME metadata, so no reader can take
a part for the whole.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SourceError, StoreError
from megaseg_dask.ngff.group import (
    read_attributes,
    read_ome,
    update_consolidated,
    write_group,
)
from megaseg_dask.ngff.image import image_attributes, open_ome_group, versioned
from megaseg_dask.ngff.plate import is_plate, join_plates, read_plate, write_plate
from megaseg_dask.plan.plan import Plan, PlannedVolume
from megaseg_dask.run.state import ChannelStatistics, OutputState, VolumeState
from megaseg_dask.run.workspace import groups, groups_of, images, places
from megaseg_dask.stores import Location

PROVENANCE = "megaseg"


def is_in_place(plan: Plan) -> bool:
    """Tell whether labels go into the source, whose own group and image are not ours."""
    return plan.target.is_same(plan.source)


def is_whole_plate(plan: Plan) -> bool:
    """Tell whether a run writes the groups of a plate, and not only into its fields."""
    return plan.plate is not None and not is_in_place(plan)


def marked(plan: Plan) -> list[Location]:
    """Return the groups that carry the provenance of a run; that of a plate belongs to all of its runs."""
    root = [] if is_in_place(plan) or plan.plate is not None else [plan.target]
    return list(dict.fromkeys([*root, *(group.location(plan) for group in groups(plan))]))


def mark_of(plan: Plan) -> dict[str, str]:
    """Return what the groups of a run carry until it is complete."""
    return {"unfinished": plan.fingerprint}


def provenance_at(group: Location) -> dict[str, Any] | None:
    """Return what a run left at a group, its mark or its provenance, if it did."""
    try:
        found: dict[str, Any] | None = read_attributes(group).get(PROVENANCE)
    except Exception:
        return None
    return found


def withdraw(plan: Plan) -> None:
    """Take back what :func:`publish` wrote of a run with missing boxes, before these are written."""

    def withdraw_group(place: Location) -> None:
        if provenance_at(place) != mark_of(plan):
            write_group(place, plan.target_image.version, {PROVENANCE: mark_of(plan)}, replace=True)

    def withdraw_image(image: str) -> None:
        for group in groups_of(plan, image):
            if group.kind != "scores" and provenance_at(group.location(plan)) != mark_of(plan):
                list_labels(plan, group.parent(plan) / "labels", remove=group.name(plan))

    map_threaded(withdraw_image, images(plan))
    map_threaded(withdraw_group, marked(plan))
    if is_whole_plate(plan):
        list_fields(plan, own=False)


def publish(
    plan: Plan, states: Sequence[VolumeState | None], missing_boxes: list[dict[str, Any]]
) -> None:
    """Write the metadata that make the finished arrays an image, its labels and their provenance.

    ``states`` has a state of each volume, ``None`` where all of it is missing; ``missing_boxes``
    are the boxes that no task could write.
    """
    version = plan.target_image.version
    known, missing = defaultdict(list), defaultdict(list)
    for volume, of_volume in zip(plan.volumes, states, strict=True):
        known[volume.image].append((volume, of_volume))
    for box in missing_boxes:
        missing[box.get("image", "")].append({k: v for k, v in box.items() if k != "image"})
    scores, labels = (
        image_attributes(plan.target_image),
        image_attributes(plan.label_image, label=True),
    )

    def provenance_of(image: str) -> dict[str, Any]:
        return {PROVENANCE: {**provenance_by(plan, known[image]), "missing_boxes": missing[image]}}

    def publish_image(image: str) -> None:
        provenance = provenance_of(image)
        # Labels first: whoever sees the image then sees all of it.
        for group in groups_of(plan, image):
            attributes = scores if group.kind == "scores" else labels
            write_group(group.location(plan), version, {**attributes, **provenance})
            if group.kind != "scores":
                list_labels(plan, group.parent(plan) / "labels", add=group.name(plan))

    map_threaded(publish_image, images(plan))
    if is_whole_plate(plan):
        list_fields(plan, own=True, missing_boxes=missing_boxes)
    elif "scores" not in plan.arrays and plan.plate is None and not is_in_place(plan):
        write_group(plan.target, version, provenance_of(""))


def list_fields(plan: Plan, *, own: bool, missing_boxes: Sequence[dict[str, Any]] = ()) -> None:
    """Keep the listing of a plate: with the fields of this run or without, and with those that others finished."""
    assert plan.plate is not None
    root, version, mine = plan.target, plan.target_image.version, set(images(plan))
    there = read_plate(root) if is_plate(root) else replace(plan.plate, fields=())
    others = replace(there, fields=tuple(field for field in there.fields if field.path not in mine))
    if not (own or others.fields):
        write_group(root, version, {PROVENANCE: mark_of(plan)}, replace=True)
        return
    earlier = (provenance_at(root) or {}).get("missing_boxes", [])
    boxes = [box for box in earlier if box.get("image") not in mine] + list(missing_boxes)
    write_plate(
        root, join_plates(plan.plate if own else replace(plan.plate, fields=()), others), version
    )
    write_group(root, version, {PROVENANCE: {**provenance_by(plan, []), "missing_boxes": boxes}})


def refresh_consolidated(plan: Plan) -> None:
    """Let groups that repeat the metadata of all below them, mostly in sources, tell of what this run wrote."""
    root = plan.target
    fields = plan.plate.fields if is_whole_plate(plan) and plan.plate else ()
    wells = [root, *(root / part for field in fields for part in (field.row, field.well))]
    written = {image: places(plan, image) + _tables(plan, image) for image in images(plan)}
    _refresh(root, [*wells, *(place for of_image in written.values() for place in of_image)])
    if is_in_place(plan):
        map_threaded(lambda image: _refresh(root / image, written[image]), filter(None, written))
        for above in _above(root):
            _refresh(above, [root, *written.get("", [])])


def _above(image: Location) -> list[Location]:
    """Return the groups of the plate that an image is a field of: well, row, plate; or none."""
    well = image.parent
    try:
        is_field = "well" in open_ome_group(well, "well")[1]
    except (SourceError, StoreError):
        # Who may write an image need not be allowed to look at what is above it.
        is_field = False
    return [well, well.parent, well.parent.parent] if is_field else []


def _refresh(group: Location, below: list[Location]) -> None:
    update_consolidated(
        group, list(dict.fromkeys(place.url.removeprefix(group.url).strip("/") for place in below))
    )


def _tables(plan: Plan, image: str) -> list[Location]:
    if "measurements" not in plan.options.outputs:
        return []
    tables = plan.target / image / "tables"
    return [
        tables,
        *(tables / group.name(plan) for group in groups_of(plan, image) if group.kind == "labels"),
    ]


def list_labels(plan: Plan, labels: Location, *, add: str = "", remove: str = "") -> None:
    """Keep the list of label images in a ``labels`` group, which viewers go by."""
    version = plan.target_image.version
    ome = read_ome(labels)
    names = [n for n in ome.get("labels") or [] if n not in (add, remove)] + ([add] if add else [])
    listed = versioned({"labels": names}, version)
    write_group(labels, version, {"ome": {**ome, **listed["ome"]}} if version == "0.5" else listed)


def provenance_by(
    plan: Plan, found: Sequence[tuple[PlannedVolume, VolumeState | None]]
) -> dict[str, Any]:
    """Return all that determines the result and nothing else: no times, hosts or workers.

    Without what was found in the volumes, which a run knows at its end, for comparison.
    """
    source, threshold = plan.source_image, plan.options.threshold
    engine = plan.engine.record(plan.batch)
    # Any block gives the same voxels, and the engine has an entry of its own.
    settings = {
        k: v for k, v in plan.options.result_options().items() if k not in engine and k != "block"
    }

    averaged = [
        {"name": b.name, "digest": b.digest}
        for b in plan.model.bundles
        if len(plan.model.bundles) > 1
    ]
    outputs = plan.model.outputs

    def per_channel(*names: str) -> list[dict[str, Any]]:
        rows = []
        for volume, state in found:
            of_channels: Sequence[ChannelStatistics | None] = state.statistics if state else ()
            for i, c in enumerate(volume.channels):
                statistics = of_channels[i] if of_channels else None
                values = {name: getattr(statistics, name, None) for name in names}
                rows.append({"t": volume.t, "c": c, **values})
        return rows

    def thresholds() -> list[dict[str, Any]]:
        rows = []
        for volume, state in found:
            by_output = state.by_output if state else ()
            for i, output in enumerate(outputs):
                row: dict[str, Any] = {"t": volume.t, "c": volume.c}
                if len(outputs) > 1:
                    row["output"] = output
                row["threshold"] = (by_output[i] if by_output else OutputState()).threshold
                rows.append(row)
        return rows

    return {
        "model": {
            "name": plan.model.name,
            "digest": plan.model.digest,
            **({"averaged": averaged} if averaged else {}),
        },
        "settings": settings,
        "engine": engine,
        "normalization": per_channel("mean", "std"),
        "threshold": thresholds() if plan.options.is_automatic and plan.has_mask else threshold,
        "source": {
            "digest": plan.source_digest,
            "shape": source.levels[0].shape,
            "dtype": source.dtype,
            "statistics": per_channel("minimum", "maximum"),
        },
        "versions": _versions(),
        "missing_boxes": [],
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("megaseg-dask", "torch", "monai", "numpy")}
