"""Automatic thresholds of any blocks are scikit-image's of the whole array."""

import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage import filters

from megaseg_dask.algorithms import thresholds
from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.algorithms.thresholds import find_threshold, merge_tables, tabulate
from megaseg_dask.errors import DataError

HISTOGRAM_METHODS = METHODS[:-1]


class Cycling(Exception):
    """scikit-image goes round in circles: its float32 means are not monotone."""


def expected(values, method, rounds=None):
    """Return what scikit-image finds for the whole array; None where it finds no number."""
    rounds = [] if rounds is None else rounds

    def count(threshold):
        rounds.append(threshold)
        if len(rounds) > 1000:
            raise Cycling

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"iter_callback": count} if method == "li" else {}
        try:
            found = float(getattr(filters, f"threshold_{method}")(values.ravel(), **options))
        except (RuntimeError, IndexError, ValueError, Cycling):
            return None
    return found if np.isfinite(found) else None


def table_of(blocks, low, high, method):
    return merge_tables(tabulate(block, low, high, method) for block in blocks)


def found_in(blocks, method):
    low, high = float(min(b.min() for b in blocks)), float(max(b.max() for b in blocks))
    return find_threshold(table_of(blocks, low, high, method), low, high, method)


def logits(seed, size, kind="two modes"):
    """Return logits like a network's: one or two modes, a skew tail, or levels."""
    rng = np.random.default_rng(seed)
    if kind == "one mode":
        return rng.normal(rng.uniform(-9, 9), 1, size).astype(np.float32)
    if kind == "skew":
        return (rng.gamma(2, 1, size) - 3).astype(np.float32)
    gap, spread, share = rng.uniform(1, 12), rng.uniform(0.3, 3, 2), rng.uniform(0.02, 0.7)
    pick = (rng.random(size) < share).astype(int)
    values = rng.normal(gap * pick - gap / 2, spread[pick])
    return (values.round(1) if kind == "levels" else values).astype(np.float32)


KINDS = st.sampled_from(["two modes", "one mode", "skew", "levels"])
many = st.builds(logits, st.integers(0, 2**32), st.integers(10, 20_000), KINDS)


def vectors(elements, size=40):
    return hnp.arrays(np.float32, st.integers(1, size), elements=elements)


@st.composite
def at_edges(draw):
    """Return values on scikit-image's bin edges and on the floats next to them."""
    low, high = sorted(draw(st.tuples(*[st.floats(-100, 100, width=32)] * 2)))
    edges = np.linspace(np.float32(low), np.float32(high), 257, dtype=np.float32)
    beside = np.nextafter(
        edges[draw(st.lists(st.integers(0, 256), min_size=1))], draw(st.sampled_from([-1e9, 1e9]))
    )
    inside = np.clip(
        np.append(beside, edges[draw(st.lists(st.integers(0, 256), min_size=1))]), low, high
    )
    return np.concatenate([edges[[0, -1]], inside]).astype(np.float32)


few = st.one_of(
    vectors(st.floats(-20, 20, width=32)),
    vectors(st.integers(-5, 5).map(float)),
    vectors(st.sampled_from([-1e6, -0.5, 0.0, 1e-30, 0.1, 0.2, 0.3, 1e6])),
    vectors(st.floats(allow_nan=False, allow_infinity=False, width=32)),
    at_edges(),
)


@st.composite
def blocks(draw, arrays):
    """Return one array's values, shared out over blocks in any way."""
    values = draw(arrays)
    cuts = draw(st.lists(st.integers(1, max(1, values.size - 1)), max_size=6, unique=True))
    return [part for part in np.split(values, sorted(cuts)) if part.size]


@given(blocks(many | few), st.sampled_from(HISTOGRAM_METHODS))
def test_any_blocks_give_the_threshold_of_the_whole_array(parts, method):
    whole = np.concatenate(parts)
    low, high = whole.min(), whole.max()
    assume(low < high)
    with np.errstate(over="ignore"):
        wanted = expected(whole, method) if np.isfinite(high - low) else None
    if wanted is None:
        with pytest.raises(DataError, match="--threshold"):
            found_in(parts, method)
    else:
        found = found_in(parts, method)
        assert found == wanted == float(np.float32(found))


@given(blocks(many | few), st.sampled_from(METHODS), st.randoms())
def test_tables_add_in_any_order(parts, method, random):
    low, high = float(min(p.min() for p in parts)), float(max(p.max() for p in parts))
    try:
        whole = tabulate(np.concatenate(parts), low, high, method)
    except DataError:
        assume(False)
    random.shuffle(parts)
    merged = table_of(parts, low, high, method)
    assert whole.keys() == merged.keys()
    assert merged["counts"].sum() == sum(p.size for p in parts)
    for name in whole.keys() - {"sums"}:
        np.testing.assert_array_equal(merged[name], whole[name])
    if "sums" in whole:
        # Values of one magnitude add exactly; the bin at the minimum holds many magnitudes.
        np.testing.assert_array_equal(merged["sums"][1:], whole["sums"][1:])
        np.testing.assert_allclose(merged["sums"][0], whole["sums"][0], rtol=1e-14)


@given(blocks(many))
def test_the_split_does_not_show_in_lis_threshold(parts):
    assert found_in(parts, "li") == found_in([np.concatenate(parts)], "li")


@given(blocks(many | few))
@example([np.array([0, 1e-30, 1], np.float32)])
@example([np.array([-1, -1, 0, 0, 1, 1], np.float32)])
def test_lis_threshold_is_within_a_millionth_of_the_range(parts):
    whole = np.concatenate(parts)
    with np.errstate(over="ignore"):
        span = float(whole.max() - whole.min())
    assume(0 < span < np.inf)
    rounds = []
    single, double = expected(whole, "li"), expected(whole.astype(np.float64), "li", rounds)
    tolerance = 1e-6 * span + 2**-23 * float(np.abs(whole).max())
    # Where a voxel lies on a threshold on the way, the last bit of a mean decides its side, and
    # scikit-image's
    # answers for float32 and float64 are two. Means of small integers are exact.
    assume(single is not None and double is not None and abs(single - double) <= tolerance)
    beside = min(np.abs(whole - np.float64(threshold)).min() for threshold in rounds)
    assume(beside > 2**-22 * span or ((np.abs(whole) <= 5).all() and (whole % 1 == 0).all()))
    assert abs(found_in(parts, "li") - double) <= tolerance


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [-0.5, -0.3, 0.1, 0.1, 0.2, 0.5, 0.6]])
def test_li_stops_where_scikit_image_does(values):
    """One more step, or a mean not rounded to the voxel it equals, would lead elsewhere."""
    values = np.array(values, np.float32)
    assert found_in([values], "li") == pytest.approx(expected(values, "li"), abs=1e-6)


@pytest.mark.parametrize(
    "size", [100_000, 600_000, 1_500_000, pytest.param(5_000_000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["two modes", "one mode", "skew"])
def test_lis_threshold_is_as_good_where_bins_are_shared(size, kind):
    values = logits(size, size, kind)
    # Not in float32: scikit-image's own sums are then further off.
    wanted = expected(values.astype(np.float64), "li")
    assert abs(found_in(np.array_split(values, 3), "li") - wanted) <= 1e-6 * np.ptp(values)


@pytest.mark.parametrize("value", [0.0, -7.0, 3.3, 1e-30, 1e8])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_volume(value, method):
    values = np.full((3, 4, 5), value, np.float32)
    wanted = expected(values, method)
    if method == "triangle":
        wanted = float(np.float32(value))  # also where scikit-image's bins would have no width
    if wanted is None:
        with pytest.raises(DataError, match=r"--threshold"):
            found_in([values, values[:1]], method)
    else:
        assert found_in([values, values[:1]], method) == wanted


def test_one_mode_has_no_minimum_and_the_message_says_what_to_do():
    values = np.sqrt(np.arange(100_000, dtype=np.float32))
    with pytest.raises(
        DataError, match=r"minimum finds no threshold .* no two modes; pass --threshold"
    ):
        found_in([values], "minimum")


@pytest.mark.parametrize("method", METHODS)
def test_two_modes_are_told_apart(method):
    rng = np.random.default_rng(1)
    values = (
        np.append(rng.normal(-6, 1, 30_000), rng.normal(6, 1, 10_000))
        .astype(np.float32)
        .reshape(40, 50, 20)
    )
    threshold = found_in([values[:7], values[7:]], method)
    assert (values > np.float32(threshold)).sum() == pytest.approx(
        10_000, rel=0.2
    )  # yen prefers rare values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -4.0])
def test_a_logit_outside_the_measured_range_is_refused(method, bad):
    with pytest.raises(DataError, match=r"in a volume of -3\.0 to 3\.0"):
        tabulate(np.array([0, bad, 1], np.float32), -3.0, 3.0, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extremes", [(-np.inf, 1), (-3e38, 3e38)])
def test_a_range_without_a_width_is_refused(method, extremes):
    with pytest.raises(DataError, match="range overflows"):
        found_in([np.array(extremes, np.float32)], method)


def test_a_peak_of_many_billions_does_not_overflow():
    values = logits(3, 20_000)
    low, high = float(values.min()), float(values.max())
    counts = tabulate(values, low, high, "triangle")["counts"]
    for times in 10 ** np.arange(6, 13):
        assert find_threshold({"counts": counts * times}, low, high, "triangle") == expected(
            values, "triangle"
        )


def test_a_volume_constant_but_for_one_voxel_in_a_billion_has_no_li():
    table = tabulate(np.array([0, 1], np.float32), 0, 1, "li")
    table["counts"][1] = table["sums"][1] = 10**9
    with pytest.raises(DataError, match="its result is nan"):
        find_threshold(table, 0, 1, "li")


@pytest.mark.parametrize("method", METHODS)
def test_neither_layout_nor_slabs_show(method, monkeypatch):
    values = logits(4, 24_000).reshape(20, 30, 40)
    wanted = found_in([values], method)
    monkeypatch.setattr(thresholds, "_SLAB", 1000)
    assert found_in([np.asfortranarray(values)[::-1]], method) == wanted
