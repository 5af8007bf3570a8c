"""Publishing: metadata and provenance turn the finished arrays of a run into images.

A run that continues is withdrawn first: its groups carry its mark again until
all of it is published.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SourceError, StoreError, TargetError
from megaseg_dask.ngff.group import (
    PROVENANCE,
    find_attributes,
    holds,
    open_ome_group,
    update_consolidated,
    write_group,
)
from megaseg_dask.ngff.image import image_attributes
from megaseg_dask.ngff.labels import add_label, list_labels, remove_labels
from megaseg_dask.ngff.plate import Plate, is_plate, join_plates, read_plate, write_plate
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.state import VolumeState
from megaseg_dask.run.target.arrays import Group, ImageTarget, Target
from megaseg_dask.run.target.provenance import (
    Measured,
    provenance_at,
    provenance_by,
)
from megaseg_dask.stores import Location, clear_array_cache
from megaseg_dask.stores.failures import is_denied

Json = dict[str, Any]


def create(target: Target) -> None:
    """Create groups and empty arrays of all outputs, with the run's mark.

    Raises:
        StoreError: The store failed.
    """
    # Arrays of an earlier run may have been replaced by others at the same place.
    clear_array_cache()
    if target.is_whole_plate:
        _list_other_fields(target)
    elif target.is_in_place:
        write_group(target.location, target.version, {})
    else:
        write_group(target.location, target.version, {PROVENANCE: target.mark})
    target.create_images()


def create_more(target: Target) -> None:
    """Create groups and empty arrays, with the run's mark, of the images that have none yet.

    A plate that is followed gets more fields while others are published.

    Raises:
        StoreError: The store failed.
    """
    are_created = map_threaded(ImageTarget.is_created, target.images)
    new = [
        image.path
        for image, is_created in zip(target.images, are_created, strict=True)
        if not is_created
    ]
    if new:
        Target(target.plan, new).create_images()


def withdraw(target: Target) -> None:
    """Unpublish an incomplete run before its missing boxes are computed again."""

    def withdraw_image(image: ImageTarget) -> None:
        for group in image.label_groups:
            if provenance_at(group.location) != target.mark:
                remove_labels(image.location, target.version, [group.name])

    def withdraw_group(group: Location) -> None:
        if provenance_at(group) != target.mark:
            write_group(group, target.version, {PROVENANCE: target.mark}, replace=True)

    map_threaded(withdraw_image, target.images)
    map_threaded(withdraw_group, target.marked)
    if target.is_whole_plate:
        _list_other_fields(target)


def is_withdrawn(target: Target) -> bool:
    """Return whether a run is not published, neither whole nor in part."""
    return provenance_at(target.marked[0]) == target.mark


def publish(
    target: Target, states: Sequence[VolumeState | None], missing_boxes: Sequence[Json]
) -> None:
    """Write the metadata that make the finished arrays images, and their provenance.

    ``states`` has a state for each volume, ``None`` where all of it is missing; ``missing_boxes``
    are the boxes that no task could write, as JSON values.
    """
    plan = target.plan
    provenance_of = _provenance_of_images(plan, states, missing_boxes)

    def publish_image(image: ImageTarget) -> None:
        for group in image.groups:
            if plan.grows:
                image.show_times(group)
            write_group(group.location, target.version, _attributes(image, group, provenance_of))
            if group.is_label:
                add_label(image.location, target.version, group.name)

    map_threaded(publish_image, target.images)
    if plan.plate is not None and not target.is_in_place:
        _list_own_fields(target, plan.plate, missing_boxes)
    elif "scores" not in plan.arrays and not target.is_in_place:
        write_group(target.location, target.version, provenance_of(""))


def find_lost_metadata(target: Target, states: Sequence[VolumeState | None]) -> Location | None:
    """Return a group or an array whose metadata are not those that a run without failures writes.

    ``None`` if all are there.

    Raises:
        StoreError: The store failed.
    """
    whole_provenance_of = _provenance_of_images(target.plan, states, ())

    def provenance_of(path: str) -> Json:
        provenance = whole_provenance_of(path)[PROVENANCE]
        # Those of the libraries that wrote it stay as they are.
        return {PROVENANCE: {key: provenance[key] for key in provenance if key != "versions"}}

    def find_in(image: ImageTarget) -> Location | None:
        for group in image.groups:
            attributes = _attributes(image, group, provenance_of)
            if not _holds(group.location, attributes):
                return group.location
        labels = {group.name for group in image.label_groups}
        if not labels <= _listed_labels(image):
            return image.labels
        return image.find_lost_array()

    if target.is_whole_plate and not _are_listed(target):
        return target.location
    if target.location in target.marked and not _holds(target.location, provenance_of("")):
        return target.location
    return next(filter(None, map_threaded(find_in, target.images)), None)


def _holds(group: Location, attributes: Json) -> bool:
    try:
        return holds(group, attributes)
    except TargetError:
        # They are damaged.
        return False


def _listed_labels(image: ImageTarget) -> set[str]:
    try:
        return set(list_labels(image.location))
    except (TargetError, SourceError):
        return set()


def _are_listed(target: Target) -> bool:
    """Return whether all fields of a run are in the listings of its plate."""
    try:
        listed = {field.path for field in read_plate(target.location).fields}
        attributes = map_threaded(find_attributes, target.plate_nodes)
    except (TargetError, SourceError):
        # They are damaged.
        return False
    return target.paths <= listed and None not in attributes


def _attributes(image: ImageTarget, group: Group, provenance_of: Callable[[str], Json]) -> Json:
    metadata = image_attributes(image.metadata_of(group), label=group.is_label)
    return {**metadata, **provenance_of(image.path)}


def _provenance_of_images(
    plan: Plan, states: Sequence[VolumeState | None], missing_boxes: Sequence[Json]
) -> Callable[[str], Json]:
    """Return a function that gives the provenance of an image by its path."""
    volumes: dict[str, list[Measured]] = defaultdict(list)
    for planned, state in zip(plan.volumes, states, strict=True):
        volumes[planned.image].append((planned, state))
    boxes: dict[str, list[Json]] = defaultdict(list)
    for box in missing_boxes:
        of_image = {name: value for name, value in box.items() if name != "image"}
        boxes[box.get("image", "")].append(of_image)

    def provenance_of(path: str) -> Json:
        return {PROVENANCE: provenance_by(plan, volumes[path], boxes[path])}

    return provenance_of


def _fields_of_others(target: Target) -> Plate:
    """Return the plate at the target without the fields of this run."""
    assert target.plan.plate is not None
    if not is_plate(target.location):
        return replace(target.plan.plate, fields=())
    plate = read_plate(target.location)
    others = [field for field in plate.fields if field.path not in target.paths]
    return replace(plate, fields=tuple(others))


def _list_other_fields(target: Target) -> None:
    """List the fields that other runs finished, and none of this run."""
    assert target.plan.plate is not None
    others = _fields_of_others(target)
    if others.fields:
        plate = join_plates(replace(target.plan.plate, fields=()), others)
        _write_plate(target, plate, ())
    else:
        write_group(target.location, target.version, {PROVENANCE: target.mark}, replace=True)


def _list_own_fields(target: Target, plate: Plate, missing_boxes: Sequence[Json]) -> None:
    """List the fields of this run, and those that other runs finished."""
    _write_plate(target, join_plates(plate, _fields_of_others(target)), missing_boxes)


def _write_plate(target: Target, plate: Plate, missing_boxes: Sequence[Json]) -> None:
    earlier = (provenance_at(target.location) or {}).get("missing_boxes", [])
    boxes = [box for box in earlier if box.get("image") not in target.paths]
    provenance = provenance_by(target.plan, (), [*boxes, *missing_boxes])
    write_plate(target.location, plate, target.version)
    write_group(target.location, target.version, {PROVENANCE: provenance})


# -- metadata that are repeated above


def refresh_consolidated(target: Target) -> None:
    """Update groups that repeat the metadata of all below them with what this run wrote.

    Such groups are mostly in sources.
    """
    root = target.location
    below = [root]
    plate = target.plan.plate
    if plate is not None and not target.is_in_place:
        for field in plate.fields:
            below += [root / field.row, root / field.well]
    written = {image.path: image.nodes + _tables(target, image) for image in target.images}
    for nodes in written.values():
        below += nodes
    _refresh(root, below)
    if target.is_in_place:
        fields = [path for path in written if path]
        map_threaded(lambda path: _refresh(root / path, written[path]), fields)
        for group in _plate_groups_above(root):
            _refresh(group, [root, *written.get("", [])])


def _plate_groups_above(image: Location) -> list[Location]:
    """Return well, row and plate of an image that is a field; none of another image."""
    well = image.parent
    try:
        is_field = "well" in open_ome_group(well, "well")[1]
    except (SourceError, StoreError) as error:
        # A user who may write an image need not be allowed to read the groups above it.
        if isinstance(error, StoreError) and not is_denied(error):
            raise
        is_field = False
    return [well, well.parent, well.parent.parent] if is_field else []


def _refresh(group: Location, below: list[Location]) -> None:
    paths = [node.path_below(group) for node in below]
    update_consolidated(group, list(dict.fromkeys(paths)))


def _tables(target: Target, image: ImageTarget) -> list[Location]:
    if not target.plan.resolved.measures_objects():
        return []
    return [image.tables_group, *image.tables]
