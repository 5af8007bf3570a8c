"""How volumes are cut: chunks and write units of arrays, and which blocks are worth trying.

A block owns its write units alone, at any block shape: two writers in one
shard or chunk would lose each other's voxels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megaseg_dask.algorithms.geometry import Shape

# Chunks suit viewers; shards keep the objects of a terabyte volume in the thousands.
CHUNK_SHAPE = (64, 128, 128)
SHARD_SHAPE = (128, 512, 512)

# Parts per axis that are tried when a block is chosen: 24^3 combinations take milliseconds.
_MOST_PARTS = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """Chunk and write unit of an array's axes ``(z, y, x)``; they are the same where there are no shards."""

    chunk_shape: Shape
    write_unit: Shape


def write_layout(shape: Shape, block_shape: Shape, *, sharded: bool) -> Layout:
    """Return chunks that divide the block, and write units of whole chunks that divide it too.

    An axis that no good chunk divides gets one chunk per block. Where one block
    spans an axis, nobody else writes along it, and it is cut evenly: a rest of
    one plane would be stored and decoded as a whole chunk.
    """
    axes = list(zip(shape, block_shape, CHUNK_SHAPE, SHARD_SHAPE, strict=True))
    chunk = tuple(
        _even(n, most) if b >= n else _divisor(b, most, least=most // 4) for n, b, most, _ in axes
    )
    if not sharded:
        return Layout(chunk, chunk)
    chunks_of_unit = [
        _even(-(-n // c), max(most // c, 1)) if b >= n else _divisor(b // c, max(most // c, 1))
        for (n, b, _, most), c in zip(axes, chunk, strict=True)
    ]
    return Layout(chunk, tuple(c * k for c, k in zip(chunk, chunks_of_unit, strict=True)))


def _even(n: int, most: int) -> int:
    """Return the extent of the fewest nearly equal parts of ``n``, none above ``most``."""
    return -(-n // -(-n // most))


def _divisor(n: int, most: int, *, least: int = 1) -> int:
    """Return the largest divisor of ``n`` up to ``most``; ``n`` itself if that is below ``least``."""
    best = max(d for d in range(1, min(n, most) + 1) if n % d == 0)
    return best if best >= least else n


def iter_block_shapes(volume_shape: Shape) -> Iterator[Shape]:
    """Yield block shapes worth trying: whole chunks, or the whole of an axis."""
    per_axis = []
    for n, chunk in zip(volume_shape, CHUNK_SHAPE, strict=True):
        chunks = math.ceil(n / chunk)
        parts = range(1, min(chunks, _MOST_PARTS) + 1)
        per_axis.append(
            sorted({min(math.ceil(chunks / p) * chunk, n) for p in parts} | {min(chunk, n)})
        )
    yield from product(*per_axis)
