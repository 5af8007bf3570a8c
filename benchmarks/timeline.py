"""When a worker reads, predicts and writes successive fields, as a trace that Chrome opens.

The real worker, source and target; in place of the network an engine that
sleeps, as a CPU does while a GPU computes: with one task in hand, and with
three, as on a GPU. The trace (open it at ``chrome://tracing`` or
https://ui.perfetto.dev) is that of the last case.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.field import PUBLISHED_SHAPE
from benchmarks.machine import RESULTS, describe, keep
from benchmarks.scale import cluster, write_series
from megaseg_dask.plan import plan
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from starter.simulation import simulate

# What a worker does in place of inference, and the functions whose calls are noted.
PRELOAD = """
import functools, json, os, threading, time
import numpy as np
from megaseg_dask.inference import pytorch
from megaseg_dask.plan import plan
from megaseg_dask.run import workspace
from megaseg_dask.run.tasks import components, pyramids, statistics

plan.TASKS_AT_ONCE["cpu"] = {n_tasks}
MASK = np.load({mask!r}).view(np.uint8)


class Simulated:
    def scores(self, dtype):
        return MASK * np.uint8(255)

    def mask(self, threshold):
        return MASK


class SleepingEngine(pytorch.TorchEngine):
    def predict_block(self, block):
        time.sleep({field_s})
        return [Simulated()]


pytorch.TorchEngine = SleepingEngine


def noting(module, name, kind):
    work = getattr(module, name)

    @functools.wraps(work)
    def noted(*args, **kwargs):
        began = time.time()
        try:
            return work(*args, **kwargs)
        finally:
            event = dict(
                name=kind,
                ph="X",
                pid=os.getpid(),
                tid=threading.get_native_id(),
                ts=began * 1e6,
                dur=(time.time() - began) * 1e6,
            )
            with open({log!r}, "a") as file:
                file.write(json.dumps(event) + chr(10))

    setattr(module, name, noted)


noting(workspace.MemoryWorkspace, "sources", "read")
noting(statistics, "measure_block", "statistics")
noting(SleepingEngine, "predict_block", "inference")
for name in ("label_block", "pair_seams", "join_objects", "relabel_block"):
    noting(components, name, "label")
noting(workspace.Workspace, "write", "write")
noting(pyramids, "downsample", "downsample")
"""


def measure(
    shape: tuple[int, ...] = PUBLISHED_SHAPE,
    n_fields: int = 12,
    paces: tuple[float, ...] = (0.25, 1.5),
) -> dict[str, Any]:
    """Return fields per second, and how busy the engine is, at some paces.

    A worker has one task in hand, and then three.
    """
    machine = describe()
    made = simulate(0, shape)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "series.zarr"
        write_series(source, np.broadcast_to(made.image, (n_fields, 1, *shape)))
        np.save(Path(name) / "mask.npy", made.mask)
        for field_s, n_tasks in product(paces, (1, 3)):
            case = f"{field_s} s, {n_tasks} in hand"
            folder = Path(name) / case
            folder.mkdir()
            found[case], events = run(source, folder, n_tasks, field_s)
    return {
        "machine": machine,
        "shape": shape,
        "fields": n_fields,
        "worker": found,
        "trace": events,
    }


def run(
    source: Path, folder: Path, n_tasks: int, field_s: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Segment a timelapse with ``n_tasks`` in hand; return its figures, and its trace."""
    log = folder / "events.jsonl"
    preload = PRELOAD
    filled = {
        "n_tasks": n_tasks,
        "field_s": field_s,
        "log!r": repr(str(log)),
        "mask!r": repr(str(folder.parent / "mask.npy")),
    }
    for key, value in filled.items():
        preload = preload.replace(f"{{{key}}}", str(value))
    settings = parse_settings(
        {"model": "starter", "engine": "torch", "threads": 1, "overlap": 0, "memory": "16GB"}
    )
    with (
        mock.patch.dict(plan.TASKS_AT_ONCE, {"cpu": n_tasks}),
        cluster(folder, 1, preload, n_tasks) as running,
    ):
        started = time.perf_counter()
        result = segment(str(source), str(folder / "out.zarr"), settings, client=running["client"])
        wall_s = time.perf_counter() - started
    assert result.status == "done", result
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return {"wall_s": round(wall_s, 2), **_figures(events)}, events


def _figures(events: list[dict[str, Any]]) -> dict[str, Any]:
    inference = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "inference")
    # From the second field on: the first waits for imports.
    steady = inference[1:]
    elapsed = steady[-1][1] - steady[0][0]
    busy = sum(stop - start for start, stop in steady)
    waits = sorted(after[0] - before[1] for before, after in pairwise(steady))
    totals: Counter[str] = Counter()
    for event in events:
        totals[event["name"]] += event["dur"]
    return {
        "fields_per_s": round(len(steady) / elapsed * 1e6, 2),
        "inference_busy": round(busy / elapsed, 3),
        "median_wait_s": round(waits[len(waits) // 2] / 1e6, 3),
        "seconds_a_field": {
            kind: round(total / len(inference) / 1e6, 3) for kind, total in totals.items()
        },
    }


def keep_both(found: dict[str, Any]) -> None:
    """Keep the result, and the trace beside it."""
    events = found.pop("trace")
    first = min(event["ts"] for event in events)
    for event in events:
        event["ts"] = round(event["ts"] - first)
        event["dur"] = round(event["dur"])
    text = json.dumps({"traceEvents": events})
    (RESULTS / "timeline.trace.json").write_text(text + "\n")
    keep("timeline", found)


def main() -> None:
    """Measure, and keep."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    keep_both(measure())


if __name__ == "__main__":
    main()
