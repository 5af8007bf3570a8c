"""Statistics add: exactly for integers, in any order; for floats to the last bit in grid order."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.normalization import (
    Counts,
    Moments,
    Normalization,
    measure,
    merge_statistics,
)
from megaseg_dask.errors import DataError

DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", ">u2", ">i4"]
integers = st.sampled_from(DTYPES).flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=1, max_dims=3))
)


@given(integers)
def test_integer_sums_are_exact(values):
    found = Counts.of(values)
    numbers = [int(v) for v in values.ravel()]
    assert (found.n, found.total) == (len(numbers), sum(numbers))
    assert found.total_squares == sum(v * v for v in numbers)
    assert (found.minimum, found.maximum) == (min(numbers), max(numbers))
    mean = Fraction(sum(numbers), len(numbers))
    variance = sum((v - mean) ** 2 for v in numbers) / len(numbers)
    assert found.mean == pytest.approx(float(mean), rel=1e-15)
    assert found.std == pytest.approx(float(variance) ** 0.5, rel=1e-14)


@given(integers, st.integers(0, 20))
def test_integer_sums_do_not_depend_on_the_split(values, cut):
    flat = values.ravel()
    assert Counts.of(flat[cut:]) + Counts.of(flat[:cut]) == Counts.of(values)


def test_a_large_array_of_the_largest_numbers_is_exact():
    values = np.full(3 * 2**20 + 7, 2**16 - 1, np.uint16)
    values[::3] = 0
    found = Counts.of(values)
    assert found.total_squares == int(np.count_nonzero(values)) * (2**16 - 1) ** 2


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32)),
    st.integers(1, 40),
)
def test_float_moments_merge_to_those_of_the_whole(values, n):
    parts = np.array_split(values, n)
    found = merge_statistics(Moments.of(p) for p in parts)
    exact = values.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12, abs=1e-9)
    assert found.std == pytest.approx(exact.std(), rel=1e-9, abs=1e-6)


def test_a_small_spread_on_a_large_offset_keeps_its_digits():
    values = (1e6 + np.random.default_rng(0).normal(0, 0.5, (64, 64, 64))).astype(np.float64)
    found = Moments.of(values)
    assert found.std == pytest.approx(values.std(), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_named_or_left_out(bad):
    values = np.ones((4, 5, 6), np.float32)
    values[2, 3, 1] = bad
    with pytest.raises(DataError, match=r"\(12, 23, 31\)"):
        measure(values, Box((10, 20, 30), (14, 25, 36)))
    values[0] = 3
    found = measure(values, Box.of(values.shape), nan_to_background=True)
    assert found.n == values.size - 1
    assert Normalization.of(found)(values)[2, 3, 1] == 0


@pytest.mark.parametrize(
    ("dtype", "offset"), [("i8", 2**52), ("i8", -(2**52)), ("u4", 2**31), ("f8", 1e12)]
)
def test_a_large_offset_does_not_blur_the_image(dtype, offset):
    image = np.random.default_rng(0).integers(0, 4000, (8, 9, 10))
    shifted = image.astype(dtype) + np.array(offset, dtype)
    plain, moved = (
        Normalization.of(measure(v, Box.of(v.shape)))(v) for v in (image.astype("u2"), shifted)
    )
    np.testing.assert_allclose(moved, plain, atol=2e-3)


def test_integers_without_an_exact_float_are_refused():
    values = np.array([2**63, 2**63 + 4000], np.uint64)
    with pytest.raises(DataError, match="subtract the offset"):
        Normalization.of(measure(values, Box.of(values.shape)))


def test_float_sums_do_not_depend_on_how_the_array_lies_in_memory():
    wide = np.random.default_rng(0).normal(1000, 7, (64, 256, 600)).astype(np.float64)
    view = wide[:, :, 100:356]
    assert Moments.of(view) == Moments.of(view.copy()) == Moments.of(np.asfortranarray(view))
