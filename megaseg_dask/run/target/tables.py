"""The tables of a run: one Parquet file beside the target, and one table in each image for Fractal's tools."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain

from megaseg_dask.algorithms.measurements import Sums, to_columns
from megaseg_dask.concurrency import map_threaded, read_ahead
from megaseg_dask.ngff.tables import (
    Columns,
    Place,
    read_ngio_table,
    remove_own_table,
    require_own_table,
    write_ngio_table,
    write_parquet,
)
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.target.ownership import read_parts
from megaseg_dask.run.target.publish import is_in_place
from megaseg_dask.run.workspace import Group, groups, read_sums, unpack
from megaseg_dask.stores import Location

SUFFIX = ".measurements.parquet"

# Outputs whose sums are in memory or on their way at a time.
_READ_AHEAD = 16
# Each thread that writes Parquet keeps some 10 MB of buffers.
_WRITERS = 8


def table_location(plan: Plan) -> Location:
    """Return the address of the run's Parquet file."""
    return plan.target.sibling(SUFFIX)


def require_own_tables(plan: Plan) -> None:
    """Raise :class:`TargetError` if an image has a table of our name that somebody else made."""
    if "measurements" in plan.options.outputs:
        map_threaded(
            lambda group: require_own_table(group.parent(plan), group.name(plan)),
            _label_groups(plan),
        )


def remove_tables(plan: Plan) -> None:
    """Remove what was measured in labels that this run makes anew."""
    if not is_in_place(plan):
        table_location(plan).parent.delete(table_location(plan).basename)
    map_threaded(
        lambda group: remove_own_table(group.parent(plan), group.name(plan)), _label_groups(plan)
    )


def write_tables(plan: Plan) -> None:
    """Write the measurements of all volumes that have some."""
    place = table_location(plan)
    outputs = [output for volume in range(len(plan.volumes)) for output in plan.outputs_of(volume)]
    write_parquet(place.parent, place.basename, chain(_rows_of_others(plan), _rows(plan, outputs)))
    made_by = {
        "megaseg-dask": version("megaseg-dask"),
        "model": plan.model.name,
        "digest": plan.model.digest,
    }
    of_group = defaultdict(list)
    for output in outputs:
        of_group[
            plan.volumes[output.volume].image, plan.suffixes[plan.target_channel(output)]
        ].append(output)

    def write_table(group: Group) -> None:
        rows, name = _rows(plan, of_group[group.image, group.suffix]), group.name(plan)
        version_ = plan.target_image.version
        write_ngio_table(
            group.parent(plan), version_, name, rows, label_name=name, provenance=made_by
        )

    map_threaded(write_table, _label_groups(plan), _WRITERS)


def _label_groups(plan: Plan) -> list[Group]:
    return [group for group in groups(plan) if group.kind == "labels"]


def _rows_of_others(plan: Plan) -> Iterator[tuple[Place, Columns]]:
    """Yield what other runs measured in other fields of the same plate, from the tables beside their labels."""
    parts = read_parts(plan.target, plan.options.label_name) if plan.plate else []
    others = [
        other
        for other in parts
        if other.run != plan.run and "measurements" in other.options.outputs
    ]
    found = [(other, group) for other in others for group in _label_groups(other)]

    def read(number: int) -> list[tuple[int, int, Columns]]:
        other, group = found[number]
        return read_ngio_table(group.parent(other), group.name(other))

    for number, volumes in read_ahead(read, range(len(found)), _READ_AHEAD):
        other, group = found[number]
        output = other.suffixes.index(group.suffix) % len(other.model.outputs)
        for timepoint, channel, columns in volumes:
            yield _place(other, group.image, timepoint, channel, output), columns


def _place(plan: Plan, image: str, timepoint: int, channel: int, output: int) -> Place:
    names = plan.model.outputs
    place = Place(timepoint, channel, output=names[output] if len(names) > 1 else None)
    if plan.plate is None:
        return place
    row, column, field = image.split("/")
    return replace(place, plate=plan.plate.name, well=f"{row}/{column}", field=field)


def _rows(plan: Plan, outputs: Sequence[Output]) -> Iterator[tuple[Place, Columns]]:
    for output, data in read_ahead(lambda output: read_sums(plan, output), outputs, _READ_AHEAD):
        volume = plan.volumes[output.volume]
        if data is None:
            continue  # it failed, and is named as missing
        sums = Sums(**unpack(data))
        place = _place(plan, volume.image, volume.target_t, volume.c, output.number)
        yield place, to_columns(sums, plan.volume_shape, plan.target_image.spacing_um)
