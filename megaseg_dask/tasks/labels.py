"""Stages about labels, and about holes to fill: both are components of a volume that is cut into blocks.

Each block is labelled by itself, seams say which fragments touch, and one task
a volume joins them. Blocks that are missing take no part: nothing is known of
their voxels, and no label is given there.
"""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask import labelling, products
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan import Plan
from megaseg_dask.tasks.scores import READERS

Array = NDArray[Any]
Summary = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Components:
    """What is labelled: the voxels of a mask, or those around it."""

    folder: str
    provisional: str
    inverted: bool

    def mask(self, plan: Plan) -> str:
        """Return the kind of mask that they are components of."""
        return products.first_mask(plan) if self.inverted else "mask"


OBJECTS = Components("objects", "fragments", inverted=False)
HOLES = Components("holes", "holes", inverted=True)


def label_block(plan: Plan, volume: int, number: int, *, of: Components = OBJECTS) -> Summary:
    """Label one block by itself; write its provisional ids, boundary planes and fragment table."""
    core = plan.block_grid()[number]
    mask = products.product(plan, of.mask(plan), volume).read(core)
    labels = labelling.label_block(mask == 0 if of.inverted else mask, plan.options.connectivity)
    fragments = labelling.list_fragments(labels, core, plan.volume_shape)
    products.write(plan, of.provisional, volume, core, labels)
    products.save(plan, volume, f"{of.folder}/planes/{number}.npz", labelling.boundary_planes(labels))
    products.save(plan, volume, f"{of.folder}/fragments/{number}.npy", np.stack([fragments.first, fragments.size]))
    return {}


def pair_seams(plan: Plan, volume: int, number: int, *, of: Components = OBJECTS) -> Summary:
    """Write which fragments of a block touch which of its later neighbours: rows of neighbour, id here, id there."""
    grid, connectivity = plan.block_grid(), plan.options.connectivity
    missing = set(products.read_state(plan, volume)["missing"])
    here, rows = products.load(plan, volume, f"{of.folder}/planes/{number}.npz"), [np.empty((0, 3), np.uint64)]
    for neighbour, direction in grid.iter_forward_neighbours(number, connectivity):
        if neighbour in missing:
            continue
        there = products.load(plan, volume, f"{of.folder}/planes/{neighbour}.npz")
        near, far = labelling.seam_keys(direction)
        pairs = labelling.pair_across_seam(
            here[near], labelling.plane_box(grid[number], near), there[far], labelling.plane_box(grid[neighbour], far),
            connectivity,
        )  # fmt: skip
        rows.append(np.insert(pairs, 0, neighbour, axis=1).astype(np.uint64))
    products.save(plan, volume, f"{of.folder}/seams/{number}.npy", np.concatenate(rows))
    return {}


def join_objects(plan: Plan, volume: int, _: int) -> Summary:
    """Join all fragments of a volume into objects, and write the final id of each fragment."""
    fragments, pairs, offsets = _read_fragments(plan, volume, OBJECTS)
    final = labelling.join_fragments(fragments, pairs, min_size=plan.options.min_size)
    _write_tables(plan, volume, OBJECTS, final, offsets)
    return {"n_objects": int(final.max(initial=0)), "n_fragments": len(fragments)}


def join_holes(plan: Plan, volume: int, _: int) -> Summary:
    """Join the background's fragments, and write which belong to holes small enough to fill."""
    fragments, pairs, offsets = _read_fragments(plan, volume, HOLES)
    small = labelling.fill_table(fragments, pairs, plan.options.fill_holes)
    _write_tables(plan, volume, HOLES, small.view(np.uint8), offsets)
    return {"n_fragments": len(fragments)}


def _present(plan: Plan, volume: int) -> list[int]:
    missing = set(products.read_state(plan, volume)["missing"])
    return [number for number in range(len(plan.block_grid())) if number not in missing]


def _read_fragments(
    plan: Plan, volume: int, of: Components
) -> tuple[labelling.Fragments, NDArray[np.int64], NDArray[np.int64]]:
    """Return the fragments of a volume, pairs of their rows that touch, and where each block's rows start."""
    present = _present(plan, volume)
    counts = np.zeros(len(plan.block_grid()), np.int64)
    with ThreadPoolExecutor(READERS) as pool:

        def read(kind: str) -> list[Array]:
            return list(pool.map(lambda n: products.load(plan, volume, f"{of.folder}/{kind}/{n}.npy"), present))

        tables = read("fragments")
        counts[present] = [table.shape[1] for table in tables]
        offsets = labelling.offsets_of(counts.tolist())
        rows = read("seams")
    n_fragments, n_pairs = int(offsets[-1]), sum(map(len, rows))
    needed = labelling.join_bytes(n_fragments, n_pairs)
    if needed > plan.memory_bytes:
        raise SettingsError(
            f"joining {n_fragments:,} fragments of volume {volume} needs {needed / 1e9:.1f} GB, and a worker may use "
            f"{plan.memory_bytes / 1e9:.1f} GB: run the same command again with more --memory"
        )
    pairs = np.empty((n_pairs, 2), np.int64)
    done = 0
    for number, touching in zip(present, rows, strict=True):
        part = pairs[done : done + len(touching)]
        # Local ids start at 1, rows of the table at 0.
        part[:, 0] = touching[:, 1].astype(np.int64) + (offsets[number] - 1)
        part[:, 1] = touching[:, 2].astype(np.int64) + (offsets[touching[:, 0].astype(np.int64)] - 1)
        done += len(touching)
    del rows
    first, size = np.empty(n_fragments, np.uint64), np.empty(n_fragments, np.uint64)
    for number, table in zip(present, tables, strict=True):
        first[offsets[number] : offsets[number + 1]], size[offsets[number] : offsets[number + 1]] = table
    return labelling.Fragments(first, size), pairs, offsets


def _write_tables(plan: Plan, volume: int, of: Components, table: Array, offsets: NDArray[np.int64]) -> None:
    def write(number: int) -> None:
        rows = table[offsets[number] : offsets[number + 1]]
        products.save(plan, volume, f"{of.folder}/tables/{number}.npy", rows)

    # Threads of a pool know nothing of the run's holder, unless they are told.
    context = copy_context()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda number: context.copy().run(write, number), _present(plan, volume)))


def fill_block(plan: Plan, volume: int, number: int) -> Summary:
    """Write the mask of one block with its small holes filled."""
    core = plan.block_grid()[number]
    mask = products.product(plan, "unfilled", volume).read(core)
    holes = products.product(plan, "holes", volume).read(core)
    small = products.load(plan, volume, f"holes/tables/{number}.npy")
    filled = labelling.relabel(holes, small, np.dtype(np.uint8))
    products.write(plan, "mask", volume, core, mask | filled)
    return {}


def relabel_block(plan: Plan, volume: int, number: int) -> Summary:
    """Write the final ids of one block to the target."""
    core = plan.block_grid()[number]
    provisional = products.product(plan, "fragments", volume).read(core)
    table = products.load(plan, volume, f"objects/tables/{number}.npy")
    labels = labelling.relabel(provisional, table, labelling.label_dtype(plan.volume_shape))
    products.write(plan, "labels", volume, core, labels)
    return {}
