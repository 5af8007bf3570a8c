"""Who works on the runs of a target: one client at a time, or processes of one stage.

Two clients on one target would clear and write under each other. The lease is
an object in the runs folder, created only if there is none; its owner counts a
beat up in it. A client that finds a lease watches it for a while: a count that
does not change belongs to a client that is gone. No clock of another machine
is read.

Processes of a job array share a run: each has a lease under the name of its
stage. Each first writes its lease, then looks for others, so of two that
exclude each other at least one sees it and leaves.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError, TargetError, TaskError
from megaseg_dask.stores import Location

KEY = "lease.json"
# Leases of job arrays, by run and stage; no label name, and so no run, begins with a plus.
_SHARED = "+tasks"


@dataclass(frozen=True, slots=True)
class Timing:
    """How often leases beat, in seconds, and how many beats may be missed before one is gone.

    A thousand processes of a job array beat on one store, so they beat less often than a
    client. A busy machine delays a few beats.
    """

    beat_s: float = 2.0
    shared_beat_s: float = 5.0
    patience: int = 6

    def beat_of(self, lease_id: str) -> float:
        """Return the seconds between two beats of a lease."""
        return self.shared_beat_s if _is_shared(lease_id) else self.beat_s


@dataclass(frozen=True, slots=True)
class Lease:
    """The holder of a run: a unique id, and a name for people.

    The id of a process of a job array is its run, its stage and a number, divided by slashes.
    """

    id: str
    host: str
    pid: int
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def own(cls, lease_id: str) -> "Lease":
        """Return a new lease of this process."""
        return cls(lease_id, socket.gethostname(), os.getpid())

    @property
    def is_gone(self) -> bool:
        """Return whether it is a process of this machine that does not exist any more."""
        is_here = self.host == socket.gethostname()
        return is_here and not Path(f"/proc/{self.pid}").exists() and Path("/proc").exists()

    def to_json(self) -> bytes:
        """Return the object that is stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Lease":
        """Return the lease of a stored object."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            # Torn by a power loss: nobody beats in it, so it is taken over as one that is gone.
            return cls("", "an unknown host", 0)


class Leases:
    """The leases in one runs folder: that of a client, or those of job arrays."""

    def __init__(self, folder: Location, timing: Timing | None = None) -> None:
        """Look at the leases of ``folder``; nothing is written."""
        self.folder = folder
        self.timing = timing or Timing()

    def read(self, lease_id: str = "", *, patient: bool = True) -> Lease | None:
        """Return the client's lease, or that of a process of a job array by its id."""
        data = self.folder.get(key_of(lease_id), patient=patient)
        return None if data is None else Lease.from_json(data)

    def shared_ids(self) -> list[str]:
        """Return the ids of the leases of job arrays."""
        keys = self.folder.keys(_SHARED)
        return [key.removeprefix(f"{_SHARED}/").removesuffix(".json") for key in keys]

    @contextmanager
    def hold(self) -> Iterator["Held"]:
        """Hold the lease of a client.

        Raises:
            TargetError: Another client, or a job array, works on a run; the message names it.

        """
        lease = Lease.own(uuid.uuid4().hex)
        self._acquire(lease)
        with self._beating(lease) as held:
            if process := self._find_alive(self.shared_ids()):
                raise TargetError(
                    f"{process} is running tasks of {self.folder}; "
                    "wait for it, or end it, and try again"
                )
            yield held

    @contextmanager
    def share(self, run: str, stage: str) -> Iterator["Held"]:
        """Work on one stage of a run, beside other processes of that stage.

        Raises:
            TargetError: A client works on a run of the target, or a process on another stage of
                this run; the message names it.

        """
        of_run = f"{run}/"
        of_stage = f"{run}/{stage}/"
        lease = Lease.own(f"{of_stage}{uuid.uuid4().hex}")
        self.folder.put(key_of(lease.id), lease.to_json())
        with self._beating(lease) as held:
            if process := self._find_alive([""]):
                raise TargetError(
                    f"{process} is writing {self.folder}; wait for it, or end it, and try again"
                )
            shared = [i for i in self.shared_ids() if i.startswith(of_run)]
            others = [i for i in shared if not i.startswith(of_stage)]
            if process := self._find_alive(others):
                raise TargetError(
                    f"{process} is running another stage of {self.folder}; "
                    "wait for it, or end it, and try again"
                )
            yield held

    def _acquire(self, lease: Lease) -> None:
        while not self.folder.create(KEY, lease.to_json()):
            if process := self._find_alive([""]):
                raise TargetError(
                    f"{self.folder} is being written by {process}; "
                    "wait for it, or end it, and try again"
                )

    @contextmanager
    def _beating(self, lease: Lease) -> Iterator["Held"]:
        held = Held(self, lease)
        try:
            yield held
        finally:
            held.release()

    def _read_all(self, lease_ids: Sequence[str]) -> dict[str, Lease]:
        leases = zip(lease_ids, map_threaded(self.read, lease_ids), strict=True)
        return {lease_id: lease for lease_id, lease in leases if lease is not None}

    def _find_alive(self, lease_ids: Sequence[str]) -> Lease | None:
        """Return one of these leases whose process lives, if there is one; remove the others."""
        leases = self._read_all(lease_ids)
        alive = self._watch(leases)
        if alive:
            return alive
        for lease_id, lease in leases.items():
            if self.read(lease_id) == lease:
                self.folder.delete(key_of(lease_id))
        return None

    def _watch(self, leases: Mapping[str, Lease]) -> Lease | None:
        """Watch leases until one beats, or for as long as a living process may keep silent.

        A lease that is given back meanwhile has no holder any more.
        """
        silent = {i: lease for i, lease in leases.items() if not lease.is_gone}
        beat_s = max(map(self.timing.beat_of, silent), default=0.0)
        stop_s = time.monotonic() + self.timing.patience * beat_s
        while silent and time.monotonic() < stop_s:
            time.sleep(min(beat_s, self.timing.beat_s) / 2)
            now = self._read_all(list(silent))
            for lease_id, lease in now.items():
                if lease != silent[lease_id]:
                    return lease
            silent = now
        return None


class Held:
    """A held lease; a heartbeat thread renews it."""

    def __init__(self, leases: Leases, lease: Lease) -> None:
        self._leases = leases
        self._lease = lease
        self._beat_s = leases.timing.beat_of(lease.id)
        self._stopped = threading.Event()
        self._lost = threading.Event()
        self._looked_at = time.time()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    @property
    def id(self) -> str:
        """The id under which workers write for this client."""
        return self._lease.id

    def require(self) -> None:
        """Check that this process was not stopped for long, and replaced by another client.

        Raises:
            StoreError: Another client took the run over.

        """
        # A process that wakes up may be here before its heart beats again. By the time of day:
        # other clocks sleep with the machine.
        pause_s = abs(time.time() - self._looked_at)
        if pause_s > self._leases.timing.patience * self._beat_s / 2:
            with suppress(StoreError):
                self._look(patient=False)
        if self._lost.is_set():
            raise StoreError(
                f"another client took over {self._leases.folder} while this one stood still; "
                "leave the run to it"
            )

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._stopped.set()
        # A beat may be waiting for a store that does not answer.
        self._heart.join(self._leases.timing.patience * self._beat_s)
        # A lease that cannot be given back stops beating, and is taken over like a dead client's.
        with suppress(StoreError):
            if self._is_ours():
                self._leases.folder.delete(key_of(self.id))

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_s):
            # A store that fails for a moment is no reason to give up: the next beat tries again.
            with suppress(StoreError):
                self._look()
                if self._lost.is_set():
                    return
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                self._leases.folder.put(key_of(self.id), self._lease.to_json())

    def _look(self, *, patient: bool = True) -> None:
        if self._is_ours(patient=patient):
            self._looked_at = time.time()
        else:
            self._lost.set()

    def _is_ours(self, *, patient: bool = True) -> bool:
        lease = self._leases.read(self.id, patient=patient)
        return lease is not None and lease.id == self.id


class Permit:
    """The right to write for the client that sent a task: it ends when the client loses its lease.

    The store is asked when a task begins, and again after a pause longer than a beat: a worker
    that was given up, and wakes up late, finds the plan of another client.
    """

    def __init__(self, leases: Leases, lease_id: str) -> None:
        """Act for the holder of the lease ``lease_id``."""
        self._leases = leases
        self._lease_id = lease_id
        self._asked_at = 0.0

    def renew(self) -> None:
        """Ask the store whether the client still holds its lease.

        Raises:
            TaskError: It does not.

        """
        lease = self._leases.read(self._lease_id)
        if lease is None or lease.id != self._lease_id:
            raise TaskError(
                f"{self._leases.folder} is no longer the run of the client that sent this task; "
                "nothing more was written"
            )
        self._asked_at = time.time()

    def require(self) -> None:
        """Ask again, if the last answer is older than a beat; raises what :meth:`renew` raises."""
        # By the time of day: other clocks sleep with the machine.
        if abs(time.time() - self._asked_at) > self._leases.timing.beat_of(self._lease_id):
            self.renew()


def key_of(lease_id: str) -> str:
    """Return the key of a lease in its runs folder."""
    return f"{_SHARED}/{lease_id}.json" if _is_shared(lease_id) else KEY


def _is_shared(lease_id: str) -> bool:
    return "/" in lease_id
