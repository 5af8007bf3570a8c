"""The workers of a run: checked, made ready, watched while it lasts, and given back.

Each kind of cluster differs only in how its workers start (:mod:`megaseg_dask.run.cluster.start`).
All of them are Dask workers of one scheduler; a run knows no more than that.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask

from megaseg_dask.errors import ClusterError, SettingsError
from megaseg_dask.events import Emit, Joined, Notice, ignore
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.machine import count_killed, memory_bytes
from megaseg_dask.messages import count
from megaseg_dask.models import staging
from megaseg_dask.plan.cluster_spec import Cluster
from megaseg_dask.plan.plan import TASKS_AT_ONCE, Plan
from megaseg_dask.run.cluster import worker_plugin
from megaseg_dask.run.cluster.dask_config import SCHEDULER_CONFIG
from megaseg_dask.run.cluster.devices import FailedDevices, Task
from megaseg_dask.run.cluster.versions import require_versions
from megaseg_dask.stores import Location, StoreOptions

if TYPE_CHECKING:
    from megaseg_dask.run.cluster.connection import Needs

# A job may wait in a queue for as long.
QUEUE_S = 3600.0
# Why a worker is gone, if nothing tells more.
UNKNOWN_LOSS = "its worker died or hung"
# Workers that are gone for this long do not come back by themselves.
_MISSING_S = 20.0
_ALL_MISSING_S = 120.0
# Paused workers that are to go on have freed memory by then.
_ALL_PAUSED_S = 40.0
# Of a worker whose GPU failed: its other tasks read or write for so long at most.
_LAST_TASKS_S = 30.0
_ANSWERS_S = 1.0
# A look at the state of all workers is a large answer where they are many.
_LOOK_S = 10.0


@dataclass
class Workers:
    """The workers of a run, behind a Dask client; lost ones are replaced where that is possible.

    ``cluster`` is the declaration of workers that were started for this run, ``None``
    for those of a client that a user gave. ``needed_bytes`` is the projected peak of
    a worker, ``device_bytes`` that of its GPU, and ``least_device_bytes`` the same with a
    batch of one patch. ``joined`` are all that ever joined, by address.
    """

    client: Any
    engine: EngineSpec
    emit: Emit = ignore
    cluster: Cluster | None = None
    needed_bytes: int = 0
    device_bytes: int = 0
    least_device_bytes: int = 0
    joined: dict[str, Joined] = field(default_factory=dict)
    # Of those that joined: a worker's name is also that of its job or nanny.
    _names: set[str] = field(default_factory=set)
    _absence: "_Absence" = field(default_factory=lambda: _Absence())
    _all_paused_since: float | None = None
    _looked_s: float = 0.0
    _required_versions: Mapping[str, list[str]] = field(default_factory=dict)
    _failed_devices: FailedDevices = field(default_factory=FailedDevices)
    # Addresses of workers whose GPU failed, and the names of workers by their GPU.
    _ending: set[str] = field(default_factory=set)
    _names_of_devices: dict[str, str] = field(default_factory=dict)
    # GPUs that get no other process, and why.
    _left_out: dict[str, str] = field(default_factory=dict)
    # What the plugin told of workers that it sent away, until the next look.
    _sent_away: deque[Mapping[str, str]] = field(default_factory=deque)
    # By the system of this machine, until the last look.
    _n_killed: int = field(default_factory=count_killed)

    @classmethod
    def of(
        cls, needs: "Plan | Needs", client: Any, emit: Emit, cluster: Cluster | None = None
    ) -> "Workers":
        """Return the workers of a plan, or of other work, behind a client."""
        workers = cls(client, needs.engine, emit, cluster, max(needs.projected_bytes.values()))
        if isinstance(needs, Plan):
            workers.device_bytes = needs.device_bytes
            workers.least_device_bytes = needs.project_device(needs.block_shape, batch=1)
        return workers

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
            SettingsError: Versions differ where it matters, a worker has no GPU that works, two
                share one, or one may not use the memory that the plan needs.
        """
        self._required_versions, notes = require_versions(
            self.client, self.engine.engine, self.engine.device
        )
        for note in notes:
            self.emit(Notice(note))
        self._warn_of_threads()
        self._warn_of_scheduler()
        self._describe(list(self.client.nthreads()), is_first=True)
        for worker in self.joined.values():
            if problem := self._memory_problem(worker) or self._device_memory_problem(worker):
                raise SettingsError(problem)
            if note := self._device_memory_note(worker):
                self.emit(Notice(note))

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

    def _device_memory_problem(self, worker: Joined) -> str:
        """Return why no batch fits the GPU of a worker, if that is so."""
        if not 0 < worker.device_total_bytes < self.least_device_bytes:
            return ""
        return (
            f"{worker.device} of worker {worker.name} on {worker.host} has "
            f"{worker.device_total_bytes / 1e9:.2f} GB, and the plan needs some "
            f"{self.least_device_bytes / 1e9:.2f} GB of a GPU: plan with a smaller --block or "
            "--patch (of a plan that is recorded, with --overwrite)"
        )

    def _device_memory_note(self, worker: Joined) -> str:
        """Return what a person should know of the memory of a worker's GPU, if anything."""
        if not 0 < worker.device_free_bytes < self.device_bytes:
            return ""
        return (
            f"{worker.device} of worker {worker.name} on {worker.host} has "
            f"{worker.device_free_bytes / 1e9:.2f} GB free, and the plan takes some "
            f"{self.device_bytes / 1e9:.2f} GB: batches may have to be halved"
        )

    def _warn_of_threads(self) -> None:
        n_threads = list(self.client.nthreads().values()) or [1]
        n_planned = TASKS_AT_ONCE.get(self.engine.device, 1)
        advice = f"start them with --nthreads {n_planned}"
        if max(n_threads) > n_planned:
            self.emit(
                Notice(
                    f"workers run {max(n_threads)} tasks at the same time, and the memory of the "
                    f"plan is for {n_planned}; {advice}"
                )
            )
        if min(n_threads) < n_planned:
            self.emit(
                Notice(
                    f"workers run {count(min(n_threads), 'task')} at a time, so a GPU waits while "
                    f"they read and write; {advice}"
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
        descriptions = self.client.run(
            worker_plugin.describe, self._gpu_precision, workers=new, on_error="return"
        )
        useless: list[tuple[Joined, str]] = []
        for address, description in descriptions.items():
            if isinstance(description, Exception):
                # It is gone again, or of another version and about to leave; the first workers
                # have been compared.
                if is_first and not isinstance(description, OSError):
                    raise description
                continue
            problem = description.pop("problem", "")
            worker = Joined(**description)
            if worker.uuid in self._left_out:
                problem = "its GPU failed before"
            if problem:
                useless.append((worker, problem))
                continue
            self.joined[address] = worker
            self._names_of_devices[_device_of(worker)] = worker.name
            self._names.add(worker.name)
            self.emit(worker)
            if not is_first:
                self._note_problems(worker)
        if useless:
            self._do_without(useless, is_first=is_first)
        self._require_own_devices(set(addresses))

    @property
    def _gpu_precision(self) -> str | None:
        """The precision in which workers compute on a GPU; ``None`` if they do not."""
        return self.engine.precision if self.engine.device == "cuda" else None

    def _note_problems(self, worker: Joined) -> None:
        problems = (
            self._memory_problem(worker),
            self._device_memory_problem(worker),
            self._device_memory_note(worker),
        )
        if problem := next(filter(None, problems), None):
            self.emit(Notice(problem))

    def _do_without(self, useless: list[tuple[Joined, str]], *, is_first: bool) -> None:
        """Go on without workers whose GPU does not work.

        Raises:
            SettingsError: No worker is left, or they are not ours to end.
        """
        is_ours = self.cluster is not None and self.cluster.kind != "scheduler"
        if is_first and not (is_ours and self.joined):
            texts = [f"worker {each.name} on {each.host}: {problem}" for each, problem in useless]
            raise SettingsError(
                f"--device cuda: {'; '.join(texts)}; start workers where a GPU works, or use "
                "--device cpu"
            )
        for worker, problem in useless:
            device = _device_of(worker)
            self._names_of_devices[device] = worker.name
            # Of a GPU that is left out already, jobs elsewhere may bring a worker again.
            self.client.run_on_scheduler(_close_worker, address=worker.address)
            if device not in self._left_out:
                self._leave_out(device, problem)

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
                    "give each worker its own GPU (a script that uses CUDA as it is imported "
                    "holds all its workers on one: put that under `if __name__ == '__main__':`)"
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
            self._gpu_precision,
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
        if "device" in message[1]:
            self._sent_away.append(message[1])

    # -- while it lasts

    def watch(self, n_workers: int) -> None:
        """Describe workers that joined, and replace workers that were lost.

        Raises:
            ClusterError: No worker has been there for long, all are paused, or no GPU works.
            SettingsError: Two workers share a GPU.
        """
        self._describe(list(self.client.nthreads()))
        now = time.monotonic()
        self._leave_out_failed()
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

    # -- GPUs that fail

    def others_than(self, address: str, tasks: Iterable[Task]) -> list[str]:
        """Return the addresses of other workers, without those on a GPU where a task failed."""
        devices = self._failed_devices.of_tasks(tasks)
        others = []
        for other in self.client.nthreads():
            worker = self.joined.get(other)
            # One that is not described yet may be the next process on such a GPU.
            is_doubtful = bool(devices) if worker is None else _device_of(worker) in devices
            if other != address and not is_doubtful:
                others.append(other)
        return others

    def device_failed(self, address: str, task: Task) -> None:
        """Note that a task failed because of the GPU of a worker, and end its process.

        A nanny starts another one, unless the GPU failed for the second time.
        """
        worker = self.joined.get(address)
        device = address if worker is None else _device_of(worker)
        self._failed_devices.add(device, address, task)
        if address not in self._ending:
            self._ending.add(address)
            self.client.run(_end_process, workers=[address], wait=False, on_error="ignore")

    def _leave_out_failed(self) -> None:
        """Leave GPUs out on which two processes failed, in tasks or as they joined."""
        while self._sent_away:
            event = self._sent_away.popleft()
            self._failed_devices.add(event["device"], event["address"])
            self._names_of_devices[event["device"]] = event["name"]
        for device in self._failed_devices.iter_left_out():
            if device not in self._left_out:
                self._leave_out(device, "two processes failed on it")

    def _leave_out(self, device: str, reason: str) -> None:
        """Start no other worker on a GPU, and end the one that is there.

        Raises:
            ClusterError: No worker of this machine is left.
        """
        from distributed import SpecCluster

        self._left_out[device] = reason
        self.emit(Notice(f"GPU {device} is not used any more: {reason}"))
        cluster = self.client.cluster
        is_ours = self.cluster is not None and self.cluster.is_local
        if not is_ours or not isinstance(cluster, SpecCluster):
            return
        cluster.sync(_forget, cluster, self._names_of_devices.get(device, device))
        n_left = len(cluster.worker_spec)
        if not n_left:
            reasons = [f"{name}: {text}" for name, text in self._left_out.items()]
            raise ClusterError(
                f"no GPU of this machine works ({'; '.join(reasons)}); see megaseg doctor, and "
                "run the same command again to resume"
            )
        self._absence.n_most = n_left

    def cause_of_loss(self, address: str = "") -> str:
        """Return why a worker is gone, as far as that is known."""
        if address in self._ending:
            return "the GPU of its worker failed"
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
        return UNKNOWN_LOSS

    def _replace(self) -> bool:
        """Ask for workers in place of lost ones; return whether that was possible.

        A batch system takes a job that ended for done, and a nanny does not start a
        worker again that died as it joined. Jobs that wait in a queue keep their place.
        """
        cluster = self.client.cluster
        if not hasattr(cluster, "worker_spec") or (self.cluster and self.cluster.adaptive):
            return False
        n_workers = self.cluster.workers if self.cluster else None
        if self._left_out and self.is_local:
            n_workers = None
        cluster.sync(_remove_ended, cluster, self._names)
        cluster.scale(n_workers or self._absence.n_most)
        return True


def _device_of(worker: Joined) -> str:
    """Return the UUID of a worker's GPU, or its own name if that is not known."""
    return worker.uuid or worker.name


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


async def _end_process(dask_worker: Any) -> None:
    """End this worker's process when its last tasks have come to an end."""
    ends = time.monotonic() + _LAST_TASKS_S
    while dask_worker.state.executing_count and time.monotonic() < ends:
        await asyncio.sleep(0.1)
    # The client fetches what they returned.
    await asyncio.sleep(_ANSWERS_S)
    # At once: what holds on to a GPU that failed may wait for ever.
    os._exit(1)


async def _close_worker(address: str, dask_scheduler: Any = None) -> None:
    await dask_scheduler.remove_worker(address, stimulus_id="megaseg-device")


async def _forget(cluster: Any, name: str) -> None:
    """Take a worker out of a cluster, which then ends it and starts none in its place."""
    for key in [key for key in cluster.worker_spec if str(key) == name]:
        del cluster.worker_spec[key]
    await cluster._correct_state()


async def _remove_ended(cluster: Any, joined: set[str]) -> None:
    """Close the jobs and nannies of a cluster whose workers had joined and are gone."""
    live = {str(worker["name"]) for worker in cluster.scheduler_info["workers"].values()}
    for name, job in list(cluster.workers.items()):
        # A job may hold several workers, whose names begin with its own.
        members = {each for each in joined if f"{each}-".startswith(f"{name}-")}
        if members and not members & live:
            # Its replacement has the same name, and has not joined yet.
            joined -= members
            cluster.workers.pop(name, None)
            await job.close()
