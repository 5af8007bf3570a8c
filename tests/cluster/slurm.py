"""A real SLURM of this machine alone: munged, slurmctld and a slurmd per node, all state in one folder, loopback only.

Debian: ``apt-get install --no-install-recommends slurm-wlm munge``. Runs as root
or as any user; where the programs are not installed, tests are skipped and say so.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_START_S, _STOP_S = 60, 20

# Without cgroups, accounting or MPI, which a test machine may not have; it lends more cores than there are.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=30
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


class Slurm:
    """The daemons; ``env`` is what a client needs."""

    def __init__(self, folder: Path, n_nodes: int = 1, n_cpus: int = 4) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("munge", "state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs={n_cpus} RealMemory=8000"
            for i in range(n_nodes)
        )
        (folder / "slurm.conf").write_text(
            _CONFIG.format(host=host, port=_free_port(), folder=folder, user=getpass.getuser(), nodes=nodes)
        )
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self.run("munged", "--force", *(f"--{option}={folder}/munge/{name}" for option, name in munge.items()))
        self.run("slurmctld", "-f", folder / "slurm.conf", "-c")
        for i in range(n_nodes):
            self.run("slurmd", "-f", folder / "slurm.conf", "-N", f"n{i}")
        deadline = time.monotonic() + _START_S
        while set(self.run("sinfo", "-h", "-o", "%T", check=False).split()) != {"idle"}:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command of SLURM, and return what it prints."""
        words = list(map(str, command))
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}{self.logs()}"
        return done.stdout

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of jobs in these states, or of all that are not over."""
        wanted = ["-t", ",".join(states)] if states else []
        return self.run("squeue", "-h", "-o", "%i", *wanted).split()

    def wait(self, seconds: float = 60) -> None:
        """Wait until no job is left."""
        deadline = time.monotonic() + seconds
        while self.jobs():
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "".join(f"\n{path}:\n{path.read_text()[-1500:]}" for path in (self.folder / "log").iterdir())

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        with contextlib.suppress(AssertionError):
            self.wait(_STOP_S)
        for pid_file in (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge/pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                _end(int(pid_file.read_text()))


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        # It may stay as a zombie of a first process that does not look after its children.
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def running_slurm(folder: Path, n_nodes: int = 1) -> Iterator[Slurm]:
    """Start a SLURM for the tests of a module, and end it; skips where it is not installed."""
    if names := missing():
        pytest.skip(f"no SLURM here ({', '.join(names)} not installed): apt-get install slurm-wlm munge")
    slurm = Slurm(folder, n_nodes)
    try:
        yield slurm
    finally:
        slurm.stop()
