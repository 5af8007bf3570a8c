"""What a worker gets as it joins a run, the first as well as one that comes hours later, and what it says of itself.

It is one plugin, which the scheduler gives to each worker before its first
task, and takes back at the end.
"""

import os
import socket
from collections.abc import Mapping
from typing import Any, TypeAlias

from megaseg_dask.models import staging
from megaseg_dask.stores import StoreOptions, configure

NAME = "megaseg"

# After how many seconds a worker leaves, and by how many that varies.
Lifetime: TypeAlias = tuple[float, float] | None


def make_plugin(
    options: StoreOptions,
    bundles: str | None,
    versions: Mapping[str, list[str]],
    lifetime_s: Lifetime,
) -> Any:
    """Return the plugin: store options, where copies of bundles are, versions to insist on, and when to leave.

    A worker whose packages do not begin with ``versions`` leaves before it has done anything. The class is made here,
    so that it travels as a whole: another version of this package may not have it.
    """
    from distributed import WorkerPlugin

    topic = NAME
    module = __name__

    class Joining(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
        name = topic

        async def setup(self, worker: Any) -> None:
            import importlib
            from importlib.metadata import PackageNotFoundError, version

            for name, wanted in versions.items():
                try:
                    found = version(name)
                except PackageNotFoundError:
                    found = "missing"
                if found.partition("+")[0].split(".")[: len(wanted)] != wanted:
                    text = f"worker {worker.address} was sent away: it has {name} {found}, not {'.'.join(wanted)}"
                    worker.log_event(topic, {"notice": text})
                    worker.loop.add_callback(worker.close, reason="megaseg-version")
                    return
            importlib.import_module(module).join(worker, options, bundles, lifetime_s)

        def teardown(self, worker: Any) -> None:
            import importlib

            importlib.import_module(module).leave(worker)

    return Joining()


def join(worker: Any, options: StoreOptions, bundles: str | None, lifetime_s: Lifetime) -> None:
    """Make this process ready for the tasks of a run."""
    configure(options)
    staging.use(staging.Copies(bundles, worker.local_directory) if bundles else None)
    if lifetime_s:
        import random

        after_s = lifetime_s[0] + random.uniform(-1, 1) * lifetime_s[1]
        worker.loop.call_later(after_s, _retire, worker)


def leave(worker: Any) -> None:
    """Forget what :func:`join` said; options of stores may be secret."""
    configure(StoreOptions())
    staging.use(None)


async def _retire(worker: Any) -> None:
    """Take no further task, finish the one at hand, and leave: Dask's own lifetime would throw that one away."""
    import asyncio

    from distributed.core import Status

    worker.status = Status.paused
    while worker.state.executing_count:
        await asyncio.sleep(0.2)
    await worker.close_gracefully(reason="megaseg-lifetime")


def describe(on_gpu: bool, dask_worker: Any = None) -> dict[str, Any]:
    """Return what this worker is, as :class:`~megaseg_dask.events.Joined` tells it; Dask passes ``dask_worker``."""
    worker = dask_worker
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    found = {
        "name": str(worker.name),
        "address": worker.address,
        "host": socket.gethostname(),
        "cores": cores,
        "memory_limit": worker.memory_manager.memory_limit or 0,
    }
    if on_gpu:
        from megaseg_dask.inference.gpu import cuda_identity

        device, uuid = cuda_identity() or (None, None)
        found |= {"device": device, "uuid": uuid}
    return found
