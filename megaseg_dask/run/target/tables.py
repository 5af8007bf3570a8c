"""The tables of a run: one file beside the target, and one table in each image.

The tables in the images are those that Fractal's tools read.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from megaseg_dask.algorithms.measurements import Sums, columns_of, to_columns
from megaseg_dask.concurrency import map_threaded, read_ahead
from megaseg_dask.messages import version_of
from megaseg_dask.ngff.tables import (
    Columns,
    Form,
    ImageTable,
    Place,
    run_schema,
    write_rows,
)
from megaseg_dask.plan.plan import Output, Plan, PlannedVolume, table_of
from megaseg_dask.run.state import Json
from megaseg_dask.run.target.arrays import Group, ImageTarget, Target
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location

_FORMS = ("parquet", "csv")

# Outputs whose sums are in memory or on their way at a time.
_MAX_READ_AHEAD = 16
# Each thread that writes Parquet keeps some 10 MB of buffers.
_N_WRITERS = 8


def _remove_tables_of_run(target: Location, forms: Sequence[str]) -> None:
    for form in forms:
        table = table_of(target, form)
        table.parent.delete(table.basename)


def require_own_tables(target: Target) -> None:
    """Check that the images have no table of our name that another program made.

    Raises:
        TargetError: One has.
    """
    map_threaded(lambda group: _table(group).require_own(), target.iter_labels())


def remove_tables(target: Target) -> None:
    """Remove the measurements of labels that this run makes again."""
    if not target.is_in_place:
        _remove_tables_of_run(target.location, _FORMS)

    def remove(image: ImageTarget) -> None:
        for group in image.measured_groups:
            _table(group).remove_own()

    # One thread for each image: its tables share one list of tables.
    map_threaded(remove, target.images)


def sweep_tables(target: Target) -> None:
    """Remove what a writer of the table of the run left that was killed."""
    table = target.plan.table
    table.parent.sweep_staged([table.basename])


def write_tables(target: Target, missing_boxes: Sequence[Json]) -> None:
    """Write the measurements of all volumes that have some, and what they lack."""
    plan = target.plan
    table = plan.table
    outputs = list(chain.from_iterable(map(plan.outputs_of, range(len(plan.volumes)))))
    others = _other_plans(target)
    rows = chain(_rows_of_others(others), _rows(plan, outputs))
    schema = run_schema([_form(each) for each in (plan, *others)])
    lacks = {"missing_boxes": json.dumps(missing_boxes)}
    write_rows(table.parent, table.basename, rows, schema=schema.with_metadata(lacks))
    # Fields that were measured before are in it too: a table of the other form would lack some.
    _remove_tables_of_run(target.location, [form for form in _FORMS if form != plan.resolved.table])
    of_group: dict[Location, list[Output]] = defaultdict(list)
    for output in outputs:
        of_group[target.array("labels", output).location.parent].append(output)
    made_by = {
        "megaseg-dask": version_of("megaseg-dask"),
        "model": plan.model.name,
        "digest": plan.model.digest,
    }

    def write(image: ImageTarget) -> None:
        lacks = [box for box in missing_boxes if box.get("image", "") == image.path]
        for group in image.measured_groups:
            _table(group).write(
                target.version,
                _rows(plan, of_group[group.location]),
                label_name=group.name,
                provenance={**made_by, "missing_boxes": lacks},
                form=_form(plan),
                has_times=len(plan.times) > 1,
            )

    # One thread for each image: its tables share one list of tables.
    map_threaded(write, target.images, _N_WRITERS)


def _table(group: Group) -> ImageTable:
    return ImageTable(group.image, group.name)


def _rows(plan: Plan, outputs: Sequence[Output]) -> Iterator[tuple[Place, Columns]]:
    """Yield the measurements of some outputs, from the sums in the run folder."""
    folder = RunFolder(plan.run)
    for output, data in read_ahead(folder.read_sums, outputs, _MAX_READ_AHEAD):
        if data is None:
            continue  # it failed, and is named as missing
        planned = plan.volumes[output.volume]
        place = _place(plan, planned.image, planned.target_t, planned.c, output.number)
        spacing_um = plan.target_image.spacing_um if _size_is_known(plan) else None
        yield (
            place,
            to_columns(Sums(**data), plan.volume_shape, spacing_um, _channels(plan, planned)),
        )


def _channels(plan: Plan, volume: PlannedVolume) -> dict[str, int]:
    """Return the names of the channels that are measured by themselves, and their numbers."""
    numbers = plan.measured_channels(volume)
    pairs = zip(plan.measured_names, plan.resolved.measure_channels, strict=True)
    return {name: numbers.index(channel) for name, channel in pairs}


def _form(plan: Plan) -> Form:
    return columns_of(size_is_known=_size_is_known(plan), channels=plan.measured_names)


def _size_is_known(plan: Plan) -> bool:
    return plan.target_image.unknown_size is None


def _other_plans(target: Target) -> list[Plan]:
    """Return the plans of other runs that measured other fields of the same plate."""
    plan = target.plan
    if plan.plate is None:
        return []
    plans = RunFolder.plans(target.location, plan.resolved.label_name)
    return [p for p in plans if p.run != plan.run and p.resolved.measures_objects()]


def _rows_of_others(others: Sequence[Plan]) -> Iterator[tuple[Place, Columns]]:
    """Yield the measurements of other runs, read from the tables beside their labels."""
    tables: list[tuple[Plan, str, Group]] = []
    for other in others:
        for image in Target(other).images:
            tables += [(other, image.path, group) for group in image.measured_groups]

    def read(number: int) -> list[tuple[int, int, Columns]]:
        group = tables[number][2]
        return _table(group).read()

    for number, volumes in read_ahead(read, range(len(tables)), _MAX_READ_AHEAD):
        other, path, group = tables[number]
        output = other.suffixes.index(group.suffix) % len(other.model.outputs)
        for timepoint, channel, columns in volumes:
            yield _place(other, path, timepoint, channel, output), columns


def _place(plan: Plan, image: str, timepoint: int, channel: int, output: int) -> Place:
    names = plan.model.outputs
    place = Place(
        timepoint,
        channel,
        channel_name=plan.channel_name(image, channel),
        output=names[output] if len(names) > 1 else None,
    )
    if plan.plate is None:
        return place
    row, column, field = image.split("/")
    return replace(place, plate=plan.plate.name, well=f"{row}/{column}", field=field)
