"""Stages of measurements: sums of the objects in one block, and in all blocks of a volume."""

from megaseg_dask.algorithms.measurements import Sums, measure_block, merge
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.workspace import Workspace

# Blocks whose sums are in memory or on their way at a time.
_N_AHEAD = 16


def measure_objects(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the sums of one block's objects, from their final ids and the first channel."""
    core = workspace.plan.block_grid()[number]
    labels = workspace.array("labels", output).read(core)
    channel = workspace.sources(output.volume)[0]
    intensity = channel.read(core.shifted(workspace.plan.region.start))
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
    total = merge(sums for _, sums in parts)
    workspace.save_sums(output, total.arrays())
    return OutputState()


def _name(number: int) -> str:
    return f"sums/{number}.npz"
