"""``--on-volume``: a command that is run for each finished volume, with JSON on its stdin.

A feedback microscope or a notifier reacts to it. The command is split into words once, and
no shell sees it or a name. One process runs at a time, in the order in which volumes were
finished. The run never waits for it, but for a short while at the end; what fails is counted.
"""

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import count, one_line
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.target.arrays import ImageTarget

# How long one call may take, and how long a run that is over waits for those that are left.
_CALL_S = 60.0
_LAST_S = 60.0
_STDERR_BYTES = 4096

Told = Mapping[str, object]


def describe_volume(plan: Plan, journal: Journal, volume: int, *, is_published: bool) -> Told:
    """Return what the command is told of a finished volume, as JSON values.

    It ``is_published`` if readers of OME-Zarr find it already.
    """
    planned = plan.volumes[volume]
    image = ImageTarget(plan, planned.image)
    first = planned.target_c
    suffixes = plan.suffixes[first : first + len(plan.model.outputs)]
    labels = []
    if plan.resolved.writes_labels():
        labels = [str(image.group("labels", suffix).location) for suffix in suffixes]
    return {
        "event": "volume",
        "source": str(plan.source / planned.image),
        "target": str(plan.target),
        "image": str(image.location),
        "field": planned.image,
        "t": planned.t,
        "target_t": planned.target_t,
        "channels": list(planned.channels),
        "channel_names": [plan.channel_name(planned.image, c) for c in planned.channels],
        "label_name": plan.resolved.label_name,
        "labels": labels,
        "objects": _count_objects(plan, journal, volume),
        "published": is_published,
    }


def _count_objects(plan: Plan, journal: Journal, volume: int) -> int | None:
    stage = plan.stage_telling("objects")
    if stage is None or not plan.resolved.writes_labels():
        return None
    told = journal.summaries(stage.name, volume)
    return sum(output.n_objects or 0 for summary in told for output in summary.by_output)


class VolumeCommand:
    """Runs the command for one volume after the other, in a thread."""

    def __init__(self, command: str, *, call_s: float = _CALL_S, last_s: float = _LAST_S) -> None:
        """Begin without a call; one may take ``call_s``, and all that are left ``last_s``.

        Raises:
            SettingsError: There is no such program.
        """
        self._words = shlex.split(command)
        if shutil.which(self._words[0]) is None:
            raise SettingsError(
                f"--on-volume {command}: no program {self._words[0]} is found; give its path"
            )
        self._call_s = call_s
        self._last_s = last_s
        self._queue: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._n_told = 0
        self._n_called = 0
        self._failures: list[str] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def tell(self, told: Told) -> None:
        """Let the command be run for a volume, when its turn comes."""
        self._n_told += 1
        self._queue.put(told)

    def finish(self) -> list[str]:
        """Wait a short while for the calls that are left; return what to warn of."""
        self._queue.put(None)
        self._thread.join(self._last_s)
        self.stop()
        warnings = []
        if self._failures:
            warnings.append(
                f"--on-volume: {len(self._failures)} of {count(self._n_told, 'call')} failed, the "
                f"first for {self._failures[0]}"
            )
        n_left = self._n_told - self._n_called
        if n_left:
            warnings.append(
                f"--on-volume: {count(n_left, 'call')} of {self._n_told} had not ended when the "
                "run did; the command takes longer than a volume"
            )
        return warnings

    def stop(self) -> None:
        """End what runs, and call nothing more."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                _end(self._process)

    # -- in the thread

    def _work(self) -> None:
        while (told := self._queue.get()) is not None:
            with tempfile.TemporaryFile() as errors:
                process = self._begin(told, errors.fileno())
                if process is None:
                    return
                problem = self._wait(process, told)
                errors.seek(0)
                line = errors.read(_STDERR_BYTES).decode(errors="replace").strip()
            if self._is_stopped:
                return
            self._n_called += 1
            if problem:
                words = f": {one_line(line)}" if line else ""
                subject = f"{told['field']} t={told['t']}".strip()
                self._failures.append(f"{subject} ({problem}{words})")

    def _begin(self, told: Told, errors: int) -> subprocess.Popen[bytes] | None:
        """Start the command; return no process if nothing more is to be called."""
        with self._lock:
            if self._is_stopped:
                return None
            # A session of its own: Ctrl-C of the terminal is for the run, which then ends it.
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            return self._process

    def _wait(self, process: subprocess.Popen[bytes], told: Told) -> str:
        """Return what went wrong; nothing if the command succeeded."""
        began_s = time.monotonic()
        try:
            process.communicate(json.dumps(told).encode() + b"\n", timeout=self._call_s)
        except subprocess.TimeoutExpired:
            _end(process)
            process.wait()
            return f"ended after {time.monotonic() - began_s:.0f} s"
        finally:
            with self._lock:
                self._process = None
        return f"exit code {process.returncode}" if process.returncode else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that we started, and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def calling(command: str | None) -> Iterator[VolumeCommand | None]:
    """Yield what runs a command; nothing without one. An error or Ctrl-C ends what runs."""
    if command is None:
        yield None
        return
    calls = VolumeCommand(command)
    try:
        yield calls
    finally:
        calls.stop()
