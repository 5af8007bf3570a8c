"""How Dask is configured for our workers, and how processes that somebody else starts get it."""

from importlib.util import find_spec
from typing import Any

import dask

# Read by libraries as they load, so set before a worker starts; worth a factor of 2 and of 4
# (docs/decisions.md).
WORKER_ENVIRONMENT = {
    # A forward pass frees and allocates gigabytes: keep them, rather than return them and fault
    # them in each time. One arena, because glibc gives other arenas, which threads get, heaps of at
    # most 64 MB.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    # Threads that spin at a barrier hold each other up as soon as another process wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A batch that shrank leaves pieces of the memory of a GPU that a block would not fit.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

# Ctrl-C, Ctrl-\\ and a terminal that is closed reach every process of it: the client alone answers,
# and ends its workers.
# An error in a worker comes back to the client, which reports it once and in one line.
# What Dask imported stays: the collector need not look at it again and again.
WORKER_PRELOAD = """
import gc
import logging
import signal

def dask_setup(worker):
    gc.freeze()
    for name in ("SIGINT", "SIGQUIT", "SIGHUP"):
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
"""

# A worker without a heartbeat for this long is given up; a call that holds the interpreter may be
# silent for a while.
WORKER_TIMEOUT_S = 120.0

# Settings that only a scheduler decides.
SCHEDULER_CONFIG = {
    # A worker never holds a second waiting task, so a task that kills it takes no neighbor along.
    "distributed.scheduler.worker-saturation": 1.0,
    # The run counts attempts itself, and tells a task that killed its worker from its neighbors.
    "distributed.scheduler.allowed-failures": 0,
}

CONFIG = {
    **SCHEDULER_CONFIG,
    "distributed.scheduler.worker-ttl": f"{WORKER_TIMEOUT_S}s",
    "distributed.worker.multiprocessing-method": "spawn",
    # The plan bounds memory; Dask must not pause or spill a worker that does what was planned.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.admin.tick.limit": "30s",
    "distributed.worker.preload": [WORKER_PRELOAD],
    **{
        f"distributed.nanny.pre-spawn-environ.{name}": value
        for name, value in WORKER_ENVIRONMENT.items()
    },
}


def without_pages() -> dict[str, Any]:
    """Return the settings of servers that answer no web request, which need no certificate.

    The scheduler keeps its pages where somebody installed the dashboard.
    """
    servers = ["worker"] if find_spec("bokeh") else ["worker", "scheduler"]
    return {f"distributed.{server}.http.routes": [] for server in servers}


def inherited() -> dict[str, str]:
    """Return the environment variable by which a Dask process elsewhere gets :data:`CONFIG`.

    Dask's own mechanism would hand on the whole configuration of this process,
    credentials included. The preload is left out: it silences the log, and the log of a
    worker elsewhere goes to its job's output, and may be all there is to find out why it
    ended.
    """
    config = dict(CONFIG)
    del config["distributed.worker.preload"]
    nested: dict[str, Any] = {}
    dask.config.set(config, config=nested)
    return {"DASK_INTERNAL_INHERIT_CONFIG": dask.config.serialize(nested)}
