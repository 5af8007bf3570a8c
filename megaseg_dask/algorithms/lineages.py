"""How good tracks are: TRA and LNK of the Cell Tracking Challenge.

Matula et al., "Cell tracking accuracy measurement based on comparison of acyclic oriented graphs",
PLOS ONE 2015: the cost of what has to be corrected, as a share of that of making all anew. Objects
are matched as for DET, by the tables of :mod:`megaseg_dask.algorithms.matching`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.matching import (
    MISSED,
    NOT_SPLIT,
    TOO_MANY,
    Contingency,
    list_covering,
)
from megaseg_dask.errors import DataError

Numbers = NDArray[np.intp]

# What corrections of links cost.
_MISSED_LINK = 1.5
_WRONG_LINK = 1
_OTHER_KIND = 1


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """Objects, by timepoint and then label, and links between them.

    ``time`` and ``label`` (uint64) are ``(n,)``. ``source`` and ``target`` are positions of
    objects, ``(m,)``; ``is_parent`` is true of links from one track to another.
    """

    time: NDArray[np.int64]
    label: NDArray[np.uint64]
    source: Numbers
    target: Numbers
    is_parent: NDArray[np.bool_]

    @classmethod
    def of(
        cls, time: NDArray[np.int64], label: NDArray[np.uint64], links: NDArray[np.intp]
    ) -> "Lineage":
        """Return objects in any order with their links ``(m, 2)``, the earlier object first.

        A link is one between tracks where an object goes on as several, or comes from several.
        """
        order = np.lexsort((label, time))
        position = np.empty(len(order), np.intp)
        position[order] = np.arange(len(order))
        source, target = position[links.reshape(-1, 2)].T
        n_after = np.bincount(source, minlength=len(order))
        n_before = np.bincount(target, minlength=len(order))
        is_parent = (n_after[source] > 1) | (n_before[target] > 1)
        return cls(time[order], label[order], source, target, is_parent)

    @classmethod
    def of_tracks(
        cls, labels: Sequence[NDArray[np.uint64]], tracks: NDArray[np.int64]
    ) -> "Lineage":
        """Return the lineage of label images whose ids are those of tracks.

        ``labels`` are the ids of each timepoint. ``tracks`` are rows of id, first and last
        timepoint, and the id of the parent, 0 if none: a text file of the Cell Tracking Challenge.

        Raises:
            DataError: An object has no track, or a parent is no earlier track.
        """
        time = np.repeat(np.arange(len(labels)), [len(ids) for ids in labels])
        label = np.concatenate(labels)
        _require_tracks_of(time, label, tracks)
        order = np.lexsort((time, label))
        is_same = label[order[1:]] == label[order[:-1]]
        is_next = time[order[1:]] == time[order[:-1]] + 1
        follows = np.flatnonzero(is_same & is_next)
        source = [order[follows]]
        target = [order[follows + 1]]
        known = {(int(t), int(i)): n for n, (t, i) in enumerate(zip(time, label, strict=True))}
        first = {int(row[0]): int(row[1]) for row in tracks}
        last = {int(row[0]): int(row[2]) for row in tracks}
        n_own = len(follows)
        for track, begins, _, parent in tracks.tolist():
            if parent == 0:
                continue
            if parent not in last:
                raise DataError(f"track {track} has the parent {parent}, which is no track")
            if first[parent] >= begins:
                raise DataError(
                    f"track {track} begins at timepoint {begins}, and its parent {parent} at "
                    f"{first[parent]}; expected an earlier one"
                )
            ends = (known.get((last[parent], parent)), known.get((begins, track)))
            # Objects that are not annotated are not compared.
            if ends[0] is not None and ends[1] is not None:
                source.append(np.array([ends[0]]))
                target.append(np.array([ends[1]]))
        sources = np.concatenate(source)
        is_parent = np.arange(len(sources)) >= n_own
        return cls(time, label, sources, np.concatenate(target), is_parent)

    def find(self, time: int, label: NDArray[np.uint64]) -> Numbers:
        """Return the positions of objects of a timepoint.

        Raises:
            DataError: There is no such object.
        """
        start, stop = np.searchsorted(self.time, [time, time + 1])
        there = self.label[start:stop]
        found: Numbers = np.searchsorted(there, label)
        is_there = found < len(there)
        is_there[is_there] = there[found[is_there]] == label[is_there]
        if not is_there.all():
            absent = label[~is_there][0]
            raise DataError(f"the tracks lack the object {absent} of timepoint {time}")
        positions: Numbers = found + start
        return positions


def _require_tracks_of(
    time: NDArray[np.int64], label: NDArray[np.uint64], tracks: NDArray[np.int64]
) -> None:
    """Check that each object has one track, which lasts at its timepoint.

    Raises:
        DataError: One has none or several.
    """
    ids, rows, counts = np.unique(tracks[:, 0], return_index=True, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"track {ids[counts > 1][0]} is listed {counts.max()} times")
    first, last = tracks[rows, 1:3].T
    is_covered = np.zeros(len(label), bool)
    is_listed = np.isin(label, ids.astype(np.uint64))
    row = np.searchsorted(ids, label[is_listed].astype(np.int64))
    at = time[is_listed]
    is_covered[is_listed] = (first[row] <= at) & (at <= last[row])
    if not is_covered.all():
        absent = np.flatnonzero(~is_covered)[0]
        raise DataError(f"no track has the object {label[absent]} of timepoint {time[absent]}")


@dataclass(frozen=True, slots=True)
class TrackScores:
    """TRA and LNK, from 0 to 1, and the links to correct.

    Links are missed, wrong, or of another kind: within a track or from a parent.
    """

    tra: float
    lnk: float
    missed_links: int
    wrong_links: int
    other_links: int


def score_tracks(predicted: Lineage, true: Lineage, tables: Sequence[Contingency]) -> TrackScores:
    """Compare tracks; ``tables`` are those of each timepoint.

    Raises:
        DataError: Tracks lack an object of the tables.
    """
    # The true object that a predicted one covers alone; those that cover several have no links.
    covered = np.full(len(predicted.label), -1)
    n_covered = np.zeros(len(predicted.label), np.int64)
    is_found = np.zeros(len(true.label), bool)
    is_compared = np.zeros(len(predicted.label), bool)
    is_true = np.zeros(len(true.label), bool)
    for time, table in enumerate(tables):
        is_compared[predicted.find(time, _objects(table.predicted))] = True
        is_true[true.find(time, _objects(table.true))] = True
        rows, _ = list_covering(table)
        ours = predicted.find(time, table.predicted[rows])
        theirs = true.find(time, table.true[rows])
        covered[ours] = theirs
        np.add.at(n_covered, ours, 1)
        is_found[theirs] = True
    covered[n_covered != 1] = -1
    in_both = (covered[predicted.source] >= 0) & (covered[predicted.target] >= 0)
    n = len(true.label)
    ours = covered[predicted.source[in_both]] * n + covered[predicted.target[in_both]]
    is_link = is_true[true.source] & is_true[true.target]
    theirs = true.source[is_link] * n + true.target[is_link]
    common, our_rows, their_rows = np.intersect1d(ours, theirs, return_indices=True)
    kinds = predicted.is_parent[in_both][our_rows] != true.is_parent[is_link][their_rows]
    n_missed = len(theirs) - len(common)
    n_wrong = len(ours) - len(common)
    n_other = int(np.count_nonzero(kinds))
    of_links = _MISSED_LINK * n_missed + _WRONG_LINK * n_wrong + _OTHER_KIND * n_other
    n_true = int(np.count_nonzero(is_true))
    n_found = int(np.count_nonzero(is_found))
    n_covering = int(np.count_nonzero(n_covered))
    of_objects = (
        MISSED * (n_true - n_found)
        + NOT_SPLIT * (n_found - n_covering)
        + TOO_MANY * (int(np.count_nonzero(is_compared)) - n_covering)
    )
    all_links = _MISSED_LINK * len(theirs)
    return TrackScores(
        tra=_share_kept(of_objects + of_links, MISSED * n_true + all_links),
        lnk=_share_kept(of_links, all_links),
        missed_links=n_missed,
        wrong_links=n_wrong,
        other_links=n_other,
    )


def _objects(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    found = np.unique(ids)
    return found[found > 0]


def _share_kept(cost: float, worst: float) -> float:
    return 1 - min(cost, worst) / worst if worst else 0.0
