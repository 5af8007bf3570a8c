"""What tasks see of the source is what was there: voxels when measured, masks when planned."""

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import DataError
from megaseg_dask.plan.where import checksum_of
from megaseg_dask.run.workspace import Array, Workspace


def wanted_voxels(
    workspace: Workspace, volume: int, number: int, region: Box
) -> NDArray[np.bool_] | None:
    """Return which voxels of the region of a block a mask marks; ``None`` if there is no mask.

    Raises:
        DataError: The mask is not that with which the run was planned, or cannot be read.
    """
    plan = workspace.plan
    reader = plan.mask_reader(plan.volumes[volume])
    if reader is None:
        return None
    wanted = reader.read(region)
    if checksum_of(wanted) != plan.surveys[volume].checksum(number):
        raise DataError(
            f"the mask of --where changed after the run was planned: it is another one at {region}"
            "; restore it and run the same command again, or start again with --overwrite"
        )
    return wanted


def is_compared(workspace: Workspace) -> bool:
    """Return whether voxels are read again after they were measured."""
    return workspace.plan.measure_level == 0 and not workspace.reads_once


def require_same_voxels(workspace: Workspace, volume: int, box: Box, channels: Array) -> None:
    """Require that a box of the first channels, ``(c, z, y, x)``, holds what was measured.

    Raises:
        DataError: The source changed in between; the first box in which it did is named.
    """
    if not is_compared(workspace):
        return
    plan = workspace.plan
    cells = plan.cell_grid
    found = np.stack([cells.checksums(values, box) for values in channels])
    for position in plan.measure_grid.iter_overlapping(box):
        part = plan.measure_grid.core(position)
        common = part & box
        measured = workspace.load_checksums(volume, plan.measure_grid.index(position))
        by_channel = measured.reshape(-1, *cells.grid_shape(part))[: len(channels)]
        seen = by_channel[:, *cells.index(common, part)]
        is_same = (found[:, *cells.index(common, box)] == seen).all(axis=0)
        for cell, same in zip(cells.iter_cells(common), is_same.ravel(), strict=True):
            if not same:
                raise DataError(
                    f"the source changed during the run: {plan.source} at {cell} differs from what "
                    "was measured; restore it and run the same command again, or start again with "
                    "--overwrite"
                )
