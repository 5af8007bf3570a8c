"""Stages of measurements: sums of the objects in one block, and of all blocks of a volume."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask import products
from megaseg_dask.measurements import Sums, measure_block, merge
from megaseg_dask.plan import Plan

Array = NDArray[Any]

# Blocks whose sums are in memory or on their way at a time.
_READ_AHEAD = 16


def measure_objects(plan: Plan, volume: int, number: int) -> dict[str, Any]:
    """Write the sums of one block's objects, from their final ids and the segmented channel."""
    core = plan.block_grid()[number]
    labels = products.product(plan, "labels", volume).read(core)
    intensity = products.source(plan, volume).read(core.shifted(plan.region.start))
    products.save(plan, volume, f"sums/{number}.npz", measure_block(labels, intensity, core).arrays())
    return {}


def collect_objects(plan: Plan, volume: int, _: int) -> dict[str, Any]:
    """Add the sums of all blocks, in grid order, and write those of the volume."""
    missing = set(products.read_state(plan, volume)["missing"])
    blocks = [number for number in range(len(plan.block_grid())) if number not in missing]
    parts = products.read_ahead(
        lambda n: Sums(**products.load(plan, volume, f"sums/{n}.npz")),
        blocks,
        _READ_AHEAD,
    )
    return write_sums(plan, volume, merge(sums for _, sums in parts))


def write_sums(plan: Plan, volume: int, sums: Sums) -> dict[str, Any]:
    """Write the sums of a volume's objects where they stay until the tables are written."""
    buffer = io.BytesIO()
    np.savez(buffer, **sums.arrays())  # type: ignore[arg-type]
    products.require_holder(plan)
    products.sums_folder(plan).put(f"{volume}.npz", buffer.getvalue())
    return {}
