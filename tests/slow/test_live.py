"""A microscope and a follower as processes, both killed at random, on a disk and in a bucket.

A reader opens the target at random instants.
"""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ngio
import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from tests.fixtures.engines import blur
from tests.fixtures.microscope import DIED
from tests.fixtures.runs import segment_here
from tests.fixtures.writers import LiveImage, first_difference

pytestmark = pytest.mark.slow

# The command with an engine that costs nothing. Float32 PyTorch needs no proof, which would fail.
_COMMAND = f"""
import sys

import numpy as np

from megaseg_dask.cli import main
from megaseg_dask.inference.pytorch import TorchEngine

{inspect.getsource(blur)}
TorchEngine.__call__ = lambda self, patches: blur(patches)

if __name__ == "__main__":
    main(sys.argv[1:])
"""
OPTIONS = {
    "channel": "dna",
    "engine": "torch",
    "threads": 1,
    "overlap": 0,
    "patch": "16,32,32",
    "outputs": "labels,scores,measurements",
    "threshold": 0.9,
}
_ROOT = Path(__file__).parents[2]
_MAX_S = 280
# A writer that died takes a while to be started again.
_SILENCE_S = 20
# So long may a process be that ends after its last look.
_END_S = 5


def objects_of(where: str) -> dict[str, bytes]:
    """Return all objects below an address."""
    folder = Location.of(where)
    found = {}
    for key in folder.keys(""):
        found[key] = folder.get(key) or b""
    return found


class Follower:
    """``megaseg segment --follow`` as a process that is killed and started again."""

    def __init__(self, folder: Path, bundle: Path, source: str, target: str) -> None:
        script = folder / "follow.py"
        script.write_text(_COMMAND)
        options = {**OPTIONS, "model": bundle, "workers": 0}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._words = [sys.executable, str(script), "segment", source]
        self._options = [*words, "--json"]
        self._target = target

    def command(self, *options: str) -> list[str]:
        """Return the command that follows, with more options."""
        return [*self._words, self._target, *self._options, "--follow", *options]

    def run_at_once(self, target: str) -> dict[str, bytes]:
        """Return what one run on the finished source writes."""
        command = [*self._words, target, *self._options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return objects_of(target)

    def run(self, kills: Iterator[float]) -> list[dict]:
        """Kill it after each of some seconds, and then let it end; return its last events."""
        while True:
            process = subprocess.Popen(
                self.command(f"--follow-timeout={_SILENCE_S}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                out, err = process.communicate(timeout=next(kills, _MAX_S))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                continue
            assert process.returncode == 0, err[-3000:]
            return list(map(json.loads, out.splitlines()))


@contextmanager
def microscope(folder: Path, where: str, kind: str, style: str) -> Iterator[Path]:
    """Let a writer run, which is started again wherever it dies."""
    log = folder / "written.jsonl"
    stopped = threading.Event()

    def write() -> None:
        for attempt in range(1, 20):
            # The last attempts live.
            seed = str(attempt if attempt < 6 else 0)
            words = [sys.executable, "-m", "tests.fixtures.microscope"]
            words += [where, kind, style, str(log), seed]
            if stopped.is_set():
                return
            ended = subprocess.run(words, check=False, cwd=_ROOT)
            # A writer that cannot start is no microscope that died.
            assert ended.returncode in (0, DIED), f"the writer ended with {ended.returncode}"
            if ended.returncode == 0:
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield log
    finally:
        stopped.set()
        thread.join()


@contextmanager
def reader(target: str, shown: dict[int, float], faults: list[str]) -> Iterator[None]:
    """Open an image at random instants, once it is published; note when it shows a timepoint."""
    stopped = threading.Event()
    chance = random.Random(1)

    def read() -> None:
        is_published = False
        while not stopped.wait(chance.random() * 0.3):
            try:
                container = ngio.open_ome_zarr_container(target, mode="r")
                image = container.get_image()
                label = container.get_label("megaseg")
                n_times = image.shape[0]
                assert label.shape[0] >= n_times
                label.get_as_numpy(t=n_times - 1)
                table = container.get_table("megaseg").dataframe
                assert len(table) > 0
            except Exception as error:
                if is_published:
                    faults.append(f"{type(error).__name__}: {error}")
                continue
            is_published = True
            for t in range(n_times):
                shown.setdefault(t, time.time())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    ("place", "kind", "style"),
    [
        ("disk", "series", "append"),
        ("disk", "plate", "full"),
        ("bucket", "series", "full"),
        ("bucket", "plate", "append"),
    ],
)
def test_both_are_killed(place, kind, style, tmp_path, tiny_bundle, request):
    root = str(tmp_path / "live")
    if place == "bucket":
        request.getfixturevalue("s3")
        root = request.getfixturevalue("bucket_folder")
    source = f"{root}/live.zarr"
    target = f"{root}/out.zarr"
    follower = Follower(tmp_path, tiny_bundle, source, target)
    chance = random.Random(f"{place} {kind} {style}")
    kills = iter([4 + 6 * chance.random() for _ in range(3)])
    shown: dict[int, float] = {}
    faults: list[str] = []
    watched = reader(target, shown, faults) if (place, kind) == ("disk", "series") else None
    with microscope(tmp_path, source, kind, style) as log:
        if watched is None:
            events = follower.run(kills)
        else:
            with watched:
                events = follower.run(kills)
        ended_s = time.time()
    written = dict(map(json.loads, log.read_text().splitlines()))
    if max(written.values()) > ended_s - _END_S:
        # A writer that was silent for too long, as on a busy machine: the same command goes on.
        events = follower.run(iter(()))
    assert events[-1]["status"] == "done"
    assert not faults, faults[:3]
    expected = follower.run_at_once(f"{root}/expected.zarr")
    assert not first_difference(objects_of(target), expected)
    if shown:
        latencies = []
        for t, seen_s in shown.items():
            latencies.append(round(seen_s - written[f"wrote t={t} c=0 level 0"], 2))
        # For people: a busy machine says nothing about a law.
        (tmp_path / "latencies.json").write_text(json.dumps(latencies))


def test_workers_get_more_volumes_of_one_plan(client, tiny_bundle, tmp_path):
    """What grows is planned again; a worker process opens that plan, and the longer source."""
    source = tmp_path / "live.zarr"
    image = LiveImage(source, "append", 3)
    steps = image.steps_of()
    assert [next(steps) for _ in range(9)]
    stopped = threading.Event()

    def write() -> None:
        for _ in steps:
            time.sleep(0.3)
        stopped.set()

    thread = threading.Thread(target=write)
    thread.start()
    settings = parse_settings(
        {**OPTIONS, "model": str(tiny_bundle), "follow": True, "time": "0:3", "settle": 0.2}
    )
    result = segment(str(source), str(tmp_path / "out.zarr"), settings, client=client)
    thread.join()
    assert result.status == "done"
    settings = parse_settings({**OPTIONS, "model": str(tiny_bundle), "time": "0:3"})
    expected = tmp_path / "expected.zarr"
    assert segment_here(str(source), str(expected), settings).status == "done"
    assert objects_of(str(tmp_path / "out.zarr")) == objects_of(str(expected))


def test_ctrl_c_ends_a_follower_that_waits_and_what_it_called(tiny_bundle, tmp_path):
    source = tmp_path / "live.zarr"
    assert list(LiveImage(source, "append", 1).steps_of())
    follower = Follower(tmp_path, tiny_bundle, str(source), str(tmp_path / "out.zarr"))
    command = follower.command("--on-volume", "sleep 300")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "following" and event["n_done"] == 1:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert not _is_running("sleep 300")


def _is_running(command: str) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_own = (folder / "stat").stat().st_uid == os.getuid()
        except OSError:
            continue
        if is_own and b" ".join(words).decode(errors="replace").strip() == command:
            return True
    return False
