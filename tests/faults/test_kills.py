"""Promise 5: SIGKILL any process at any instant.

The same command resumes, to the arrays of an undisturbed run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megaseg_dask.plan.settings import parse_settings
from tests.faults.test_faults import arrays, assert_same
from tests.fixtures.faults import Haunted
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (40, 90, 130)  # 3 x 3 x 2 ragged blocks
STAGES = (
    "measure segment histogram cutoff threshold holes holes-seams holes-join fill "
    "label seams join relabel"
).split()

# What the runs of this module have in common.
OPTIONS = {
    "engine": "openvino",
    "threads": "1",
    "overlap": "0",
    "block": "20,30,50",
    "outputs": "labels,scores,mask",
    "threshold": "otsu",
    "fill_holes": "20",
}

# The command, with the workers that the tests watch.
_COMMAND = """
import sys
from megaseg_dask.cli import main
from megaseg_dask.run.cluster import dask_config

if __name__ == "__main__":
    dask_config.CONFIG["distributed.worker.preload"].append({preload!r})
    main(sys.argv[1:])
"""


class Command:
    """`megaseg segment` as a process of its own, to be killed and started again."""

    def __init__(self, folder: Path, bundle: Path, *options: str) -> None:
        (folder / "haunted").mkdir()
        self.haunted = Haunted(folder / "haunted")
        self.source = write_image(folder / "image.zarr", blobs(SHAPE), chunks=(20, 30, 50))
        self.target = folder / "out.zarr"
        script = folder / "command.py"
        script.write_text(_COMMAND.format(preload=self.haunted.preload))
        self._arguments = [
            sys.executable,
            str(script),
            "segment",
            str(self.source),
            str(self.target),
            "--json",
            "--model",
            str(bundle),
            "--retries",
            "9",
            *(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()),
            *options,
        ]

    def start(self) -> subprocess.Popen:
        # A group of its own: what a killed client leaves behind can be found and ended.
        return subprocess.Popen(
            self._arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self) -> dict:
        process = self.start()
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err[-3000:] + out[-1000:]
        return json.loads(out.splitlines()[-1])


def workers_of(client: subprocess.Popen) -> list[psutil.Process]:
    """Return the worker processes of a client, which are those that compute."""
    with_tasks = []
    try:
        children = psutil.Process(client.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                with_tasks.append(child)
        except psutil.Error:
            continue
    return with_tasks


def kill_all(client: subprocess.Popen) -> None:
    """SIGKILL a client and all that it started, as a power cut would."""
    try:
        os.killpg(client.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    client.communicate()


def recorded(target: Path) -> set[tuple[str, int]]:
    """Return the tasks that the journal says are done."""
    done = set()
    for segment in sorted((target.parent / f"{target.name}.run/megaseg/journal").glob("*.jsonl")):
        for line in segment.read_text().splitlines()[1:]:
            record = json.loads(line)
            if "s" in record:
                done.add((record["stage"], record["index"]))
    return done


def wait_for(condition, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_bundle) -> dict:
    """The arrays of a run in which nothing happened."""
    command = Command(tmp_path_factory.mktemp("undisturbed"), tiny_bundle)
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS})
    assert segment_here(str(command.source), str(command.target), settings).status == "done"
    return arrays(command.target)


def kill_worker_and_go_on(command: Command, rng: random.Random) -> int:
    """Kill one worker at a random instant of a run; return how many were killed."""
    before = command.haunted.calls
    client = command.start()
    wait_for(lambda: command.haunted.calls != before or client.poll() is not None)
    time.sleep(rng.uniform(0, 2.5))
    victims = workers_of(client)
    if victims:
        rng.choice(victims).kill()
    out, err = client.communicate(timeout=280)
    assert client.returncode == 0, err[-3000:] + out[-1000:]
    return bool(victims)


def kill_client_in(command: Command, stage: str, rng: random.Random, *, workers_too: bool) -> None:
    """Kill the client, and perhaps its workers, once a stage has begun."""
    client = command.start()
    wait_for(
        lambda: any(task[0] == stage for task in command.haunted.calls) or client.poll() is not None
    )
    time.sleep(rng.uniform(0, 0.3))
    if workers_too:
        kill_all(client)
        return
    victims = workers_of(client)
    client.kill()
    client.communicate()
    # Without their client, workers end by themselves.
    _, alive = psutil.wait_procs(victims, timeout=120)
    assert not alive, "workers outlived their client"


def test_one_worker_and_one_client_killed(tmp_path, tiny_bundle, undisturbed):
    expected = undisturbed
    command = Command(tmp_path, tiny_bundle, "--workers", "2")
    rng = random.Random(1)
    kill_client_in(command, "segment", rng, workers_too=False)
    finished = {task for task in recorded(command.target) if task[0] == "segment"}
    before = command.haunted.calls
    kill_worker_and_go_on(command, rng)
    after = command.haunted.calls
    assert all(after[task] == before[task] for task in finished), (
        "a finished block was computed again"
    )
    assert_same(arrays(command.target), expected)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_workers_killed_at_random_instants(tmp_path, tiny_bundle, undisturbed):
    expected = undisturbed
    rng, n_killed = random.Random(0), 0
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = Command(folder, tiny_bundle, "--workers", "2")
        n_killed += kill_worker_and_go_on(command, rng)
        assert_same(arrays(command.target), expected)
    assert n_killed >= 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_clients_killed_in_every_stage(tmp_path, tiny_bundle, undisturbed):
    """By turns with its workers, as a power cut would, and alone."""
    expected = undisturbed
    command = Command(tmp_path, tiny_bundle, "--workers", "1")
    rng = random.Random(7)
    for number, stage in enumerate(STAGES):
        command.haunted.forget()
        finished = recorded(command.target)
        kill_client_in(command, stage, rng, workers_too=bool(number % 2))
        again = {task for task in command.haunted.calls if task in finished}
        assert not again, f"computed again after the journal had them: {again}"
    command.haunted.forget()
    finished = recorded(command.target)
    assert command.run()["status"] == "done"
    assert not {task for task in command.haunted.calls if task in finished}
    assert_same(arrays(command.target), expected)
