"""One worker process per GPU of this machine, each of which sees that one alone."""

from typing import Any

from distributed import LocalCluster


class GpuCluster(LocalCluster):  # type: ignore[misc]  # distributed has no types
    """A local cluster whose workers are pinned to a device each.

    The pin is in their environment before anything is imported. A replacement gets
    the device of the worker that was lost.
    """

    def __init__(self, devices: list[str], n_workers: int, **options: Any) -> None:
        """Start workers on the first of ``devices``, as ``CUDA_VISIBLE_DEVICES`` takes them."""
        self.devices = devices
        super().__init__(n_workers=0, **options)
        self.scale(n_workers)

    def new_worker_spec(self) -> dict[Any, Any]:
        """Return the next worker, named by its place in ``devices``."""
        place = next(i for i in range(len(self.devices)) if i not in self.worker_spec)
        environment = {"CUDA_VISIBLE_DEVICES": self.devices[place]}
        options = {**self.new_spec["options"], "env": environment}
        return {place: {**self.new_spec, "options": options}}
