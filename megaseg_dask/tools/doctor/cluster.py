"""``megaseg cluster check``: one worker of a cluster file segments one real block.

The cheapest proof that a cluster works is a run: it needs the queue, the network,
the versions on both sides, and a folder that client and worker both reach.
"""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import ClusterError
from megaseg_dask.events import Event, Joined, Notice, Result, Started
from megaseg_dask.plan.cluster_spec import read_cluster
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.sample import write_sample

# The starter's patch shape: its whole network runs.
_VOLUME_SHAPE = (32, 128, 128)
_BACKGROUND = 100
_SIGNAL = 400
_CELL_SHAPE = (16, 32, 32)


@dataclass
class ClusterReport:
    """What one worker of a cluster reported, and the result of its block."""

    kind: str
    target: str
    workers: list[Joined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dashboard: str | None = None
    result: Result | None = None

    def add(self, event: Event) -> None:
        """Keep what an event says about the cluster."""
        match event:
            case Joined():
                self.workers.append(event)
            case Started():
                self.dashboard = event.dashboard
            case Notice():
                self.notes.append(event.text)
            case Result():
                self.result = event

    def to_json(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "kind": self.kind,
            "target": self.target,
            "workers": [asdict(worker) for worker in self.workers],
            "notes": self.notes,
            "dashboard": self.dashboard,
            "block_s": self.result.wall_s if self.result else None,
            "n_objects": self.result.n_objects if self.result else None,
        }


def check_cluster(
    file: str,
    target: str,
    options: dict[str, object],
    emit: Callable[[Event], None] = lambda event: None,
) -> ClusterReport:
    """Start one worker as a cluster file says, segment a small volume there, and remove it again.

    The volume and its segmentation lie in a new folder below ``target``, which worker and
    client both have to reach. ``options`` are further settings of the run.

    Raises:
        ClusterError: if the worker joined and its block failed.
        MegasegError: if the cluster cannot be used for a run.
    """
    checked = ClusterReport(read_cluster(file).kind, target)
    folder = Location.of(target) / f"megaseg-check-{uuid.uuid4().hex[:8]}"
    source = folder / "volume.zarr"
    run = {"model": "starter", "cluster": file, "workers": 1, "retries": 0}
    settings = parse_settings({**options, **run})

    def report(event: Event) -> None:
        checked.add(event)
        emit(event)

    try:
        write_sample(source, *_simulate())
        result = segment(source.url, (folder / "segmented.zarr").url, settings, emit=report)
    finally:
        folder.remove()
    if result.failures:
        cause = result.failures[0].error
        raise ClusterError(f"{file}: the worker joined and failed: {cause}")
    return checked


def _simulate() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return an image with photon noise and its mask, uint16: every second cell is bright."""
    z, y, x = np.indices(_VOLUME_SHAPE) // np.reshape(_CELL_SHAPE, (3, 1, 1, 1))
    mask = (z + y + x) % 2
    image = np.random.default_rng(0).poisson(_BACKGROUND + _SIGNAL * mask)
    return image.astype(np.uint16), mask.astype(np.uint16)
