"""The way to workers: a scheduler that answers, and a first worker that joined."""

import functools
import logging
import multiprocessing
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import dask

from megaseg_dask.errors import SettingsError
from megaseg_dask.events import Emit, Notice
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.plan.cluster_spec import BATCH, Cluster, cluster_of
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.cluster.dask_config import CONFIG, WORKER_TIMEOUT_S, without_pages
from megaseg_dask.run.cluster.start import adapt, require_queued, security_of, started
from megaseg_dask.run.cluster.workers import QUEUE_S, Workers

# A first worker on this machine joins within seconds.
START_S = 60.0
# After this long a person is told what the run waits for.
_NOTICE_S = 10.0


class Needs(Protocol):
    """What workers have to offer: of a plan, or of an import."""

    @property
    def settings(self) -> Settings:
        """How workers are started."""
        ...

    @property
    def engine(self) -> EngineSpec:
        """What they compute with."""
        ...

    @property
    def projected_bytes(self) -> Mapping[str, int]:
        """The peak memory of a worker in each stage."""
        ...


@contextmanager
def connect(plan: Needs, emit: Emit = lambda _: None) -> Iterator[Workers]:
    """Yield the workers that the plan's settings ask for, once the first is there.

    They are given back at the end.

    Raises:
        SettingsError: A scheduler does not answer, jobs are refused, or no worker comes.
    """
    # Its defaults join the configuration at the import: within ours they would be gone when that
    # ends, and with them the next run of this process.
    import distributed  # noqa: F401

    cluster = cluster_of(plan.settings)
    if cluster.is_local:
        _require_children()
    if cluster.kind == "local" and plan.engine.device == "cuda":
        cluster = cluster.model_copy(update={"kind": "cuda"})
    timeout_s = min(plan.settings.timeout or WORKER_TIMEOUT_S, WORKER_TIMEOUT_S)
    config = {**CONFIG, "distributed.scheduler.worker-ttl": f"{timeout_s}s"}
    config["temporary-directory"] = _private_scratch(dask.config.get("temporary-directory", None))
    if cluster.is_local:
        config |= without_pages()
    with dask.config.set(config), _quiet(), _dask_cluster(cluster) as dask_cluster:
        with _open_client(cluster, dask_cluster, emit) as client:
            _wait_for_worker(client, cluster, emit)
            adapt(cluster, dask_cluster)
            yield Workers.of(plan, client, emit, cluster)


@functools.cache
def _private_scratch(parent: str | None) -> str:
    """Return a folder for the files of this process's servers, where no other user can write.

    Dask imports from it, and its usual place in /tmp anybody may have taken before.
    """
    try:
        folder = tempfile.mkdtemp(prefix="megaseg-", dir=parent)
    except OSError as error:
        raise SettingsError(
            f"workers need a folder for their files in {parent or tempfile.gettempdir()}: "
            f"{error.strerror}; create it, or set temporary-directory in Dask's configuration "
            "(DASK_TEMPORARY_DIRECTORY)"
        ) from error
    # At exit, after what Dask removes in it.
    weakref.finalize(_private_scratch, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _dask_cluster(cluster: Cluster) -> Any:
    if cluster.kind == "scheduler":
        return nullcontext()
    return started(cluster)


def _open_client(cluster: Cluster, dask_cluster: Any, emit: Emit) -> Any:
    from distributed import Client

    if dask_cluster is not None:
        return Client(dask_cluster)
    # A scheduler that was started beside this command may need a moment.
    notice = Notice(
        f"no answer from the scheduler at {cluster.address} yet; waiting up to {START_S:.0f} s"
    )
    timer = threading.Timer(_NOTICE_S / 2, emit, [notice])
    timer.start()
    try:
        return Client(cluster.address, timeout=START_S, security=security_of(cluster))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--scheduler {cluster.address}: no answer ({error}); check the address, and check "
            "that dask scheduler runs there"
        ) from error
    except (TypeError, RuntimeError) as error:
        raise SettingsError(
            f"--scheduler {cluster.address}: {error}; put its certificates in a cluster file "
            "(docs/clusters.md)"
        ) from error
    finally:
        timer.cancel()


def _require_children() -> None:
    """Check that this process can start workers.

    Raises:
        SettingsError: It cannot.
    """
    process = multiprocessing.current_process()
    # A worker that imports the user's script would start more workers.
    if getattr(process, "_inheriting", False):
        raise SettingsError(
            "workers import your script; put its calls under `if __name__ == '__main__':`"
        )
    if process.daemon:
        raise SettingsError(
            "this process is a worker of multiprocessing or Dask, which cannot start workers; pass "
            "workers=0 to run in this process, or client= to use other workers"
        )
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        # Dask would wait for its worker for ever.
        raise SettingsError(
            f"workers need shared memory, and this system gives none ({error.strerror}); make "
            "/dev/shm writable, or run in this process with --workers 0"
        ) from error


def _wait_for_worker(client: Any, cluster: Cluster, emit: Emit) -> None:
    """Wait for the first worker: seconds on this machine, as long as it takes in a queue."""
    max_wait_s = cluster.wait or (QUEUE_S if cluster.is_queued else START_S)
    ends = time.monotonic() + max_wait_s
    is_silent = not cluster.is_local
    while True:
        left_s = ends - time.monotonic()
        try:
            client.wait_for_workers(1, timeout=max(min(_NOTICE_S, left_s), 0.1))
            return
        except TimeoutError as error:
            require_queued(cluster, client.cluster)
            if left_s <= _NOTICE_S:
                raise SettingsError(
                    f"no worker joined within {max_wait_s:.0f} s; {_where_to_look(cluster, client)}"
                ) from error
        if is_silent:
            emit(
                Notice(
                    f"waiting for the first worker, at most {max_wait_s / 60:.0f} minutes; it "
                    "joins when its job starts"
                )
            )
            is_silent = False


def _where_to_look(cluster: Cluster, client: Any) -> str:
    if cluster.kind in BATCH:
        return (
            "read the output of its jobs (options: log_directory), and check that they can reach "
            "this machine"
        )
    return f"see {dashboard_of(client)}"


def dashboard_of(client: Any) -> str | None:
    """Return the address of Dask's page, ``None`` if none can be told."""
    try:
        link: str | None = client.dashboard_link
    except Exception:
        # It is made from a template of the user, which may name variables that are not set.
        return None
    return link


def require_client(client: Any) -> None:
    """Check that a client of a user can be used here.

    Raises:
        SettingsError: It is none, is asynchronous, or is closed.
    """
    from distributed import Client

    if not isinstance(client, Client):
        raise SettingsError(
            f"client: expected a distributed.Client, not {type(client).__name__}; pass an address "
            "as scheduler="
        )
    if client.asynchronous:
        raise SettingsError(
            "client: an asynchronous Client cannot be used; create a Client without "
            "asynchronous=True, and call segment in a thread (asyncio.to_thread)"
        )
    if client.status != "running":
        raise SettingsError(f"client: its state is {client.status}; create a new Client")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log lines about workers that come and go from the user's terminal."""
    names = (
        "distributed",
        "distributed.client",
        "distributed.nanny",
        "distributed.scheduler",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A busy dashboard port is replaced by a free one, which the address shown later tells.
            warnings.filterwarnings("ignore", "Port .* is already in use")
            # The run compares versions itself, and says which difference matters.
            warnings.filterwarnings("ignore", "Mismatched versions found")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
