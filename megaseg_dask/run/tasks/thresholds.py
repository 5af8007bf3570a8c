"""The stages of an automatic threshold: tables of logits, the threshold of a volume, its mask."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import thresholds
from megaseg_dask.algorithms.doubts import bimodality
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import DataError
from megaseg_dask.plan.memory import TABLES_READ_AHEAD
from megaseg_dask.plan.plan import Output
from megaseg_dask.plan.resolved import Automatic
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.workspace import Workspace

Float32 = NDArray[np.float32]


def find_extremes(logits: Float32) -> OutputState:
    """Return lowest and highest logit of a block; neither if no voxel is a number."""
    known = logits[~np.isnan(logits)] if np.isnan(logits.min(initial=0)) else logits
    if not known.size:
        return OutputState()
    return OutputState(low=float(known.min()), high=float(known.max()))


def sum_above(mask: NDArray[np.uint8], intensity: NDArray[Any]) -> OutputState:
    """Return the voxels of a block that are above the threshold, and the sum of intensities."""
    values = intensity[mask != 0]
    return OutputState(n_above=values.size, sum_above=float(values.sum(dtype=np.float64)))


def merge_sums(blocks: Sequence[OutputState]) -> OutputState:
    """Return the sums of :func:`sum_above` of a volume from those of its blocks."""
    known = [block for block in blocks if block.n_above is not None]
    if not known:
        return OutputState()
    return OutputState(
        n_above=sum(block.n_above or 0 for block in known),
        sum_above=math.fsum(block.sum_above or 0.0 for block in known),
    )


def merge_extremes(blocks: Sequence[OutputState]) -> OutputState:
    """Return lowest and highest logit of a volume from those of its blocks."""
    lows = [block.low for block in blocks if block.low is not None]
    highs = [block.high for block in blocks if block.high is not None]
    return OutputState(low=min(lows, default=None), high=max(highs, default=None))


def tabulate_block(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the table of one block's logits over the range of the whole volume.

    Raises:
        DataError: No voxel of the volume is a number.
    """
    logits = workspace.array("logits", output).read(workspace.plan.block_grid()[number])
    is_known = ~np.isnan(logits)
    known = logits[is_known] if _has_background(workspace) else logits.ravel()
    if not known.size:
        workspace.save(output, _table_name(number), {})
        return OutputState()
    low, high = _range(workspace, output)
    table = thresholds.tabulate(known, low, high, _method(workspace))
    workspace.save(output, _table_name(number), table)
    return OutputState()


def find_cutoff(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Find the threshold of a volume, a logit, from the tables of its blocks.

    Raises:
        DataError: There is none.
    """
    present = workspace.present_blocks(output)
    if not present:
        raise DataError("no block of the volume was predicted, so no threshold can be found")
    state = workspace.output_state(output)
    if state.low is None and workspace.plan.resolved.where is not None:
        # A mask may leave out all of a volume.
        return OutputState()
    tables = read_ahead(
        lambda number: workspace.load(output, _table_name(number)),
        present,
        TABLES_READ_AHEAD,
    )
    merged = thresholds.merge_tables(table for _, table in tables if table)
    low, high = _range(workspace, output)
    cutoff = thresholds.find_threshold(merged, low, high, _method(workspace))
    separation = None
    if len(merged["counts"]) == thresholds.N_BINS:
        separation = bimodality(merged["counts"], low, high)
    return OutputState(threshold=cutoff, bimodality=separation)


def threshold_block(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the mask of one block from its logits and the volume's threshold."""
    core = workspace.plan.block_grid()[number]
    logits = workspace.array("logits", output).read(core)
    cutoff = workspace.output_state(output).threshold
    # Strictly above; a NaN never is, and without a threshold all are NaN.
    mask = (logits > np.float32(np.inf if cutoff is None else cutoff)).view(np.uint8)
    workspace.write(workspace.first_mask, output, core, mask)
    return OutputState()


def _has_background(workspace: Workspace) -> bool:
    """Return whether a logit may be NaN: not by accident, but since its voxel is background."""
    resolved = workspace.plan.resolved
    return resolved.nan_to_background or resolved.where is not None


def _method(workspace: Workspace) -> str:
    threshold = workspace.plan.resolved.threshold
    assert isinstance(threshold, Automatic)
    return threshold.method


def _range(workspace: Workspace, output: Output) -> tuple[float, float]:
    state = workspace.output_state(output)
    if state.low is None or state.high is None:
        raise DataError(
            "no voxel of the volume is a number, so no threshold can be found; give one with "
            "--threshold"
        )
    return state.low, state.high


def _table_name(number: int) -> str:
    return f"histograms/{number}.npz"
