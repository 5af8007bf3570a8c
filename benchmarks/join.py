"""One volume labelled by blocks, by dask-image and by scikit-image; and large joins of fragments.

Each variant runs in a fresh process, on the same mask, which it finds in
memory; ours works on one thread, dask-image on all cores. Every answer is
checked against scikit-image's: ours id for id, dask-image's after its ids are
put in order.
"""

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks.machine import describe, keep
from megaseg_dask.algorithms import components
from megaseg_dask.algorithms.geometry import BlockGrid, Shape
from megaseg_dask.run.tasks.process_memory import peak_bytes, release, reset_peak

T = TypeVar("T")

VARIANTS = ("ours", "dask_image", "whole", "cc3d")
BLOCK = 128
# What a variant may take before it counts as failed; processor seconds, since others may use the
# machine too.
LIMIT_CPU_S = 100
LIMIT_BYTES = 10 * 10**9

# Site percolation in blocks so small that many fragments touch a seam: density and connectivity of
# a tile. By faces 39 % touch one, with 0.30 pairs a fragment; by corners 52 % and 0.40.
TABLES = {"faces": (0.3, 1), "corners": (0.08, 3)}
TILE = (64, 64, 64)
TILE_BLOCK = (8, 8, 8)


# -- our path, without files


def label_blocks(
    labels: np.ndarray, mask: np.ndarray, block: Shape, connectivity: int
) -> components.Fragments:
    """Write provisional ids of each block into ``labels``; return the fragments of all blocks."""
    tables = []
    for core in BlockGrid(mask.shape, block):
        found = components.label_block(mask[core.slices], connectivity)
        labels[core.slices] = found
        tables.append(components.list_fragments(found, core, mask.shape))
    return components.Fragments(
        np.concatenate([t.first for t in tables]), np.concatenate([t.size for t in tables])
    )


def pair_blocks(
    labels: np.ndarray, block: Shape, connectivity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of rows that touch across any seam, int64, and each block's first row."""
    grid = BlockGrid(labels.shape, block)
    offsets = components.offsets_of([int(labels[core.slices].max()) for core in grid])
    pairs = [np.empty((0, 2), np.int64)]
    for i, core in enumerate(grid):
        here = components.boundary_planes(labels[core.slices])
        for j, direction in grid.iter_forward_neighbors(i, connectivity):
            near, far = components.seam_keys(direction)
            boxes = components.plane_box(core, near), components.plane_box(grid[j], far)
            found = components.pair_across_seam(
                here[near], boxes[0], labels[boxes[1].slices], boxes[1], connectivity
            )
            pairs.append(found.astype(np.int64) + np.array([offsets[i], offsets[j]]) - 1)
    return np.concatenate(pairs), offsets


def label_ours(mask: np.ndarray, block: int) -> tuple[np.ndarray, dict[str, float]]:
    """Label, pair, join and relabel in place; and the seconds of each."""
    labels = np.empty(mask.shape, np.uint32)
    clock = [time.perf_counter()]
    fragments = label_blocks(labels, mask, (block,) * 3, 1)
    clock.append(time.perf_counter())
    pairs, offsets = pair_blocks(labels, (block,) * 3, 1)
    clock.append(time.perf_counter())
    final = components.join_fragments(fragments, pairs)
    clock.append(time.perf_counter())
    for i, core in enumerate(BlockGrid(mask.shape, (block,) * 3)):
        table = final[offsets[i] : offsets[i + 1]]
        labels[core.slices] = components.relabel(labels[core.slices], table, labels.dtype)
    clock.append(time.perf_counter())
    seconds = dict(
        zip(
            ("label_s", "seams_s", "join_s", "relabel_s"),
            np.diff(clock).round(2).tolist(),
            strict=True,
        )
    )
    return labels, {"n_fragments": len(fragments), "n_pairs": len(pairs), **seconds}


# -- the others


def label_dask_image(mask: np.ndarray, block: int) -> tuple[np.ndarray, dict[str, float]]:
    """dask-image on the same blocks, computed by Dask's threads."""
    import dask.array as da
    from dask_image.ndmeasure import label

    return label(da.from_array(mask, chunks=block))[0].compute(), {}


def label_whole(mask: np.ndarray, block: int) -> tuple[np.ndarray, dict[str, float]]:
    """scikit-image on the whole volume."""
    from skimage.measure import label

    return label(mask, connectivity=1), {}


def label_cc3d(mask: np.ndarray, block: int) -> tuple[np.ndarray, dict[str, float]]:
    """cc3d on the whole volume, which we use for a block."""
    import cc3d

    return cc3d.connected_components(mask, connectivity=6), {}


def renumber(labels: np.ndarray) -> np.ndarray:
    """Return a table from any ids to 1..n in order of first voxels; id 0 stays."""
    first = np.full(int(labels.max()) + 1, labels.size, np.int64)
    for z, plane in enumerate(labels):
        np.minimum.at(first, plane.ravel(), np.arange(z * plane.size, (z + 1) * plane.size))
    used = np.flatnonzero((first < labels.size) & (np.arange(len(first)) > 0))
    table = np.zeros(len(first), np.uint32)
    table[used[np.argsort(first[used])]] = np.arange(1, len(used) + 1)
    return table


def digest(labels: np.ndarray, table: np.ndarray | None = None) -> str:
    """Return a digest of the voxels as uint32, through a table of ids if there is one."""
    state = hashlib.sha256()
    for plane in labels:
        ids = plane
        if table is not None:
            ids = table[plane]
        state.update(ids.astype("<u4").tobytes())
    return state.hexdigest()


# -- one measurement, in a process of its own


def spend(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Return the result of ``work``, its wall time, and the processor time of all threads.

    The measurement of peak memory starts again.
    """
    reset_peak()
    wall = time.perf_counter()
    cpu = time.process_time()
    result = work()
    wall_s = time.perf_counter() - wall
    cpu_s = time.process_time() - cpu
    return result, {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2)}


def measure_labels(variant: str, path: Path, block: int) -> dict[str, Any]:
    """Label a saved mask; memory is what comes on top of the mask."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S + 5))
    label = {
        "ours": label_ours,
        "dask_image": label_dask_image,
        "whole": label_whole,
        "cc3d": label_cc3d,
    }[variant]
    mask = np.load(path)
    label(mask[:16, :16, :16], 8)  # what the libraries load stays out of the measurement
    release()
    before = psutil.Process().memory_info().rss
    (labels, details), spent = spend(lambda: label(mask, block))
    # dask-image gives other ids to the same objects.
    table = renumber(labels) if variant == "dask_image" else None
    return {
        **spent,
        "peak_bytes": peak_bytes() - before,
        "dtype": str(labels.dtype),
        "n_objects": int(labels.max()),
        "digest": digest(labels, table),
        **details,
    }


@dataclass(frozen=True)
class Tile:
    """A random mask, its fragments, and their pairs: within the tile, and to an equal one below."""

    mask: np.ndarray
    fragments: components.Fragments
    within: np.ndarray
    below: np.ndarray

    @classmethod
    def of(cls, kind: str) -> "Tile":
        """Make the tile of ``faces`` or ``corners``."""
        density, connectivity = TABLES[kind]
        mask = np.random.default_rng(0).random(TILE) < density
        labels = np.empty((2 * TILE[0], *TILE[1:]), np.uint32)
        both = label_blocks(labels, np.concatenate([mask, mask]), TILE_BLOCK, connectivity)
        pairs, _ = pair_blocks(labels, TILE_BLOCK, connectivity)
        n = len(both) // 2
        pairs = pairs[pairs[:, 0] < n]
        inside = pairs[:, 1] < n
        return cls(
            mask, components.Fragments(both.first[:n], both.size[:n]), pairs[inside], pairs[~inside]
        )

    def stack(self, n_tiles: int) -> tuple[components.Fragments, np.ndarray]:
        """Return fragments and pairs of this many tiles, stacked along z."""
        tiles = np.arange(n_tiles)[:, None]
        first = self.fragments.first + tiles.astype(np.uint64) * np.uint64(self.mask.size)
        rows = tiles[..., None] * len(self.fragments)
        middle = n_tiles * len(self.within)
        pairs = np.empty((middle + (n_tiles - 1) * len(self.below), 2), np.int64)
        np.add(self.within, rows, out=pairs[:middle].reshape(n_tiles, -1, 2))
        np.add(self.below, rows[:-1], out=pairs[middle:].reshape(n_tiles - 1, -1, 2))
        return components.Fragments(first.ravel(), np.tile(self.fragments.size, n_tiles)), pairs


def measure_table(kind: str, n_fragments: int) -> dict[str, Any]:
    """Join a table alone; memory includes the table, the pairs and the ids."""
    tile = Tile.of(kind)
    # What the libraries load stays out of the measurement.
    components.join_fragments(*tile.stack(2))
    release()
    before = psutil.Process().memory_info().rss
    fragments, pairs = tile.stack(-(-n_fragments // len(tile.fragments)))
    release()
    final, spent = spend(lambda: components.join_fragments(fragments, pairs, min_size=2))
    return {
        "n_fragments": len(fragments),
        "n_pairs": len(pairs),
        "n_objects_of_2_voxels": int(final.max()),
        **spent,
        "peak_bytes": peak_bytes() - before,
        "projected_bytes": components.join_bytes(len(fragments), len(pairs)),
        "input_bytes": sum(a.nbytes for a in (fragments.first, fragments.size, pairs)),
    }


# -- all of them, side by side


def require_exact_tables(kind: str) -> None:
    """Check three tiles against scikit-image: a fragment has the id of its first voxel."""
    from skimage.measure import label

    tile = Tile.of(kind)
    fragments, pairs = tile.stack(3)
    expected = label(np.concatenate([tile.mask] * 3), connectivity=TABLES[kind][1])
    final = components.join_fragments(fragments, pairs)
    assert np.array_equal(final, expected.ravel()[fragments.first]), (
        f"{kind}: ids are not scikit-image's"
    )


def random_mask(kind: str, extent: int) -> np.ndarray:
    """Return ``percolation`` or ``blobs``.

    Percolation has sites at 0.3, just below the threshold of 6 neighbors; blobs are
    round and fill 18 %.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    if kind == "percolation":
        return np.stack([rng.random((extent, extent), np.float32) < 0.3 for _ in range(extent)])
    field = gaussian_filter(rng.standard_normal((extent,) * 3, np.float32), 4, truncate=3)
    return field > 0.9 * field.std()


def run_fresh(*arguments: object) -> dict[str, Any]:
    """Run one measurement in a fresh process; a failure is a result too."""
    command = [sys.executable, "-m", "benchmarks.join", *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"no result after {LIMIT_CPU_S} s of processor time"}
    if done.returncode:
        return {
            "failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        }
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(kind: str, extents: tuple[int, ...], block: int) -> dict[str, dict[str, Any]]:
    """Return what each variant took on one kind of mask, at each extent until it fails."""
    results: dict[str, dict[str, Any]] = {}
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.npy"
        for extent in extents:
            np.save(path, random_mask(kind, extent))
            found = {v: run_fresh("labels", v, path, block) for v in VARIANTS if v not in failed}
            digests = {result.pop("digest") for result in found.values() if "digest" in result}
            assert "failed" not in found["ours"], found["ours"]
            assert len(digests) == 1, f"{kind} {extent}: the labels differ: {found}"
            failed |= {variant for variant, result in found.items() if "failed" in result}
            results[f"{extent}x{extent}x{extent}"] = found
    return results


def measure(
    extents: tuple[int, ...] = (256, 384, 512),
    block: int = BLOCK,
    n_fragments: tuple[int, ...] = (10**6, 10**7, 10**8),
) -> dict[str, Any]:
    """Return seconds and peak memory of all variants on both masks, and of growing joins."""
    machine = describe()
    for package in ("dask-image", "scikit-image", "scipy"):
        machine[package] = version(package)
    joins = {}
    for kind in TABLES:
        require_exact_tables(kind)
    for kind in TABLES:
        joins[kind] = [run_fresh("table", kind, n) for n in n_fragments]
    return {
        "machine": machine,
        "block": [block] * 3,
        "connectivity": 1,
        "limits": {"cpu_s": LIMIT_CPU_S, "bytes": LIMIT_BYTES},
        "labels": {kind: compare(kind, extents, block) for kind in ("percolation", "blobs")},
        "join": joins,
    }


def main() -> None:
    """Run everything and keep it; or one measurement, which is how this module runs itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", nargs="*", help="labels VARIANT MASK BLOCK, or table KIND FRAGMENTS")
    match parser.parse_args().one:
        case ["labels", variant, path, block]:
            print(json.dumps(measure_labels(variant, Path(path), int(block))))
        case ["table", kind, n_fragments]:
            print(json.dumps(measure_table(kind, int(n_fragments))))
        case _:
            keep("join", measure())


if __name__ == "__main__":
    main()
