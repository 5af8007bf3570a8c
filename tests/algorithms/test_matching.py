import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.matching import Contingency, evaluate, evaluate_contingency
from megaseg_dask.errors import DataError, SettingsError

LABELS = hnp.arrays(np.uint64, (4, 5, 6), elements=st.sampled_from([0, 1, 2, 3, 7, 2**63 + 5]))


def rows(table):
    return list(
        zip(table.predicted.tolist(), table.true.tolist(), table.voxels.tolist(), strict=True)
    )


def test_a_shifted_square_by_hand():
    true, predicted = np.zeros((2, 10, 10), np.uint16)
    true[2:6, 2:6] = 9
    predicted[2:6, 3:7] = 4  # 12 of 20 voxels shared
    predicted[9, 9] = 5
    found = evaluate(predicted, true)
    assert (found.dice, found.iou) == (24 / 33, 12 / 21)
    assert (found.precision, found.recall) == (12 / 17, 12 / 16)
    assert (found.n_predicted, found.n_true) == (2, 1)
    assert [m.true_positives for m in found.matchings] == [1, 1, 1] + [0] * 7
    assert found.matchings[0].average_precision == 0.5
    assert found.mean_average_precision == pytest.approx(0.15)
    assert found.segmentation_quality == 0.6
    assert found.recognition_quality == pytest.approx(2 / 3)
    assert found.panoptic_quality == pytest.approx(0.4)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_halves_of_an_object_match_it_once(swapped):
    whole, halves = np.array([1, 1, 1, 1, 0]), np.array([1, 1, 2, 2, 3])
    found = evaluate(whole, halves) if swapped else evaluate(halves, whole)
    assert (found.matchings[0].true_positives, found.segmentation_quality) == (1, 0.5)


@given(LABELS)
def test_perfect_is_one(labels):
    found = evaluate(labels, labels)
    expected = float(labels.any())  # 0 where there is nothing at all, as StarDist has it
    ratios = [found.dice, found.iou, found.precision, found.recall, found.mean_average_precision]
    assert [*ratios, found.panoptic_quality] == [expected] * 6


@pytest.mark.parametrize("shape", [(0,), (3, 4, 5)])
def test_nothing_predicted_and_nothing_true_is_zero_everywhere(shape):
    found = evaluate(np.zeros(shape, int), np.zeros(shape, int)).as_dict()
    matchings = found.pop("matchings")
    assert set(found.values()) == {0}
    assert {m["average_precision"] for m in matchings} == {0}


def test_nothing_predicted_misses_every_object():
    found = evaluate(np.zeros((3, 3), np.uint8), np.eye(3, dtype=np.uint8))
    assert (found.matchings[0].false_negatives, found.dice, found.recall) == (1, 0, 0)


@given(LABELS, LABELS, st.integers(0, 4), st.integers(0, 6))
def test_tables_of_blocks_add_to_the_table_of_the_whole(predicted, true, z, x):
    blocks = [(slice(0, z), slice(0, x)), (slice(z, 4), slice(0, x)), (slice(0, 4), slice(x, 6))]
    parts = [Contingency.of(predicted[a][..., b], true[a][..., b]) for a, b in blocks]
    whole = Contingency.of(predicted, true)
    assert rows(sum(parts, Contingency.none())) == rows(whole)
    assert rows(sum(reversed(parts), Contingency.none())) == rows(whole)
    assert evaluate_contingency(sum(parts, Contingency.none())) == evaluate(predicted, true)


@given(LABELS, LABELS)
def test_swapping_the_images_swaps_precision_and_recall(predicted, true):
    there, back = evaluate(predicted, true), evaluate(true, predicted)
    assert (there.precision, there.recall, there.n_true) == (
        back.recall,
        back.precision,
        back.n_predicted,
    )
    assert (there.dice, there.mean_average_precision) == (back.dice, back.mean_average_precision)
    assert there.panoptic_quality == pytest.approx(back.panoptic_quality)


def test_ids_of_the_largest_size_cost_nothing_and_do_not_collide():
    predicted = np.array([2**64 - 1, 2**64 - 2, 2**53, 2**53 + 1], np.uint64)
    found = evaluate(predicted, np.arange(1, 5, dtype=np.uint8))
    assert found.matchings[-1].true_positives == 4


def test_bool_is_one_object_and_memory_order_does_not_matter():
    mask = np.random.default_rng(0).random((5, 6, 7)) < 0.5
    assert evaluate(mask, mask.astype(np.int64)).n_true == 1
    assert_array_equal(Contingency.of(np.asfortranarray(mask), mask).predicted, [0, 1])


def test_as_dict_is_json():
    found = evaluate(np.eye(4, dtype=int), np.eye(4, dtype=int))
    assert json.loads(json.dumps(found.as_dict()))["matchings"][3]["threshold"] == 0.65


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(2, 3\).*\(3, 2\)"),
        (np.zeros(3), np.zeros(3, int), "integers, found float64"),
        (np.zeros(3, int), np.array([0, -1, 2]), "negative, found -1"),
    ],
)
def test_refuses_what_is_no_pair_of_label_images(predicted, true, message):
    with pytest.raises(DataError, match=message):
        Contingency.of(predicted, true)


@pytest.mark.parametrize("thresholds", [(), (0.4, 0.6), (1.1,)])
def test_refuses_thresholds_where_matching_is_not_unique(thresholds):
    with pytest.raises(SettingsError, match=r"between 0\.5 and 1"):
        evaluate(np.eye(2, dtype=int), np.eye(2, dtype=int), thresholds)


def test_splits_and_merges_by_hand():
    true = np.array([1, 1, 1, 1, 0, 2, 2, 0, 3, 3, 0, 4, 4, 4])
    ours = np.array([5, 5, 6, 6, 0, 7, 7, 7, 7, 7, 0, 8, 8, 0])
    found = evaluate(ours, true)
    # Object 1 is split into 5 and 6; 7 is 2 and 3 together; 8 is a part of 4 alone.
    assert (found.n_split, found.n_merged) == (1, 1)
    swapped = evaluate(true, ours)
    assert (swapped.n_split, swapped.n_merged) == (1, 1)
    # Half of an object's voxels are not most of them.
    assert evaluate(np.array([1, 1, 2, 2]), np.array([3, 0, 3, 0])).n_split == 0
