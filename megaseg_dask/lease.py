"""One client at a time: who carries out a run holds its lease, and says so with a heartbeat.

Two clients on one target would clear and write under each other. The lease is
an object in the run folder, created only if there is none; its owner counts a
beat up in it. Whoever finds a lease watches for a while: a count that stands
still belongs to a client that is gone. No clock of another machine is read.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.stores import Location

KEY = "lease.json"
BEAT_S = 2.0
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
        return self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists() and Path("/proc").exists()


class Held:
    """The lease of a run, kept by a thread that beats."""

    def __init__(self, run: Location, lease: Lease) -> None:
        self._run, self._lease = run, lease
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
        if abs(time.time() - self._looked) > _PATIENCE * BEAT_S / 2:
            with suppress(StoreError):
                self._look(patient=False)
        if self._lost.is_set():
            raise StoreError(f"another client took over {self._run} while this one stood still; leave the run to it")

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._stopped.set()
        # A beat may be waiting for a store that does not answer.
        self._heart.join(_PATIENCE * BEAT_S)
        # A lease that cannot be given back stands still, and is taken over as one of a client that is gone.
        with suppress(StoreError):
            if _is_of(self._lease, read(self._run)):
                self._run.delete(KEY)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            # A store that fails for a moment is no reason to give up: the next beat tries again.
            with suppress(StoreError):
                self._look()
                if self._lost.is_set():
                    return
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                self._run.put(KEY, _encode(self._lease))

    def _look(self, *, patient: bool = True) -> None:
        if _is_of(self._lease, read(self._run, patient=patient)):
            self._looked = time.time()
        else:
            self._lost.set()


def _is_of(lease: Lease, holder: Lease | None) -> bool:
    return holder is not None and holder.id == lease.id


@contextmanager
def held(run: Location) -> Iterator[Held]:
    """Hold the lease of a run; raises :class:`TargetError` that names the client that has it."""
    lease = Lease(uuid.uuid4().hex, socket.gethostname(), os.getpid())
    _acquire(run, lease)
    holding = Held(run, lease)
    try:
        yield holding
    finally:
        holding.release()


def read(run: Location, *, patient: bool = True) -> Lease | None:
    """Return the lease of a run, if somebody has it."""
    data = run.get(KEY, patient=patient)
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
        if not holder.is_gone and _is_alive(run, holder):
            raise TargetError(f"{run} is being written by {holder}; wait for it, or end it, and try again")
        if read(run) == holder:
            run.delete(KEY)


def _is_alive(run: Location, holder: Lease) -> bool:
    """Watch a lease until its beat goes on, or for as long as a living client may keep silent."""
    patience = time.monotonic() + _PATIENCE * BEAT_S
    while time.monotonic() < patience:
        time.sleep(BEAT_S / 2)
        if read(run) != holder:
            return True
    return False


def _encode(lease: Lease) -> bytes:
    return json.dumps(asdict(lease)).encode()
