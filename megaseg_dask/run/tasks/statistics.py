"""The stage ``measure``: statistics of each channel of a volume, for its normalization."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Counts,
    Normalization,
    Statistics,
    measure,
    merge_statistics,
)
from megaseg_dask.errors import DataError
from megaseg_dask.messages import first_few
from megaseg_dask.ngff.volume import Absent
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.resolved import Given
from megaseg_dask.run.state import ChannelStatistics, PartStatistics, TaskSummary
from megaseg_dask.run.tasks.source import is_compared
from megaseg_dask.run.workspace import Workspace


def measure_block(workspace: Workspace, volume: int, number: int) -> TaskSummary:
    """Sum the intensities of each channel in one part of the measured level."""
    plan = workspace.plan
    level = plan.measure_level or 0
    box = plan.measure_grid[number]
    absent = Absent()
    parts = []
    checksums = []
    for channel in workspace.sources(volume, level):
        values = channel.read(box)
        if level == 0:
            absent += channel.count_absent(box, values)
        parts.append(_measure_parts(plan, values, box))
        if is_compared(workspace):
            checksums.append(plan.cell_grid.checksums(values, box))
        # An error in the statistics then names this part, not the whole volume.
        describe_channel(plan, parts[-1])
    if checksums:
        workspace.save_checksums(volume, number, np.stack(checksums))
    return TaskSummary(parts=tuple(parts), absent=absent.objects, absent_inner=absent.inner)


def _measure_parts(plan: Plan, values: NDArray[Any], box: Box) -> tuple[PartStatistics, ...]:
    """Return the statistics of the parts of the fixed partition inside ``box``.

    Floats keep an entry for each part; integers add up to one.
    """
    partition = BlockGrid(plan.measure_grid.volume_shape, PARTITION_SHAPE)
    parts = []
    for position in partition.iter_overlapping(box):
        core = partition.core(position)
        statistics = measure(
            values[core.within(box).slices],
            core,
            nan_to_background=plan.resolved.nan_to_background,
        )
        parts.append(PartStatistics(partition.index(position), statistics))
    if isinstance(parts[0].statistics, Counts):
        total = merge_statistics(part.statistics for part in parts)
        return (PartStatistics(parts[0].place, total),)
    return tuple(parts)


def describe_channel(plan: Plan, parts: Iterable[PartStatistics]) -> ChannelStatistics:
    """Return mean, std and extremes of a channel from its parts, added in grid order.

    Extremes are ``None`` where the settings give mean and std.

    Raises:
        DataError: The numbers have no exact mean or std.
    """
    normalization = plan.resolved.normalization
    if isinstance(normalization, Given):
        return ChannelStatistics(normalization.mean, normalization.std)
    return _describe(_in_order(parts))


def _in_order(parts: Iterable[PartStatistics]) -> Iterator[Statistics]:
    for part in sorted(parts, key=lambda part: part.place):
        yield part.statistics


def _describe(in_order: Iterable[Statistics]) -> ChannelStatistics:
    total = merge_statistics(in_order)
    zscore = asdict(Normalization.of(total))
    if not total.n:
        # JSON has no infinity, which is the minimum of a volume without a finite voxel.
        return ChannelStatistics(**zscore, minimum=0.0, maximum=0.0)
    return ChannelStatistics(**zscore, minimum=total.minimum, maximum=total.maximum)


def describe_group(
    plan: Plan, volumes: Sequence[Sequence[TaskSummary]]
) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel of a group from the ``measure`` tasks of its volumes.

    They are added in the order of the volumes.

    Raises:
        DataError: The numbers have no exact mean or std.
    """

    def describe(channel: int) -> ChannelStatistics:
        parts: list[Statistics] = []
        for summaries in volumes:
            of_volume = [summary.parts[channel] for summary in summaries]
            parts += _in_order(chain.from_iterable(of_volume))
        return _describe(parts)

    return tuple(map(describe, range(plan.model.in_channels)))


def require_group(workspace: Workspace, volume: int, _: int) -> TaskSummary:
    """Require that all volumes of the group of a volume were measured.

    Raises:
        DataError: Some were not; it names them.
    """
    lacking = workspace.state(volume).lacking
    if lacking:
        group = workspace.plan.group_of(volume)
        raise DataError(
            f"the statistics of its group ({group}) need {first_few(lacking)}, which could not be "
            "measured; fix the cause and run the same command again"
        )
    return TaskSummary()


def describe_volume(plan: Plan, summaries: Sequence[TaskSummary]) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel of a volume from its ``measure`` tasks.

    There are none if nothing is predicted.
    """
    if not plan.resolved.predicts():
        return ()

    def describe(channel: int) -> ChannelStatistics:
        of_tasks = (summary.parts[channel] for summary in summaries)
        return describe_channel(plan, chain.from_iterable(of_tasks))

    return tuple(map(describe, range(plan.model.in_channels)))
