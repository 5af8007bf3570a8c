"""The first rows of the table of objects, for readers who want to see what is in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import MegasegError
from megaseg_dask.ngff.tables import iter_columns
from megaseg_dask.plan.plan import Plan
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.charts import number

_MAX_ROWS = 6
# What tells an object from others, and what most readers ask for first.
_OF_PLATE = ("well", "field")
_COLUMNS = ("timepoint", "channel_name", "label")
_OF_SIZE_UM = ("volume_um3", "centroid_z_um", "centroid_y_um", "centroid_x_um")
_OF_SIZE = ("volume_voxels", "centroid_z", "centroid_y", "centroid_x")
_INTENSITY = "intensity_mean"


@dataclass(frozen=True, slots=True)
class TableHead:
    """The first rows of a table as texts, and where it lies."""

    file: Location
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def read_head(plan: Plan) -> TableHead | None:
    """Return the beginning of a run's table of objects; ``None`` if there is none to be read."""
    if not plan.resolved.measures_objects():
        return None
    is_known = plan.source_image.unknown_size is None
    columns = (
        *(_OF_PLATE if plan.plate else ()),
        *_COLUMNS,
        *(_OF_SIZE_UM if is_known else _OF_SIZE),
        _INTENSITY,
    )
    try:
        batches = list(islice(iter_columns(plan.table, columns), 1))
    except (MegasegError, OSError, KeyError):
        # The survey says why it cannot be read.
        return None
    rows = []
    for batch in batches:
        texts = [_texts(values[:_MAX_ROWS]) for values in batch]
        rows += list(zip(*texts, strict=True))
    return TableHead(plan.table, columns, rows)


def _texts(values: NDArray[np.generic]) -> list[str]:
    return [_text(value) for value in values.tolist()]


def _text(value: object) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)
