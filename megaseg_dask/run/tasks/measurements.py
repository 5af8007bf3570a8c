"""Stages of measurements: sums of the objects in one block, and in all blocks of a volume."""

from megaseg_dask.algorithms.measurements import Sums, measure_block, merge
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.state import OutputState

# Blocks whose sums are in memory or on their way at a time.
_READ_AHEAD = 16


def measure_objects(plan: Plan, output: Output, number: int) -> OutputState:
    """Write the sums of one block's objects, from their final ids and the channel, or the first of several."""
    core = plan.block_grid()[number]
    labels = workspace.product(plan, "labels", output).read(core)
    intensity = workspace.sources(plan, output.volume)[0].read(core.shifted(plan.region.start))
    workspace.save(
        plan, output, f"sums/{number}.npz", measure_block(labels, intensity, core).arrays()
    )
    return OutputState()


def collect_objects(plan: Plan, output: Output, _: int) -> OutputState:
    """Add the sums of all blocks, in grid order, and write those of the volume."""
    blocks = workspace.read_state(plan, output.volume).present(len(plan.block_grid()))
    parts = read_ahead(
        lambda n: Sums(**workspace.load(plan, output, f"sums/{n}.npz")),
        blocks,
        _READ_AHEAD,
    )
    return write_sums(plan, output, merge(sums for _, sums in parts))


def write_sums(plan: Plan, output: Output, sums: Sums) -> OutputState:
    """Write the sums of an output's objects where they stay until the tables are written."""
    workspace.save_sums(plan, output, workspace.pack(sums.arrays()))
    return OutputState()
