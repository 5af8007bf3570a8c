"""Simulated lineages, linked from true labels and scored by traccuracy.

traccuracy 0.4 asks for click below 8.2, which Typer does not work with, so it is no requirement of
the tests: they run where it is installed beside them.
"""

import networkx
import numpy as np
import pytest
from scipy.ndimage import center_of_mass

from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.algorithms.tracking import Frame, Linking, Tracks, link_frames
from tests.fixtures.movies import Movie, simulate

traccuracy = pytest.importorskip("traccuracy", reason="it needs another click than Typer")

pytestmark = [
    pytest.mark.slow,
    # Of libraries that it imports.
    pytest.mark.filterwarnings("ignore"),
]


def frame_of(ids: np.ndarray) -> Frame:
    label = np.unique(ids[ids > 0])
    centroid = np.reshape(center_of_mass(ids > 0, ids, label), (-1, 3))
    return Frame(label.astype(np.uint64), np.bincount(ids.ravel())[label], centroid)


def graph_of(frames: list[Frame]) -> networkx.DiGraph:
    """Nodes without links, numbered through all timepoints."""
    graph = networkx.DiGraph()
    for t, frame in enumerate(frames):
        for label, (z, y, x) in zip(frame.label, frame.centroid, strict=True):
            graph.add_node(len(graph), t=t, label=int(label), z=z, y=y, x=x)
    return graph


def true_graph(frames: list[Frame], movie: Movie) -> networkx.DiGraph:
    graph = graph_of(frames)
    last: dict[int, int] = {}
    for node, known in graph.nodes(data=True):
        track = known["label"]
        before = last.get(track, last.get(movie.parents.get(track, 0)))
        if before is not None and graph.nodes[before]["t"] == known["t"] - 1:
            graph.add_edge(before, node)
        last[track] = node
    return graph


def scores_of(movie: Movie) -> tuple[float, float, float]:
    """TRA, LNK and the F1 of divisions with the default options."""
    from traccuracy.matchers import CTCMatcher
    from traccuracy.metrics import CTCMetrics, DivisionMetrics

    frames = list(map(frame_of, movie.tracks))
    n_voxels = np.concatenate([frame.n_voxels for frame in frames])
    linking = Linking(float(np.cbrt(6 * np.median(n_voxels) / np.pi)))
    links = []
    for t in range(len(frames) - 1):
        overlaps = Contingency.of(*movie.tracks[t : t + 2])
        links.append(link_frames(*frames[t : t + 2], overlaps, linking)[0])
    tracks = Tracks.of(list(map(len, frames)), links)
    found = graph_of(frames)
    found.add_edges_from(zip(tracks.source.tolist(), tracks.target.tolist(), strict=True))
    graphs = [
        traccuracy.TrackingGraph(
            graph,
            segmentation=movie.tracks,
            frame_key="t",
            label_key="label",
            location_keys=("z", "y", "x"),
        )
        for graph in (true_graph(frames, movie), found)
    ]
    metrics = [CTCMetrics(), DivisionMetrics()]
    results, _ = traccuracy.run_metrics(*graphs, matcher=CTCMatcher(), metrics=metrics)
    of_links, of_divisions = (result["results"] for result in results)
    f1 = of_divisions["Frame Buffer 0"]["Division F1"]
    return of_links["TRA"], of_links["LNK"], f1


@pytest.mark.parametrize(
    ("options", "tra", "lnk", "f1"),
    [
        ({"step": 1.0}, 1, 1, 0),
        ({"step": 1.0, "division": 0.03, "death": 0.02}, 0.998, 0.99, 0.9),
        ({"step": 2.0, "division": 0.03, "death": 0.02}, 0.99, 0.93, 0.6),
    ],
    ids=["walks", "divides", "walks far"],
)
def test_simulated_lineages(options, tra, lnk, f1):
    found = scores_of(simulate(8, 200, seed=1, **options))
    assert found[0] >= tra
    assert found[1] >= lnk
    assert not found[2] < f1  # Without divisions it is no number.
