"""Stages that take objects apart: each object is split by one task, wherever its voxels are.

The join deals the objects out. A task writes the parts of its objects as
pieces, one set for each block that has voxels of them. Once all parts are
known they are numbered, and the stage ``relabel`` puts the pieces into blocks.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms import components, splitting
from megaseg_dask.algorithms.components import Fragments
from megaseg_dask.algorithms.doubts import ObjectSizes
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import read_ahead
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.state import OutputState
from megaseg_dask.run.workspace import Workspace

Rows = NDArray[np.uint64]
Voxels = NDArray[np.uint32]

# Objects that are left whole and named; all are counted.
_MAX_NAMED = 10
# Blocks whose tables are kept beside an object that lies in several.
_N_TABLES = 32
# Voxels that are put into a block at a time.
_VOXELS_AT_ONCE = 2**22
_N_AHEAD = 16

# Names of what tasks leave for each other. Rows are the fields of one entry: id and box of a dealt
# object; first voxel and size of an object; object, first voxel and size of a part; block and
# number of a set of pieces.
WHOLE_IDS = "objects/whole/{}"
TABLES = "objects/tables/{}"
_DEALT = "objects/dealt/{}"
_DEALT_ROWS = 7
_TOO_LARGE = "objects/too-large"
_OBJECTS = "objects/objects"
_OBJECT_ROWS = 2
_PARTS = "objects/parts/{}"
_PART_ROWS = 3
_SETS = "objects/sets/{}"
_SET_ROWS = 2
_PART_IDS = "objects/part-ids/{}"
_CUTS = "objects/cuts/{}"
_PIECES = "objects/pieces/{block}/{task}-{number}.npz"


def deal_objects(workspace: Workspace, output: Output, objects: splitting.Objects) -> None:
    """Write which objects each task splits, and which are too large for any."""
    plan = workspace.plan
    depth_um = plan.resolved.split_depth
    assert depth_um is not None
    boxes = objects.boxes
    spacing_um = plan.target_image.spacing_um
    chosen = splitting.may_split(boxes, plan.volume_shape, spacing_um, depth_um)
    fits = splitting.padded_voxels(boxes) <= plan.split_voxels
    ids = np.arange(1, len(boxes) + 1)
    rows = np.column_stack([ids, boxes]).astype(np.uint64)
    workspace.save_rows(output, _TOO_LARGE, rows[chosen & ~fits].T)
    workspace.save_rows(output, _OBJECTS, np.stack([objects.first, objects.size]))
    rows = rows[chosen & fits]
    present = workspace.present_blocks(output)
    task = splitting.deal(boxes[chosen & fits], plan.block_grid(), present)
    order = np.argsort(task, kind="stable")
    numbers = np.array(present, np.int64)
    begin = np.searchsorted(task[order], numbers)
    end = np.searchsorted(task[order], numbers, side="right")

    def write(number: int) -> None:
        of_task = order[begin[number] : end[number]]
        workspace.save_rows(output, _DEALT.format(present[number]), rows[of_task].T)

    for _ in read_ahead(write, range(len(present)), _N_AHEAD):
        pass


# -- the stage ``split``


def split_objects(workspace: Workspace, output: Output, number: int) -> OutputState:
    """Split the objects that were dealt to a block, and write the parts of those that come apart.

    Objects inside the block come first: its ids are read once for all of them.
    """
    plan = workspace.plan
    depth_um = plan.resolved.split_depth
    assert depth_um is not None
    dealt = workspace.load_rows(output, _DEALT.format(number), _DEALT_ROWS).astype(np.int64)
    objects = [(int(row[0]), _box_of(row[1:])) for row in dealt.T]
    pieces = _Pieces(workspace, output, number)
    parts_of_all = [np.empty((_PART_ROWS, 0), np.uint64)]
    for object_id, box, mask in _iter_masks(workspace, output, number, objects):
        at_end = [
            (start == 0, stop == extent)
            for start, stop, extent in zip(box.start, box.stop, plan.volume_shape, strict=True)
        ]
        spacing_um = plan.target_image.spacing_um
        parts = splitting.split_object(mask, at_end, spacing_um, depth_um)
        if parts is None:
            continue
        found = splitting.list_parts(parts, box, plan.volume_shape)
        pieces.add(parts, box)
        of_object = np.full(len(found), object_id, np.uint64)
        parts_of_all.append(np.stack([of_object, found.first, found.size]))
    pieces.write()
    workspace.save_rows(output, _PARTS.format(number), np.concatenate(parts_of_all, axis=1))
    workspace.save_rows(output, _SETS.format(number), pieces.sets)
    return OutputState()


def _box_of(row: NDArray[np.int64]) -> Box:
    start, stop = row.reshape(2, -1).tolist()
    return Box(tuple(start), tuple(stop))


def _iter_masks(
    workspace: Workspace, output: Output, number: int, objects: list[tuple[int, Box]]
) -> Iterator[tuple[int, Box, NDArray[np.bool_]]]:
    """Yield each object's id, box and mask in it."""
    core = workspace.plan.block_grid()[number]
    inside = [(object_id, box) for object_id, box in objects if box in core]
    if inside:
        ids = _read_ids(workspace, output, number, core)
        for object_id, box in inside:
            yield object_id, box, ids[box.within(core).slices] == object_id
        del ids
    read = _Reader(workspace, output)
    for object_id, box in objects:
        if box not in core:
            yield object_id, box, read.mask(object_id, box)


def _read_ids(
    workspace: Workspace, output: Output, number: int, box: Box
) -> NDArray[np.unsignedinteger]:
    """Return the ids of whole objects in a box that lies in one block."""
    fragments = workspace.array("fragments", output).read(box)
    (table,) = workspace.load_rows(output, WHOLE_IDS.format(number), 1)
    dtype = components.label_dtype(workspace.plan.volume_shape)
    return components.relabel(fragments, table, dtype)


class _Reader:
    """Reads objects that lie in several blocks; in a block that is missing there is nothing."""

    def __init__(self, workspace: Workspace, output: Output) -> None:
        self._grid = workspace.plan.block_grid()
        self._fragments = workspace.array("fragments", output)
        self._present = set(workspace.present_blocks(output))

        @lru_cache(_N_TABLES)
        def table(number: int) -> Rows:
            (ids,) = workspace.load_rows(output, WHOLE_IDS.format(number), 1)
            return np.asarray(ids)

        self._table = table

    def mask(self, object_id: int, box: Box) -> NDArray[np.bool_]:
        """Return where an object is in its box."""
        mask = np.zeros(box.shape, np.bool_)
        for position in self._grid.iter_overlapping(box):
            number = self._grid.index(position)
            if number not in self._present:
                continue
            common = self._grid.core(position) & box
            # Fragments of the object alone: of a large block these are few.
            is_of_object = np.concatenate([[False], self._table(number) == object_id])
            mask[common.within(box).slices] = is_of_object[self._fragments.read(common)]
        return mask


class _Pieces:
    """The parts that a task found, packed for the blocks in which their voxels are.

    They are written in sets, so that voxels of a block at most are in memory, and of one object.
    """

    def __init__(self, workspace: Workspace, output: Output, task: int) -> None:
        self._workspace = workspace
        self._output = output
        self._task = task
        self._grid = workspace.plan.block_grid()
        self._n_parts = 0
        self._n_voxels = 0
        self._n_sets = 0
        self._waiting: dict[int, list[tuple[Voxels, Voxels]]] = defaultdict(list)
        self._sets: list[tuple[int, int]] = []

    @property
    def sets(self) -> Rows:
        """Block and number of each set."""
        return np.array(self._sets, np.uint64).reshape(-1, _SET_ROWS).T

    def add(self, parts: splitting.Parts, box: Box) -> None:
        """Add the parts of an object in its box; they are numbered on from those before."""
        for position in self._grid.iter_overlapping(box):
            core = self._grid.core(position)
            common = core & box
            values = parts[common.within(box).slices]
            places = np.nonzero(values)
            if not len(places[0]):
                continue
            offset = common.within(core).start
            in_block = tuple(p + o for p, o in zip(places, offset, strict=True))
            index = np.ravel_multi_index(in_block, core.shape).astype(np.uint32)
            # A task's parts are numbered from 0.
            number = (values[places] + (self._n_parts - 1)).astype(np.uint32)
            self._waiting[self._grid.index(position)].append((index, number))
            self._n_voxels += len(index)
        self._n_parts += int(parts.max())
        if self._n_voxels > self._grid[0].size:
            self.write()

    def write(self) -> None:
        """Write what is waiting."""
        for block, pieces in self._waiting.items():
            name = _PIECES.format(block=block, task=self._task, number=self._n_sets)
            voxels, parts = map(np.concatenate, zip(*pieces, strict=True))
            self._workspace.save(self._output, name, {"voxels": voxels, "parts": parts})
            self._sets.append((block, self._n_sets))
        self._n_sets += 1
        self._n_voxels = 0
        self._waiting.clear()


# -- the stage ``rank``


def rank_objects(workspace: Workspace, output: Output, _: int) -> OutputState:
    """Number whole objects and parts by first voxel, and write the ids of both for each block."""
    present = workspace.present_blocks(output)
    parts = [np.empty((_PART_ROWS, 0), np.uint64)]
    sets: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def read(number: int) -> tuple[Rows, Rows]:
        of_task = workspace.load_rows(output, _PARTS.format(number), _PART_ROWS)
        return of_task, workspace.load_rows(output, _SETS.format(number), _SET_ROWS)

    for number, (of_task, sets_of_task) in read_ahead(read, present, _N_AHEAD):
        parts.append(of_task)
        for block, set_number in sets_of_task.T.tolist():
            sets[block].append((number, set_number))
    counts = [rows.shape[1] for rows in parts[1:]]
    split, first, size = np.concatenate(parts, axis=1)
    objects = Fragments(*workspace.load_rows(output, _OBJECTS, _OBJECT_ROWS))
    min_size = workspace.plan.resolved.min_size
    ids, part_ids = splitting.rank(objects, split, Fragments(first, size), min_size=min_size)
    offsets = components.offsets_of(counts)

    def write(place: int) -> None:
        number = present[place]
        of_task = part_ids[offsets[place] : offsets[place + 1]]
        workspace.save_rows(output, _PART_IDS.format(number), of_task[None])
        rows = np.array(sets[number], np.uint64).reshape(-1, _SET_ROWS).T
        workspace.save_rows(output, _CUTS.format(number), rows)
        (whole,) = workspace.load_rows(output, WHOLE_IDS.format(number), 1)
        table = ids[whole.astype(np.int64) - 1]
        workspace.save_rows(output, TABLES.format(number), table[None])

    for _done in read_ahead(write, range(len(present)), _N_AHEAD):
        pass
    object_ids, *boxes = workspace.load_rows(output, _TOO_LARGE, _DEALT_ROWS)
    too_large = np.stack([ids[object_ids.astype(np.int64) - 1], *boxes])
    kept = too_large[:, too_large[0] > 0]
    n_whole = int(kept.shape[1])
    highest = max(int(ids.max(initial=0)), int(part_ids.max(initial=0)))
    return OutputState(
        n_objects=highest,
        sizes=_sizes_of(objects, ids, split, Fragments(first, size), part_ids, min_size),
        n_whole=n_whole or None,
        whole=tuple(tuple(row) for row in kept.T[:_MAX_NAMED].tolist()),
    )


def _sizes_of(
    objects: Fragments,
    ids: NDArray[Any],
    split: Rows,
    parts: Fragments,
    part_ids: NDArray[Any],
    min_size: int,
) -> ObjectSizes:
    """Return what the sizes of whole objects and of parts say; an object that is split is none."""
    is_whole = np.ones(len(objects), np.bool_)
    is_whole[np.unique(split).astype(np.int64) - 1] = False
    all_ids = np.concatenate([ids[is_whole], part_ids])
    sizes = np.concatenate([objects.size[is_whole], parts.size])
    return ObjectSizes.of(all_ids, sizes, min_size)


# -- in the stage ``relabel``


def put_parts(workspace: Workspace, output: Output, number: int, labels: NDArray[Any]) -> None:
    """Put the final ids of parts into the labels of a block."""
    flat = labels.reshape(-1)
    cuts = workspace.load_rows(output, _CUTS.format(number), _SET_ROWS)
    for task, set_number in cuts.T.tolist():
        (ids,) = workspace.load_rows(output, _PART_IDS.format(task), 1)
        name = _PIECES.format(block=number, task=task, number=set_number)
        pieces = workspace.load(output, name)
        for start in range(0, len(pieces["voxels"]), _VOXELS_AT_ONCE):
            some = slice(start, start + _VOXELS_AT_ONCE)
            flat[pieces["voxels"][some]] = ids[pieces["parts"][some]]
