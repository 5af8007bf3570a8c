"""How volumes are cut: chunks and write units of arrays, and which blocks are worth trying.

A block owns its write units alone, at any block shape: two writers in one
shard or chunk would lose each other's voxels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from megaseg_dask.algorithms.geometry import PatchGrid, Shape

# Chunks suit viewers; shards keep the objects of a terabyte volume in the thousands.
CHUNK_SHAPE = (64, 128, 128)
SHARD_SHAPE = (128, 512, 512)

# Parts per axis that are tried when a block is chosen: 24^3 combinations take milliseconds.
_MAX_PARTS = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """Chunk and write unit of an array, ``(z, y, x)``; without shards they are the same."""

    chunk_shape: Shape
    write_unit: Shape


def write_layout(shape: Shape, block_shape: Shape, *, sharded: bool) -> Layout:
    """Return chunks that divide the block, and write units of whole chunks that divide it too.

    An axis that no good chunk divides gets one chunk per block. Where one block
    spans an axis, nothing else writes along it, and it is cut evenly: a rest of
    one plane would be stored and decoded as a whole chunk.
    """
    chunk = tuple(map(_chunk_extent, shape, block_shape, CHUNK_SHAPE))
    if not sharded:
        return Layout(chunk, chunk)
    return Layout(chunk, tuple(map(_unit_extent, shape, block_shape, chunk, SHARD_SHAPE)))


def _chunk_extent(extent: int, block: int, max_chunk: int) -> int:
    if block >= extent:
        return _even(extent, max_chunk)
    chunk = _divisor(block, max_chunk)
    if chunk < max_chunk // 4:
        return block
    return chunk


def _unit_extent(extent: int, block: int, chunk: int, max_unit: int) -> int:
    max_chunks = max(max_unit // chunk, 1)
    if block >= extent:
        return chunk * _even(-(-extent // chunk), max_chunks)
    return chunk * _divisor(block // chunk, max_chunks)


def _even(n: int, most: int) -> int:
    """Return the extent of the fewest nearly equal parts of ``n``, none above ``most``."""
    n_parts = -(-n // most)
    return -(-n // n_parts)


def _divisor(n: int, most: int) -> int:
    """Return the largest divisor of ``n`` up to ``most``."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def cheapest_block(volume_shape: Shape, patches: PatchGrid, fits: Callable[[Shape], bool]) -> Shape:
    """Return the block ``(z, y, x)`` that makes all blocks predict the fewest patches.

    Only blocks that fit are taken; if none does, the smallest block is returned.
    """
    shapes = list(iter_block_shapes(volume_shape))
    # Of equal blocks by that measure the largest: fewer seams, fewer tasks.
    shapes.sort(key=lambda shape: (patches.count_predicted(shape), -math.prod(shape)))
    smallest = min(shapes, key=math.prod)
    return next(filter(fits, shapes), smallest)


def iter_block_shapes(volume_shape: Shape) -> Iterator[Shape]:
    """Yield block shapes worth trying: whole chunks, or the whole of an axis."""
    return product(*map(_block_extents, volume_shape, CHUNK_SHAPE))


def _block_extents(extent: int, chunk: int) -> list[int]:
    n_chunks = math.ceil(extent / chunk)
    extents = {min(chunk, extent)}
    for n_parts in range(1, min(n_chunks, _MAX_PARTS) + 1):
        extents.add(min(math.ceil(n_chunks / n_parts) * chunk, extent))
    return sorted(extents)
