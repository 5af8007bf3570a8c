"""What ``megaseg relabel`` of a field costs, as a share of segmenting it on a CPU.

    python -m benchmarks.relabelling

Both are the command as it is typed, with ``--workers 0``, in processor seconds: other programs on
the machine then matter little. Reach: 3 %.

Expected before it was run: 140 windows of about 1 s, and 4 s of labelling, of which half is the
start of Python and its libraries. In the kept result the run itself is that of ``field.json``, and
what was labelled again are scores of as large a field that an engine without a network made.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.field import PUBLISHED_SHAPE
from benchmarks.machine import describe, keep
from megaseg_dask.stores import Location
from megaseg_dask.tools.sample import write_sample
from starter.simulation import simulate

CHANGES = {
    "threshold": ["--threshold", "0.6"],
    "threshold and split": ["--threshold", "0.6", "--split", "distance", "--min-size", "100"],
}


def command_s(*words: str) -> float:
    """Return the processor seconds of a ``megaseg`` command, and of all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "megaseg_dask", *words, "--workers", "0", "--quiet"]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(
    folder: Path, shape: tuple[int, ...] = PUBLISHED_SHAPE, kind: str = "nuclei"
) -> dict[str, Any]:
    """Return the seconds of a run and of each way to label it again, and their shares."""
    made = simulate(0, shape, kind)
    source = folder / "field.zarr"
    write_sample(Location.of(source), made.image, made.mask.astype(np.uint16))
    target = str(folder / "out.zarr")
    run_s = command_s("segment", str(source), target, "--model", "starter")
    found: dict[str, Any] = {
        "machine": describe(),
        "shape": shape,
        "kind": kind,
        "segment_cpu_s": round(run_s, 1),
    }
    for number, (name, change) in enumerate(CHANGES.items()):
        again_s = command_s("relabel", target, "--label-name", f"n{number}", *change)
        found[name] = {"cpu_s": round(again_s, 2), "share": round(again_s / run_s, 4)}
    return found


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=",".join(map(str, PUBLISHED_SHAPE)))
    parser.add_argument("--folder", type=Path, help="where the images stay; else nothing stays")
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split(",")))
    with tempfile.TemporaryDirectory() as temporary:
        keep("relabelling", measure(options.folder or Path(temporary), shape))


if __name__ == "__main__":
    main()
