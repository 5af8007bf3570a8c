"""Worked examples of coarser levels; the laws are in tests/laws/test_pyramid_laws.py."""

import numpy as np
import pytest

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.pyramids import Step, default_level_shapes, downsample, integer_factor


def row(*values, to, mode=True, dtype="uint32", scaled=None):
    """Downsample one row of voxels to ``to`` voxels."""
    fine, coarse = (1, 1, len(values)), (1, 1, to)
    step = Step(fine, coarse, scaled and (1.0, 1.0, scaled))
    source, box = step.source_box(Box.of(coarse)), Box.of(coarse)
    array = np.array(values, dtype).reshape(fine)[source.slices]
    return downsample(array, source, box, step, mode=mode).ravel().tolist()


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ([3, 7], 3),
        ([0, 7], 7),
        ([7, 0], 7),
        ([0, 0, 7], 0),
        ([0, 0, 7, 7], 7),
        ([0, 0, 7, 3], 0),
        ([9, 9, 4, 4], 4),
        ([0, 1, 2, 2], 2),
        ([0, 2, 1], 1),
        ([5, 5, 5], 5),
    ],
)
def test_mode_of_one_window(window, expected):
    assert row(*window, to=1) == [expected]


def test_ids_are_never_mixed():
    assert row(3, 7, 3, 7, to=2) == [3, 3]


def test_scores_are_averaged_and_rounded_half_to_even():
    assert row(0, 1, 1, 2, 254, 255, 255, 255, to=4, mode=False, dtype="uint8") == [0, 2, 254, 255]


def test_a_cut_off_window_counts_what_it_has():
    assert row(1, 1, 2, 2, 9, to=3) == [1, 2, 9]
    assert row(2, 4, 7, to=2, mode=False, dtype="uint8") == [3, 7]


def test_a_level_rounded_down_leaves_the_rest_out():
    assert row(1, 1, 2, 2, 9, to=2) == [1, 2]
    assert Step((1, 1, 5), (1, 1, 2)).source_box(Box.of((1, 1, 2))) == Box.of((1, 1, 4))


@pytest.mark.parametrize(
    ("scaled", "expected"),
    [(3.0, [1, 4, 7]), (5.0, [2, 7, 10]), (4.0, [2, 6, 9]), (None, [2, 6, 9])],
)
def test_scales_decide_where_shapes_do_not(scaled, expected):
    assert row(*range(11), to=3, scaled=scaled, mode=False, dtype="uint8") == expected


@pytest.mark.parametrize(
    ("scaled", "factor"),
    [
        (None, 4),
        (3.0, 3),
        (4.0, 4),
        (5.0, 5),
        (11 / 3, 4),
        (1.0, 4),
        (0.001, 4),
        (-3.0, 4),
        (2.0, 4),
        (float("inf"), 4),
    ],
)
def test_a_scale_that_fits_the_shapes_gives_the_factor(scaled, factor):
    assert integer_factor(11, 3, scaled) == factor


def test_without_a_whole_factor_the_nearest_voxel_stands():
    assert row(*range(7), to=5) == [0, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("fine", "coarse", "factor"),
    [
        (275, 137, 2),
        (275, 138, 2),
        (10, 4, 3),
        (5, 2, 2),
        (9, 9, 1),
        (1, 1, 1),
        (100, 33, 3),
        (100, 34, 3),
        (275, 200, None),
        (3, 7, None),
        (1, 3, None),
        (1, 2, None),
    ],
)
def test_factor_of_a_level_rounded_either_way(fine, coarse, factor):
    assert integer_factor(fine, coarse) == factor


def test_voxels_of_the_default_pyramid_grow_towards_cubes():
    levels = list(default_level_shapes((65, 624, 924), (0.29, 0.108, 0.108)))
    assert levels == [((65, 312, 462), (1, 2, 2)), ((33, 156, 231), (2, 2, 2))]
