"""What a worker gets as it joins a run, the first as well as one that comes hours later.

It is one plugin, which the scheduler gives to each worker before its first task,
and takes back at the end. A worker says here too what it is.
"""

import socket
from collections.abc import Mapping
from typing import Any, TypeAlias

from megaseg_dask.inference.machine import n_cores
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
    precision: str | None,
) -> Any:
    """Return the plugin that makes a worker ready for the tasks of a run.

    ``bundles`` is the address of the copies of bundles, if workers need them. A worker
    whose packages do not begin with ``versions``, or whose GPU does not compute in a
    ``precision``, leaves before it has done anything.
    The class is made here, so that it travels as a whole: another version of this
    package may not have it.
    """
    from distributed import WorkerPlugin

    topic = NAME
    module = __name__

    class RunPlugin(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
        name = topic

        async def setup(self, worker: Any) -> None:
            import importlib
            from importlib.metadata import PackageNotFoundError, version

            for package, required in versions.items():
                try:
                    installed = version(package)
                except PackageNotFoundError:
                    installed = "missing"
                parts = installed.partition("+")[0].split(".")
                if parts[: len(required)] != required:
                    notice = (
                        f"worker {worker.address} was refused: it has {package} {installed}, "
                        f"expected {'.'.join(required)}"
                    )
                    worker.log_event(topic, {"notice": notice})
                    worker.loop.add_callback(worker.close, reason="megaseg-version")
                    return
            plugin = importlib.import_module(module)
            if precision is not None and await plugin.leaves_without_device(worker, precision):
                return
            plugin.set_up_worker(worker, options, bundles, lifetime_s)

        def teardown(self, worker: Any) -> None:
            import importlib

            importlib.import_module(module).tear_down_worker()

    return RunPlugin()


async def leaves_without_device(worker: Any, precision: str) -> bool:
    """Send a worker away whose GPU does not work; return whether that was so."""
    import asyncio

    from megaseg_dask.inference.gpu import open_device

    # In a thread: it takes seconds, in which the scheduler has to hear from this process.
    device = await asyncio.to_thread(open_device, precision)
    if not device.problem:
        return False
    name = str(worker.name)
    event = {
        "notice": f"worker {name} was refused: {device.problem}",
        "address": worker.address,
        "name": name,
        "device": device.uuid or name,
        "problem": device.problem,
    }
    worker.log_event(NAME, event)
    worker.loop.add_callback(worker.close, reason="megaseg-device")
    return True


def set_up_worker(
    worker: Any, options: StoreOptions, bundles: str | None, lifetime_s: Lifetime
) -> None:
    """Make this process ready for the tasks of a run."""
    configure(options)
    staging.use(staging.Copies(bundles, worker.local_directory) if bundles else None)
    if lifetime_s:
        import random

        mean_s, spread_s = lifetime_s
        after_s = mean_s + random.uniform(-1, 1) * spread_s
        worker.loop.call_later(after_s, _retire, worker)


def tear_down_worker() -> None:
    """Undo :func:`set_up_worker`; options of stores may be secret."""
    configure(StoreOptions())
    staging.use(None)


async def _retire(worker: Any) -> None:
    """Take no further task, finish the current one, and leave.

    Dask's own lifetime would throw the current task away.
    """
    import asyncio

    from distributed.core import Status

    worker.status = Status.paused
    while worker.state.executing_count:
        await asyncio.sleep(0.2)
    await worker.close_gracefully(reason="megaseg-lifetime")


def describe(precision: str | None, dask_worker: Any = None) -> dict[str, Any]:
    """Return the fields of this worker's :class:`~megaseg_dask.events.Joined`.

    With a ``precision`` it is to compute on a GPU; ``problem`` then says why it cannot. Dask
    passes ``dask_worker``.
    """
    description = {
        "name": str(dask_worker.name),
        "address": dask_worker.address,
        "host": socket.gethostname(),
        "cores": n_cores(),
        "memory_limit": _memory_limit(dask_worker),
    }
    if precision is not None:
        from megaseg_dask.inference.gpu import open_device

        device = open_device(precision)
        description |= {
            "device": device.name,
            "uuid": device.uuid,
            "device_free_bytes": device.free_bytes,
            "device_total_bytes": device.total_bytes,
            "problem": device.problem,
        }
    return description


def _memory_limit(worker: Any) -> int:
    """Return the bytes from which Dask pauses or ends a worker, 0 if it never does.

    A worker that keeps its memory is paused for ever.
    """
    import dask

    limit = worker.memory_manager.memory_limit or 0
    terminates = worker.nanny is not None and dask.config.get("distributed.worker.memory.terminate")
    shares = [worker.memory_manager.memory_pause_fraction, terminates]
    return int(limit * min(filter(None, shares), default=0))
