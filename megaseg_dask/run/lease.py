"""Who works on the runs of a target: one client at a time, or processes of one stage.

Two clients on one target would clear and write under each other. Leases of
clients are numbered objects in the runs folder. The holder is the client that
created the highest number, and each number is created only if it is not there,
so of many clients that find a dead one a single one follows it. Nobody writes
the object of another, and the highest number is never removed: a client that
stood still for any time finds a higher one, whatever its late requests do.

The holder counts a beat up in its object. A client that finds a lease watches
it for a while: a count that does not change belongs to a client that is gone.
No clock and no host name of another machine is believed. A process id is, if
it is of the same boot and PID namespace.

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
from megaseg_dask.stores.failures import why_not_writable

# Leases of clients by number, those of job arrays by run and stage. No label name, and so no run,
# begins with a plus.
_CLIENTS = "+lease"
_SHARED = "+tasks"


def clock_s() -> float:
    """Return seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


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

    def trust_of(self, lease_id: str) -> float:
        """Return for how many seconds a holder relies on its last look at the store."""
        return self.patience * self.beat_of(lease_id) / 3

    @property
    def grace_s(self) -> float:
        """How long a successor waits before it writes.

        A client that wakes up may rely on a look from before it was replaced.
        """
        return self.patience * self.beat_s / 2


@dataclass(frozen=True, slots=True)
class Lease:
    """The holder of a run: a unique id, and a name for people.

    The id of a process of a job array is its run, its stage, the number of the last client's
    lease and a random part. A lease without an id only takes the place of a client that is gone.
    """

    id: str
    host: str
    pid: int
    boot: str = ""
    namespace: str = ""
    beat: int = 0
    is_over: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def own(cls, lease_id: str) -> "Lease":
        """Return a new lease of this process."""
        return cls(lease_id, socket.gethostname(), os.getpid(), *_place())

    @property
    def is_gone(self) -> bool:
        """Return whether its process is known not to exist any more."""
        if not self.boot or (self.boot, self.namespace) != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def to_json(self) -> bytes:
        """Return the object that is stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Lease":
        """Return the lease of a stored object."""
        try:
            lease = cls(**json.loads(data))
        except (ValueError, TypeError):
            # Torn by a power loss: nobody beats in it, so it is taken over as one that is gone.
            lease = cls("torn", "an unknown host", 0)
        return lease


def _place() -> tuple[str, str]:
    """Return where the process ids of this process hold: the boot and the PID namespace.

    Both are empty where the system does not tell them.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "", ""


class Leases:
    """The leases in one runs folder: that of a client, or those of job arrays."""

    def __init__(self, folder: Location, timing: Timing | None = None) -> None:
        """Look at the leases of ``folder``; nothing is written."""
        self.folder = folder
        self.timing = timing or Timing()

    # -- what is there

    def last(self) -> tuple[int, Lease | None]:
        """Return number and lease of the last client; 0 and ``None`` if there never was one."""
        while number := self.last_number():
            lease = self._read(_key_of_client(number))
            # It was removed in between if another client came.
            if lease is not None:
                return number, lease
        return 0, None

    def last_number(self) -> int:
        """Return the number of the last client's lease; 0 if there never was one."""
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        names = [key.rpartition("/")[2] for key in self.folder.keys(_CLIENTS)]
        numbers = [name.removesuffix(".json") for name in names]
        return [int(number) for number in numbers if number.isdecimal()]

    def shared_ids(self) -> list[str]:
        """Return the ids of the leases of job arrays."""
        keys = self.folder.keys(_SHARED)
        return [key.removeprefix(f"{_SHARED}/").removesuffix(".json") for key in keys]

    def holds(self, lease_id: str) -> bool:
        """Return whether a lease is still that of its process."""
        if _is_shared(lease_id):
            is_there = self._read(key_of(lease_id)) is not None
            return is_there and self.last_number() == _number_in(lease_id)
        _, last = self.last()
        return last is not None and last.id == lease_id

    def _read(self, key: str) -> Lease | None:
        data = self.folder.get(key)
        return None if data is None else Lease.from_json(data)

    # -- holding

    @contextmanager
    def hold(self) -> Iterator["Held"]:
        """Hold the lease of a client.

        Raises:
            TargetError: Another client, or a job array, works on a run; the message names it. Or
                the folder cannot be written.
        """
        lease = Lease.own(uuid.uuid4().hex)
        # A new number would end the work of job arrays.
        self._require_unshared()
        number = self._follow(lease)
        with self._beating(lease, _key_of_client(number)) as held:
            self._require_unshared()
            for earlier in self._numbers():
                if earlier < number:
                    self.folder.delete(_key_of_client(earlier))
            yield held

    def _require_unshared(self) -> None:
        if process := self._find_alive(self.shared_ids()):
            raise TargetError(
                f"{process} is running tasks of {self.folder}; wait until it ends, or stop it, and "
                "try again"
            )

    def _follow(self, lease: Lease) -> int:
        """Create the number after the last, once that is over; return it.

        Raises:
            TargetError: Its client lives.
        """
        while True:
            number, last = self.last()
            if last is not None and last.id == lease.id:
                # A request that was repeated had been carried out the first time.
                return number
            if process := self._watch_client(number, last):
                raise TargetError(
                    f"{self.folder} is being written by {process}; wait until it ends, or stop it, "
                    "and try again"
                )
            key = _key_of_client(number + 1)
            if self._create(key, lease):
                if last is not None and not last.is_over and not last.is_gone:
                    time.sleep(self.timing.grace_s)
                if self.last_number() == number + 1:
                    return number + 1
                # Others came, and removed this number, before it was created again.
                self.folder.delete(key)

    def _watch_client(self, number: int, last: Lease | None) -> Lease | None:
        """Return the lease of the last client if it is alive."""
        if last is None or last.is_over or not last.id:
            return None
        return self._watch({_key_of_client(number): last}, self.timing.beat_s)

    @contextmanager
    def share(self, run: str, stage: str) -> Iterator["Held"]:
        """Work on one stage of a run, beside other processes of that stage.

        Raises:
            TargetError: A client works on a run of the target, or a process on another stage of
                this run; the message names it. Or the folder cannot be written.
            StoreError: A client came at the same moment.
        """
        of_run = f"{run}/"
        of_stage = f"{run}/{stage}/"
        number = self._pass_clients()
        lease = Lease.own(f"{of_stage}{number}-{uuid.uuid4().hex}")
        self._create(key_of(lease.id), lease)
        with self._beating(lease, key_of(lease.id)) as held:
            held.require()
            shared = [i for i in self.shared_ids() if i.startswith(of_run)]
            others = [i for i in shared if not i.startswith(of_stage)]
            if process := self._find_alive(others):
                raise TargetError(
                    f"{process} is running another stage of {self.folder}; wait until it ends, or "
                    "stop it, and try again"
                )
            yield held

    def _pass_clients(self) -> int:
        """Return the number of the last client, once no client lives.

        A client that is gone gets a successor without an id, so it writes no more if it wakes up.

        Raises:
            TargetError: A client lives.
        """
        number, last = self.last()
        while last is not None and not last.is_over and last.id:
            if process := self._watch_client(number, last):
                raise TargetError(
                    f"{process} is writing {self.folder}; wait until it ends, or stop it, and try "
                    "again"
                )
            nobody = Lease("", "", 0, is_over=last.is_gone)
            self._create(_key_of_client(number + 1), nobody)
            number, last = self.last()
        if last is not None and not last.is_over:
            time.sleep(self.timing.grace_s)
        return number

    def _create(self, key: str, lease: Lease) -> bool:
        """Write a lease unless it exists; return whether it was written.

        Raises:
            TargetError: Nothing can be written here.
            StoreError: The store failed.
        """
        try:
            return self.folder.create(key, lease.to_json())
        except StoreError as error:
            if reason := why_not_writable(error):
                raise TargetError(
                    f"{self.folder} cannot be written: {reason}; change its permissions, or copy "
                    "it and its target together to a place where you may write"
                ) from error
            raise

    @contextmanager
    def _beating(self, lease: Lease, key: str) -> Iterator["Held"]:
        held = Held(self, lease, key)
        try:
            yield held
        finally:
            held.release()

    # -- watching

    def _find_alive(self, lease_ids: Sequence[str]) -> Lease | None:
        """Return one of these shared leases whose process lives, if one does; remove the others."""
        leases = self._read_all(list(map(key_of, lease_ids)))
        alive = self._watch(leases, self.timing.shared_beat_s)
        if alive:
            return alive

        def remove(key: str) -> None:
            if self._read(key) == leases[key]:
                self.folder.delete(key)

        map_threaded(remove, leases)
        return None

    def _read_all(self, keys: Sequence[str]) -> dict[str, Lease]:
        leases = zip(keys, map_threaded(self._read, keys), strict=True)
        return {key: lease for key, lease in leases if lease is not None and not lease.is_over}

    def _watch(self, leases: Mapping[str, Lease], beat_s: float) -> Lease | None:
        """Watch leases by key until one beats, or for as long as a living process may be silent.

        A lease that is given back meanwhile has no holder any more.
        """
        silent = {key: lease for key, lease in leases.items() if not lease.is_gone}
        stop_s = time.monotonic() + self.timing.patience * beat_s
        while silent and time.monotonic() < stop_s:
            time.sleep(min(beat_s, self.timing.beat_s) / 2)
            now = self._read_all(list(silent))
            for key, lease in now.items():
                if lease != silent[key]:
                    return lease
            silent = now
        return None


class Held:
    """A held lease; a heartbeat thread renews it."""

    def __init__(self, leases: Leases, lease: Lease, key: str) -> None:
        self._leases = leases
        self._lease = lease
        self._key = key
        self._stopped = threading.Event()
        self._lost = threading.Event()
        # This process may have stood still since it created its lease.
        self._looked_s = float("-inf")
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    @property
    def id(self) -> str:
        """The id under which workers write for this client."""
        return self._lease.id

    def require(self) -> None:
        """Check that this process was not stopped for long, and replaced by another client.

        Raises:
            StoreError: Another client took the run over, or the store does not tell.
        """
        # A process that wakes up may be here before its heart beats again.
        if clock_s() - self._looked_s > self._leases.timing.trust_of(self.id):
            self._look()
        if self._lost.is_set():
            raise StoreError(
                f"another megaseg process took over {self._leases.folder} while this one did not "
                "respond; let the other process finish"
            )

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._stopped.set()
        # A beat may be waiting for a store that does not answer.
        self._heart.join(self._leases.timing.patience * self._leases.timing.beat_of(self.id))
        # A lease that cannot be given back stops beating, and is taken over like a dead client's.
        with suppress(StoreError):
            if not self._leases.holds(self.id):
                return
            if _is_shared(self.id):
                self._leases.folder.delete(self._key)
            else:
                self._put(replace(self._lease, is_over=True))

    def _beat(self) -> None:
        while not self._stopped.wait(self._leases.timing.beat_of(self.id)):
            # A store that fails for a moment is no reason to give up: the next beat tries again.
            with suppress(StoreError):
                self._look()
                if self._lost.is_set():
                    return
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                # In the folder that is looked at: NFS then sees what others created there.
                self._put(self._lease)

    def _put(self, lease: Lease) -> None:
        self._leases.folder.put(self._key, lease.to_json())

    def _look(self) -> None:
        asked_s = clock_s()
        if self._leases.holds(self.id):
            self._looked_s = asked_s
        else:
            self._lost.set()


class Permit:
    """The right to write for the client that sent a task: it ends when the client loses its lease.

    The store is asked when a task begins, and again after a pause longer than a beat: a worker
    that was given up, and wakes up late, finds the plan of another client.
    """

    def __init__(self, leases: Leases, lease_id: str) -> None:
        """Act for the holder of the lease ``lease_id``."""
        self._leases = leases
        self._lease_id = lease_id
        self._asked_s = float("-inf")

    def renew(self) -> None:
        """Ask the store whether the client still holds its lease.

        Raises:
            TaskError: It does not.
        """
        asked_s = clock_s()
        if not self._leases.holds(self._lease_id):
            raise TaskError(
                f"{self._leases.folder} now belongs to another megaseg process; this task wrote "
                "nothing more"
            )
        self._asked_s = asked_s

    def require(self) -> None:
        """Ask again, if the last answer is older than a beat; raises what :meth:`renew` raises."""
        if clock_s() - self._asked_s > self._leases.timing.beat_of(self._lease_id):
            self.renew()


def key_of(lease_id: str) -> str:
    """Return the key of the lease of a process of a job array, in its runs folder."""
    return f"{_SHARED}/{lease_id}.json"


def _key_of_client(number: int) -> str:
    return f"{_CLIENTS}/{number:08d}.json"


def _number_in(lease_id: str) -> int:
    """Return the number of the last client's lease when a process of a job array began."""
    number, _, _ = lease_id.rpartition("/")[2].partition("-")
    return int(number)


def _is_shared(lease_id: str) -> bool:
    return "/" in lease_id
