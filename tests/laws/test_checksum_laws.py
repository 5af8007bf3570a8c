"""Two readers of overlapping boxes compare what they saw, wherever their boxes begin and end."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.checksums import CellGrid
from megaseg_dask.algorithms.geometry import Box

SHAPE = (7, 9, 8)


@st.composite
def boxes(draw):
    start = [draw(st.integers(0, n - 1)) for n in SHAPE]
    stop = [draw(st.integers(a + 1, n)) for a, n in zip(start, SHAPE, strict=True)]
    return Box(tuple(start), tuple(stop))


@given(st.lists(boxes(), min_size=2, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_a_change_is_seen_in_each_box_that_holds_it_and_in_no_other(read, seed, data):
    dtype = data.draw(st.sampled_from(["uint8", "int16", "float32", "float64"]))
    before = np.random.default_rng(seed).integers(0, 200, SHAPE).astype(dtype)
    voxel = tuple(data.draw(st.integers(0, n - 1)) for n in SHAPE)
    after = before.copy()
    after[voxel] += 1
    cells = CellGrid.between([*read, Box.of(SHAPE)])
    one, other = read[:2]
    common = one & other
    if not common.size or min(common.shape) <= 0:
        return
    first = cells.checksums(before[one.slices], one)[cells.index(common, one)]
    again = cells.checksums(before[other.slices], other)[cells.index(common, other)]
    assert_array_equal(first, again)
    changed = cells.checksums(after[other.slices], other)[cells.index(common, other)]
    is_inside = all(a <= v < b for v, a, b in zip(voxel, common.start, common.stop, strict=True))
    assert (first != changed).sum() == int(is_inside)
    held = list(cells.iter_cells(common))
    assert sum(cell.size for cell in held) == common.size
