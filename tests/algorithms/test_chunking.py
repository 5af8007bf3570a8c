"""Laws of chunks and write units: a block owns its write units alone, and none is silly."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.algorithms.chunking import (
    CHUNK_SHAPE,
    SHARD_SHAPE,
    iter_block_shapes,
    write_layout,
)
from megaseg_dask.algorithms.geometry import BlockGrid

sharded = pytest.mark.parametrize("sharded", [False, True])
extents = st.one_of(
    st.integers(1, 70), st.integers(1, 3000), st.sampled_from([64, 128, 256, 512, 1024, 2048])
)
shapes = st.tuples(extents, extents, extents)


@sharded
@given(shape=shapes, block=shapes)
def test_two_blocks_never_share_a_write_unit(shape, block, sharded):
    layout = write_layout(shape, block, sharded=sharded)
    for n, b, chunk, unit in zip(shape, block, layout.chunk_shape, layout.write_unit, strict=True):
        owners = BlockGrid((n,), (b,))
        units = [range(core.start[0] // unit, (core.stop[0] - 1) // unit + 1) for core in owners]
        assert all(before.stop <= after.start for before, after in pairwise(units))
        assert unit % chunk == 0
        assert b >= n or b % unit == 0
    assert sharded or layout.chunk_shape == layout.write_unit


@sharded
@given(shape=shapes, block=shapes)
def test_no_axis_is_silly(shape, block, sharded):
    layout = write_layout(shape, block, sharded=sharded)
    axes = zip(
        shape, block, layout.chunk_shape, layout.write_unit, CHUNK_SHAPE, SHARD_SHAPE, strict=True
    )
    for n, b, chunk, unit, most, most_unit in axes:
        assert 1 <= chunk <= min(n, b)
        # Only a block that no good chunk divides makes a chunk of its own size.
        assert chunk <= most or chunk == b
        assert chunk >= min(n, b, most // 4)
        assert unit <= max(most_unit, chunk)
        # Padding of the last chunk is decoded too: even parts waste less than one voxel each.
        if b >= n:
            n_chunks = -(-n // chunk)
            assert chunk * n_chunks < n + n_chunks
            assert unit < n + chunk * -(-n // unit)


@pytest.mark.parametrize(
    ("shape", "block", "chunk", "unit"),
    [
        ((65, 624, 924), (65, 624, 924), (33, 125, 116), (66, 375, 464)),
        ((2048, 2048, 2048), (256, 1024, 1024), (64, 128, 128), (128, 512, 512)),
        ((200, 1000, 1000), (97, 101, 262), (97, 101, 262), (97, 101, 262)),
        ((16, 16, 16), (64, 128, 128), (16, 16, 16), (16, 16, 16)),
    ],
)
def test_layouts_of_real_cases(shape, block, chunk, unit):
    layout = write_layout(shape, block, sharded=True)
    assert (layout.chunk_shape, layout.write_unit) == (chunk, unit)


@given(shapes)
def test_blocks_worth_trying_are_whole_chunks_or_the_whole_axis(shape):
    blocks = list(iter_block_shapes(shape))
    assert shape in blocks
    assert len(blocks) <= 25**3
    for n, chunk, axis in zip(shape, CHUNK_SHAPE, np.array(blocks).T, strict=True):
        assert all(b == n or (b % chunk == 0 and b < n) for b in set(axis.tolist()))
