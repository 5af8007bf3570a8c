"""Links between timepoints, and the tracks that they make; SciPy's dense solver is the oracle."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.ndimage import center_of_mass
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.spatial.distance import cdist

from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.algorithms.tracking import Frame, Linking, Links, Tracks, link_frames
from megaseg_dask.errors import SettingsError
from tests.fixtures.movies import draw, simulate


def frame_of(ids: np.ndarray) -> Frame:
    label = np.unique(ids[ids > 0])
    centroid = np.reshape(center_of_mass(ids > 0, ids, label), (-1, 3))
    return Frame(label.astype(np.uint64), np.bincount(ids.ravel())[label], centroid)


def link(before: np.ndarray, after: np.ndarray, linking: Linking):
    overlaps = Contingency.of(before, after)
    return link_frames(frame_of(before), frame_of(after), overlaps, linking)


def pairs_of(links: Links) -> set[tuple[int, int]]:
    return set(zip(links.before.tolist(), links.after.tolist(), strict=True))


def track(movie: np.ndarray, linking: Linking) -> Tracks:
    links = [link(a, b, linking)[0] for a, b in pairwise(movie)]
    return Tracks.of([len(frame_of(ids)) for ids in movie], links)


@given(st.integers(0, 999), st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=25, deadline=None)
def test_overlaps_of_any_blocks_add_to_those_of_the_whole_volume(seed, block):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 2**62, (2, 9, 8, 7)) * rng.integers(0, 2, (2, 9, 8, 7))
    before, after = np.where(rng.random((2, 9, 8, 7)) < 0.5, before.flat[0], (before, after))
    boxes = [box.slices for box in BlockGrid((9, 8, 7), block)]
    table = sum((Contingency.of(before[box], after[box]) for box in boxes), Contingency.none())
    rows, row = np.unique(before, return_inverse=True)
    columns, column = np.unique(after, return_inverse=True)
    ones = np.ones(before.size, int)
    whole = coo_array((ones, (row.ravel(), column.ravel()))).tocsr().tocoo()
    found = zip(table.predicted, table.true, table.voxels, strict=True)
    expected = zip(rows[whole.row], columns[whole.col], whole.data, strict=True)
    assert set(found) == set(expected)


@given(st.integers(0, 999), st.integers(1, 40), st.floats(2, 30))
@settings(max_examples=25, deadline=None)
def test_links_are_the_cheapest_assignment(seed, n, reach):
    """Solved in parts as sparse costs, they cost what the dense solver finds for all at once."""
    rng = np.random.default_rng(seed)
    places = [rng.uniform(0, 30, (n + extra, 3)) for extra in (0, seed % 3)]
    frames = [Frame(np.arange(1, len(p) + 1, dtype="u8"), np.ones(len(p), int), p) for p in places]
    found, _ = link_frames(*frames, Contingency.none(), Linking(reach, splits=False))
    cost = (1 + np.minimum(cdist(*places) / reach, 1)) / 2
    cost[cdist(*places) > reach] = 1e3
    free = np.where(np.eye(n, dtype=bool), 1.05, 1e3)
    dense = np.hstack([cost, free])
    expected = dense[linear_sum_assignment(dense)].sum()
    assert found.cost.sum() + 1.05 * (n - len(found)) == pytest.approx(expected)
    assert (found.distance <= reach).all()
    assert len(set(found.before)) == len(set(found.after)) == len(found)


def test_balls_that_move_less_than_halfway_to_the_next_keep_their_track():
    movie = simulate(6, 60, step=1.0, seed=3).tracks
    tracks = track(movie, Linking(8))
    true = np.concatenate([np.unique(ids[ids > 0]) for ids in movie])
    assert tracks.n_tracks == 60
    assert_array_equal(tracks.track, true)
    assert not tracks.parent.any()


def test_a_division_begins_two_tracks_of_one_parent_and_lineage():
    shape = (20, 20, 40)
    mother = draw(shape, {1: np.array([10, 10, 20])}, 5)
    both = draw(shape, {1: np.array([10, 10, 16]), 2: np.array([10, 10, 24])}, 4)
    movie = np.stack([mother, mother, both, both])
    tracks = track(movie, Linking(8))
    assert_array_equal(tracks.track, [1, 1, 2, 3, 2, 3])
    assert_array_equal(tracks.parent, [0, 0, 1, 1, 1, 1])
    assert_array_equal(tracks.lineage, [1] * 6)
    assert (tracks.n_splits, tracks.n_merges) == (1, 0)
    assert track(movie, Linking(8, splits=False)).n_splits == 0
    back = track(movie[::-1], Linking(8, merges=True))
    assert (back.n_splits, back.n_merges) == (0, 1)
    assert_array_equal(back.track, [1, 2, 1, 2, 3, 3])
    assert track(movie[::-1], Linking(8)).n_merges == 0


def test_a_newcomer_beside_a_cell_is_no_part_of_it():
    shape = (20, 20, 40)
    alone = draw(shape, {1: np.array([10, 10, 12])}, 4)
    with_other = draw(shape, {1: np.array([10, 10, 13]), 2: np.array([10, 10, 20])}, 4)
    tracks = track(np.stack([alone, with_other]), Linking(12))
    assert_array_equal(tracks.track, [1, 1, 2])
    assert tracks.n_splits == 0


def test_without_a_distance_only_objects_that_overlap_are_linked():
    shape = (20, 20, 60)
    before = draw(shape, {1: np.array([10, 10, 10]), 2: np.array([10, 10, 40])}, 4)
    after = draw(shape, {1: np.array([10, 10, 12]), 2: np.array([10, 10, 50])}, 4)
    found, _ = link(before, after, Linking(0))
    assert pairs_of(found) == {(0, 0)}
    found, _ = link(before, after, Linking(11))
    assert pairs_of(found) == {(0, 0), (1, 1)}


def test_empty_timepoints_end_all_tracks():
    ids = draw((12, 12, 12), {1: np.array([6, 6, 6])}, 3)
    empty = np.zeros_like(ids)
    for movie in ([ids, empty, ids], [empty, empty], [empty, ids]):
        tracks = track(np.stack(movie), Linking(8))
        n = sum(bool(each.any()) for each in movie)
        assert tracks.n_tracks == n
        assert len(tracks.source) == 0


def test_a_reach_that_takes_in_too_much_is_refused():
    places = np.random.default_rng(0).uniform(0, 9, (5000, 3))
    frame = Frame(np.arange(1, 5001, dtype="u8"), np.ones(5000, int), places)
    with pytest.raises(SettingsError, match="25,000,000 pairs"):
        link_frames(frame, frame, Contingency.none(), Linking(1e9))


def test_what_drifts_is_measured():
    movie = simulate(2, 60, step=0.0, drift=(0, 3, 0), seed=1).tracks
    found, drift = link(*movie, Linking(8))
    assert drift.shift == pytest.approx(3, abs=0.1)
    assert drift.unreached == 0
    shape = (20, 20, 60)
    before = draw(shape, {1: np.array([10, 10, 10])}, 4)
    after = draw(shape, {1: np.array([10, 10, 40])}, 4)
    found, drift = link(before, after, Linking(8))
    assert len(found) == 0
    assert (drift.unreached, drift.nearest, drift.shift) == (1, 30, 0)


@given(st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_names_of_labels_do_not_matter(seed):
    movie = simulate(3, 20, step=2.0, division=0.1, death=0.1, seed=seed).tracks
    plain = track(movie, Linking(8))
    # In another order, and as large as they may be.
    names = np.random.default_rng(seed).permutation(movie.max() + 1) + 1
    other = [np.where(ids > 0, names[ids], 0) for ids in movie]
    found = track(np.stack(other), Linking(8))
    assert (found.n_tracks, found.n_splits) == (plain.n_tracks, plain.n_splits)
    assert len(found.source) == len(plain.source)
