"""Many workers: a simulation of 8 to 1024 of them, and runs with which it is compared.

Events, not formulas: a client with a window of groups, one queue for all that
client and scheduler do, workers that take the next group, a store of limited
bandwidth. How many groups are in flight and how large they are is asked of the
dispatcher itself. What it is compared with are real runs: of the network at 1
and 2 workers, and of tasks that only sleep at 64.
"""

import heapq
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import dask
import numpy as np

from benchmarks.machine import describe, keep
from benchmarks.scale import CHUNK_SHAPE, cluster, write_volume
from megaseg_dask.algorithms.normalization import Counts
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import dispatcher
from megaseg_dask.run.cluster import worker_plugin
from megaseg_dask.run.cluster.dask_config import CONFIG
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.run.state import PartStatistics, TaskSummary
from megaseg_dask.run.tasks.worker import Outcome, Worker

WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Load:
    """A stage: its tasks, and what one of them takes of a worker and of the store."""

    stage: str
    n_tasks: int
    compute_s: float
    n_bytes: float = 0.0
    n_requests: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What is shared, and what a worker can do."""

    # Of client and scheduler together, for each group that is sent and comes back.
    group_cost_s: float
    # Of the store as a whole, and of one worker's connection to it.
    store_bytes_per_s: float = 10e9
    worker_bytes_per_s: float = 250e6
    # Reading the next block and writing the last one go on beside inference.
    overlapped: bool = True
    # Tasks differ: standard deviation as a share of the mean.
    jitter: float = 0.1


def simulate(
    loads: Sequence[Load], n_workers: int, machine: Machine, seed: int = 0
) -> dict[str, Any]:
    """Return the wall time of stages one after the other, and how busy all parts were."""
    rng = np.random.default_rng(seed)
    clock = 0.0
    busy = 0.0
    hub_busy = 0.0
    peak = 0.0
    stage_s = {}
    for load in loads:
        began = clock
        clock, of_workers, of_hub = _run_stage(load, n_workers, machine, rng, clock)
        busy += of_workers
        hub_busy += of_hub
        stage_s[load.stage] = round(clock - began, 1)
        peak = max(peak, load.n_requests * load.n_tasks / max(clock - began, 1e-9))
    ideal = sum(_task_s(load, 1, machine) * load.n_tasks for load in loads) / n_workers
    return {
        "workers": n_workers,
        "wall_s": round(clock, 1),
        "efficiency": round(ideal / clock, 3),
        "workers_busy": round(busy / (clock * n_workers), 3),
        "scheduler_busy": round(hub_busy / clock, 3),
        "store_requests_per_s": round(peak),
        "store_gb_per_s": round(
            sum(load.n_bytes * load.n_tasks for load in loads) / clock / 1e9, 2
        ),
        "stage_s": stage_s,
    }


def _task_s(load: Load, n_busy: int, machine: Machine) -> float:
    moved = load.n_bytes / min(machine.worker_bytes_per_s, machine.store_bytes_per_s / n_busy)
    if machine.overlapped:
        return max(load.compute_s, moved)
    return load.compute_s + moved


def _run_stage(
    load: Load, n_workers: int, machine: Machine, rng: Any, clock: float
) -> tuple[float, float, float]:
    """Run one stage from ``clock`` on.

    Return when it ends, and how long workers and scheduler were busy.
    """
    task_s = _task_s(load, min(n_workers, load.n_tasks), machine)
    waiting = n_workers
    queued = deque[int]()
    n_left = load.n_tasks
    n_running = 0
    hub_free = clock
    busy = 0.0
    hub_busy = 0.0
    mean = 0.0
    events: list[tuple[float, int, str, int]] = []
    n = 0

    def push(at: float, kind: str, size: int) -> None:
        nonlocal n
        n += 1
        heapq.heappush(events, (at, n, kind, size))

    def refill(now: float) -> None:
        nonlocal n_left, n_running, hub_free, hub_busy
        while n_left and n_running < dispatcher.window_of(n_workers):
            size = min(dispatcher.group_size_of(mean or None, n_left, n_workers), n_left)
            n_left -= size
            n_running += 1
            hub_free = max(hub_free, now) + machine.group_cost_s / 2
            hub_busy += machine.group_cost_s / 2
            push(hub_free, "sent", size)

    refill(clock)
    now = clock
    while events:
        now, _, kind, size = heapq.heappop(events)
        if kind == "ended":
            waiting += 1
            hub_free = max(hub_free, now) + machine.group_cost_s / 2
            hub_busy += machine.group_cost_s / 2
            push(hub_free, "known", size)
        elif kind == "known":
            n_running -= 1
            mean = task_s
            refill(now)
        else:
            queued.append(size)
        while queued and waiting:
            waiting -= 1
            size = queued.popleft()
            jitter = machine.jitter * rng.standard_normal() / np.sqrt(size)
            took = task_s * size * max(1 + jitter, 0.1)
            busy += took
            push(now + took, "ended", size)
    return now, busy, hub_busy


# -- what is simulated

# Targets of the design for MegaSeg_v1 on an H200, as no GPU was there to measure: 0.25 s of network
# for a field of 65×624×924 at overlap 0, 0.5 s with all else on the worker's 16 cores.
FIELD_SHAPE = (65, 624, 924)
FIELD_S = 0.5
NETWORK_S = 0.25
# Nanoseconds a voxel on one core, measured: benchmarks/results/scale.json, volume_64gb.
_STAGES_64GB = ("measure", "label", "relabel", "downsample-1", "downsample-2", "downsample-3")


def plate() -> list[Load]:
    """384 wells × 9 fields × 100 timepoints: each volume is one task."""
    voxels = float(np.prod(FIELD_SHAPE))
    # Source uint16 in chunks of 2 MiB; scores and labels in one shard a level, 0.5 of their bytes
    # after compression.
    n_requests = voxels * 2 / 2**21 + 2 * 3 * 2
    n_bytes = voxels * 2 + voxels * (1 + 4) * 1.15 * 0.5
    return [Load("volume", 384 * 9 * 100, FIELD_S, n_bytes, n_requests)]


def light_sheet(cores: int = 8) -> list[Load]:
    """8 TB of uint16 in blocks of 256×1024×1024; a worker's tasks use all of its ``cores``."""
    scale = json.loads((Path(__file__).parent / "results/scale.json").read_text())["volume_64gb"]
    measured = float(np.prod(scale["shape"]))
    voxels = 4e12
    block = 256 * 1024 * 1024
    n = round(voxels / block)
    core_s = {stage: scale["stage_s"][stage] / measured for stage in _STAGES_64GB}
    network_s = NETWORK_S / float(np.prod(FIELD_SHAPE)) * 1.1  # redundancy of blocks of this size
    one_s = {stage: seconds * block / cores for stage, seconds in core_s.items()}

    def load(stage: str, seconds: float, bytes_per_voxel: float, share: float = 1.0) -> Load:
        n_bytes = block * bytes_per_voxel
        return Load(stage, max(round(n * share), 1), seconds, n_bytes, n_bytes / 2**22 + 4)

    fragments = scale["objects"] / measured * voxels
    return [
        load("measure", one_s["measure"], 2),
        load("segment", network_s * block, 2 * 1.3 + 0.7),
        load("label", one_s["label"], 0.3 + 1),
        load("seams", 0.01, 0.01),
        Load("join", 1, fragments * 0.6e-6),
        load("relabel", one_s["relabel"], 1 + 1),
        load("downsample-1", one_s["downsample-1"] * 8, 2, 1 / 8),
        load("downsample-2", one_s["downsample-2"] * 64, 2, 1 / 64),
        load("downsample-3", one_s["downsample-3"] * 512, 2, 1 / 512),
    ]


# -- what it is compared with


@contextmanager
def sleeping(task_s: float) -> Iterator[None]:
    """Let tasks of workers in this process sleep, and do nothing else."""
    part = PartStatistics(0, Counts(8, 8, 16, 0, 2))
    summaries = {"measure": TaskSummary(parts=((part,),))}

    def sleep(worker_: Any, stage: str, index: int) -> Outcome:
        time.sleep(task_s)
        return Outcome(index, summaries.get(stage, TaskSummary()), task_s)

    # Workers are processes elsewhere, and tasks of one process take turns; here all of them are
    # in this one.
    with (
        mock.patch.object(Worker, "attempt", sleep),
        mock.patch.object(worker_plugin, "describe", _describe),
    ):
        yield


def _describe(on_gpu: bool) -> dict[str, Any]:
    """Stand in for the description of a worker.

    Of many workers in one process, Dask does not know which one is asked.
    """
    return {"name": "sleeper", "address": "", "host": "", "cores": 1, "memory_limit": 0}


def run_sleeping(n_per_axis: int, task_s: float, n_workers: int = 64) -> dict[str, Any]:
    """Run sleeping tasks, about the cube of ``n_per_axis``, by the real scheduler and journal."""
    from distributed import Client, LocalCluster

    with (
        tempfile.TemporaryDirectory() as name,
        dask.config.set({**CONFIG, "distributed.worker.preload": []}),
    ):
        source = write_volume(
            Path(name) / "volume.zarr", tuple(-(-n_per_axis * 16 // c) for c in CHUNK_SHAPE)
        )
        import zarr

        zarr.open_array(source / "0", mode="r+").resize((n_per_axis * 16,) * 3)
        settings = parse_settings(
            {
                "model": "starter",
                "engine": "torch",
                "threads": 1,
                "block": "16,16,16",
                "outputs": "scores",
                "overlap": 0,
            }
        )
        target = str(Path(name) / "out.zarr")
        [(plan, _)] = plan_runs(str(source), target, settings)
        with (
            LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                processes=False,
                memory_limit=0,
                dashboard_address=None,
            ) as own,
            Client(own) as client,
            sleeping(task_s),
        ):
            client.wait_for_workers(n_workers, timeout=120)
            times: list[float] = []

            def note(event: Any) -> None:
                if event.kind == "progress" and event.stage == "segment":
                    times.append(time.perf_counter())

            result = segment(str(source), target, settings, client=client, emit=note)
        assert result.status == "done", result
    # From the moment that the stage begins: what comes before is the start of a run.
    return {
        "workers": n_workers,
        "task_s": task_s,
        "tasks": plan.stage("segment").n_tasks,
        "wall_s": round(times[-1] - times[0], 2),
    }


def calibrate(n_per_axis: int = 8) -> float:
    """Return the seconds of client and scheduler for a group, from empty tasks one by one."""
    with (
        mock.patch.object(dispatcher, "_GROUP_S", 0.0),
        mock.patch.object(dispatcher, "_GROUP_COST_S", 0.0),
    ):
        found = run_sleeping(n_per_axis, 0.0)
    return float(found["wall_s"] / found["tasks"])


def compare_sleeping(n_per_axis: int, task_s: float, group_cost_s: float) -> dict[str, Any]:
    """Compare a run of sleeping tasks with what the simulation says of it."""
    found = run_sleeping(n_per_axis, task_s)
    expected = simulate(
        [Load("segment", found["tasks"], task_s)],
        found["workers"],
        Machine(group_cost_s, jitter=0.0),
    )
    return {
        **found,
        "simulated_s": expected["wall_s"],
        "ratio": round(found["wall_s"] / expected["wall_s"], 2),
    }


def compare_network(n_workers: int, group_cost_s: float) -> dict[str, Any]:
    """Segment a volume of 16 blocks, and simulate it with the mean seconds of its tasks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_volume(folder / "volume.zarr", (1, 1, 1))
        target = str(folder / "out.zarr")
        settings = parse_settings(
            {
                "model": "starter",
                "engine": "torch",
                "threads": 1,
                "overlap": 0,
                "patch": "32,64,64",
                "block": "64,64,64",
            }
        )
        [(plan, _)] = plan_runs(str(source), target, settings)
        with cluster(folder, n_workers, "") as running:
            # The first run opens the network.
            segment(str(source), str(folder / "first.zarr"), settings, client=running["client"])
            result = segment(str(source), target, settings, client=running["client"])
        timings = Journal.read(plan).timings
    loads = [Load(s.name, s.n_tasks, timings[s.name].seconds / s.n_tasks) for s in plan.stages]
    expected = simulate(loads, n_workers, Machine(group_cost_s, jitter=0.0))
    return {
        "workers": n_workers,
        "stage_s": {load.stage: round(load.compute_s, 3) for load in loads},
        "wall_s": round(result.wall_s, 2),
        "simulated_s": expected["wall_s"],
        "ratio": round(result.wall_s / expected["wall_s"], 2),
    }


def table(loads: Sequence[Load], machine: Machine, price: float) -> list[dict[str, Any]]:
    """Return a row for each number of workers, with the price of holding all of them to the end."""
    rows = [simulate(loads, n, machine) for n in WORKERS]
    return [{**row, "cost": round(row["wall_s"] / 3600 * row["workers"] * price)} for row in rows]


def _in_small_groups(loads: Sequence[Load], machine: Machine, price: float) -> list[dict[str, Any]]:
    """Return the table with groups of half a second, and at most 512 of them in flight."""
    with (
        mock.patch.object(dispatcher, "_GROUP_COST_S", 0.0),
        mock.patch.object(dispatcher, "window_of", lambda n: min(max(8, 4 * n), 512)),
    ):
        return table(loads, machine, price)


def measure(price: float = 3.0) -> dict[str, Any]:
    """Calibrate, compare, and simulate both cases."""
    group_cost_s = calibrate()
    checks = [
        *(compare_network(n, group_cost_s) for n in (1, 2)),
        compare_sleeping(11, 1.0, group_cost_s),
        compare_sleeping(11, 0.25, group_cost_s),
    ]
    # Of a quiet machine with a core each for client and scheduler, as earlier runs say; the
    # calibration is this machine's, with all else that ran on it.
    machine = Machine(group_cost_s=0.003)
    fast = replace(machine, store_bytes_per_s=300e9)
    return {
        "machine": describe(),
        "load": [round(n, 1) for n in os.getloadavg()],
        "group_cost_s": round(group_cost_s, 5),
        "checks": checks,
        "assumed": {
            **asdict(machine),
            "price_per_gpu_hour": price,
            "field_s": FIELD_S,
            "network_s": NETWORK_S,
        },
        "plate": table(plate(), machine, price),
        "plate_with_fast_store": table(plate(), fast, price),
        "plate_with_fast_store_in_small_groups": _in_small_groups(plate(), fast, price),
        "light_sheet": table(light_sheet(), machine, price),
    }


def main() -> None:
    """Measure and keep the result, or only simulate (``tables``)."""
    if sys.argv[1:] == ["tables"]:
        for loads in (plate(), light_sheet()):
            for row in table(loads, Machine(0.003), 3.0):
                print(row)
    else:
        keep("scaling", measure())


if __name__ == "__main__":
    main()
