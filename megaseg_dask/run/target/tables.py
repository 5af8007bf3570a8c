"""The tables of a run: one file beside the target, and one table in each image.

The tables in the images are those that Fractal's tools read.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from numpy.typing import NDArray

from megaseg_dask.algorithms.measurements import TRACK_COLUMNS, Sums, columns_of, to_columns
from megaseg_dask.algorithms.regions import (
    DISTANCES,
    RegionSums,
    choose_regions,
    columns_of_objects,
    columns_of_regions,
    object_columns,
    to_region_columns,
)
from megaseg_dask.concurrency import map_threaded, read_ahead
from megaseg_dask.errors import TargetError
from megaseg_dask.messages import version_of
from megaseg_dask.ngff.tables import (
    Columns,
    Form,
    ImageTable,
    Place,
    has_ends,
    read_notes,
    run_schema,
    write_rows,
)
from megaseg_dask.plan.plan import Output, Plan, PlannedVolume, table_of
from megaseg_dask.run.state import Json
from megaseg_dask.run.target.arrays import Group, ImageTarget, Target
from megaseg_dask.run.target.tracks import remove_tracks
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location

Array = NDArray[Any]

_FORMS = ("parquet", "csv")

# Outputs whose sums are in memory or on their way at a time.
_MAX_READ_AHEAD = 16
# Each thread that writes Parquet keeps some 10 MB of buffers.
_N_WRITERS = 8


@dataclass(frozen=True)
class _Kind:
    """Tables of objects, or of the regions that they lie in.

    ``ending`` is that of the name of a table in an image. ``form`` and ``columns`` are those of a
    volume with these sums.
    """

    name: str
    ending: str
    form: Callable[[Plan], Form]
    columns: Callable[[Plan, PlannedVolume, Mapping[str, Array]], Columns]

    def table(self, group: Group) -> ImageTable:
        """Return the table that belongs to a label image."""
        return ImageTable(group.image, group.name + self.ending)

    def file(self, plan: Plan, form: str) -> Location:
        """Return the table of all images of a run."""
        return table_of(plan.target, form, self.name, plan.table_label)

    def remove_files(self, plan: Plan, forms: Sequence[str]) -> None:
        """Remove the tables of a run in some forms."""
        for form in forms:
            file = self.file(plan, form)
            file.parent.delete(file.basename)


def _form_of_objects(plan: Plan) -> Form:
    columns = columns_of(size_is_known=_size_is_known(plan), channels=plan.measured_names)
    if plan.resolved.regions:
        columns |= object_columns(size_is_known=_size_is_known(plan))
    return columns


def _columns_of_objects(plan: Plan, volume: PlannedVolume, arrays: Mapping[str, Array]) -> Columns:
    sums = Sums.from_arrays(arrays)
    columns = to_columns(sums, plan.volume_shape, plan.known_spacing_um, _channels(plan, volume))
    if plan.resolved.regions:
        overlaps = RegionSums.from_arrays(arrays).overlaps
        columns |= columns_of_objects(sums, overlaps, arrays.get(DISTANCES))
    return columns


def _form_of_regions(plan: Plan) -> Form:
    return columns_of_regions(size_is_known=_size_is_known(plan), channels=plan.measured_names)


def _columns_of_regions(plan: Plan, volume: PlannedVolume, arrays: Mapping[str, Array]) -> Columns:
    objects = Sums.from_arrays(arrays)
    sums = RegionSums.from_arrays(arrays)
    region, _ = choose_regions(objects.label, sums.overlaps)
    channels = _channels(plan, volume)
    return to_region_columns(sums, region, plan.volume_shape, plan.known_spacing_um, channels)


_OBJECTS = _Kind("measurements", "", _form_of_objects, _columns_of_objects)
_REGIONS = _Kind("regions", "_regions", _form_of_regions, _columns_of_regions)


def _kinds(plan: Plan) -> list[_Kind]:
    return [_OBJECTS, _REGIONS] if plan.resolved.regions else [_OBJECTS]


def require_own_tables(target: Target) -> None:
    """Check that the images have no table of our name that another program made.

    Raises:
        TargetError: One has.
    """

    def require(group: Group) -> None:
        for kind in _kinds(target.plan):
            table = kind.table(group)
            try:
                table.require_own()
            except TargetError:
                # In an image of ours nobody else writes: what is damaged is replaced.
                if target.is_in_place or not table.is_damaged():
                    raise

    map_threaded(require, target.iter_labels())


def remove_tables(target: Target) -> None:
    """Remove the measurements of labels that this run makes again."""
    kinds = (_OBJECTS, _REGIONS)
    # Beside a source one file serves runs of all label names. Labels made again have their own.
    if not target.plan.is_in_place:
        for kind in kinds:
            kind.remove_files(target.plan, _FORMS)

    def remove(image: ImageTarget) -> None:
        for group in image.measured_groups:
            for kind in kinds:
                table = kind.table(group)
                if not target.is_in_place:
                    table.remove_damaged()
                table.remove_own()

    # One thread for each image: its tables share one list of tables.
    map_threaded(remove, target.images)
    if len(target.plan.times) > 1:
        remove_tracks(target)


def sweep_tables(target: Target) -> None:
    """Remove what a writer of the tables of the run left that was killed."""
    plan = target.plan
    files = [kind.file(plan, plan.resolved.table) for kind in _kinds(plan)]
    files[0].parent.sweep_staged([file.basename for file in files])


def write_tables(target: Target, missing_boxes: Sequence[Json]) -> None:
    """Write the measurements of all volumes that have some, and what they lack."""
    for kind in _kinds(target.plan):
        _write_tables(target, missing_boxes, kind)


def _write_tables(target: Target, missing_boxes: Sequence[Json], kind: _Kind) -> None:
    plan = target.plan
    table = kind.file(plan, plan.resolved.table)
    outputs = plan.output_order
    others = [other for other in _other_plans(target) if kind in _kinds(other)]
    rows = chain(_rows_of_others(others, kind), _rows(plan, outputs, kind))
    schema = run_schema([kind.form(each) for each in (plan, *others)])
    told = {"missing_boxes": json.dumps(missing_boxes), "origin": json.dumps(_origin(plan))}
    write_rows(table.parent, table.basename, rows, schema=schema.with_metadata(told))
    # Fields that were measured before are in it too: a table of the other form would lack some.
    kind.remove_files(plan, [form for form in _FORMS if form != plan.resolved.table])
    of_group: dict[Location, list[Output]] = defaultdict(list)
    for output in outputs:
        of_group[target.array("labels", output).location.parent].append(output)
    made_by = {"megaseg-dask": version_of("megaseg-dask"), **_model(plan), "origin": _origin(plan)}

    def write(image: ImageTarget) -> None:
        lacks = [box for box in missing_boxes if box.get("image", "") == image.path]
        for group in image.measured_groups:
            kind.table(group).write(
                target.version,
                _rows(plan, of_group[group.location], kind),
                label_name=_label_name(plan, group, kind),
                provenance={**made_by, "missing_boxes": lacks},
                form=kind.form(plan),
                has_times=len(plan.times) > 1,
            )

    # One thread for each image: its tables share one list of tables.
    map_threaded(write, target.images, _N_WRITERS)


def _label_name(plan: Plan, group: Group, kind: _Kind) -> str | None:
    """Return the label image of the same image that a table is about; regions may be elsewhere."""
    if kind == _OBJECTS:
        return group.name
    companions = [image.regions for image in plan.images.values() if image.regions]
    is_beside = plan.is_in_place and companions[0].is_own
    return companions[0].label if is_beside else None


def write_track_columns(
    plan: Plan,
    group: Group,
    columns: Mapping[int, Columns],
    provenance: Mapping[str, object],
) -> None:
    """Write the table of a label image again with columns of tracks, by timepoint.

    The rows are those of the table, in their order; ``provenance`` is added to its own.

    Raises:
        StoreError: The store failed, or there is no table.
    """
    table = _OBJECTS.table(group)
    output = _output_of(plan, group)

    def rows() -> Iterator[tuple[Place, Columns]]:
        for timepoint, channel, known in table.iter_volumes():
            place = _place(plan, group.image.path_below(plan.target), timepoint, channel, output)
            yield place, {**known, **columns[timepoint]}

    table.write(
        plan.target_image.version,
        rows(),
        label_name=group.name,
        provenance={**table.provenance(), **provenance},
        form={**_form_of_objects(plan), **TRACK_COLUMNS},
        has_times=len(plan.times) > 1,
    )


def rewrite_run_table(plans: Sequence[Plan], provenance: Mapping[str, object]) -> Location:
    """Write the table of the runs of one name again, from the tables in their images.

    Columns of tracks are empty for label images that have none. Return the file.

    Raises:
        StoreError: The store failed.
    """
    groups = [(plan, group) for plan in plans for group in Target(plan).iter_labels()]
    forms = [_form_of_objects(plan) for plan in plans]
    forms.append({**forms[0], **TRACK_COLUMNS})
    first = plans[0]
    file = _OBJECTS.file(first, first.resolved.table)
    told = {**read_notes(file), **{name: json.dumps(value) for name, value in provenance.items()}}

    def rows() -> Iterator[tuple[Place, Columns]]:
        for plan, group in groups:
            table = _OBJECTS.table(group)
            if not table.location.exists():
                continue  # the run failed there, and is told of
            output = _output_of(plan, group)
            for timepoint, channel, columns in table.iter_volumes():
                place = _place(
                    plan, group.image.path_below(plan.target), timepoint, channel, output
                )
                yield place, columns

    write_rows(file.parent, file.basename, rows(), schema=run_schema(forms).with_metadata(told))
    return file


def _output_of(plan: Plan, group: Group) -> int:
    """Return the number of the network's output whose objects a label image has."""
    return plan.suffixes.index(group.suffix) % len(plan.model.outputs)


def find_lost_table(target: Target) -> Location | None:
    """Return a table of a run without failures that is not there as it was written.

    ``None`` if all are there.

    Raises:
        StoreError: The store failed.
    """
    plan = target.plan
    provenance = {**_model(plan), "missing_boxes": []}

    def find_in(kind: _Kind, group: Group) -> Location | None:
        table = kind.table(group)
        try:
            is_whole = table.is_whole(
                label_name=_label_name(plan, group, kind),
                provenance=provenance,
                has_times=len(plan.times) > 1,
            )
        except TargetError:
            # Metadata are damaged.
            is_whole = False
        return None if is_whole else table.location

    for kind in _kinds(plan):
        lost = map_threaded(partial(find_in, kind), target.iter_labels())
        if any(lost):
            return next(filter(None, lost))
    return next((table for table in plan.tables if not has_ends(table)), None)


def _origin(plan: Plan) -> dict[str, int]:
    """Return the place in the source of the first timepoint and voxel: all places count from it."""
    return {"t": plan.times.start, **dict(zip("zyx", plan.region.start, strict=True))}


def _model(plan: Plan) -> dict[str, str]:
    return {"model": plan.model.name, "digest": plan.model.digest}


def _rows(plan: Plan, outputs: Sequence[Output], kind: _Kind) -> Iterator[tuple[Place, Columns]]:
    """Yield the measurements of some outputs, from the sums in the run folder."""
    folder = RunFolder(plan.run)
    for output, arrays in read_ahead(folder.read_sums, outputs, _MAX_READ_AHEAD):
        if arrays is None:
            continue  # it failed, and is named as missing
        planned = plan.volumes[output.volume]
        place = _place(plan, planned.image, planned.target_t, planned.c, output.number)
        yield place, kind.columns(plan, planned, arrays)


def _channels(plan: Plan, volume: PlannedVolume) -> dict[str, int]:
    """Return the names of the channels that are measured by themselves, and their numbers."""
    numbers = plan.measured_channels(volume)
    pairs = zip(plan.measured_names, plan.resolved.measure_channels, strict=True)
    return {name: numbers.index(channel) for name, channel in pairs}


def _size_is_known(plan: Plan) -> bool:
    return plan.known_spacing_um is not None


def _other_plans(target: Target) -> list[Plan]:
    """Return the plans of other runs that measured other fields of the same plate."""
    plan = target.plan
    if plan.plate is None:
        return []
    plans = RunFolder.plans(target.location, plan.resolved.label_name)
    return [p for p in plans if p.run != plan.run and p.resolved.measures_objects()]


def _rows_of_others(others: Sequence[Plan], kind: _Kind) -> Iterator[tuple[Place, Columns]]:
    """Yield the measurements of other runs, read from the tables beside their labels."""
    tables: list[tuple[Plan, str, Group]] = []
    for other in others:
        for image in Target(other).images:
            tables += [(other, image.path, group) for group in image.measured_groups]

    def read(number: int) -> list[tuple[int, int, Columns]]:
        group = tables[number][2]
        return kind.table(group).read()

    for number, volumes in read_ahead(read, range(len(tables)), _MAX_READ_AHEAD):
        other, path, group = tables[number]
        output = _output_of(other, group)
        for timepoint, channel, columns in volumes:
            yield _place(other, path, timepoint, channel, output), columns


def _place(plan: Plan, image: str, timepoint: int, channel: int, output: int) -> Place:
    names = plan.model.outputs
    place = Place(
        timepoint,
        channel,
        channel_name=plan.channel_name(image, channel),
        output=names[output] if len(names) > 1 else None,
        source_timepoint=plan.times.start + timepoint,
    )
    if plan.plate is None:
        return place
    row, column, field = image.split("/")
    return replace(place, plate=plan.plate.name, well=f"{row}/{column}", field=field)
