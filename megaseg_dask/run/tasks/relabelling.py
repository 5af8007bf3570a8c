"""The stage ``reread``: a block's stored scores or logits become its mask; no network runs."""

from megaseg_dask.algorithms.blending import mask_of_scores
from megaseg_dask.errors import DataError
from megaseg_dask.inference.block import HostOutputs
from megaseg_dask.plan.plan import Output
from megaseg_dask.plan.resolved import Fixed
from megaseg_dask.run.state import OutputState, TaskSummary
from megaseg_dask.run.tasks.thresholds import find_extremes
from megaseg_dask.run.workspace import Workspace


def read_block(workspace: Workspace, volume: int, number: int) -> TaskSummary:
    """Write the mask of one block, or the logits to find it from.

    Raises:
        DataError: That part was not predicted, or is lost.
    """
    outputs = workspace.plan.outputs_of(volume)
    states = tuple(_read_output(workspace, output, number) for output in outputs)
    return TaskSummary(by_output=states)


def _read_output(workspace: Workspace, output: Output, number: int) -> OutputState:
    plan = workspace.plan
    basis = plan.resolved.basis
    assert basis is not None
    core = plan.block_grid()[number]
    scores = workspace.basis(output)
    try:
        stored = scores.read(core)
    except DataError as error:
        lost = scores.find_lost(core)
        cause = f"{lost} is missing: that run did not make it, or it was removed" if lost else error
        raise DataError(
            f"the {basis.kind} of run {basis.run} lack this part ({cause}); finish that run with "
            "its megaseg segment command, then run this command again"
        ) from error
    if not isinstance(plan.resolved.threshold, Fixed):
        workspace.write("logits", output, core, stored)
        return find_extremes(stored)
    threshold = plan.resolved.threshold.score
    if basis.kind == "logits":
        mask = HostOutputs(stored).mask(threshold)
    else:
        mask = mask_of_scores(stored, threshold)
    workspace.write(workspace.first_mask, output, core, mask)
    return OutputState()
