"""The viewer of predictions as a process: killed, and on a volume larger than memory."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import zarr

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

pytest.importorskip("neuroglancer", reason="the viewer is an extra: pip install '.[view]'")
pytestmark = pytest.mark.slow

WAIT_S = 240.0


class Viewing:
    """A viewer in another process, asked as its page asks."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process = process
        self.url = url
        scene = self.ask("scene", {})
        self.scores = scene["state"]["layers"][-1]["source"].partition("|")[0]

    def ask(self, name: str, question: dict) -> dict:
        request = Request(f"{self.url}ask/{name}", json.dumps(question).encode())
        with urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)

    def chunk(self, *position: int) -> np.ndarray:
        """Return a chunk of the finest level, with what fills it up."""
        with urlopen(f"{self.scores}0/c/{'/'.join(map(str, position))}", timeout=WAIT_S) as answer:
            return np.frombuffer(answer.read(), np.uint8).reshape(64, 64, 64)

    @property
    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


@contextmanager
def viewing(source, *options):
    command = [sys.executable, "-m", "megaseg_dask", "view", str(source), *map(str, options)]
    process = subprocess.Popen(
        [*command, "--no-browser", "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        yield Viewing(process, json.loads(process.stdout.readline())["url"])
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def n_recorded(target: Path) -> int:
    """Return how many blocks are recorded as predicted."""
    plan = RunFolder(Location.of(f"{target}.run/megaseg")).find_plan()
    return 0 if plan is None else int(Journal.read(plan).done("segment").sum())


def test_what_was_looked_at_survives_a_kill_and_is_not_predicted_again(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((32, 128, 192)))
    options = {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "block": "32,64,64"}
    settings = parse_settings(options)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    segment_here(str(source), str(tmp_path / "a.zarr"), settings)
    target = tmp_path / "b.zarr"
    with viewing(source, "--target", target, *words) as viewer:
        seen = {}
        for n_looked_at, position in enumerate([(0, 0, 1), (0, 1, 2)], 1):
            seen[position] = viewer.chunk(*position)
            until = time.monotonic() + WAIT_S
            while n_recorded(target) < n_looked_at:
                assert time.monotonic() < until
                time.sleep(0.05)
        # Another one is looked at, and may be half done.
        viewer.chunk(0, 0, 0)
        os.kill(viewer.process.pid, signal.SIGKILL)
        viewer.process.wait()
    events = []
    result = segment_here(str(source), str(target), settings, emit=events.append)
    assert result.status == "done"
    first = next(e for e in events if e.kind == "progress" and e.stage == "segment")
    assert first.n_done in (2, 3)
    assert contents(target) == contents(tmp_path / "a.zarr")
    written = zarr.open_array(target / "0", mode="r")
    for (z, y, x), values in seen.items():
        box = tuple(slice(64 * n, 64 * n + 64) for n in (z, y, x))
        np.testing.assert_array_equal(values[:32], written[box])


def test_five_places_of_twenty_gigabytes_take_no_more_memory_than_one(tmp_path, tiny_bundle):
    shape = (256, 6400, 6400)
    group = zarr.open_group(tmp_path / "image.zarr", mode="w", zarr_format=3)
    array = group.create_array(
        "0",
        shape=shape,
        chunks=(64, 256, 256),
        dtype="uint16",
        fill_value=100,
        dimension_names=list("zyx"),
    )
    places = [(0, 0, 0), (128, 3200, 3200), (192, 6144, 6144), (0, 6144, 0), (128, 0, 6144)]
    for z, y, x in places:
        array[z : z + 64, y : y + 256, x : x + 256] = blobs((64, 256, 256), seed=z + x)
    scale = [{"type": "scale", "scale": [0.3, 0.1, 0.1]}]
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets, "name": "large"}],
    }
    assert array.nbytes > 20 * 10**9
    options = ["--model", tiny_bundle, "--engine", "torch", "--threads", "1"]
    # As large as those of MegaSeg, and few.
    options += ["--patch", "64,128,128", "--overlap", "0.25"]
    peaks = []
    with viewing(tmp_path / "image.zarr", *options) as viewer:
        for z, y, x in places:
            center = {"z": z + 32, "y": y + 96, "x": x + 96}
            viewer.ask("look", {"field": "", "position": center, "pixel": 1.0})
            assert np.ptp(viewer.chunk(z // 64, y // 64, x // 64)) > 0
            peaks.append(viewer.peak_bytes)
        status = viewer.ask("look", {"field": "", "position": center, "pixel": 1.0})["status"]
    assert "Provisional scores" in status
    # Patches and scores that are remembered, and what PyTorch takes.
    assert peaks[-1] < 2.5 * 10**9, peaks
    assert peaks[-1] - peaks[0] < 2**30 + 2**29, peaks
