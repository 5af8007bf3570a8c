"""TRA and LNK as py-ctcmetrics has them, on movies with errors of all kinds."""

import numpy as np
import pytest
import tifffile
from ctc_metrics.metrics import lnk, tra
from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations, match

from megaseg_dask.algorithms.lineages import Lineage, score_tracks
from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.errors import DataError
from tests.fixtures.movies import simulate


def tracks_of(ids: np.ndarray, parents: dict[int, int]) -> np.ndarray:
    """Rows of id, first and last timepoint, and parent."""
    rows = []
    for name in np.unique(ids[ids > 0]).tolist():
        times = np.flatnonzero((ids == name).any((1, 2, 3)))
        parent = parents.get(name, 0)
        rows.append((name, times[0], times[-1], parent if (ids == parent).any() else 0))
    return np.array(rows, np.int64)


def objects_of(ids: np.ndarray) -> list[np.ndarray]:
    return [np.unique(frame[frame > 0]).astype(np.uint64) for frame in ids]


def with_errors(movie, seed: int):
    """Labels and parents of a bad tracker: ids that swap, objects that vanish, merge and appear."""
    rng = np.random.default_rng(seed)
    ids = movie.tracks.astype(np.int64)
    parents = dict(movie.parents)
    names = np.unique(ids[ids > 0])
    one, other, gone, merged, into = rng.choice(names, 5, replace=False)
    swapped = ids[2:].copy()
    ids[2:][swapped == one] = other
    ids[2:][swapped == other] = one
    ids[ids == gone] = 0
    ids[1:][ids[1:] == merged] = into
    ids[1, :3, :3, :3] = ids.max() + 1
    # A division that is missed: the daughter goes on without a parent.
    parents.pop(next(iter(parents), 0), None)
    return ids, parents


@pytest.mark.parametrize("seed", range(3))
def test_tra_and_lnk_are_those_of_the_cell_tracking_challenge(seed, tmp_path):
    movie = simulate(4, 16, division=0.1, death=0.05, seed=seed, spacing=11)
    predicted, parents = with_errors(movie, seed)
    true_rows = tracks_of(movie.tracks, movie.parents)
    rows = tracks_of(predicted, parents)
    each = []
    for pair in zip(movie.tracks, predicted, strict=True):
        files = [tmp_path / "true.tif", tmp_path / "predicted.tif"]
        for file, ids in zip(files, pair, strict=True):
            tifffile.imwrite(file, ids.astype(np.int64))
        each.append(match(*map(str, files)))
    labels_true, labels, mapped_true, mapped, _ = zip(*each, strict=True)
    expected = count_acyclic_graph_correction_operations(
        true_rows, rows, labels_true, labels, mapped_true, mapped
    )
    tables = [Contingency.of(*pair) for pair in zip(predicted, movie.tracks, strict=True)]
    ours = Lineage.of_tracks(objects_of(predicted), rows)
    theirs = Lineage.of_tracks(objects_of(movie.tracks), true_rows)
    found = score_tracks(ours, theirs, tables)
    assert found.missed_links == expected["EA"]
    assert found.wrong_links == expected["ED"]
    assert found.other_links == expected["EC"]
    assert found.tra == pytest.approx(tra(**expected)[0])
    assert found.lnk == pytest.approx(lnk(**expected))
    assert 0 < found.tra < 1
    perfect = [Contingency.of(ids, ids) for ids in movie.tracks]
    same = score_tracks(theirs, theirs, perfect)
    assert (same.tra, same.lnk) == (1, 1)


def test_objects_in_any_order_are_the_same_lineage():
    time = np.array([1, 0, 1, 0])
    label = np.array([2, 1, 1, 3], np.uint64)
    found = Lineage.of(time, label, np.array([[1, 2], [1, 0]]))
    assert list(zip(found.time, found.label, strict=True)) == [(0, 1), (0, 3), (1, 1), (1, 2)]
    assert sorted(zip(found.source, found.target, strict=True)) == [(0, 2), (0, 3)]
    assert found.is_parent.all()
    with pytest.raises(DataError, match="object 7 of timepoint 1"):
        found.find(1, np.array([1, 7], np.uint64))
