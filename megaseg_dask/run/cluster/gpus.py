"""One worker process per GPU of this machine, each of which sees that one alone."""

import os
from typing import Any

from distributed import LocalCluster


def visible_devices(n: int) -> list[str]:
    """Return the names of the ``n`` GPUs that this process may use.

    They are as ``CUDA_VISIBLE_DEVICES`` takes them.
    """
    # A batch system may have given us some of the machine's.
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [name.strip() for name in given if name.strip()]
    return names[:n] or [str(i) for i in range(n)]


class GpuCluster(LocalCluster):  # type: ignore[misc]  # distributed has no types
    """A local cluster whose workers are pinned to a device each.

    The pin is in their environment before anything is imported. A replacement gets
    the device of the worker that was lost.
    """

    def __init__(self, devices: list[str], **options: Any) -> None:
        self.devices = devices
        super().__init__(n_workers=0, **options)

    def new_worker_spec(self) -> dict[Any, Any]:
        """Return the next worker, named by its place in ``devices``."""
        place = next(i for i in range(len(self.devices)) if i not in self.worker_spec)
        environment = {"CUDA_VISIBLE_DEVICES": self.devices[place]}
        options = {**self.new_spec["options"], "env": environment}
        return {place: {**self.new_spec, "options": options}}
