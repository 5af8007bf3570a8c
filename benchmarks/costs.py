"""What runs take of time, requests and bytes, beside what their plans project.

    python -m benchmarks.costs

Three real runs with the starter model on nuclei: an image on a disk, the same image in a bucket in
blocks, and a plate in a bucket. The bucket is on a server of this machine. The starter was trained
on simulated nuclei, and the image is that of ``megaseg demo``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.requests import project_traffic
from megaseg_dask.run.status import recorded_plans
from megaseg_dask.stores import Location
from megaseg_dask.tools.demo import read_sample
from tests.fixtures.images import write_image
from tests.fixtures.servers import KEY, SECRET, S3Server, find_weed

SPACING_UM = {"z": 0.29, "y": 0.26, "x": 0.26}
KINDS = ("n_put", "n_get", "n_list", "n_delete", "bytes_read", "bytes_written")


def run(*words: str) -> dict[str, Any]:
    """Return the last line of a ``megaseg`` command with ``--json``."""
    command = [sys.executable, "-m", "megaseg_dask", *words, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(source: str, target: str, *options: str) -> dict[str, Any]:
    """Return what one run takes, projected and counted; its time is that of its tasks."""
    request = (source, target, "--model", "starter", *options)
    projected = run("plan", *request)["usage"]
    used = run("segment", *request, "--workers", "0")["used"]
    found = {kind: [projected[kind], used[kind]] for kind in KINDS}
    found["requests"] = [sum(each[kind] for kind in KINDS[:4]) for each in (projected, used)]
    # A lease beats by the clock: what the plan projects for a run that takes as long as it took.
    [plan] = recorded_plans(target)
    for_time = project_traffic(plan, 1, used["worker_s"])
    assert for_time is not None
    found["requests_at_counted_time"] = [for_time.n_requests, found["requests"][1]]
    found["seconds"] = [projected["worker_s"], used["worker_s"]]
    return found


def write_fields(path: Path, image: Any) -> Path:
    """Write the quarters of an image as a plate of two wells."""
    fields = tuple(Field(row, "1", name) for row in "AB" for name in "01")
    write_plate(Location.of(path), Plate("0.5", "screen", ("A", "B"), ("1",), fields), "0.5")
    half = [n // 2 for n in image.shape]
    for number, field in enumerate(fields):
        y = number // 2 * half[1]
        x = number % 2 * half[2]
        part = image[:, y : y + half[1], x : x + half[2]]
        write_image(path / field.path, part, scale=SPACING_UM, chunks=(60, 64, 64))
    return path


def measure(folder: Path) -> dict[str, Any]:
    """Run all three, and return what each took."""
    # How quick the machine is, is measured now, and not taken from another hour.
    os.environ["MEGASEG_HOME"] = str(folder / "home")
    image, _ = read_sample()
    source = write_image(folder / "nuclei.zarr", image, scale=SPACING_UM, chunks=(60, 128, 128))
    program = find_weed()
    assert program is not None
    server = S3Server.started(program, folder / "s3")
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        server.make_bucket("private")
        in_bucket = server.upload(source, "private", "nuclei.zarr")
        plate = server.upload(write_fields(folder / "plate.zarr", image), "private", "plate.zarr")
        # The first run of a model on a machine proves the engine, and reads a patch for that.
        compare(str(source), str(folder / "first.zarr"))
        return {
            "machine": describe(),
            "disk, one block": compare(str(source), str(folder / "out.zarr")),
            "S3, 4 blocks": compare(in_bucket, "s3://private/out.zarr", "--block", "60,128,128"),
            "S3, plate of 4 fields": compare(
                plate, "s3://private/plate-out.zarr", "--outputs", "labels,scores,measurements"
            ),
        }
    finally:
        server.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        keep("costs", measure(Path(name)))
