"""Workers of a run: started as the settings say, made ready, looked after while it lasts, and given back.

Each kind of cluster differs only in how its workers start (:mod:`megaseg_dask.run.cluster.start`). All of them are
Dask workers of one scheduler; a run knows no more than that.
"""

import logging
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import dask

from megaseg_dask.errors import ClusterError, SettingsError
from megaseg_dask.events import Event, Joined, Notice
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models import staging
from megaseg_dask.plan.cluster_spec import BATCH, Cluster, cluster_of
from megaseg_dask.plan.plan import TASKS_AT_ONCE, Plan
from megaseg_dask.run.cluster import worker_plugin
from megaseg_dask.run.cluster.dask_config import (
    CONFIG,
    SCHEDULER_CONFIG,
    WORKER_ENVIRONMENT,
    WORKER_PRELOAD,
    WORKER_TIMEOUT_S,
)
from megaseg_dask.run.cluster.start import adapt, require_queued, security_of, started
from megaseg_dask.run.cluster.versions import require_versions
from megaseg_dask.stores import Location, StoreOptions

__all__ = ["CONFIG", "WORKER_ENVIRONMENT", "WORKER_PRELOAD", "Workers", "connect"]

Emit = Callable[[Event], None]

# A first worker comes within seconds here, and elsewhere after a queue.
START_S, _QUEUE_S = 60.0, 3600.0
# Workers that are gone for so long do not come back by themselves.
_MISSING_S, _ALL_MISSING_S = 20.0, 120.0
# A person is told what is waited for after so long.
_TELL_S = 10.0


@dataclass
class Workers:
    """The workers of a run, behind a Dask client; replaces those that are lost where it can."""

    client: Any
    engine: EngineName = "torch"
    device: str = "cpu"
    emit: Emit = lambda _: None
    wanted: Cluster | None = None
    # By address: all that ever joined.
    joined: dict[str, Joined] = field(default_factory=dict)
    # Of those that joined, by the name that a job or nanny has too.
    _names: set[str] = field(default_factory=set)
    _n: int = 0
    _missing_since: float | None = None
    _none_since: float | None = None
    _insisted: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Tell whether workers see the files of this machine."""
        from distributed import LocalCluster

        return (
            self.wanted.is_local if self.wanted else isinstance(self.client.cluster, LocalCluster)
        )

    @property
    def patience_s(self) -> float:
        """How long a run waits when no worker is left: a job may have to queue again."""
        if self.wanted is None or not self.wanted.is_queued:
            return _ALL_MISSING_S
        return self.wanted.wait or _QUEUE_S

    def record(self) -> dict[str, Any]:
        """Return what the run folder keeps of its workers: hosts and devices, as JSON values."""
        return {"workers": [asdict(worker) for worker in self.joined.values()]}

    # -- as a run begins and ends

    def greet(self) -> None:
        """Compare versions, look at the scheduler and at each worker; raises :class:`SettingsError`."""
        self._insisted, notes = require_versions(self.client, self.engine)
        for note in notes:
            self.emit(Notice(note))
        self._require_one_task_each()
        self._describe(list(self.client.nthreads()), is_first=True)

    def _require_one_task_each(self) -> None:
        """Warn of a scheduler or workers that somebody else set otherwise than a run wants them."""
        most, planned = (
            max(self.client.nthreads().values(), default=1),
            TASKS_AT_ONCE.get(self.device, 1),
        )
        if most > planned:
            self.emit(
                Notice(
                    f"workers take {most} tasks at once, and the plan's memory is that of {planned}: start "
                    f"them with --nthreads {planned}"
                )
            )
        found = {
            key: self.client.run_on_scheduler(dask.config.get, key) for key in SCHEDULER_CONFIG
        }
        wrong = [
            f"{key} {found[key]}, not {value}"
            for key, value in SCHEDULER_CONFIG.items()
            if found[key] != value
        ]
        if wrong:
            self.emit(
                Notice(
                    f"the scheduler has {' and '.join(wrong)}: a block that kills its worker may take others "
                    "along; see docs/clusters.md"
                )
            )

    def _describe(self, addresses: list[str], *, is_first: bool = False) -> None:
        new = [address for address in addresses if address not in self.joined]
        if not new:
            return
        found = self.client.run(
            worker_plugin.describe, self.device == "cuda", workers=new, on_error="return"
        )
        for address, description in found.items():
            if isinstance(description, Exception):
                # It is gone again, or of another version and about to leave; the first have been compared.
                if is_first and not isinstance(description, OSError):
                    raise description
                continue
            self.joined[address] = Joined(**description)
            self._names.add(self.joined[address].name)
            self.emit(self.joined[address])
        self._require_own_devices(set(addresses))

    def _require_own_devices(self, addresses: set[str]) -> None:
        """Raise :class:`SettingsError` if two workers compute on one GPU: each would get half of its memory."""
        owners: dict[str, str] = {}
        for address in sorted(addresses & set(self.joined)):
            worker = self.joined[address]
            if worker.uuid and owners.setdefault(worker.uuid, worker.name) != worker.name:
                raise SettingsError(
                    f"workers {owners[worker.uuid]} and {worker.name} share GPU {worker.uuid} on "
                    f"{worker.host}; give each a device of its own"
                )

    @contextmanager
    def ready(self, model: ModelRef, run: Location, options: StoreOptions) -> Iterator[None]:
        """Make all workers ready for tasks, also those that come later, and take it back at the end.

        Weights go beside the run once, and from there to each worker once, where workers do not see our files.
        """
        bundles = None if self.is_local else run / staging.FOLDER
        for bundle in model.bundles:
            if bundles:
                staging.put(bundle.path, bundle.digest, bundles, bundle.checkpoint)
        lifetime_s = self.wanted.lifetime_s if self.wanted else None
        plugin = worker_plugin.make_plugin(
            options, bundles.url if bundles else None, self._insisted, lifetime_s
        )
        self.client.subscribe_topic(worker_plugin.NAME, self._hear)
        self.client.register_plugin(plugin)
        try:
            yield
        finally:
            # The scheduler may be gone, which the run has said.
            with suppress(Exception):
                self.client.unregister_worker_plugin(worker_plugin.NAME)
            with suppress(Exception):
                self.client.unsubscribe_topic(worker_plugin.NAME)
            if bundles:
                bundles.remove()

    def _hear(self, event: Any) -> None:
        self.emit(Notice(event[1]["notice"]))

    # -- while it lasts

    def look(self, n_workers: int) -> None:
        """Look after workers that joined or were lost; raises :class:`ClusterError` once none is left for long."""
        now = time.monotonic()
        self._describe(list(self.client.nthreads()))
        self._none_since = None if n_workers else self._none_since or now
        if n_workers >= self._n:
            self._n, self._missing_since = n_workers, None
            return
        self._missing_since = self._missing_since or now
        if self._none_since and now - self._none_since > self.patience_s:
            gone_s = now - self._none_since
            raise ClusterError(
                f"all workers are gone for {gone_s:.0f} s; run the same command again to go on"
            )
        if now - self._missing_since > _MISSING_S and self._replace():
            self._missing_since = None

    def _replace(self) -> bool:
        """Ask anew for workers that are gone; tell whether that could be asked for.

        A batch system takes a job that ended for done, and a nanny does not start a worker again that died as it
        joined. Jobs that wait in a queue keep their place.
        """
        cluster = self.client.cluster
        if not hasattr(cluster, "worker_spec") or (self.wanted and self.wanted.adaptive):
            return False
        cluster.sync(_forget_ended, cluster, self._names)
        cluster.scale(self.wanted.workers if self.wanted and self.wanted.workers else self._n)
        return True


async def _forget_ended(cluster: Any, joined: set[str]) -> None:
    """Take jobs and nannies off the list whose workers had joined and are gone."""
    live = {str(worker["name"]) for worker in cluster.scheduler_info["workers"].values()}
    for name, job in list(cluster.workers.items()):
        members = {
            f"{name}{suffix}" for suffix in cluster.worker_spec.get(name, {}).get("group", ("",))
        }
        if members & joined and not members & live:
            # What comes in its place has its name, and has not joined yet.
            joined -= members
            cluster.workers.pop(name, None)
            await job.close()


# -- connecting


@contextmanager
def connect(plan: Plan, emit: Emit = lambda _: None) -> Iterator[Workers]:
    """Yield the workers that the plan's settings ask for, once the first is there, and give them back.

    Raises :class:`SettingsError` if a scheduler does not answer, jobs are refused or no worker comes.
    """
    # Its defaults join the configuration at the import: within ours they would be gone when that ends, and with them
    # the next run of this process.
    import distributed  # noqa: F401

    _require_main_guard()
    options = plan.settings
    wanted = cluster_of(options)
    if wanted.kind == "local" and plan.engine.device == "cuda":
        wanted = wanted.model_copy(update={"kind": "cuda"})
    patience_s = min(options.timeout or WORKER_TIMEOUT_S, WORKER_TIMEOUT_S)
    with (
        dask.config.set({**CONFIG, "distributed.scheduler.worker-ttl": f"{patience_s}s"}),
        _quiet(),
    ):
        with (
            started(wanted) if wanted.kind != "scheduler" else nullcontext() as cluster,
            _client(wanted, cluster, emit) as client,
        ):
            _require_worker(client, wanted, emit)
            adapt(wanted, cluster)
            yield Workers(client, plan.engine.engine, plan.engine.device, emit, wanted)


def _client(wanted: Cluster, cluster: Any, emit: Emit) -> Any:
    from distributed import Client

    if cluster is not None:
        return Client(cluster)
    # One that was started beside this command may need a moment.
    patience = Notice(
        f"no answer from the scheduler at {wanted.address} yet; waiting {START_S:.0f} s in all"
    )
    teller = threading.Timer(_TELL_S / 2, emit, [patience])
    teller.start()
    try:
        return Client(wanted.address, timeout=START_S, security=security_of(wanted))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--scheduler {wanted.address}: no answer: {error}; check the address, and that dask "
            "scheduler runs there"
        ) from error
    except (TypeError, RuntimeError) as error:
        raise SettingsError(
            f"--scheduler {wanted.address}: {error}; name its certificates in a cluster file "
            "(docs/clusters.md)"
        ) from error
    finally:
        teller.cancel()


def _require_main_guard() -> None:
    """Refuse to run while a worker imports the user's script: it would start workers, without end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError(
            "workers import your script: put its calls under `if __name__ == '__main__':`"
        )


def _require_worker(client: Any, wanted: Cluster, emit: Emit) -> None:
    """Wait for the first worker: seconds on this machine, as long as it takes in a queue."""
    wait_s, started_at, told = (
        wanted.wait or (_QUEUE_S if wanted.is_queued else START_S),
        time.monotonic(),
        False,
    )
    while True:
        left_s = wait_s - (time.monotonic() - started_at)
        try:
            client.wait_for_workers(1, timeout=max(min(_TELL_S, left_s), 0.1))
            return
        except TimeoutError as error:
            require_queued(wanted, client.cluster)
            if left_s <= _TELL_S:
                raise SettingsError(
                    f"no worker joined within {wait_s:.0f} s; {_where_to_look(wanted, client)}"
                ) from error
        if not told and not wanted.is_local:
            emit(
                Notice(
                    f"waiting for the first worker, for {wait_s / 60:.0f} minutes at most; it joins when its job runs"
                )
            )
            told = True


def _where_to_look(wanted: Cluster, client: Any) -> str:
    if wanted.kind in BATCH:
        return "look at the output of its jobs (options: log_directory), and whether they may reach this machine"
    return f"see {client.dashboard_link}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log lines about workers that come and go from the user's terminal."""
    loggers = [
        logging.getLogger(name)
        for name in ("distributed", "distributed.nanny", "distributed.scheduler")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A busy dashboard port is replaced by a free one, which the address shown later tells.
            warnings.filterwarnings("ignore", "Port .* is already in use")
            # We compare versions ourselves, and say which difference matters.
            warnings.filterwarnings("ignore", "Mismatched versions found")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
