"""Stages of measurements: sums of the objects in one block, and in all blocks of a volume."""

from itertools import chain

import numpy as np

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import Sums, measure_block, merge
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.tasks.source import require_same_voxels
from megaseg_dask.run.workspace import Workspace

# Blocks whose sums are in memory or on their way at a time.
_N_AHEAD = 16


def measure_objects(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the sums of one block's objects, from their final ids and the first channel.

    Raises:
        DataError: The channel is not what was measured.
    """
    core = workspace.plan.block_grid()[number]
    labels = workspace.array("labels", output).read(core)
    channel = workspace.sources(output.volume)[0]
    region = core.shifted(workspace.plan.region.start)
    intensity = channel.read(region)
    require_same_voxels(workspace, output.volume, region, intensity[None])
    sums = measure_block(labels, intensity, core)
    workspace.save(output, _name(number), sums.arrays())
    return OutputState()


def collect_objects(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Add the sums of all blocks, in grid order, and write those of the volume."""
    parts = read_ahead(
        lambda number: Sums(**workspace.load(output, _name(number))),
        workspace.present_blocks(output),
        _N_AHEAD,
    )
    # There may be no block that is not missing.
    total = merge(chain([_no_objects(workspace)], (sums for _, sums in parts)))
    workspace.save_sums(output, total.arrays())
    return OutputState()


def _no_objects(workspace: Workspace) -> Sums:
    voxel = (1, 1, 1)
    intensity = np.zeros(voxel, workspace.plan.source_image.dtype)
    return measure_block(np.zeros(voxel, np.uint32), intensity, Box.of(voxel))


def _name(number: int) -> str:
    return f"sums/{number}.npz"
