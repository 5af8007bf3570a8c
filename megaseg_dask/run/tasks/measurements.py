"""Stages of measurements: sums of the objects in one block, and in all blocks of a volume."""

from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.components import label_dtype
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import Sums, measure_block, merge
from megaseg_dask.algorithms.regions import (
    DISTANCES,
    RegionSums,
    measure_distances,
    measure_regions,
    merge_regions,
)
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import DataError
from megaseg_dask.ngff.volume import Absent
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.tasks.source import require_same_voxels
from megaseg_dask.run.workspace import Workspace

Array = NDArray[Any]

# Blocks whose sums are in memory or on their way at a time.
_N_AHEAD = 16


def measure_objects(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the sums of one block's objects, from their final ids and the measured channels.

    Raises:
        DataError: The first channel is not what was measured before.
    """
    core = workspace.plan.block_grid()[number]
    labels = _read_with_border(workspace, output, core)
    channels = workspace.measured_sources(output.volume)
    region = core.shifted(workspace.plan.region.start)
    intensity = np.stack([channel.read(region) for channel in channels])
    # Only channels that are segmented were read before.
    require_same_voxels(workspace, output.volume, region, intensity[:1])
    absent = _count_absent(workspace, output, region, intensity)
    sums = measure_block(labels, intensity, core)
    workspace.save(output, _name(number), sums.arrays())
    regions = _read_regions(workspace, output.volume, core)
    if regions is not None:
        of_regions = measure_regions(labels, regions, intensity, core)
        workspace.save(output, _name_of_regions(number), of_regions.arrays())
    return OutputState(n_absent=absent.objects or None, n_absent_inner=absent.inner or None)


def _count_absent(workspace: Workspace, output: Output, box: Box, intensity: Array) -> Absent:
    """Return what the channels lack in a box that no other stage counts."""
    counted = workspace.plan.counted_when_measured(output)
    absent = Absent()
    pairs = zip(workspace.measured_sources(output.volume), intensity, strict=True)
    for number, (channel, values) in enumerate(pairs):
        if number in counted:
            absent += channel.count_absent(box, values)
    return absent


def _read_with_border(workspace: Workspace, output: Output, core: Box) -> Array:
    """Return the labels of a block and of one voxel around it.

    They are 0 where the volume ends, and in blocks that are missing.
    """
    plan = workspace.plan
    grid = plan.block_grid()
    around = core.grown(1)
    volume = workspace.array("labels", output)
    labels = np.zeros(around.shape, label_dtype(plan.volume_shape))
    present = set(workspace.present_blocks(output))
    boxes = [around & Box.of(plan.volume_shape)]
    if len(present) < len(grid):
        positions = grid.iter_overlapping(boxes[0])
        boxes = [around & grid.core(p) for p in positions if grid.index(p) in present]
    for box in boxes:
        labels[box.within(around).slices] = volume.read(box)
    return labels


def _read_regions(workspace: Workspace, volume: int, core: Box) -> Array | None:
    """Return the ids of the regions in a block and one voxel around it, 0 where the volume ends.

    Raises:
        DataError: One is below 0.
    """
    regions = workspace.regions(volume)
    if regions is None:
        return None
    plan = workspace.plan
    around = core.grown(1)
    box = around & Box.of(plan.volume_shape)
    values = regions.read(box.shifted(plan.region.start))
    if values.dtype.kind == "i" and values.min() < 0:
        raise DataError(
            f"--regions {plan.resolved.regions}: it has the id {values.min()}; expected ids of 0 "
            "and above"
        )
    before = [a - b for a, b in zip(box.start, around.start, strict=True)]
    after = [b - a for a, b in zip(box.stop, around.stop, strict=True)]
    return np.pad(values, list(zip(before, after, strict=True)))


def collect_objects(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Add the sums of all blocks, in grid order, and write those of the volume."""
    plan = workspace.plan
    parts = read_ahead(
        lambda number: Sums.from_arrays(workspace.load(output, _name(number))),
        workspace.present_blocks(output),
        _N_AHEAD,
    )
    # There may be no block that is not missing.
    total = merge(chain([_no_objects(workspace, output)], (sums for _, sums in parts)))
    arrays = total.arrays()
    regions = workspace.regions(output.volume)
    if regions is not None:
        of_blocks = read_ahead(
            lambda number: RegionSums.from_arrays(workspace.load(output, _name_of_regions(number))),
            workspace.present_blocks(output),
            _N_AHEAD,
        )
        none = _no_regions(workspace, output)
        of_regions = merge_regions(chain([none], (sums for _, sums in of_blocks)))
        arrays |= of_regions.arrays()
        spacing_um = plan.known_spacing_um
        if spacing_um is not None:
            arrays[DISTANCES] = measure_distances(
                total,
                of_regions,
                lambda box: regions.read(box.shifted(plan.region.start)),
                plan.volume_shape,
                spacing_um,
            )
    workspace.save_sums(output, arrays)
    return OutputState()


def _no_objects(workspace: Workspace, output: Output) -> Sums:
    labels = np.zeros((3, 3, 3), np.uint32)
    return measure_block(labels, _one_voxel(workspace, output), Box.of((1, 1, 1)))


def _no_regions(workspace: Workspace, output: Output) -> RegionSums:
    labels = np.zeros((3, 3, 3), np.uint32)
    return measure_regions(labels, labels, _one_voxel(workspace, output), Box.of((1, 1, 1)))


def _one_voxel(workspace: Workspace, output: Output) -> Array:
    """Return a voxel of all channels that are measured, of no object."""
    plan = workspace.plan
    n_channels = len(plan.measured_channels(plan.volumes[output.volume]))
    return np.zeros((n_channels, 1, 1, 1), plan.source_image.dtype)


def _name(number: int) -> str:
    return f"sums/{number}.npz"


def _name_of_regions(number: int) -> str:
    return f"regions/{number}.npz"
