"""The tables of a run: one Parquet file beside the target, and one table in each image for Fractal's tools."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version

import numpy as np

from megaseg_dask.measurements import Columns, Sums, to_columns
from megaseg_dask.ngff.tables import Place, require_own_table, write_ngio_table, write_parquet
from megaseg_dask.plan import Output, Plan
from megaseg_dask.products import Group, groups, read_sums
from megaseg_dask.stores import Location

SUFFIX = ".measurements.parquet"


def table_location(plan: Plan) -> Location:
    """Return the address of the run's Parquet file."""
    return Location(plan.target).sibling(SUFFIX)


def require_own_tables(plan: Plan) -> None:
    """Raise :class:`TargetError` if an image has a table of our name that somebody else made."""
    if "measurements" in plan.options.outputs:
        for group in _label_groups(plan):
            require_own_table(group.parent(plan), group.name(plan))


def write_tables(plan: Plan) -> None:
    """Write the measurements of all volumes that have some."""
    place = table_location(plan)
    write_parquet(place.parent, place.basename, _rows(plan, _outputs(plan)))
    for group in _label_groups(plan):
        here = [
            output
            for output in _outputs(plan)
            if plan.volumes[output.volume].image == group.image
            and plan.suffixes[plan.target_channel(output)] == group.suffix
        ]
        name = group.name(plan)
        made_by = {"megaseg-dask": version("megaseg-dask"), "model": plan.model.name, "digest": plan.model.digest}
        write_ngio_table(
            group.parent(plan),
            plan.target_image.version,
            name,
            _rows(plan, here),
            label_name=name,
            provenance=made_by,
        )


def _label_groups(plan: Plan) -> list[Group]:
    return [group for group in groups(plan) if group.kind == "labels"]


def _outputs(plan: Plan) -> Iterator[Output]:
    for volume in range(len(plan.volumes)):
        yield from plan.outputs_of(volume)


def _rows(plan: Plan, outputs: Iterable[Output]) -> Iterator[tuple[Place, Columns]]:
    several = len(plan.model.outputs) > 1
    for output in outputs:
        volume, data = plan.volumes[output.volume], read_sums(plan, output)
        if data is None:
            continue  # it failed, and is named as missing
        place = Place(volume.target_t, volume.c, output=plan.model.outputs[output.number] if several else None)
        if plan.plate is not None:
            row, column, field = volume.image.split("/")
            place = replace(place, plate=plan.plate.name, well=f"{row}/{column}", field=field)
        sums = Sums(**np.load(io.BytesIO(data), allow_pickle=False))
        yield place, to_columns(sums, plan.volume_shape, plan.target_image.spacing_um)
