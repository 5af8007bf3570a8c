"""Stages about labels, and about holes to fill: both are components of a volume that is cut into blocks.

Each block is labelled by itself, seams say which fragments touch, and one task
a volume joins them. Blocks that are missing take no part: nothing is known of
their voxels, and no label is given there.
"""

from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import components
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.memory import IDLE_BYTES
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.state import OutputState

Array = NDArray[Any]

# First voxel and size of a fragment, 64 bits each.
_FRAGMENT_BYTES = 16
# Blocks whose small objects are on their way at a time.
_READ_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Components:
    """What is labelled: the voxels of a mask, or those around it."""

    folder: str
    provisional: str
    inverted: bool

    def mask(self, plan: Plan) -> str:
        """Return the kind of mask that they are components of."""
        return workspace.first_mask(plan) if self.inverted else "mask"


OBJECTS = Components("objects", "fragments", inverted=False)
HOLES = Components("holes", "holes", inverted=True)


def label_block(
    plan: Plan, output: Output, number: int, *, of: Components = OBJECTS
) -> OutputState:
    """Label one block by itself; write its provisional ids, boundary planes and fragment table."""
    core = plan.block_grid()[number]
    mask = workspace.product(plan, of.mask(plan), output).read(core)
    labels = components.label_block(mask == 0 if of.inverted else mask, plan.options.connectivity)
    fragments = components.list_fragments(labels, core, plan.volume_shape)
    workspace.write(plan, of.provisional, output, core, labels)
    workspace.save(
        plan, output, f"{of.folder}/planes/{number}.npz", components.boundary_planes(labels)
    )
    workspace.save_rows(
        plan, output, f"{of.folder}/fragments/{number}", np.stack([fragments.first, fragments.size])
    )
    return OutputState()


def pair_seams(plan: Plan, output: Output, number: int, *, of: Components = OBJECTS) -> OutputState:
    """Write which fragments of a block touch which of its later neighbours: neighbour, id here, id there."""
    grid, connectivity = plan.block_grid(), plan.options.connectivity
    missing = set(workspace.read_state(plan, output.volume).missing)
    here, rows = (
        workspace.load(plan, output, f"{of.folder}/planes/{number}.npz"),
        [np.empty((3, 0), np.uint64)],
    )
    for neighbour, direction in grid.iter_forward_neighbors(number, connectivity):
        if neighbour in missing:
            continue
        there = workspace.load(plan, output, f"{of.folder}/planes/{neighbour}.npz")
        near, far = components.seam_keys(direction)
        pairs = components.pair_across_seam(
            here[near],
            components.plane_box(grid[number], near),
            there[far],
            components.plane_box(grid[neighbour], far),
            connectivity,
        )
        rows.append(np.insert(pairs, 0, neighbour, axis=1).astype(np.uint64).T)
    workspace.save_rows(plan, output, f"{of.folder}/seams/{number}", np.concatenate(rows, axis=1))
    return OutputState()


def label_holes(plan: Plan, output: Output, number: int) -> OutputState:
    """Label the background of one block by itself."""
    return label_block(plan, output, number, of=HOLES)


def pair_seams_of_holes(plan: Plan, output: Output, number: int) -> OutputState:
    """Write which fragments of a block's background touch those of its later neighbors."""
    return pair_seams(plan, output, number, of=HOLES)


def join_objects(plan: Plan, output: Output, _: int) -> OutputState:
    """Join all fragments of an output into objects, and write the final id of each fragment."""
    fragments, pairs, offsets = _read_fragments(plan, output, OBJECTS)
    final = components.join_fragments(fragments, pairs, min_size=plan.options.min_size)
    _write_tables(plan, output, OBJECTS, final, offsets)
    return OutputState(n_objects=int(final.max(initial=0)), n_fragments=len(fragments))


def join_holes(plan: Plan, output: Output, _: int) -> OutputState:
    """Join the background's fragments, and write which belong to holes small enough to fill."""
    fragments, pairs, offsets = _read_fragments(plan, output, HOLES)
    small = components.fill_table(fragments, pairs, plan.options.fill_holes)
    _write_tables(plan, output, HOLES, small.view(np.uint8), offsets)
    return OutputState(n_fragments=len(fragments))


def _present(plan: Plan, output: Output) -> list[int]:
    return workspace.read_state(plan, output.volume).present(len(plan.block_grid()))


def _read_fragments(
    plan: Plan, output: Output, of: Components
) -> tuple[components.Fragments, Iterator[NDArray[np.int64]], NDArray[np.int64]]:
    """Return the fragments of an output, pairs of their rows that touch, and where each block's rows start."""
    present, folder = _present(plan, output), workspace.output_folder(plan, output)
    counts = np.zeros(len(plan.block_grid()), np.int64)
    # From the sizes of the objects: what is read then goes where it belongs, and is in memory once.
    for number, size in read_ahead(
        lambda n: folder.size(f"{of.folder}/fragments/{n}") or 0, present, _READ_AHEAD
    ):
        counts[number] = size // _FRAGMENT_BYTES
    offsets = components.offsets_of(counts.tolist())
    needed = IDLE_BYTES + components.join_bytes(int(offsets[-1]))
    if needed > plan.memory_bytes:
        raise SettingsError(
            f"joining {offsets[-1]:,} fragments of volume {output.volume} needs {needed / 1e9:.1f} GB, and a worker "
            f"may use {plan.memory_bytes / 1e9:.1f} GB: run the same command again with more --memory"
        )
    table = np.empty((2, offsets[-1]), np.uint64)
    for number, rows in read_ahead(
        lambda n: workspace.load_rows(plan, output, f"{of.folder}/fragments/{n}", 2),
        present,
        _READ_AHEAD,
    ):
        table[:, offsets[number] : offsets[number + 1]] = rows
    return components.Fragments(*table), _iter_pairs(plan, output, of, present, offsets), offsets


def _iter_pairs(
    plan: Plan, output: Output, of: Components, present: list[int], offsets: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Yield the pairs of each block's seams, as rows of the volume's table."""
    for number, (neighbour, here, there) in read_ahead(
        lambda n: workspace.load_rows(plan, output, f"{of.folder}/seams/{n}", 3),
        present,
        _READ_AHEAD,
    ):
        # Local ids start at 1, rows of the table at 0.
        rows = np.stack([here.astype(np.int64), there.astype(np.int64)], axis=1) - 1
        rows[:, 0] += offsets[number]
        rows[:, 1] += offsets[neighbour.astype(np.int64)]
        yield rows


def _write_tables(
    plan: Plan, output: Output, of: Components, table: Array, offsets: NDArray[np.int64]
) -> None:
    def write(number: int) -> None:
        rows = table[offsets[number] : offsets[number + 1]]
        workspace.save_rows(
            plan, output, f"{of.folder}/tables/{number}", rows.astype(np.uint64)[None]
        )

    # Threads of a pool know nothing of the run's holder, unless they are told.
    context = copy_context()
    for _ in read_ahead(
        lambda n: context.copy().run(write, n), _present(plan, output), _READ_AHEAD
    ):
        pass


def fill_block(plan: Plan, output: Output, number: int) -> OutputState:
    """Write the mask of one block with its small holes filled."""
    core = plan.block_grid()[number]
    mask = workspace.product(plan, "unfilled", output).read(core)
    holes = workspace.product(plan, "holes", output).read(core)
    (small,) = workspace.load_rows(plan, output, f"holes/tables/{number}", 1)
    filled = components.relabel(holes, small, np.dtype(np.uint8))
    workspace.write(plan, "mask", output, core, mask | filled)
    return OutputState()


def relabel_block(plan: Plan, output: Output, number: int) -> OutputState:
    """Write the final ids of one block to the target."""
    core = plan.block_grid()[number]
    provisional = workspace.product(plan, "fragments", output).read(core)
    (table,) = workspace.load_rows(plan, output, f"objects/tables/{number}", 1)
    labels = components.relabel(provisional, table, components.label_dtype(plan.volume_shape))
    workspace.write(plan, "labels", output, core, labels)
    return OutputState()
