"""Size: many tasks and large volumes, with an engine that does nothing, to see all else.

Tasks per second through scheduler and journal; peak memory of client,
scheduler and worker; the time to find out that all is done. Workers and
scheduler are processes of their own, so that each can be weighed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from benchmarks.machine import RESULTS, describe, keep
from megaseg_dask.ngff.plate import Acquisition, Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.cluster.dask_config import CONFIG, WORKER_ENVIRONMENT
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.demo import read_sample
from megaseg_dask.tools.sample import write_sample
from starter.simulation import simulate

# What a worker runs in place of the network, and in place of everything.
EMPTY_ENGINE = """
from megaseg_dask.inference.pytorch import TorchEngine
TorchEngine.__call__ = lambda self, patches: patches
"""
EMPTY_TASKS = """
import megaseg_dask.run.tasks.worker as tasks
from megaseg_dask.algorithms.normalization import Counts
from megaseg_dask.run.state import OutputState, PartStatistics, TaskSummary

known = {
    "measure": TaskSummary(parts=((PartStatistics(0, Counts(8, 8, 16, 0, 2)),),)),
    "join": TaskSummary(by_output=(OutputState(n_objects=0),)),
}
tasks.run_task = lambda workspace, stage, index: known.get(stage, TaskSummary())
"""

CHUNK_SHAPE = (64, 256, 256)


def write_volume(path: Path, grid_shape: tuple[int, ...], dtype: str = "uint16") -> Path:
    """Write an image of one chunk, repeated by links: large, and yet small on the disk."""
    tile = simulate(0, CHUNK_SHAPE).image.astype(dtype)
    shape = tuple(c * n for c, n in zip(CHUNK_SHAPE, grid_shape, strict=True))
    group = zarr.open_group(path, mode="w")
    array = group.create_array(
        "0", shape=shape, chunks=CHUNK_SHAPE, dtype=dtype, dimension_names=list("zyx")
    )
    array[tuple(map(slice, CHUNK_SHAPE))] = tile
    first = path / "0/c/0/0/0"
    for place in np.ndindex(*grid_shape):
        chunk = path / "0/c" / "/".join(map(str, place))
        if chunk != first:
            chunk.parent.mkdir(parents=True, exist_ok=True)
            os.link(first, chunk)
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"name": "large", "axes": axes, "datasets": datasets}],
    }
    return path


@contextmanager
def cluster(
    folder: Path,
    n_workers: int,
    preload: str,
    n_threads: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Start a scheduler and workers; yield a client of theirs, and their largest sizes so far."""
    # Dask loads it twice in a worker, and what is wrapped once too often counts double.
    once = "import sys\nif not hasattr(sys, 'is_preloaded'):\n    sys.is_preloaded = True\n"
    (folder / "preload.py").write_text(once + textwrap.indent(preload, "    "))
    keys = {
        f"DASK_{k.replace('.', '__').replace('-', '_').upper()}": str(v)
        for k, v in CONFIG.items()
        if "preload" not in k and "pre-spawn" not in k
    }
    variables = {
        **os.environ,
        **(environment or {}),
        **WORKER_ENVIRONMENT,
        **keys,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--scheduler-file",
        str(folder / "scheduler.json"),
        "--no-dashboard",
    ]
    quiet = {"env": variables, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, **quiet)]  # type: ignore[call-overload]
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        "--scheduler-file",
        str(folder / "scheduler.json"),
        "--nthreads",
        str(n_threads),
        "--memory-limit",
        "0",
        "--no-dashboard",
        "--nworkers",
        str(n_workers),
        "--preload",
        str(folder / "preload.py"),
        "--local-directory",
        str(folder),
    ]
    processes.append(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
    sizes: dict[str, Any] = {"scheduler": 0, "client": 0, "over_time": []}
    stopped = threading.Event()

    def watch() -> None:
        started = time.monotonic()
        while not stopped.wait(1.0):
            for name, pid in (("scheduler", processes[0].pid), ("client", os.getpid())):
                sizes[name] = max(sizes[name], psutil.Process(pid).memory_info().rss)
            now = [psutil.Process(pid).memory_info().rss for pid in (processes[0].pid, os.getpid())]
            sizes["over_time"].append((round(time.monotonic() - started), *now))

    from distributed import Client

    try:
        with Client(scheduler_file=str(folder / "scheduler.json"), timeout=60) as client:
            client.wait_for_workers(n_workers, timeout=300)
            threading.Thread(target=watch, daemon=True).start()
            yield {"client": client, "sizes": sizes}
            stopped.set()
    finally:
        stopped.set()
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _mb(n: float) -> int:
    return round(n / 1e6)


def measure_tasks(n_per_axis: int, outputs: str) -> dict[str, Any]:
    """Run empty tasks through scheduler and journal, then ask whether all is done.

    Each stage has the cube of ``n_per_axis`` of them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = tuple(-(-n_per_axis * 16 // c) for c in CHUNK_SHAPE)
        source = write_volume(folder / "volume.zarr", grid)
        # Exactly so many blocks: the array is cut to size, its chunks stay as they are.
        array = zarr.open_array(source / "0", mode="r+")
        array.resize((n_per_axis * 16,) * 3)
        options = {
            "model": "starter",
            "engine": "torch",
            "threads": 1,
            "block": "16,16,16",
            "outputs": outputs,
            "overlap": 0,
        }
        settings = parse_settings(options)
        target = str(folder / "out.zarr")
        started = time.perf_counter()
        [(plan, _)] = plan_runs(str(source), target, settings)
        plan_s = time.perf_counter() - started
        with cluster(folder, 2, EMPTY_TASKS) as running:
            base = psutil.Process().memory_info().rss
            started = time.perf_counter()
            result = segment(str(source), target, settings, client=running["client"])
            wall_s = time.perf_counter() - started
            sizes = running["sizes"]
        assert result.status == "done", result
        started = time.perf_counter()
        assert segment(str(source), target, settings).already_done
        again_s = time.perf_counter() - started
        segments = list((folder / "out.zarr.run/megaseg/journal").iterdir())
    n_tasks = sum(stage.n_tasks for stage in plan.stages)
    third = len(sizes["over_time"]) // 3
    return {
        "stages": {stage.name: stage.n_tasks for stage in plan.stages},
        "tasks": n_tasks,
        "wall_s": round(wall_s, 1),
        "tasks_per_s": round(n_tasks / wall_s),
        "plan_s": round(plan_s, 2),
        "already_done_s": round(again_s, 2),
        "client_mb": {"before": _mb(base), "peak": _mb(sizes["client"])},
        "scheduler_peak_mb": _mb(sizes["scheduler"]),
        "after_a_third_mb": [_mb(n) for n in sizes["over_time"][third][1:]],
        "at_the_end_mb": [_mb(n) for n in sizes["over_time"][-1][1:]],
        "journal_segments": len(segments),
        "journal_mb": _size_mb(segments),
    }


def _size_mb(segments: list[Path]) -> int | None:
    if not segments[0].exists():
        return None
    return _mb(sum(segment.stat().st_size for segment in segments))


def measure_volume(
    grid_shape: tuple[int, ...],
    memory: str,
    n_workers: int = 1,
    dtype: str = "uint16",
    **options: Any,
) -> dict[str, Any]:
    """Segment a large volume with an empty engine within a memory budget.

    Its peaks are compared with the projection.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_volume(folder / "volume.zarr", grid_shape, dtype)
        # An engine that does nothing gives the image itself: at a middling score it is noise, of 36
        # million fragments.
        fixed = {
            "model": "starter",
            "engine": "torch",
            "threads": 1,
            "memory": memory,
            "overlap": 0,
            "threshold": 0.95,
        }
        settings = parse_settings({**fixed, **options})
        target = str(folder / "out.zarr")
        [(plan, _)] = plan_runs(str(source), target, settings)
        with cluster(folder, n_workers, EMPTY_ENGINE) as running:
            started = time.perf_counter()
            result = segment(str(source), target, settings, client=running["client"])
            wall_s = time.perf_counter() - started
            sizes = running["sizes"]
        assert result.status == "done", result
        timings = Journal.read(plan).timings
        written = sum(p.stat().st_size for p in (folder / "out.zarr").rglob("*") if p.is_file())
    projected = {stage.name: plan.projected(stage) for stage in plan.stages}
    voxels = float(np.prod(plan.volume_shape))
    return {
        "shape": plan.volume_shape,
        "source_gb": round(voxels * np.dtype(dtype).itemsize / 1e9, 1),
        "memory_gb": plan.memory_bytes / 1e9,
        "workers": n_workers,
        "block_shape": plan.block_shape,
        "blocks": len(plan.block_grid()),
        "redundancy": summarize(plan)["redundancy"],
        "objects": result.n_objects,
        "wall_s": round(wall_s, 1),
        "mvoxels_per_s": round(voxels / wall_s / 1e6, 1),
        "written_gb": round(written / 1e9, 2),
        "stage_s": {stage: round(timing.seconds, 1) for stage, timing in timings.items()},
        "peak_gb": {stage: round(peak / 1e9, 3) for stage, peak in result.peak_bytes.items()},
        "projected_gb": {stage: round(peak / 1e9, 3) for stage, peak in projected.items()},
        "within": all(
            peak <= projected[stage] <= plan.memory_bytes
            for stage, peak in result.peak_bytes.items()
        ),
        "client_peak_mb": _mb(sizes["client"]),
        "scheduler_peak_mb": _mb(sizes["scheduler"]),
    }


def write_screen(folder: Path, n_fields: int, shape: tuple[int, ...] = (16, 64, 64)) -> Path:
    """Write a plate of so many equal small fields; their chunks are links to one file."""
    fields = [Field("A", str(1 + i // 10), str(i % 10), 0) for i in range(n_fields)]
    columns = tuple(str(1 + i) for i in range(-(-n_fields // 10)))
    write_plate(
        Location.of(folder),
        Plate("0.5", "screen", ("A",), columns, tuple(fields), (Acquisition(0),)),
        "0.5",
    )
    image = simulate(0, shape).image.astype(np.uint16)
    write_sample(Location.of(folder / fields[0].path), image, np.zeros(shape, np.uint16))
    first = folder / fields[0].path
    shutil.rmtree(first / "labels", ignore_errors=True)
    files = [p.relative_to(first) for p in first.rglob("*") if p.is_file()]
    for field in fields[1:]:
        for name in files:
            path = folder / field.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(first / name, path)
    return folder


def measure_fields(n_fields: int = 2000) -> dict[str, Any]:
    """Stream a plate of small fields through two workers with an empty engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_screen(folder / "screen.zarr", n_fields)
        target = str(folder / "out.zarr")
        settings = parse_settings(
            {
                "model": "starter",
                "engine": "torch",
                "threads": 1,
                "overlap": 0,
                "patch": "16,64,64",
                "outputs": "labels,scores,measurements",
            }
        )
        started = time.perf_counter()
        [(plan, _)] = plan_runs(str(source), target, settings)
        plan_s = time.perf_counter() - started
        times: list[float] = []
        with cluster(folder, 2, EMPTY_ENGINE) as running:
            started = time.perf_counter()
            result = segment(
                str(source),
                target,
                settings,
                client=running["client"],
                emit=lambda event: times.append(time.perf_counter()),
            )
            wall_s = time.perf_counter() - started
            sizes = running["sizes"]
        assert result.status == "done", result
    third = len(sizes["over_time"]) // 3
    return {
        "fields": n_fields,
        "field_shape": plan.volume_shape,
        "plan_s": round(plan_s, 1),
        "wall_s": round(wall_s, 1),
        "first_to_last_field_s": round(times[-2] - times[1], 1),
        "fields_per_s": round(n_fields / wall_s, 1),
        "worker_peak_mb": _mb(result.peak_bytes["volume"]),
        "projected_mb": _mb(plan.projected_bytes["volume"]),
        "scheduler_and_client_after_a_third_mb": [_mb(n) for n in sizes["over_time"][third][1:]],
        "scheduler_and_client_at_the_end_mb": [_mb(n) for n in sizes["over_time"][-1][1:]],
    }


def measure_plate() -> dict[str, Any]:
    """Time a plate of real nuclei, and its fields one by one.

    It has 2×3 wells × 2 fields × 3 timepoints × 2 channels.
    """
    nuclei = read_sample()[0]
    shape = (24, 64, 72)
    rng = np.random.default_rng(0)
    fields = [Field(row, column, name, 0) for row, column, name in product("AB", "123", "01")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plate = Plate(
            "0.5", "screen", ("A", "B"), ("1", "2", "3"), tuple(fields), (Acquisition(0),)
        )
        write_plate(Location.of(folder / "screen.zarr"), plate, "0.5")
        for field in fields:
            crops = [_random_crop(nuclei, shape, rng) for _ in range(6)]
            write_series(folder / "screen.zarr" / field.path, np.stack(crops).reshape(3, 2, *shape))
        settings = parse_settings(
            {
                "model": "starter",
                "threads": 1,
                "channel": "0,1",
                "patch": "32,64,64",
                "outputs": "labels,scores,measurements",
            }
        )

        def timed(source: Path, target: str) -> float:
            started = time.perf_counter()
            result = segment(str(source), str(folder / target), settings, client=running["client"])
            assert result.status == "done"
            return time.perf_counter() - started

        paces = {}
        for n in (1, 2):
            with cluster(folder, n, "") as running:
                # Workers open the network: several volumes, so that each of them does.
                timed(folder / "screen.zarr" / fields[0].path, f"first-{n}.zarr")
                plate_s = timed(folder / "screen.zarr", f"plate-{n}.zarr")
                workers = "1 worker" if n == 1 else f"{n} workers"
                paces[workers] = round(len(fields) * 6 / plate_s, 2)
                if n == 2:
                    alone_s = [
                        timed(folder / "screen.zarr" / field.path, f"{i}.zarr")
                        for i, field in enumerate(fields)
                    ]
    return {
        "volumes": len(fields) * 6,
        "volume_shape": shape,
        "volumes_per_s": paces,
        "plate_s": round(plate_s, 1),
        "sum_of_single_runs_s": round(sum(alone_s), 1),
        "ratio": round(plate_s / sum(alone_s), 2),
    }


def _random_crop(image: np.ndarray, shape: tuple[int, ...], rng: Any) -> np.ndarray:
    start = [int(rng.integers(n - m + 1)) for n, m in zip(image.shape, shape, strict=True)]
    return image[tuple(slice(first, first + m) for first, m in zip(start, shape, strict=True))]


def write_series(path: Path, image: Any) -> None:
    """Write an image of ``(t, c, z, y, x)``."""
    group = zarr.open_group(path, mode="w")
    axes = "tczyx"
    array = group.create_array(
        "0",
        shape=image.shape,
        chunks=(1, 1, *image.shape[2:]),
        dtype=image.dtype,
        dimension_names=list(axes),
    )
    array[...] = image
    types = {"t": "time", "c": "channel"}
    listed = [{"name": axis, "type": types.get(axis, "space")} for axis in axes]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * 5}]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": listed, "datasets": datasets}]}


def keep_case(name: str, result: dict[str, Any]) -> None:
    """Put one case among the kept results, with the machine as it was then."""
    kept = json.loads((RESULTS / "scale.json").read_text())
    load = [round(n, 1) for n in os.getloadavg()]
    keep("scale", {**kept, "machine": describe(), name: {"load_after": load, **result}})


def measure_overhead() -> dict[str, Any]:
    """Compare the staged path with the one-task path on one volume, with an empty engine."""
    one = measure_volume((1, 4, 4), "8GB", block="64,1024,1024")
    staged = measure_volume((1, 4, 4), "8GB", block="64,512,512")
    return {"one_task": one, "staged": staged, "ratio": round(staged["wall_s"] / one["wall_s"], 2)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "all_stages": lambda: measure_tasks(47, "labels,scores"),
    "one_stage": lambda: measure_tasks(100, "scores"),
    "fields": measure_fields,
    "plate": measure_plate,
    "overhead": measure_overhead,
    "volume_8gb": lambda: measure_volume((16, 8, 8), "2GB"),
    # An hour, and 70 GB of disk at times: only by name.
    "volume_64gb": lambda: measure_volume((128, 8, 8), "4GB", 2),
}


def main() -> None:
    """Run the cases that are named, or all but the largest, and keep each."""
    for name in sys.argv[1:] or list(CASES)[:-1]:
        keep_case(name, CASES[name]())


if __name__ == "__main__":
    main()
