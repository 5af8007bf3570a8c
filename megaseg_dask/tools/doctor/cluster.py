"""A cluster file tried before a night depends on it: one worker, one real block, and what it saw."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from megaseg_dask.errors import ClusterError
from megaseg_dask.events import Event, Joined, Notice, Result, Started
from megaseg_dask.plan.cluster_spec import read_cluster
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.demo import write_sample
from megaseg_dask.tools.simulation import simulate

# Of the starter's patch, so that its whole network runs.
_SHAPE = (32, 128, 128)


@dataclass
class Seen:
    """What became of one block on one worker of a cluster."""

    kind: str
    target: str
    workers: list[Joined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dashboard: str | None = None
    result: Result | None = None

    def hear(self, event: Event) -> None:
        """Take down what a run tells."""
        match event:
            case Joined():
                self.workers.append(event)
            case Started():
                self.dashboard = event.dashboard
            case Result():
                self.result = event
            case Notice():
                self.notes.append(event.text)

    def as_dict(self) -> dict[str, Any]:
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
    file: str, target: str, options: dict[str, Any], emit: Callable[[Event], None] = lambda _: None
) -> Seen:
    """Start one worker as a cluster file says, segment a small simulated volume there, and remove it again.

    The volume is written to, and read from, a folder below ``target``: where worker and client both reach it.
    ``options`` are further settings of a run. Raises :class:`MegasegError` if the cluster is not fit for a run.
    """
    seen = Seen(read_cluster(file).kind, target)
    folder = Location.of(target) / f"megaseg-check-{uuid.uuid4().hex[:8]}"
    settings = parse_settings(
        {**options, "model": "starter", "cluster": file, "workers": 1, "retries": 0}
    )

    def hear(event: Event) -> None:
        seen.hear(event)
        emit(event)

    made = simulate(0, _SHAPE, kind="nuclei")
    try:
        write_sample(folder / "volume.zarr", made.image, made.mask.astype("uint16"))
        result = segment(
            (folder / "volume.zarr").url, (folder / "segmented.zarr").url, settings, emit=hear
        )
    finally:
        folder.remove()
    if result.failures:
        raise ClusterError(f"{file}: the worker joined and failed: {result.failures[0].error}")
    return seen
