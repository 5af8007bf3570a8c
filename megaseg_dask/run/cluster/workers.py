"""The workers of a run: checked, made ready, watched while it lasts, and given back.

Each kind of cluster differs only in how its workers start (:mod:`megaseg_dask.run.cluster.start`).
All of them are Dask workers of one scheduler; a run knows no more than that.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dask

from megaseg_dask.errors import ClusterError, SettingsError
from megaseg_dask.events import Emit, Joined, Notice, ignore
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.machine import count_killed, memory_bytes
from megaseg_dask.models import staging
from megaseg_dask.plan.cluster_spec import Cluster
from megaseg_dask.plan.plan import TASKS_AT_ONCE
from megaseg_dask.run.cluster import worker_plugin
from megaseg_dask.run.cluster.dask_config import SCHEDULER_CONFIG
from megaseg_dask.run.cluster.versions import require_versions
from megaseg_dask.stores import Location, StoreOptions

# A job may wait in a queue for as long.
QUEUE_S = 3600.0
# Workers that are gone for this long do not come back by themselves.
_MISSING_S = 20.0
_ALL_MISSING_S = 120.0
# Paused workers that are to go on have freed memory by then.
_ALL_PAUSED_S = 40.0
# A look at the state of all workers is a large answer where they are many.
_LOOK_S = 10.0


@dataclass
class Workers:
    """The workers of a run, behind a Dask client; lost ones are replaced where that is possible.

    ``cluster`` is the declaration of workers that were started for this run, ``None``
    for those of a client that a user gave. ``needed_bytes`` is the projected peak of
    a worker. ``joined`` are all that ever joined, by address.
    """

    client: Any
    engine: EngineSpec
    emit: Emit = ignore
    cluster: Cluster | None = None
    needed_bytes: int = 0
    joined: dict[str, Joined] = field(default_factory=dict)
    # Of those that joined: a worker's name is also that of its job or nanny.
    _names: set[str] = field(default_factory=set)
    _absence: "_Absence" = field(default_factory=lambda: _Absence())
    _all_paused_since: float | None = None
    _looked_s: float = 0.0
    _required_versions: Mapping[str, list[str]] = field(default_factory=dict)
    # By the system of this machine, until the last look.
    _n_killed: int = field(default_factory=count_killed)

    @property
    def is_local(self) -> bool:
        """Whether workers see the files of this machine."""
        from distributed import LocalCluster

        if self.cluster:
            return self.cluster.is_local
        return isinstance(self.client.cluster, LocalCluster)

    @property
    def max_absence_s(self) -> float:
        """How long a run waits when no worker is left: a job may have to queue again."""
        if self.cluster is None or not self.cluster.is_queued:
            return _ALL_MISSING_S
        return self.cluster.wait or QUEUE_S

    # -- as a run begins and ends

    def check_workers(self) -> None:
        """Compare versions, and check the settings of the scheduler and of each worker.

        Raises:
            SettingsError: Versions differ where it matters, two workers share a GPU, or one may
                not use the memory that the plan needs.
        """
        self._required_versions, notes = require_versions(self.client, self.engine.engine)
        for note in notes:
            self.emit(Notice(note))
        self._warn_of_threads()
        self._warn_of_scheduler()
        self._describe(list(self.client.nthreads()), is_first=True)
        for worker in self.joined.values():
            if problem := self._memory_problem(worker):
                raise SettingsError(problem)

    def _memory_problem(self, worker: Joined) -> str:
        """Return what is wrong with the memory of a worker, if anything is."""
        if not 0 < worker.memory_limit < self.needed_bytes:
            return ""
        return (
            f"Dask pauses or stops worker {worker.name} on {worker.host} when it uses "
            f"{worker.memory_limit / 1e9:.2f} GB, and the plan needs {self.needed_bytes / 1e9:.2f} "
            "GB: start workers with a larger --memory-limit (0 means no limit), or plan with a "
            "smaller --memory (if the plan is recorded, with --overwrite)"
        )

    def _warn_of_threads(self) -> None:
        n_threads = max(self.client.nthreads().values(), default=1)
        n_planned = TASKS_AT_ONCE.get(self.engine.device, 1)
        if n_threads > n_planned:
            self.emit(
                Notice(
                    f"workers run {n_threads} tasks at the same time, and the memory of the plan "
                    f"is for {n_planned}; start them with --nthreads {n_planned}"
                )
            )

    def _warn_of_scheduler(self) -> None:
        """Warn of a scheduler that somebody else started with other settings than a run needs."""
        differences = []
        for key, value in SCHEDULER_CONFIG.items():
            actual = self.client.run_on_scheduler(dask.config.get, key)
            if actual != value:
                differences.append(f"{key} {actual}, not {value}")
        if differences:
            self.emit(
                Notice(
                    f"the scheduler has {' and '.join(differences)}: a block that kills its worker "
                    "may make other blocks fail too; see docs/clusters.md"
                )
            )

    def _describe(self, addresses: list[str], *, is_first: bool = False) -> None:
        new = [address for address in addresses if address not in self.joined]
        if not new:
            return
        on_gpu = self.engine.device == "cuda"
        descriptions = self.client.run(
            worker_plugin.describe, on_gpu, workers=new, on_error="return"
        )
        for address, description in descriptions.items():
            if isinstance(description, Exception):
                # It is gone again, or of another version and about to leave; the first workers
                # have been compared.
                if is_first and not isinstance(description, OSError):
                    raise description
                continue
            worker = Joined(**description)
            self.joined[address] = worker
            self._names.add(worker.name)
            self.emit(worker)
            problem = self._memory_problem(worker)
            if problem and not is_first:
                self.emit(Notice(problem))
        self._require_own_devices(set(addresses))

    def _require_own_devices(self, addresses: set[str]) -> None:
        """Raise :class:`SettingsError` if two workers compute on one GPU.

        Each would get half of its memory.
        """
        owners: dict[str, str] = {}
        for address in sorted(addresses & set(self.joined)):
            worker = self.joined[address]
            if not worker.uuid:
                continue
            owner = owners.setdefault(worker.uuid, worker.name)
            if owner != worker.name:
                raise SettingsError(
                    f"workers {owner} and {worker.name} share GPU {worker.uuid} on {worker.host}; "
                    "give each worker its own GPU"
                )

    @contextmanager
    def ready(self, model: ModelRef, run: Location, options: StoreOptions) -> Iterator[None]:
        """Prepare all workers for tasks, also those that come later, and undo it at the end.

        Where workers do not see the files of this machine, the bundles are copied beside
        the run once, and from there to each worker once.
        """
        bundles = None if self.is_local else run / staging.FOLDER
        for bundle in model.bundles:
            if bundles:
                staging.put(bundle.path, bundle.digest, bundles, bundle.checkpoint)
        try:
            with self.ready_with(options, bundles):
                yield
        finally:
            if bundles:
                bundles.remove()

    @contextmanager
    def ready_with(self, options: StoreOptions, bundles: Location | None = None) -> Iterator[None]:
        """Give all workers the options of stores, and the place of copies of bundles."""
        plugin = worker_plugin.make_plugin(
            options,
            bundles.url if bundles else None,
            self._required_versions,
            self.cluster.lifetime_s if self.cluster else None,
        )
        self.client.subscribe_topic(worker_plugin.NAME, self._forward)
        self.client.register_plugin(plugin)
        try:
            yield
        finally:
            # The scheduler may be gone, which the run has said.
            with suppress(Exception):
                self.client.unregister_worker_plugin(worker_plugin.NAME)
            with suppress(Exception):
                self.client.unsubscribe_topic(worker_plugin.NAME)

    def _forward(self, message: Any) -> None:
        self.emit(Notice(message[1]["notice"]))

    # -- while it lasts

    def watch(self, n_workers: int) -> None:
        """Describe workers that joined, and replace workers that were lost.

        Raises:
            ClusterError: No worker has been there for long, or all are paused.
            SettingsError: Two workers share a GPU.
        """
        self._describe(list(self.client.nthreads()))
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self._require_one_that_works(now)
        absence = self._absence
        absence.update(n_workers, now)
        if absence.all_missing_s > self.max_absence_s:
            raise ClusterError(
                f"there were no workers for {absence.all_missing_s:.0f} s; "
                "run the same command again to resume"
            )
        if absence.missing_s > _MISSING_S and self._replace():
            absence.forget()

    def _require_one_that_works(self, now: float) -> None:
        """Raise :class:`ClusterError` if Dask has paused all workers for long."""
        states = [
            worker["status"]
            for worker in self.client.scheduler_info(n_workers=-1)["workers"].values()
        ]
        if set(states) != {"paused"}:
            self._all_paused_since = None
        elif self._all_paused_since is None:
            self._all_paused_since = now
        paused_s = _elapsed(self._all_paused_since, now)
        if paused_s > _ALL_PAUSED_S:
            raise ClusterError(
                f"all workers were paused for {paused_s:.0f} s because they use more memory than "
                "their limit; start workers with a larger --memory-limit (0 means no limit), and "
                "run the same command again to resume"
            )

    def cause_of_loss(self) -> str:
        """Return why a worker is gone, as far as that is known."""
        n_before = self._n_killed
        self._n_killed = count_killed()
        if self.is_local and self._n_killed > n_before:
            return (
                "its worker was killed because memory ran out (this machine, or its container, has "
                f"{memory_bytes() / 1e9:.1f} GB); use fewer --workers, or plan with a smaller "
                "--memory and --overwrite"
            )
        limits = [worker.memory_limit for worker in self.joined.values() if worker.memory_limit]
        if limits:
            return f"its worker died or hung; Dask stops a worker near {min(limits) / 1e9:.2f} GB"
        return "its worker died or hung"

    def _replace(self) -> bool:
        """Ask for workers in place of lost ones; return whether that was possible.

        A batch system takes a job that ended for done, and a nanny does not start a
        worker again that died as it joined. Jobs that wait in a queue keep their place.
        """
        cluster = self.client.cluster
        if not hasattr(cluster, "worker_spec") or (self.cluster and self.cluster.adaptive):
            return False
        n_workers = self.cluster.workers if self.cluster else None
        cluster.sync(_remove_ended, cluster, self._names)
        cluster.scale(n_workers or self._absence.n_most)
        return True


@dataclass
class _Absence:
    """Since when workers are missing, and how many there were at most."""

    n_most: int = 0
    missing_s: float = 0.0
    all_missing_s: float = 0.0
    _missing_since: float | None = None
    _all_missing_since: float | None = None

    def update(self, n_workers: int, now: float) -> None:
        """Note how many workers there are now."""
        if n_workers:
            self._all_missing_since = None
        elif self._all_missing_since is None and self.n_most:
            self._all_missing_since = now
        if n_workers >= self.n_most:
            self.n_most = n_workers
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        self.missing_s = _elapsed(self._missing_since, now)
        self.all_missing_s = _elapsed(self._all_missing_since, now)

    def forget(self) -> None:
        """Start again: the missing workers have been asked for."""
        self._missing_since = None


def _elapsed(since: float | None, now: float) -> float:
    return 0.0 if since is None else now - since


async def _remove_ended(cluster: Any, joined: set[str]) -> None:
    """Close the jobs and nannies of a cluster whose workers had joined and are gone."""
    live = {str(worker["name"]) for worker in cluster.scheduler_info["workers"].values()}
    for name, job in list(cluster.workers.items()):
        suffixes = cluster.worker_spec.get(name, {}).get("group", ("",))
        members = {f"{name}{suffix}" for suffix in suffixes}
        if members & joined and not members & live:
            # Its replacement has the same name, and has not joined yet.
            joined -= members
            cluster.workers.pop(name, None)
            await job.close()
