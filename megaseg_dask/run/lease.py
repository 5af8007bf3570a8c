"""One client at a time, or one stage of single tasks: who works on a run says so with a heartbeat.

Two clients on one target would clear and write under each other. The lease is
an object in the run folder, created only if there is none; its owner counts a
beat up in it. Whoever finds a lease watches for a while: a count that stands
still belongs to a client that is gone. No clock of another machine is read.

Processes of a job array share a run: each has a lease of its own, under the
name of its stage. Each first writes its lease, then looks for others, so of
two that exclude each other at least one sees it and leaves.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.stores import Location

KEY = "lease.json"
# Leases of single tasks, by run and stage; no label name, and so no run, begins with a plus.
_SHARED = "+tasks"
BEAT_S = 2.0
# A thousand of them beat on one store.
SHARED_BEAT_S = 5.0
# Beats that may be missed before a client counts as gone; a busy machine delays a few.
_PATIENCE = 6


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a run: an id of its own, and a name for people."""

    id: str
    host: str
    pid: int
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Tell whether it is a process of this machine that does not exist any more."""
        return (
            self.host == socket.gethostname()
            and not Path(f"/proc/{self.pid}").exists()
            and Path("/proc").exists()
        )


class Held:
    """A lease of a run, kept by a thread that beats."""

    def __init__(self, run: Location, lease: Lease, beat_s: float) -> None:
        self._run, self._lease, self._beat_s = run, lease, beat_s
        self._stopped, self._lost = threading.Event(), threading.Event()
        self._looked = time.time()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    @property
    def id(self) -> str:
        """The id under which workers write for this client."""
        return self._lease.id

    def require(self) -> None:
        """Raise :class:`StoreError` if another client took the run over, because this one had stopped for long."""
        # Who wakes up is here before its heart beats again. By the time of day: other clocks sleep with the machine.
        if abs(time.time() - self._looked) > _PATIENCE * self._beat_s / 2:
            with suppress(StoreError):
                self._look(patient=False)
        if self._lost.is_set():
            raise StoreError(
                f"another client took over {self._run} while this one stood still; leave the run to it"
            )

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._stopped.set()
        # A beat may be waiting for a store that does not answer.
        self._heart.join(_PATIENCE * self._beat_s)
        # A lease that cannot be given back stands still, and is taken over as one of a client that is gone.
        with suppress(StoreError):
            if self._is_ours():
                self._run.delete(_key(self.id))

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_s):
            # A store that fails for a moment is no reason to give up: the next beat tries again.
            with suppress(StoreError):
                self._look()
                if self._lost.is_set():
                    return
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                self._run.put(_key(self.id), _encode(self._lease))

    def _look(self, *, patient: bool = True) -> None:
        if self._is_ours(patient=patient):
            self._looked = time.time()
        else:
            self._lost.set()

    def _is_ours(self, *, patient: bool = True) -> bool:
        holder = read(self._run, self.id, patient=patient)
        return holder is not None and holder.id == self.id


@contextmanager
def held(run: Location) -> Iterator[Held]:
    """Hold the lease of a run; raises :class:`TargetError` that names the client, or task, that works on it."""
    lease = _own(uuid.uuid4().hex)
    _acquire(run, lease)
    with _beating(run, lease, BEAT_S) as holding:
        _require_none(run, shared_ids(run), "running tasks of")
        yield holding


@contextmanager
def shared(run: Location, name: str, stage: str) -> Iterator[Held]:
    """Work on one stage of a run, beside others that do the same.

    Raises :class:`TargetError` that names a client of any run of the target, or a task of another stage of this run.
    """
    of_run, of_stage = f"{name}/", f"{name}/{stage}/"
    lease = _own(f"{of_stage}{uuid.uuid4().hex}")
    run.put(_key(lease.id), _encode(lease))
    with _beating(run, lease, SHARED_BEAT_S) as holding:
        _require_none(run, [""], "writing")
        others = [i for i in shared_ids(run) if i.startswith(of_run) and not i.startswith(of_stage)]
        _require_none(run, others, "running another stage of")
        yield holding


def shared_ids(run: Location) -> list[str]:
    """Return the ids of the leases of single tasks: run, stage and a number, divided by slashes."""
    return [key.removeprefix(f"{_SHARED}/").removesuffix(".json") for key in run.keys(_SHARED)]


def _own(lease_id: str) -> Lease:
    return Lease(lease_id, socket.gethostname(), os.getpid())


@contextmanager
def _beating(run: Location, lease: Lease, beat_s: float) -> Iterator[Held]:
    holding = Held(run, lease, beat_s)
    try:
        yield holding
    finally:
        holding.release()


def _key(lease_id: str) -> str:
    return f"{_SHARED}/{lease_id}.json" if "/" in lease_id else KEY


def read(run: Location, lease_id: str = "", *, patient: bool = True) -> Lease | None:
    """Return the lease of a run's client, if there is one; or that of single tasks, by its id."""
    data = run.get(_key(lease_id), patient=patient)
    if data is None:
        return None
    try:
        return Lease(**json.loads(data))
    except (ValueError, TypeError):
        # Torn by a power loss: nobody beats in it, so it is taken over as one that stands still.
        return Lease("", "an unknown host", 0)


def _acquire(run: Location, lease: Lease) -> None:
    while not run.create(KEY, _encode(lease)):
        holder = read(run)
        if holder is None:
            continue
        if alive := _find_alive(run, {"": holder}):
            raise TargetError(
                f"{run} is being written by {alive}; wait for it, or end it, and try again"
            )
        if read(run) == holder:
            run.delete(KEY)


def _require_none(run: Location, lease_ids: list[str], doing: str) -> None:
    """Raise :class:`TargetError` if somebody has one of these leases; remove those of processes that are gone."""
    found = dict(zip(lease_ids, map_threaded(lambda i: read(run, i), lease_ids), strict=True))
    holders = {i: holder for i, holder in found.items() if holder is not None}
    if alive := _find_alive(run, holders):
        raise TargetError(f"{alive} is {doing} {run}; wait for it, or end it, and try again")
    for lease_id, holder in holders.items():
        if read(run, lease_id) == holder:
            run.delete(_key(lease_id))


def _find_alive(run: Location, holders: Mapping[str, Lease]) -> Lease | None:
    """Watch leases until the beat of one goes on, or for as long as a living process may keep silent.

    A lease that is given back meanwhile is nobody's.
    """
    silent = {i: holder for i, holder in holders.items() if not holder.is_gone}
    beat_s = max((SHARED_BEAT_S if i else BEAT_S for i in silent), default=0.0)
    patience = time.monotonic() + _PATIENCE * beat_s
    while silent and time.monotonic() < patience:
        time.sleep(min(beat_s, BEAT_S) / 2)
        now = dict(zip(silent, map_threaded(lambda i: read(run, i), list(silent)), strict=True))
        for lease_id, holder in now.items():
            if holder is not None and holder != silent[lease_id]:
                return holder
        silent = {i: holder for i, holder in silent.items() if now[i] is not None}
    return None


def _encode(lease: Lease) -> bytes:
    return json.dumps(asdict(lease)).encode()
