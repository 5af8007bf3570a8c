"""What tracking a simulated movie of a hundred thousand objects a timepoint takes.

    python -m benchmarks.tracking [SIDE [TIMEPOINTS]]

SIDE³ balls of 7 voxels in diameter stand about 9 voxels apart and walk at random, with a standard
deviation of a voxel along each axis. Their label images are written, read and counted as
``megaseg track`` does it, and linked with the default options; the graph is written as GEFF.
Seconds are of the processor, of all threads.

Expected before it was run, for 46³ balls: 76 million voxels a timepoint at 20 to 30 million a
second for reading and counting, so 3 s; linking 0.5 s; a movie of 100 timepoints in 6 minutes on
one core. All links right but some per mille: steps seldom reach half of 9 voxels.
"""

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.machine import describe, keep
from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.algorithms.tracking import Frame, Linking, Tracks, link_frames
from megaseg_dask.ngff.labels import read_label_image
from megaseg_dask.ngff.tracks import TrackGraph, write_tracks
from megaseg_dask.run.tasks.process_memory import peak_bytes, reset_peak
from megaseg_dask.stores import Location
from megaseg_dask.tools.tracking import count_overlaps

SIDE = 46
N_TIMES = 4
SPACING = 9
RADIUS = 3.5
CHUNK = (128, 128, 128)


def write_movie(path: Path, side: int, n_times: int) -> list[Frame]:
    """Write label images whose ids are those of the balls; return where these are."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    places = (grid + 1) * SPACING + rng.uniform(-1, 1, grid.shape)
    extent = (side + 1) * SPACING
    group = zarr.open_group(path, mode="w", zarr_format=3)
    array = group.create_array(
        "0",
        shape=(n_times, extent, extent, extent),
        chunks=(1, *CHUNK),
        dtype="uint32",
        dimension_names=list("tzyx"),
    )
    axes = [{"name": "t", "type": "time"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = {"type": "scale", "scale": [1.0] * 4}
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    multiscale = {"axes": axes, "datasets": datasets}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale], "image-label": {}}
    label = np.arange(1, len(places) + 1, dtype=np.uint64)
    frames = []
    for t in range(n_times):
        ids = draw(places, extent)
        array[t] = ids
        n_voxels = np.bincount(ids.ravel(), minlength=len(label) + 1)[1:]
        frames.append(Frame(label, n_voxels, places.copy()))
        places = np.clip(places + rng.normal(0, 1, places.shape), RADIUS, extent - RADIUS - 1)
    return frames


def draw(places: np.ndarray, extent: int) -> np.ndarray:
    """Return balls ``(z, y, x)`` with ids from 1; a voxel of several is that of the last."""
    ids = np.zeros((extent,) * 3, np.uint32)
    reach = math.ceil(RADIUS)
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3), -1).reshape(-1, 3)
    centers = np.rint(places).astype(int)
    for offset in offsets[np.square(offsets).sum(1) <= RADIUS**2]:
        z, y, x = np.clip(centers + offset, 0, extent - 1).T
        ids[z, y, x] = np.arange(1, len(places) + 1)
    return ids


def measure(folder: Path, side: int = SIDE, n_times: int = N_TIMES) -> dict[str, Any]:
    """Return what each step takes, and how many links are right."""
    machine = describe()
    frames = write_movie(folder / "labels.zarr", side, n_times)
    location = Location.of(folder / "labels.zarr")
    labels = read_label_image(location)
    reset_peak()
    clock = [time.process_time()]
    blocks = BlockGrid(labels.volume_shape(), CHUNK)
    overlaps = count_overlaps(location, labels, blocks, lambda done, n_blocks: None)
    clock.append(time.process_time())
    diameter = float(np.cbrt(6 * np.median(frames[0].n_voxels) / np.pi))
    neighbors = zip(frames[:-1], frames[1:], overlaps, strict=True)
    links = [link_frames(*each, Linking(diameter))[0] for each in neighbors]
    clock.append(time.process_time())
    tracks = Tracks.of([len(frame) for frame in frames], links)
    clock.append(time.process_time())
    times = np.repeat(np.arange(n_times), [len(frame) for frame in frames])
    places = np.concatenate([frame.centroid for frame in frames])
    nodes = {
        "t": times,
        **{name: np.ascontiguousarray(places[:, axis]) for axis, name in enumerate("zyx")},
        "label": np.concatenate([frame.label for frame in frames]),
        "track_id": tracks.track,
        "lineage_id": tracks.lineage,
    }
    graph = TrackGraph(nodes, np.stack([tracks.source, tracks.target], axis=1), {}, "micrometer")
    write_tracks(location.sibling(".geff"), graph, labels_path="labels.zarr", provenance={})
    clock.append(time.process_time())
    counted_s, linked_s, joined_s, written_s = np.diff(clock).tolist()
    n_right = sum(int(np.count_nonzero(each.before == each.after)) for each in links)
    n_links = sum(map(len, links))
    return {
        "machine": machine,
        "objects": side**3,
        "timepoints": n_times,
        "voxels": labels.volume_shape(),
        "rows_of_overlaps": [len(table.voxels) for table in overlaps],
        "count_cpu_s_a_timepoint": round(counted_s / n_times, 2),
        "link_cpu_s_a_pair": round(linked_s / (n_times - 1), 2),
        "join_cpu_s": round(joined_s, 2),
        "geff_cpu_s": round(written_s, 2),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "links": n_links,
        "links_right": round(n_right / n_links, 5),
        "true_links_found": round(n_right / (side**3 * (n_times - 1)), 5),
    }


def main() -> None:
    """Measure, and keep the result of the whole size."""
    numbers = list(map(int, sys.argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), *numbers)
    if numbers:
        print(found)
    else:
        keep("tracking", found)


if __name__ == "__main__":
    main()
