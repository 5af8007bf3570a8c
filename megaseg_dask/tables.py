"""The tables of a run: one Parquet file beside the target, and one table in each image for Fractal's tools."""

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np

from megaseg_dask.measurements import Columns, Sums, to_columns
from megaseg_dask.ngff.tables import Place, require_own_table, write_ngio_table, write_parquet
from megaseg_dask.plan import Plan
from megaseg_dask.products import Group, groups, read_ahead, sums_folder
from megaseg_dask.stores import Location, at_once

SUFFIX = ".measurements.parquet"

# Volumes whose sums are in memory or on their way at a time.
_READ_AHEAD = 16
# Each thread that writes Parquet keeps some 10 MB of buffers.
_WRITERS = 8


def table_location(plan: Plan) -> Location:
    """Return the address of the run's Parquet file."""
    return Location(plan.target).sibling(SUFFIX)


def require_own_tables(plan: Plan) -> None:
    """Raise :class:`TargetError` if an image has a table of our name that somebody else made."""
    if "measurements" in plan.options.outputs:
        at_once(lambda group: require_own_table(group.parent(plan), group.name(plan)), _label_groups(plan))


def write_tables(plan: Plan) -> None:
    """Write the measurements of all volumes that have some."""
    place = table_location(plan)
    write_parquet(place.parent, place.basename, _rows(plan, range(len(plan.volumes))))
    made_by = {"megaseg-dask": version("megaseg-dask"), "model": plan.model.name, "digest": plan.model.digest}
    volumes = defaultdict(list)
    for number, volume in enumerate(plan.volumes):
        volumes[volume.image, plan.suffixes[volume.target_c]].append(number)

    def write_table(group: Group) -> None:
        rows, name = _rows(plan, volumes[group.image, group.suffix]), group.name(plan)
        version_ = plan.target_image.version
        write_ngio_table(group.parent(plan), version_, name, rows, label_name=name, provenance=made_by)

    at_once(write_table, _label_groups(plan), _WRITERS)


def _label_groups(plan: Plan) -> list[Group]:
    return [group for group in groups(plan) if group.kind == "labels"]


def _rows(plan: Plan, volumes: Sequence[int]) -> Iterator[tuple[Place, Columns]]:
    for number, data in read_ahead(lambda number: sums_folder(plan).get(f"{number}.npz"), volumes, _READ_AHEAD):
        volume = plan.volumes[number]
        if data is None:
            continue  # it failed, and is named as missing
        place = Place(volume.target_t, volume.c)
        if plan.plate is not None:
            row, column, field = volume.image.split("/")
            place = Place(volume.target_t, volume.c, plan.plate.name, f"{row}/{column}", field)
        sums = Sums(**np.load(io.BytesIO(data), allow_pickle=False))
        yield place, to_columns(sums, plan.volume_shape, plan.target_image.spacing_um)
