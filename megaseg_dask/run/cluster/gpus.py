"""One worker process per GPU of this machine, each of which sees that one alone."""

import os
from typing import Any

from distributed import LocalCluster


def visible_devices(n: int) -> list[str]:
    """Return the names of the ``n`` GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # A batch system gave us some of the machine's.
    return [name.strip() for name in given.split(",") if name.strip()][:n] or list(
        map(str, range(n))
    )


class GpuCluster(LocalCluster):  # type: ignore[misc]  # distributed has no types
    """A local cluster whose workers are pinned to a device each, in their environment, before anything is imported.

    A worker that is started anew gets the device of the one that was lost.
    """

    def __init__(self, devices: list[str], **options: Any) -> None:
        self.devices = devices
        super().__init__(n_workers=0, **options)

    def new_worker_spec(self) -> dict[Any, Any]:
        """Return the next worker, named by its place in ``devices``."""
        place = next(i for i in range(len(self.devices)) if i not in self.worker_spec)
        options = {**self.new_spec["options"], "env": {"CUDA_VISIBLE_DEVICES": self.devices[place]}}
        return {place: {**self.new_spec, "options": options}}
