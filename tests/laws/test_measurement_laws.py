"""Measurements add: any split of a volume gives the same table, exactly for integers."""

import io
import math
import tracemalloc
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms import measurements
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.measurements import Sums, measure_block, merge, to_columns
from megaseg_dask.errors import DataError
from tests.fixtures.images import with_border

# Integers of at most 16 bits are summed exactly; wider ones as floats are.
EXACT = ["u1", "i1", "u2", "i2", ">u2", "?"]
WIDE = ["u4", "i4", "u8", "i8", ">i4"]
SPACING = (0.29, 0.108333, 0.108333)

shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7)
finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def volumes(draw, dtype=None, elements=None):
    """Labels of few objects, so that they cross blocks, with ids of any size; and an image."""
    shape = draw(shapes)
    ids = draw(st.lists(st.integers(1, 2**63 - 1), min_size=1, max_size=4, unique=True))
    which = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, len(ids))))
    labels = np.array([0, *ids], np.uint64)[which]
    if max(ids) < 2**32 and draw(st.booleans()):
        labels = labels.astype(np.uint32)
    return labels, draw(hnp.arrays(dtype or draw(st.sampled_from(EXACT)), shape, elements=elements))


block_shapes = st.tuples(*[st.integers(1, 7)] * 3)


def measure_parts(labels, image, block_shape, **options) -> list[Sums]:
    cores = BlockGrid(labels.shape, block_shape)
    return [measure_block(*with_border(labels, image, core), core, **options) for core in cores]


def measure_whole(labels, image) -> Sums:
    whole = Box.of(labels.shape)
    return measure_block(*with_border(labels, image, whole), whole)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert_array_equal(found[name], values, err_msg=name, strict=True)


@given(volumes(), block_shapes, st.randoms(use_true_random=False), st.integers(1, 60))
def test_no_split_and_no_order_changes_sums_of_16_bits(volume, block_shape, random, slab):
    expected = measure_whole(*volume)
    parts = measure_parts(*volume, block_shape, slab_voxels=slab)
    random.shuffle(parts)
    assert_same(merge(parts).arrays(), expected.arrays())
    cut = random.randint(1, len(parts))
    in_a_tree = merge(merge(some) for some in (parts[:cut], parts[cut:]) if some)
    assert_same(in_a_tree.arrays(), expected.arrays())


@given(volumes(), block_shapes)
def test_tables_of_16_bits_are_exact(volume, block_shape):
    labels, image = volume
    found = to_columns(merge(measure_parts(labels, image, block_shape)), labels.shape, SPACING)
    assert found["label"].tolist() == sorted(set(labels[labels > 0].tolist()))
    for row, label in enumerate(found["label"].tolist()):
        inside = labels == label
        values, places = [int(v) for v in image[inside]], np.argwhere(inside)
        n = len(values)
        mean = Fraction(sum(values), n)
        variance = sum((v - mean) ** 2 for v in values) / n
        expected = {
            "volume_voxels": n,
            "volume_um3": n * math.prod(SPACING),
            "intensity_mean": float(mean),
            "intensity_min": float(min(values)),
            "intensity_max": float(max(values)),
            "intensity_std": math.sqrt(variance),
            "intensity_sum": float(sum(values)),
            "touches_border": bool(((places == 0) | (places == np.array(labels.shape) - 1)).any()),
        }
        for i, axis in enumerate("zyx"):
            centroid = float(Fraction(int(places[:, i].sum()), n))
            expected |= {f"centroid_{axis}": centroid, f"centroid_{axis}_um": centroid * SPACING[i]}
            expected |= {
                f"bbox_{axis}_start": places[:, i].min(),
                f"bbox_{axis}_stop": places[:, i].max() + 1,
            }
        assert {name: found[name][row] for name in expected} == expected


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", *WIDE])
@given(data=st.data(), block_shape=block_shapes, slab=st.integers(1, 60))
def test_other_tables_agree_to_the_stated_tolerance(dtype, data, block_shape, slab):
    elements = None
    if dtype not in WIDE:
        elements = st.floats(-6e4, 6e4, width=16) if dtype == "f2" else finite
    labels, image = data.draw(volumes(dtype, elements))
    expected = to_columns(measure_whole(labels, image), labels.shape, SPACING)
    parts = measure_parts(labels, image, block_shape, slab_voxels=slab)
    found = to_columns(merge(parts), labels.shape, SPACING)
    for row, label in enumerate(expected["label"].tolist()):
        values = image[labels == label].astype(np.float64)
        for table in (found, expected):
            assert_allclose(
                table["intensity_sum"][row],
                math.fsum(values),
                rtol=0,
                atol=1e-12 * np.abs(values).sum(),
            )
            assert_allclose(
                table["intensity_mean"][row],
                values.mean(),
                rtol=0,
                atol=1e-12 * np.abs(values).max(),
            )
            assert_allclose(
                table["intensity_std"][row], values.std(), rtol=0, atol=1e-12 * np.abs(values).max()
            )
    approximate = {"intensity_mean", "intensity_std", "intensity_sum"}
    assert_same(
        *({n: v for n, v in table.items() if n not in approximate} for table in (found, expected))
    )


def test_float_sums_in_one_order_are_one_result():
    labels = np.random.default_rng(0).integers(0, 3, (20, 30, 40)).astype(np.uint32)
    image = np.random.default_rng(1).normal(1000, 7, labels.shape).astype(np.float32)
    first, again = (merge(measure_parts(labels, image, (7, 8, 9))).arrays() for _ in range(2))
    assert_same(again, first)


def test_a_small_spread_on_a_large_offset_keeps_its_digits():
    labels = np.ones((16, 32, 32), np.uint32)
    image = (1e6 + np.random.default_rng(0).normal(0, 0.5, labels.shape)).astype(np.float32)
    found = to_columns(merge(measure_parts(labels, image, (5, 9, 32))), labels.shape, SPACING)
    assert found["intensity_std"][0] == pytest.approx(image.astype(np.float64).std(), rel=1e-10)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_sums_outgrow_64_bits(dtype):
    limits = np.iinfo(dtype)
    image = np.array([limits.max, limits.min, limits.max, limits.max - 1], dtype).reshape(1, 2, 2)
    sums = measure_whole(np.full(image.shape, 7, np.uint32), image)
    values = [int(v) for v in image.ravel()]
    doublings = 40
    for _ in range(doublings):
        sums = merge([sums, sums])
    mean = Fraction(sum(values), 4)
    expected = {
        "intensity_sum": float(sum(values) * 2**doublings),
        "intensity_mean": float(mean),
        "intensity_std": math.sqrt(sum((v - mean) ** 2 for v in values) / 4),
    }
    found = to_columns(sums, (1, 2, 2), SPACING)
    assert found["volume_voxels"][0] == 4 * 2**doublings
    intensities = {name: found[name][0] for name in expected}
    if dtype in EXACT:
        assert intensities == expected
    else:
        assert intensities == pytest.approx(expected, rel=1e-12)


def test_products_of_coordinates_outgrow_64_bits():
    labels = np.ones((2, 3, 4), np.uint32)
    core = Box((2**21, 2**21, 2**21), (2**21 + 2, 2**21 + 3, 2**21 + 4))
    sums = measure_block(np.pad(labels, 1), np.ones((1, 2, 3, 4), np.uint16), core)
    doublings = 36
    for _ in range(doublings):
        sums = merge([sums, sums])
    found = to_columns(sums, (2**22,) * 3, (1.0, 1.0, 1.0))
    lengths = [found[f"axis_{name}_um"][0] for name in ("minor", "middle", "major")]
    # The variance of n positions in a row is (n² - 1) / 12.
    assert lengths == pytest.approx([math.sqrt(20 * (n * n - 1) / 12) for n in (2, 3, 4)], 1e-12)


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_no_objects_make_an_empty_table_of_the_same_columns(dtype):
    labels = np.zeros((4, 5, 6), np.uint32)
    image = np.ones(labels.shape, dtype)
    empty = to_columns(merge(measure_parts(labels, image, (2, 3, 4))), labels.shape, SPACING)
    labels[2, 2, 2] = 1
    full = to_columns(merge(measure_parts(labels, image, (2, 3, 4))), labels.shape, SPACING)
    assert {n: v.dtype for n, v in empty.items()} == {n: v.dtype for n, v in full.items()}
    assert {len(v) for v in empty.values()} == {0}


def test_an_object_over_many_blocks_and_ids_beyond_32_bits():
    labels = np.zeros((30, 40, 50), np.uint64)
    labels[1:29, 20, 1:49] = 2**32 + 5
    labels[15, 1:39, 25] = 5
    labels[0, 0, 0] = 2**40
    image = np.random.default_rng(0).integers(0, 2**16, labels.shape, np.uint16)
    found = to_columns(merge(measure_parts(labels, image, (4, 4, 4))), labels.shape, SPACING)
    assert found["label"].tolist() == [5, 2**32 + 5, 2**40]
    assert found["volume_voxels"].tolist() == [38, 28 * 48 - 1, 1]
    assert found["touches_border"].tolist() == [False, False, True]
    assert_same(found, to_columns(measure_whole(labels, image), labels.shape, SPACING))


def test_an_object_touches_the_volumes_border_not_a_blocks():
    labels = np.zeros((8, 8, 8), np.uint32)
    labels[3:5, 3:5, 3:5] = 1
    for label, place in enumerate(
        [(0, 4, 6), (7, 2, 2), (2, 0, 2), (4, 7, 6), (6, 4, 0), (6, 6, 7)], 2
    ):
        labels[place] = label
    found = to_columns(merge(measure_parts(labels, labels, (4, 4, 4))), labels.shape, SPACING)
    assert found["touches_border"].tolist() == [False] + [True] * 6


def test_sums_can_be_stored():
    labels = np.random.default_rng(0).integers(0, 9, (6, 7, 8)).astype(np.uint64)
    for image in (labels.astype(np.int16), labels.astype(np.float32)):
        sums = measure_whole(labels, image)
        buffer = io.BytesIO()
        np.savez(buffer, **sums.arrays())
        buffer.seek(0)
        with np.load(buffer, allow_pickle=False) as loaded:
            assert_same(Sums.from_arrays(loaded).arrays(), sums.arrays())


def test_the_array_may_lie_in_memory_as_it_likes():
    wide = np.random.default_rng(0).integers(0, 5, (9, 8, 14)).astype(np.uint32)
    view, image = wide[::2, :, 3:11], wide.astype(np.float32)[::2, :, 3:11]
    expected = measure_whole(view.copy(), image.copy()).arrays()
    assert_same(measure_whole(view, image).arrays(), expected)
    assert_same(measure_whole(np.asfortranarray(view), np.asfortranarray(image)).arrays(), expected)


def test_an_image_of_another_shape_is_refused():
    labels = np.ones((2, 3, 4), np.uint32)
    with pytest.raises(DataError, match=r"\(2, 3, 4\).*\(2, 3, 5\).*0:2,0:3,0:4"):
        measure_block(np.pad(labels, 1), np.ones((1, 2, 3, 5)), Box.of(labels.shape))


def test_many_small_parts_are_held_as_their_objects():
    labels = np.ones((1, 1, 1), np.uint32)
    part = measure_whole(labels, labels)
    most = 0

    def add(parts, add=measurements._add):
        nonlocal most
        most = max(most, len(parts))
        return add(parts)

    with patch.object(measurements, "_add", add):
        whole = merge(part for _ in range(5000))
    assert whole.n_voxels.tolist() == [5000]
    assert most <= 1025


@pytest.mark.parametrize("dtype", ["u2", "u4", "f4"])
def test_memory_does_not_grow_with_the_block(dtype):
    labels = np.kron(
        np.arange(1, 129, dtype=np.uint32).reshape(8, 4, 4), np.ones((16, 32, 32), np.uint32)
    )
    image = np.random.default_rng(0).integers(0, 2**16, labels.shape).astype(dtype)
    peaks = []
    for n_planes in (32, 128):
        core = Box.of((n_planes, *labels.shape[1:]))
        inputs = with_border(labels, image, core)
        tracemalloc.start()
        measure_block(*inputs, core)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20e6
