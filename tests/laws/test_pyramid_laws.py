"""Coarser levels equal a count of each window by hand, however the level is cut into boxes."""

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.pyramids import Step, default_level_shapes, downsample, integer_factor

small_ids = st.integers(0, 3)
shapes = st.tuples(*[st.integers(1, 9)] * 3)


@st.composite
def fine_and_coarse(draw, elements=small_ids, dtype="uint32"):
    """A finer level and the shape of a coarser one.

    Whole factors rounded either way, or any extent.
    """
    fine = draw(shapes)
    coarse = []
    for n in fine:
        factor = draw(st.integers(1, 4))
        coarse.append(
            draw(st.sampled_from([max(n // factor, 1), -(-n // factor), draw(st.integers(1, n))]))
        )
    return draw(arrays(dtype, fine, elements=elements)), tuple(coarse)


def window(i: int, fine: int, coarse: int) -> range:
    """The voxels of the finer level that voxel ``i`` stands for, found by exhaustion."""
    ratio = Fraction(fine, coarse)
    whole = [f for f in range(1, fine + 1) if coarse in (fine // f, -(-fine // f))]
    if not whole:
        centre = int((i + Fraction(1, 2)) * ratio)
        return range(centre, centre + 1)
    factor = integer_factor(fine, coarse)
    assert factor in whole
    assert abs(factor - ratio) == min(abs(f - ratio) for f in whole)
    return range(i * factor, min((i + 1) * factor, fine))


def by_hand(values, coarse, reduce_):
    result = np.empty(coarse, values.dtype)
    for place in np.ndindex(coarse):
        ranges = [window(i, n, m) for i, n, m in zip(place, values.shape, coarse, strict=True)]
        result[place] = reduce_(values[np.ix_(*ranges)])
    return result


def mode(voxels):
    """Most frequent id; of equally frequent ones the smallest that is an object."""
    counts = Counter(voxels.ravel().tolist())
    return min(counts, key=lambda v: (-counts[v], v == 0, v))


def whole(values, coarse, **options):
    box, step = Box.of(coarse), Step(values.shape, coarse)
    source = step.source_box(box)
    return downsample(values[source.slices], source, box, step, **options)


@given(fine_and_coarse())
@settings(deadline=None)
def test_labels_take_the_mode_of_each_window(case):
    values, coarse = case
    assert_array_equal(whole(values, coarse, mode=True), by_hand(values, coarse, mode))


@given(fine_and_coarse(elements=st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]), dtype="uint64"))
@settings(deadline=None, max_examples=30)
def test_the_largest_ids_survive(case):
    values, coarse = case
    assert_array_equal(whole(values, coarse, mode=True), by_hand(values, coarse, mode))


@given(fine_and_coarse(elements=st.integers(0, 255), dtype="uint8"))
@settings(deadline=None)
def test_stored_scores_are_averaged_and_rounded_half_to_even(case):
    values, coarse = case
    expected = by_hand(
        values, coarse, lambda voxels: round(Fraction(int(voxels.sum(dtype=int)), voxels.size))
    )
    assert_array_equal(whole(values, coarse, mode=False), expected)


@given(fine_and_coarse(elements=st.floats(0, 1, width=32), dtype="float32"))
@settings(deadline=None)
def test_float_scores_are_averaged(case):
    values, coarse = case
    expected = by_hand(values.astype(float), coarse, np.mean)
    np.testing.assert_allclose(whole(values, coarse, mode=False), expected, rtol=1e-6, atol=1e-12)


@given(
    st.one_of(
        fine_and_coarse().map(lambda case: (*case, True)),
        fine_and_coarse(elements=st.floats(0, 1, width=32), dtype="float32").map(
            lambda case: (*case, False)
        ),
    ),
    shapes,
)
@settings(deadline=None)
def test_any_split_gives_the_same_level(case, block):
    values, coarse, is_labels = case
    split, step = np.empty(coarse, values.dtype), Step(values.shape, coarse)
    for box in BlockGrid(coarse, block):
        source = step.source_box(box)
        assert source in Box.of(values.shape)
        split[box.slices] = downsample(values[source.slices], source, box, step, mode=is_labels)
    assert_array_equal(split, whole(values, coarse, mode=is_labels))


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False)] * 3),
)
def test_default_pyramid_ends_and_halves(shape, spacing):
    before = shape
    for level, (coarse, factor) in enumerate(default_level_shapes(shape, spacing)):
        assert level < 64
        assert set(factor) <= {1, 2}
        assert 2 in factor
        assert coarse == tuple(-(-n // f) for n, f in zip(before, factor, strict=True))
        before = coarse
    assert max(before[-2:]) <= 256
