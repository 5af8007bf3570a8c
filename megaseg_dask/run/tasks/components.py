"""Stages about labels, and about holes to fill: both are components of a volume cut into blocks.

Each block is labelled by itself, seams say which fragments touch, and one task
a volume joins them. Missing blocks take no part: nothing is known of their
voxels, and no label is given there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import components
from megaseg_dask.algorithms.doubts import ObjectSizes
from megaseg_dask.algorithms.splitting import Objects, fragment_boxes
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.memory import IDLE_BYTES, SPLIT_JOIN_BYTES
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.tasks.splitting import WHOLE_IDS, deal_objects, put_parts
from megaseg_dask.run.workspace import Workspace

Array = NDArray[Any]
Indices = NDArray[np.int64]

# Blocks whose small objects are on their way at a time.
_N_AHEAD = 64
# First voxel and size of a fragment; neighbor, id here and id there of a pair.
_FRAGMENT_ROWS = 2
_PAIR_ROWS = 3
BOX_ROWS = 6


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of components: objects of a mask, or holes: components of the voxels around it."""

    folder: str
    provisional: str
    is_inverted: bool

    def mask(self, workspace: Workspace) -> str:
        """Return the kind of mask that they are components of."""
        return workspace.first_mask if self.is_inverted else "mask"

    def fragments(self, number: int) -> str:
        """Return the name of the fragments of a block."""
        return f"{self.folder}/fragments/{number}"

    def planes(self, number: int) -> str:
        """Return the name of the boundary planes of a block."""
        return f"{self.folder}/planes/{number}.npz"

    def seams(self, number: int) -> str:
        """Return the name of the pairs at the seams of a block."""
        return f"{self.folder}/seams/{number}"

    def are_split(self, workspace: Workspace) -> bool:
        """Return whether components are taken apart: objects are, by request."""
        return not self.is_inverted and workspace.plan.resolved.splits_objects()

    def boxes(self, number: int) -> str:
        """Return the name of the bounding boxes of the fragments of a block."""
        return f"{self.folder}/boxes/{number}"

    def table(self, number: int) -> str:
        """Return the name of the table that gives the fragments of a block their final ids."""
        return f"{self.folder}/tables/{number}"


OBJECTS = Kind("objects", "fragments", is_inverted=False)
HOLES = Kind("holes", "holes", is_inverted=True)


# -- blocks


def label_block(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Label the objects of one block by themselves."""
    return _label_block(workspace, output, number, OBJECTS)


def label_holes(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Label the background of one block by itself."""
    return _label_block(workspace, output, number, HOLES)


def pair_seams(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write which fragments of objects touch across the seams of a block."""
    return _pair_seams(workspace, output, number, OBJECTS)


def pair_seams_of_holes(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write which fragments of background touch across the seams of a block."""
    return _pair_seams(workspace, output, number, HOLES)


def _label_block(workspace: Workspace, output: Output, number: int, kind: Kind) -> OutputState:
    """Write the provisional ids of one block, its boundary planes and its fragment table."""
    plan = workspace.plan
    core = plan.block_grid()[number]
    mask = workspace.array(kind.mask(workspace), output).read(core)
    if kind.is_inverted:
        mask = mask == 0
    labels = components.label_block(mask, plan.resolved.connectivity)
    fragments = components.list_fragments(labels, core, plan.volume_shape)
    rows = np.stack([fragments.first, fragments.size])
    workspace.write(kind.provisional, output, core, labels)
    workspace.save(output, kind.planes(number), components.boundary_planes(labels))
    workspace.save_rows(output, kind.fragments(number), rows)
    if kind.are_split(workspace):
        boxes = fragment_boxes(labels, core)
        workspace.save_rows(output, kind.boxes(number), boxes)
    return OutputState()


def _pair_seams(workspace: Workspace, output: Output, number: int, kind: Kind) -> OutputState:
    """Write which fragments of a block touch which of its later neighbors.

    A pair is the neighbor's number, the id here and the id there.
    """
    grid = workspace.plan.block_grid()
    connectivity = workspace.plan.resolved.connectivity
    missing = set(workspace.state(output.volume).missing)
    here = workspace.load(output, kind.planes(number))
    rows = [np.empty((_PAIR_ROWS, 0), np.uint64)]
    for neighbor, direction in grid.iter_forward_neighbors(number, connectivity):
        if neighbor in missing:
            continue
        there = workspace.load(output, kind.planes(neighbor))
        near, far = components.seam_keys(direction)
        pairs = components.pair_across_seam(
            here[near],
            components.plane_box(grid[number], near),
            there[far],
            components.plane_box(grid[neighbor], far),
            connectivity,
        )
        rows.append(np.insert(pairs, 0, neighbor, axis=1).astype(np.uint64).T)
    workspace.save_rows(output, kind.seams(number), np.concatenate(rows, axis=1))
    return OutputState()


def fill_block(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the mask of one block with its small holes filled."""
    core = workspace.plan.block_grid()[number]
    mask = workspace.array(HOLES.mask(workspace), output).read(core)
    holes = workspace.array(HOLES.provisional, output).read(core)
    (small,) = workspace.load_rows(output, HOLES.table(number), 1)
    filled = components.relabel(holes, small, np.dtype(np.uint8))
    workspace.write("mask", output, core, mask | filled)
    return OutputState()


def relabel_block(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Write the final ids of one block to the target."""
    core = workspace.plan.block_grid()[number]
    provisional = workspace.array(OBJECTS.provisional, output).read(core)
    (table,) = workspace.load_rows(output, OBJECTS.table(number), 1)
    dtype = components.label_dtype(workspace.plan.volume_shape)
    labels = components.relabel(provisional, table, dtype)
    if OBJECTS.are_split(workspace):
        put_parts(workspace, output, number, labels)
    workspace.write("labels", output, core, labels)
    return OutputState()


# -- volumes


def join_objects(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Join all fragments of an output into objects, and write the final id of each fragment."""
    volume = _Fragments(workspace, output, OBJECTS)
    if OBJECTS.are_split(workspace):
        return _deal_objects(workspace, output, volume)
    min_size = workspace.plan.resolved.min_size
    final = components.join_fragments(volume.fragments, volume.iter_pairs(), min_size=min_size)
    volume.write_tables(final, OBJECTS.table)
    return OutputState(
        n_objects=int(final.max(initial=0)),
        sizes=ObjectSizes.of(final, volume.fragments.size, min_size),
        n_fragments=len(volume.fragments),
    )


def _deal_objects(workspace: Workspace, output: Output, volume: "_Fragments") -> OutputState:
    """Join all fragments into whole objects, of any size, and deal them out to be split."""
    boxes = volume.read_boxes()
    ids = components.join_fragments(volume.fragments, volume.iter_pairs())
    volume.write_tables(ids, WHOLE_IDS.format)
    deal_objects(workspace, output, Objects.of(volume.fragments, boxes, ids))
    return OutputState(n_fragments=len(volume.fragments))


def join_holes(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Join the background's fragments, and write which belong to holes small enough to fill."""
    volume = _Fragments(workspace, output, HOLES)
    max_size = workspace.plan.resolved.fill_holes
    small = components.fill_table(volume.fragments, volume.iter_pairs(), max_size)
    volume.write_tables(small.view(np.uint8), HOLES.table)
    return OutputState(n_fragments=len(volume.fragments))


class _Fragments:
    """The fragments of one output of a volume, in one table: those of a block follow each other."""

    def __init__(self, workspace: Workspace, output: Output, kind: Kind) -> None:
        self._workspace = workspace
        self._output = output
        self._kind = kind
        self._blocks = workspace.present_blocks(output)
        # Where the rows of each block begin.
        self._offsets = self._read_offsets()
        self._require_memory()
        self.fragments = self._read_fragments()

    def _read_offsets(self) -> Indices:
        """Count the fragments of each block by the sizes of their objects.

        The fragments then go where they belong as they are read, and are in memory once.
        """
        counts = np.zeros(len(self._workspace.plan.block_grid()), np.int64)

        def count(number: int) -> int:
            name = self._kind.fragments(number)
            return self._workspace.count_rows(self._output, name, _FRAGMENT_ROWS)

        for number, n_fragments in read_ahead(count, self._blocks, _N_AHEAD):
            counts[number] = n_fragments
        return components.offsets_of(counts.tolist())

    def _require_memory(self) -> None:
        n_fragments = int(self._offsets[-1])
        needed = IDLE_BYTES + components.join_bytes(n_fragments, 2 * components.JOIN_BATCH)
        if self._kind.are_split(self._workspace):
            needed += n_fragments * SPLIT_JOIN_BYTES
        memory_bytes = self._workspace.plan.memory_bytes
        if needed > memory_bytes:
            raise SettingsError(
                f"joining {n_fragments:,} fragments of volume {self._output.volume} needs "
                f"{needed / 1e9:.1f} GB, but a worker may use only {memory_bytes / 1e9:.1f} GB; "
                "run the same command again with more --memory"
            )

    def _rows_of(self, number: int) -> slice:
        return slice(self._offsets[number], self._offsets[number + 1])

    def _read_fragments(self) -> components.Fragments:
        table = np.empty((_FRAGMENT_ROWS, self._offsets[-1]), np.uint64)
        self._read_rows(self._kind.fragments, table)
        return components.Fragments(*table)

    def read_boxes(self) -> NDArray[np.uint32]:
        """Return the bounding box of each fragment, in columns ``(6, n)``."""
        # Half the memory of what is stored: no axis has more voxels.
        table = np.empty((BOX_ROWS, self._offsets[-1]), np.uint32)
        self._read_rows(self._kind.boxes, table)
        return table

    def _read_rows(self, name: Callable[[int], str], table: Array) -> None:
        """Read the rows of all blocks into a table."""

        def read(number: int) -> NDArray[np.uint64]:
            return self._workspace.load_rows(self._output, name(number), len(table))

        for number, rows in read_ahead(read, self._blocks, _N_AHEAD):
            table[:, self._rows_of(number)] = rows

    def iter_pairs(self) -> Iterator[Indices]:
        """Yield the pairs of each block's seams, as rows of the table."""

        def read(number: int) -> NDArray[np.uint64]:
            name = self._kind.seams(number)
            return self._workspace.load_rows(self._output, name, _PAIR_ROWS)

        for number, (neighbor, here, there) in read_ahead(read, self._blocks, _N_AHEAD):
            # Local ids start at 1, rows of the table at 0.
            rows = np.stack([here.astype(np.int64), there.astype(np.int64)], axis=1) - 1
            rows[:, 0] += self._offsets[number]
            rows[:, 1] += self._offsets[neighbor.astype(np.int64)]
            yield rows

    def write_tables(self, values: Array, name: Callable[[int], str]) -> None:
        """Write the part of each block of a table with a value for each fragment."""

        def write(number: int) -> None:
            rows = values[self._rows_of(number)].astype(np.uint64)[None]
            self._workspace.save_rows(self._output, name(number), rows)

        for _ in read_ahead(write, self._blocks, _N_AHEAD):
            pass
