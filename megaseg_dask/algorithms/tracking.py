"""Objects of a timelapse become tracks: which objects of two timepoints are one, which divided.

Two timepoints are linked by linear assignment (Jaqaman et al., "Robust single-particle tracking in
live-cell time-lapse sequences", Nature Methods 2008): first one object to one, then what is left
over as parts of objects that are linked. The costs are sparse, so a hundred thousand objects are
linked in seconds. Arrays go in and come out; equal input gives equal tracks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.errors import SettingsError

Numbers = NDArray[np.intp]
Floats = NDArray[np.float64]

# A pair costs from 0 to 1; a link that is not made costs a little more, as in TrackMate.
_NO_LINK = 1.05
# Pairs of two timepoints within reach, about 100 bytes each.
_MAX_PAIRS = 20_000_000
# Pairs that are solved together at least: a solution takes the square of their number.
_BATCH_PAIRS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The objects of one timepoint, by ascending label, each once.

    ``label`` uint64 and ``n_voxels`` int64 are ``(n,)``, ``centroid`` float64 ``(n, 3)`` in µm.
    """

    label: NDArray[np.uint64]
    n_voxels: NDArray[np.int64]
    centroid: Floats

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, slots=True)
class Linking:
    """How objects are linked.

    ``max_distance`` is how far a centroid may move to the next timepoint, in µm; with 0, objects
    are linked that have voxels in common. ``splits`` lets an object go on as two, ``merges`` two as
    one.
    """

    max_distance: float
    splits: bool = True
    merges: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """Links from the objects of one timepoint to those of the next, ``(m,)`` each.

    ``before`` and ``after`` are positions in the frames, ``shared`` the voxels in common.
    ``overlap`` is the IoU of the two objects, ``distance`` that of their centroids in µm. ``cost``
    is low for a sure link.
    """

    before: Numbers
    after: Numbers
    shared: NDArray[np.int64]
    overlap: Floats
    distance: Floats
    cost: Floats

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, chosen: NDArray[Any]) -> "Links":
        return Links(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def __add__(self, other: "Links") -> "Links":
        """Return the links of both, those of the other one last."""
        return Links(
            *(
                np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            )
        )


@dataclass(frozen=True, slots=True)
class Drift:
    """How far objects are from those of the next timepoint.

    ``unreached`` is the share of them that have no partner within reach; ``nearest`` the median
    distance to the nearest object of the next timepoint, in µm; ``shift`` how far linked objects
    moved together (the length of their median displacement), in µm.
    """

    unreached: float
    nearest: float
    shift: float


def link_frames(
    before: Frame, after: Frame, overlaps: Contingency, linking: Linking
) -> tuple[Links, Drift | None]:
    """Link the objects of two timepoints; ``overlaps`` counts their voxels in common.

    The links of one object to one come first, then those of parts. There is no drift if a
    timepoint has no objects.

    Raises:
        SettingsError: Too many pairs are within reach.
    """
    pairs = _list_pairs(before, after, overlaps, linking.max_distance)
    links = pairs[_assign(pairs.before, pairs.after, pairs.cost, (len(before), len(after)))]
    found = links
    if linking.splits:
        found += _link_parts(before, after, pairs, links, linking.max_distance)
    if linking.merges:
        parts = _link_parts(after, before, _turned(pairs), _turned(links), linking.max_distance)
        found += _turned(parts)
    return found, _measure_drift(before, after, pairs, links)


def _list_pairs(before: Frame, after: Frame, overlaps: Contingency, max_distance: float) -> Links:
    """Return all pairs within reach."""
    is_pair = (overlaps.predicted > 0) & (overlaps.true > 0)
    rows = np.searchsorted(before.label, overlaps.predicted[is_pair])
    columns = np.searchsorted(after.label, overlaps.true[is_pair])
    voxels = overlaps.voxels[is_pair]
    if max_distance > 0 and len(before) and len(after):
        places = cKDTree(before.centroid)
        next_places = cKDTree(after.centroid)
        n_near = places.count_neighbors(next_places, max_distance)
        if n_near > _MAX_PAIRS:
            raise SettingsError(
                f"{n_near:,} pairs of objects of two timepoints are within {max_distance:g}; "
                "give a smaller --max-distance"
            )
        near = places.sparse_distance_matrix(next_places, max_distance, output_type="ndarray")
        rows = np.concatenate([rows, near["i"]])
        columns = np.concatenate([columns, near["j"]])
        voxels = np.concatenate([voxels, np.zeros(len(near), np.int64)])
    # A pair that also overlaps is listed twice: the first has the voxels.
    _, first = np.unique(rows * len(after) + columns, return_index=True)
    rows = rows[first]
    columns = columns[first]
    voxels = voxels[first]
    union = before.n_voxels[rows] + after.n_voxels[columns] - voxels
    overlap = voxels / union
    distance = np.linalg.norm(before.centroid[rows] - after.centroid[columns], axis=1)
    cost = _cost(overlap, distance, max_distance)
    return Links(rows, columns, voxels, overlap, distance, cost)


def _cost(overlap: Floats, distance: Floats, max_distance: float) -> Floats:
    """Return the mean of what is not shared and of the way, both from 0 to 1."""
    apart = 1 - overlap
    if max_distance == 0:
        return apart
    cost: Floats = (apart + np.minimum(distance / max_distance, 1)) / 2
    return cost


def _link_parts(
    wholes: Frame, parts: Frame, pairs: Links, links: Links, max_distance: float
) -> Links:
    """Link objects without a partner as a second part of one that has a partner.

    Both parts together have to fit the whole better than its partner alone. ``wholes`` are the
    objects ``before``, ``parts`` those ``after``.
    """
    partner = np.full(len(wholes), -1)
    partner[links.before] = np.arange(len(links))
    is_free = ~np.isin(pairs.after, links.after)
    pairs = pairs[is_free & (partner[pairs.before] >= 0)]
    firsts = links[partner[pairs.before]]
    n_first = parts.n_voxels[firsts.after]
    n_second = parts.n_voxels[pairs.after]
    n_parts = n_first + n_second
    weight = (n_first / n_parts)[:, np.newaxis]
    middle = weight * parts.centroid[firsts.after] + (1 - weight) * parts.centroid[pairs.after]
    distance = np.linalg.norm(middle - wholes.centroid[pairs.before], axis=1)
    shared = firsts.shared + pairs.shared
    overlap = shared / (wholes.n_voxels[pairs.before] + n_parts - shared)
    cost = _cost(overlap, distance, max_distance)
    better = np.flatnonzero(cost < firsts.cost)
    shape = (len(parts), len(wholes))
    chosen = _assign(pairs.after[better], pairs.before[better], cost[better], shape)
    return pairs[better[chosen]]


def _turned(links: Links) -> Links:
    """Return the same links from the later objects to the earlier ones."""
    return replace(links, before=links.after, after=links.before)


def _measure_drift(before: Frame, after: Frame, pairs: Links, links: Links) -> Drift | None:
    if not len(before) or not len(after):
        return None
    reached = len(np.unique(pairs.before)) / len(before)
    distances, _ = cKDTree(after.centroid).query(before.centroid)
    shift = 0.0
    if len(links):
        moves = after.centroid[links.after] - before.centroid[links.before]
        shift = float(np.linalg.norm(np.median(moves, axis=0)))
    return Drift(1 - reached, float(np.median(distances)), shift)


# -- assignment


def _assign(rows: Numbers, columns: Numbers, cost: Floats, shape: tuple[int, int]) -> Numbers:
    """Return which pairs make up the cheapest assignment, where a row without one costs too.

    Rows and columns that no pair connects do not depend on each other: they are solved in parts.
    """
    if not len(rows):
        return np.empty(0, np.intp)
    n_nodes = sum(shape)
    ends = (rows, columns + shape[0])
    graph = coo_array((np.ones(len(rows), bool), ends), shape=(n_nodes, n_nodes))
    _, component = connected_components(graph, directed=False)
    of_pair = component[rows]
    order = np.argsort(of_pair, kind="stable")
    chosen = [order[batch] for batch in _iter_batches(of_pair[order])]
    solved = [batch[_solve(rows[batch], columns[batch], cost[batch])] for batch in chosen]
    return np.sort(np.concatenate(solved))


def _iter_batches(component: NDArray[Any]) -> list[slice]:
    """Return slices of sorted components, whole ones, of about a number of pairs or more."""
    ends = np.append(np.flatnonzero(np.diff(component)) + 1, len(component))
    batches = []
    start = 0
    for end in ends.tolist():
        if end - start >= _BATCH_PAIRS or end == len(component):
            batches.append(slice(start, end))
            start = end
    return batches


def _solve(rows: Numbers, columns: Numbers, cost: Floats) -> Numbers:
    """Return which pairs make up the cheapest assignment, as positions."""
    _, row = np.unique(rows, return_inverse=True)
    _, column = np.unique(columns, return_inverse=True)
    n_rows = int(row.max()) + 1
    n_columns = int(column.max()) + 1
    # Each row has a column of its own, which stands for no link.
    own = np.arange(n_rows)
    weights = np.concatenate([cost, np.full(n_rows, _NO_LINK)])
    # A weight of 0 would be no pair.
    weights = np.maximum(weights, 1e-12)
    places = (np.concatenate([row, own]), np.concatenate([column, n_columns + own]))
    matrix = csr_array((weights, places), shape=(n_rows, n_columns + n_rows))
    _, matched = min_weight_full_bipartite_matching(matrix)
    is_chosen: Numbers = np.flatnonzero(matched[row] == column)
    return is_chosen


# -- tracks


@dataclass(frozen=True, slots=True, eq=False)
class Tracks:
    """The tracks of a timelapse; objects are numbered from 0 through all timepoints.

    ``track``, ``parent`` and ``lineage`` are int64 ``(n,)``, of each object. A track is a path
    without a branch; ids begin at 1, by first timepoint and label. ``parent`` is the track that
    the object's track comes from, 0 if none; of several the one with the surest link. A lineage is
    all that is linked. ``source`` and ``target`` are the objects of each link, ``(m,)``.
    """

    track: NDArray[np.int64]
    parent: NDArray[np.int64]
    lineage: NDArray[np.int64]
    source: Numbers
    target: Numbers
    overlap: Floats
    distance: Floats

    @classmethod
    def of(cls, n_objects: Sequence[int], links: Sequence[Links]) -> "Tracks":
        """Join the links between all pairs of neighboring timepoints, one fewer than those."""
        starts = np.cumsum([0, *n_objects])
        n = int(starts[-1])
        sources = [each.before + starts[t] for t, each in enumerate(links)]
        targets = [each.after + starts[t + 1] for t, each in enumerate(links)]
        source: Numbers = np.concatenate([np.empty(0, np.intp), *sources])
        target: Numbers = np.concatenate([np.empty(0, np.intp), *targets])
        cost = np.concatenate([np.empty(0), *(each.cost for each in links)])
        overlap = np.concatenate([np.empty(0), *(each.overlap for each in links)])
        distance = np.concatenate([np.empty(0), *(each.distance for each in links)])
        n_after = np.bincount(source, minlength=n)
        n_before = np.bincount(target, minlength=n)
        goes_on = (n_after[source] == 1) & (n_before[target] == 1)
        track = _number_parts(n, source[goes_on], target[goes_on])
        lineage = _number_parts(n, source, target)
        begins = ~goes_on
        parents = np.zeros(int(track.max(initial=0)) + 1, np.int64)
        # The surest link is written last.
        surest = np.flatnonzero(begins)[np.argsort(-cost[begins], kind="stable")]
        parents[track[target[surest]]] = track[source[surest]]
        return cls(track, parents[track], lineage, source, target, overlap, distance)

    @property
    def n_tracks(self) -> int:
        """How many tracks there are."""
        return int(self.track.max(initial=0))

    @property
    def n_splits(self) -> int:
        """How many objects go on as several."""
        return int(np.count_nonzero(np.bincount(self.source) > 1))

    @property
    def n_merges(self) -> int:
        """How many objects come from several."""
        return int(np.count_nonzero(np.bincount(self.target) > 1))


def _number_parts(n: int, source: Numbers, target: Numbers) -> NDArray[np.int64]:
    """Return the part of a graph that each node belongs to, from 1, by their first nodes."""
    graph = coo_array((np.ones(len(source), bool), (source, target)), shape=(n, n))
    _, part = connected_components(graph, directed=False)
    _, first, inverse = np.unique(part, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(1, len(first) + 1)
    return rank[inverse]
