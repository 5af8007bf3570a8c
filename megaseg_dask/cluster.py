"""Workers: a local cluster of processes, one worker per GPU, or a scheduler that already runs."""

import logging
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask

from megaseg_dask.errors import EngineError, SettingsError
from megaseg_dask.plan import Plan
from megaseg_dask.stores import StoreOptions, configure

START_S = 60

# Read by libraries as they load, so set before a worker starts; worth a factor of 2 and of 4 (docs/decisions.md).
WORKER_ENVIRONMENT = {
    # A forward pass frees and allocates gigabytes: keep them, rather than return and fault them in each time. One
    # arena, because glibc gives other arenas, which threads get, heaps of at most 64 MB.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    # Threads that spin at a barrier hold up each other as soon as another process wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}

# Ctrl-C reaches every process of a terminal: the client alone answers it, and ends its workers. What fails in a
# worker comes back to the client, which says so once and in one line.
WORKER_PRELOAD = """
import logging
import signal

def dask_setup(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
"""

# A worker that sends no sign of life for so long is given up; a call that holds the interpreter may be silent a while.
WORKER_TIMEOUT_S = 120.0

# 1.0: a worker never holds a second task in waiting, so a task that kills it takes no neighbour along.
CONFIG = {
    "distributed.scheduler.worker-saturation": 1.0,
    # We count attempts ourselves, and tell who dies for its neighbour from who killed the worker.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": f"{WORKER_TIMEOUT_S}s",
    "distributed.worker.multiprocessing-method": "spawn",
    # The plan bounds memory; Dask must not pause or spill a worker that does what was planned.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.admin.tick.limit": "30s",
    "distributed.worker.preload": [WORKER_PRELOAD],
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in WORKER_ENVIRONMENT.items()},
}


@contextmanager
def connect(plan: Plan) -> Iterator[Any]:
    """Yield a Dask ``Client`` with the workers that the plan's settings ask for, and give them back.

    Raises :class:`SettingsError` if a scheduler does not answer or no worker comes.
    """
    from distributed import Client

    _require_main_guard()
    patience_s = min(plan.options.timeout or WORKER_TIMEOUT_S, WORKER_TIMEOUT_S)
    with dask.config.set({**CONFIG, "distributed.scheduler.worker-ttl": f"{patience_s}s"}), _quiet():
        if plan.options.scheduler:
            try:
                client = Client(plan.options.scheduler, timeout=START_S)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--scheduler {plan.options.scheduler}: no answer: {error}") from error
            with client:
                _require_worker(client)
                yield client
            return
        try:
            cluster = _local_cluster(plan)
        except RuntimeError as error:
            raise EngineError(
                f"workers could not start ({error}); in a script, put its calls under `if __name__ == '__main__':`"
            ) from error
        try:
            with Client(cluster) as client:
                _require_worker(client)
                yield client
        finally:
            # On a busy machine workers may take longer to end than Dask waits; what they did is done.
            with suppress(TimeoutError, OSError):
                cluster.close()


def _require_main_guard() -> None:
    """Refuse to run while a worker imports the user's script: it would start workers, without end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError("workers import your script: put its calls under `if __name__ == '__main__':`")


def _require_worker(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=START_S)
    except TimeoutError as error:
        raise SettingsError(f"no worker joined within {START_S} s; see {client.dashboard_link}") from error


def open_stores(client: Any, options: StoreOptions) -> None:
    """Let all workers, also those that come later, open stores with the options of this run."""
    from distributed import WorkerPlugin

    class OpenStores(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
        name = "megaseg-stores"

        def setup(self, worker: Any) -> None:
            configure(options)

    client.register_plugin(OpenStores())


def add_workers(client: Any, n: int) -> bool:
    """Bring the workers of a cluster that we started up to ``n`` again; tell whether that could be asked for.

    A worker that dies in the moment it joins is not started again by its nanny.
    """
    cluster = client.cluster
    if cluster is None or not hasattr(cluster, "scale"):
        return False
    # Down to those that are there, so that the dead are forgotten.
    cluster.scale(len(client.nthreads()))
    cluster.scale(n)
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log lines about workers that come and go from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.nanny", "distributed.scheduler")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A busy dashboard port is replaced by a free one, which the address shown later tells.
            warnings.filterwarnings("ignore", "Port .* is already in use")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _local_cluster(plan: Plan) -> Any:
    if plan.engine.device == "cuda":
        from megaseg_dask.engines.pytorch import cuda_devices

        if not cuda_devices():
            raise SettingsError("--device cuda: PyTorch sees no GPU here; run megaseg doctor, or use --device cpu")
        return _cuda_cluster(plan)
    from distributed import LocalCluster

    # One thread per worker: a task already uses all threads that the plan gives a forward pass.
    return LocalCluster(
        n_workers=plan.options.workers or 1,
        threads_per_worker=1,
        processes=True,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
    )


def _cuda_cluster(plan: Plan) -> Any:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise SettingsError(
            "one worker per GPU needs dask-cuda: pip install 'megaseg-dask[cuda12]' (or cuda13), or use --device cpu"
        ) from error
    return LocalCUDACluster(
        n_workers=plan.options.workers,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
    )
