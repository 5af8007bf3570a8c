"""How volumes are cut: chunks and write units of arrays, and which blocks are worth trying.

A block owns its write units alone, at any block shape: two writers in one
shard or chunk would lose each other's voxels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megaseg_dask.geometry import Shape

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
    spans an axis, nobody else writes along it, and any chunk will do.
    """
    spans = [b >= n for n, b in zip(shape, block_shape, strict=True)]
    chunk = tuple(
        min(n, most) if spanned else _divisor(b, most, least=most // 4)
        for n, b, most, spanned in zip(shape, block_shape, CHUNK_SHAPE, spans, strict=True)
    )
    if not sharded:
        return Layout(chunk, chunk)
    n_chunks = [-(-(n if spanned else b) // c)
                for n, b, c, spanned in zip(shape, block_shape, chunk, spans, strict=True)]  # fmt: skip
    most_chunks = [max(most // c, 1) for most, c in zip(SHARD_SHAPE, chunk, strict=True)]
    unit = tuple(c * _divisor(n, most) for c, n, most in zip(chunk, n_chunks, most_chunks, strict=True))
    return Layout(chunk, unit)


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
        per_axis.append(sorted({min(math.ceil(chunks / p) * chunk, n) for p in parts} | {min(chunk, n)}))
    yield from product(*per_axis)
