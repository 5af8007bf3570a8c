"""The acceptance run of a GPU in one command: ``python -m benchmarks.gpu OUT``.

Each figure is a line of JSON in ``OUT/gpu.jsonl`` as soon as it is known, so that a run
that is stopped has told what it could. A step begins only if the time that is left may
do for it. ``--tiny`` runs all of it on a CPU but what asks a device for its memory.

Measured are what the card reaches in a large product and in a copy; forward passes beside
MONAI's own on the same card; kernels; fields, cold and steady, with their agreement with
float32; whether bits depend on the place in a batch, on blocks and on threads; what happens
without memory; and fields per second from Zarr to Zarr on local workers.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.field import PUBLISHED_SHAPE, write_untrained
from benchmarks.machine import describe
from benchmarks.scale import write_series
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import Normalization
from megaseg_dask.errors import MegasegError
from megaseg_dask.events import Event, Progress
from megaseg_dask.inference import gpu, pytorch
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.pytorch import DeviceEngine, _launch
from megaseg_dask.messages import version_of
from megaseg_dask.models import Bundle, NetworkSpec
from megaseg_dask.models.build import build_network
from megaseg_dask.models.cytodl.transforms import Step
from megaseg_dask.models.registry import load
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from starter.simulation import simulate

GB = 1e9
# A process of its own may take so long, and ends so long before the run has to.
_ASK_S = 90.0
_MARGIN_S = 5.0


@dataclass(frozen=True)
class Size:
    """How large everything is, and how often it is timed."""

    device: str
    field: Shape
    tile: Shape
    patch: Shape
    filters: tuple[int, ...]
    matmul: int
    copy_bytes: int
    n_fields: int
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    n_times: int


FULL = Size(
    device="cuda",
    field=PUBLISHED_SHAPE,
    tile=(33, 156, 231),
    patch=(64, 128, 128),
    filters=NetworkSpec().filters,
    matmul=8192,
    copy_bytes=2**31,
    n_fields=16,
    precisions=("fp16", "bf16"),
    batches=(1, 4, 8),
    n_times=5,
)
TINY = Size(
    device="cpu",
    field=(16, 40, 48),
    tile=(16, 20, 48),
    patch=(16, 32, 32),
    filters=(4, 8, 8, 8, 8),
    matmul=128,
    copy_bytes=2**20,
    n_fields=2,
    precisions=("bf16",),
    batches=(1, 2),
    n_times=1,
)
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Limits of a GPU's memory, in GB, under which a batch of eight patches is tried.
LIMITS_GB = (40.0, 8.0, 4.0, 2.0, 1.2)

# By what else cuDNN may choose its kernels: PyTorch's flags, and variables of a process. The choice
# is kept in a process, so each is measured in one of its own.
CHOICES: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "trials of kernels": ({"benchmark": True}, {}),
    "the second heuristic": ({}, {"TORCH_CUDNN_USE_HEURISTIC_MODE_B": "1"}),
}

# What a job of its own process shows.
JOBS = {
    "local": "workers of this machine, of dask-cuda where it is installed",
    "plain": "workers of this machine, without dask-cuda",
    "shared": "two workers on one GPU, which are refused",
}


class Acceptance:
    """One run: its size, its deadline, and where its lines go."""

    def __init__(self, out: Path, size: Size, seconds: float) -> None:
        """Begin the clock."""
        out.mkdir(parents=True, exist_ok=True)
        self.size = size
        self._file = out / "gpu.jsonl"
        self._began = time.monotonic()
        self._seconds = seconds
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)

    # -- lines and time

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def say(self, step: str, **found: object) -> None:
        """Write a line of figures, and show it."""
        line = json.dumps({"step": step, "at_s": round(self.elapsed_s, 1), **found}, default=str)
        print(line[:400], flush=True)
        with self._file.open("a") as file:
            file.write(line + "\n")

    def run(self, only: str = "") -> None:
        """Run all steps that fit the time; one that fails is a line, and the others go on."""
        for name, (step, needed_s) in STEPS.items():
            if only and name not in only.split(","):
                continue
            if self._seconds - self.elapsed_s < needed_s:
                self.say(name, skipped="no time is left")
                continue
            started = time.monotonic()
            try:
                step(self)
            except Exception as error:
                self.say(name, failed=f"{type(error).__name__}: {error}"[:500])
                self.say(name, where=traceback.format_exc()[-800:])
            if self.on_gpu:
                torch.cuda.empty_cache()
            self.say(name, took_s=round(time.monotonic() - started, 1))
        self._folder.cleanup()

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to ask."""
        return self.size.device == "cuda"

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, the device's included."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def quickest(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, when it is warm."""
        work()
        return min(self.timed(work) for _ in range(self.size.n_times))

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """Return the most memory of the GPU since the last time that this was asked."""
        if not self.on_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return round(peak / GB, 3)

    def ask(self, *options: str, **environment: str) -> dict[str, Any]:
        """Return what a process of its own finds, or how it failed."""
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        if not self.on_gpu:
            command.append("--tiny")
        # One that hangs leaves time for the steps after it.
        left_s = min(self._seconds - self.elapsed_s - _MARGIN_S, _ASK_S)
        if left_s <= 0:
            return {"stopped": "no time is left"}
        try:
            ended = subprocess.run(
                command,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=left_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"stopped": f"it took more than {left_s:.0f} s"}
        if ended.returncode:
            return {"failed": ended.stderr[-800:]}
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    # -- what is measured with

    @cached_property
    def image(self) -> np.ndarray:
        """One field ``(c, z, y, x)``: a small simulation and its mirror images."""
        tile = simulate(0, self.size.tile).image
        for axis, extent in enumerate(self.size.field):
            while tile.shape[axis] < extent:
                tile = np.concatenate([tile, np.flip(tile, axis)], axis)
        return np.ascontiguousarray(tile[tuple(map(slice, self.size.field))])[None]

    @cached_property
    def models(self) -> dict[str, str]:
        """MegaSeg_v1's network without its weights, and the light network, trained."""
        return {"v1": str(write_untrained(self.folder, self.size.filters)), "light": "starter"}

    def bundle(self, model: str) -> Bundle:
        """Return one of the two networks."""
        return load(self.models[model])[1]

    def engine(self, model: str, precision: str) -> DeviceEngine:
        """Return an engine whose blocks stay on the device."""
        spec = EngineSpec("torch", self.size.device, precision, threads=1)
        return DeviceEngine(self.bundle(model), spec)

    def block(self, overlap: float, batch: int, core: Box | None = None) -> Block:
        """Return a part of the field, or all of it, to be predicted."""
        grid = PatchGrid(self.size.field, self.size.patch, (overlap,) * 3)
        core = core or Box.of(self.size.field)
        zscore = Normalization(float(self.image.mean()), float(self.image.std()))
        values = self.image[:, *grid.read_box(core).slices]
        prepare = Preparation((Step("zscore"),), (zscore,))
        return Block(core, values, Patches(grid, batch=batch), prepare)

    def logits(self, engine: DeviceEngine, block: Block) -> torch.Tensor:
        """Return the blended logits of a block, where they are."""
        (output,) = engine.predict_block(block)
        return output.blended


def agreement(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Return how far logits are from those in float32, and Dice of the masks."""
    found = found.double()
    exact = exact.double()
    mask = found > 0
    expected = exact > 0
    total = max(int(mask.sum()) + int(expected.sum()), 1)
    return {
        "relative_l2": float((found - exact).norm() / exact.norm()),
        "dice": round(2 * int((mask & expected).sum()) / total, 6),
        "largest_difference": float((found.sigmoid() - exact.sigmoid()).abs().max()),
    }


# -- steps


def facts(run: Acceptance) -> None:
    """Say what this machine is."""
    packages = ("triton", "dask", "dask-cuda", "nvidia-ml-py", "megaseg-dask")
    run.say(
        "facts",
        machine=describe(),
        versions={name: version_of(name) for name in packages},
        cudnn=torch.backends.cudnn.version(),
        device=asdict(gpu.open_device("fp16")),
        installed=[asdict(device) for device in gpu.installed_devices()],
        architectures=torch.cuda.get_arch_list(),
    )


def ceilings(run: Acceptance) -> None:
    """Measure what the card reaches in a large product, and in a copy within its memory."""
    n = run.size.matmul
    for name in run.size.precisions:
        matrix = torch.randn((n, n), device=run.size.device, dtype=HALVES[name])
        seconds = run.quickest(lambda m=matrix: m @ m)
        run.say("ceilings", matmul=name, tflop_per_s=round(2 * n**3 / seconds / 1e12, 3))
    source = torch.zeros(run.size.copy_bytes, dtype=torch.uint8, device=run.size.device)
    target = torch.empty_like(source)
    seconds = run.quickest(lambda: target.copy_(source))
    run.say("ceilings", copy_tb_per_s=round(2 * run.size.copy_bytes / seconds / 1e12, 4))


def forward(run: Acceptance) -> None:
    """Time forward passes of patches that are on the device, beside the network as MONAI has it."""
    for model, batch in product(run.models, run.size.batches):
        bundle = run.bundle(model)
        shape = (batch, bundle.network.in_channels, *run.size.patch)
        precisions = ("fp32", *run.size.precisions) if batch == 1 else run.size.precisions
        for precision in precisions:
            work = run.engine(model, precision).prepare_pass(shape)
            run.peak_gb()
            ms = round(1e3 * run.quickest(work) / batch, 3)
            run.say(
                "forward",
                network=model,
                batch=batch,
                precision=precision,
                ms_a_patch=ms,
                peak_gb=run.peak_gb(),
            )
        half = run.size.precisions[0]
        ms = round(1e3 * run.quickest(_monai_pass(run, bundle, shape, half)) / batch, 3)
        run.say("forward", network=f"{model}, MONAI", batch=batch, precision=half, ms_a_patch=ms)


def _monai_pass(
    run: Acceptance, bundle: Bundle, shape: tuple[int, ...], precision: str
) -> Callable[[], object]:
    network = build_network(bundle).to(run.size.device)
    patches = torch.randn(shape, device=run.size.device)

    def work() -> object:
        with torch.inference_mode(), torch.autocast(run.size.device, HALVES[precision]):
            return network(patches)

    return work


def choices(run: Acceptance) -> None:
    """Time forward passes with other choices of cuDNN's kernels."""
    for name, (_, environment) in CHOICES.items():
        options = [str(run.folder), "--choice", name, "--model", run.models["v1"]]
        run.say("choices", choice=name, **run.ask(*options, **environment))


def run_choice(name: str, model: str, size: Size) -> dict[str, Any]:
    """Return the time of a patch with another choice of kernels."""
    flags, _ = CHOICES[name]
    pytorch._CUDNN_FLAGS.update(flags)
    precision = size.precisions[0]
    bundle = load(model)[1]
    engine = DeviceEngine(bundle, EngineSpec("torch", size.device, precision, threads=1))
    batch = size.batches[-1]
    work = engine.prepare_pass((batch, bundle.network.in_channels, *size.patch))
    work()
    seconds = []
    for _ in range(size.n_times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    ms = round(1e3 * min(seconds) / batch, 3)
    return {"precision": precision, "batch": batch, "ms_a_patch": ms}


def kernels(run: Acceptance) -> None:
    """List what takes longest: kernels alone, since operators carry the time of theirs too."""
    for model in run.models:
        channels = run.bundle(model).network.in_channels
        shape = (run.size.batches[-1], channels, *run.size.patch)
        work = run.engine(model, run.size.precisions[0]).prepare_pass(shape)
        work()
        activities = [ProfilerActivity.CPU]
        where = DeviceType.CPU
        if run.on_gpu:
            activities.append(ProfilerActivity.CUDA)
            where = DeviceType.CUDA
            recorded = _profiled(work, activities)
        else:
            # Of a processor only what the thread does is recorded that asks for it.
            recorded = _launch(_profiled, work.args[0], activities)
        rows = [row for row in recorded.key_averages() if row.device_type == where]
        rows.sort(key=lambda row: _self_us(row, run), reverse=True)
        total = sum(_self_us(row, run) for row in rows) or 1.0
        run.say(
            "kernels",
            network=model,
            batch=shape[0],
            total_ms=round(total / 1e3, 3),
            launches=sum(row.count for row in rows),
            top=[(r.key[:90], r.count, round(_self_us(r, run) / total, 3)) for r in rows[:12]],
        )


def _profiled(work: Callable[[], object], activities: list[ProfilerActivity]) -> profile:
    """Return the record of some work."""
    with profile(activities=activities) as recorded:
        work()
    return recorded


def _self_us(row: Any, run: Acceptance) -> float:
    return row.self_device_time_total if run.on_gpu else row.self_cpu_time_total


def fields(run: Acceptance) -> None:
    """Predict whole fields from host to host: cold, steady, and compared with float32."""
    batch = run.size.batches[-1]
    for model, overlap in product(run.models, (0.0, 0.25)):
        block = run.block(overlap, batch)
        exact = run.logits(run.engine(model, "fp32"), run.block(overlap, 1))
        for precision in run.size.precisions:
            engine = run.engine(model, precision)
            run.peak_gb()
            cold_s = run.timed(lambda e=engine, b=block: run.logits(e, b))
            first = run.logits(engine, block)

            def work(engine: DeviceEngine = engine, block: Block = block) -> None:
                (output,) = engine.predict_block(block)
                output.scores("uint8")
                output.mask(0.5)

            steady_s = run.quickest(work)
            run.say(
                "fields",
                network=model,
                overlap=overlap,
                precision=precision,
                batch=engine.largest_batch or batch,
                windows=len(block.patches.grid),
                cold_s=round(cold_s, 3),
                steady_s=round(steady_s, 4),
                peak_gb=run.peak_gb(),
                same_bits_again=torch.equal(run.logits(engine, block), first),
                **agreement(first, exact),
            )


def bits(run: Acceptance) -> None:
    """Compare bits: of the places in a batch, of blocks with the whole, and of three threads."""
    batch = run.size.batches[-1]
    precision = run.size.precisions[0]
    engine = run.engine("light", precision)
    patch = torch.randn((1, 1, *run.size.patch), device=run.size.device)
    with torch.inference_mode():
        slots = engine._predict(patch.expand(batch, -1, -1, -1, -1).contiguous())
    whole = run.logits(engine, run.block(0.25, batch))
    _, height, width = run.size.field
    halves = BlockGrid(run.size.field, (run.size.field[0], height // 2, width // 2))
    n_differ = 0
    for core in halves:
        part = run.logits(engine, run.block(0.25, batch, core))
        n_differ += int((part != whole[core.slices]).sum())
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(run.logits(engine, run.block(0.25, batch))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        thread.join()
    run.say(
        "bits",
        precision=precision,
        same_in_each_slot=bool((slots == slots[:1]).all()),
        voxels_that_blocks_change=n_differ,
        of_voxels=math.prod(run.size.field),
        same_in_threads=[torch.equal(each, whole) for each in found],
    )


def out_of_memory(run: Acceptance) -> None:
    """Say under which limits a batch shrinks, and how the device tells that it is full."""
    if not run.on_gpu:
        run.say("out of memory", skipped="a CPU has no such limit")
        return
    _, total = torch.cuda.mem_get_info()
    shape = (run.size.batches[-1], 1, *run.size.patch)
    for limit_gb in LIMITS_GB:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(limit_gb * GB / total, 1.0))
        try:
            engine = run.engine("v1", run.size.precisions[0])
            engine.prepare_pass(shape)()
            run.say("out of memory", limit_gb=limit_gb, batch=engine.largest_batch or shape[0])
        except (RuntimeError, MegasegError) as error:
            cause = error.__cause__ or error
            run.say(
                "out of memory",
                limit_gb=limit_gb,
                error=type(cause).__name__,
                text=str(cause)[:200],
                is_known=gpu.is_out_of_memory(cause),
            )
    torch.cuda.set_per_process_memory_fraction(1.0)


def monai(run: Acceptance) -> None:
    """Time MONAI's sliding window on the same card, field and network."""
    network = build_network(run.bundle("v1")).to(run.size.device)
    image = torch.from_numpy(self_scaled(run.image)).to(run.size.device)[None]
    for precision in (None, run.size.precisions[0]):
        half = HALVES.get(precision or "", torch.float32)

        def work(half: torch.dtype = half) -> None:
            enabled = half != torch.float32
            with torch.inference_mode(), torch.autocast(run.size.device, half, enabled=enabled):
                sliding_window_inference(image, run.size.patch, 4, network, 0.0, mode="gaussian")

        run.peak_gb()
        seconds = run.quickest(work)
        name = precision or "fp32"
        run.say("monai", precision=name, field_s=round(seconds, 3), peak_gb=run.peak_gb())


def self_scaled(image: np.ndarray) -> np.ndarray:
    """Return the z-scores of an image, float32."""
    return ((image - image.mean()) / image.std()).astype(np.float32)


def jobs(run: Acceptance) -> None:
    """Segment a timelapse from Zarr to Zarr, each kind in a process of its own."""
    source = run.folder / "series.zarr"
    write_series(source, np.broadcast_to(run.image, (run.size.n_fields, 1, *run.size.field)))
    for kind in JOBS:
        if run._seconds - run.elapsed_s < _JOB_S:
            run.say("jobs", kind=kind, skipped="no time is left")
            continue
        options = [str(run.folder / kind), "--job", kind, "--source", str(source)]
        found = run.ask(*options, "--model", run.models["v1"])
        run.say("jobs", kind=kind, what=JOBS[kind], **found)


def run_job(kind: str, source: str, model: str, out: Path, size: Size) -> dict[str, Any]:
    """Return what one job shows: fields per second, between the first and the last one.

    A job whose fields all end at one moment has no such rate.
    """
    if kind == "plain":
        # As where it is not installed.
        sys.modules["dask_cuda"] = None  # type: ignore[assignment]
    settings = {"model": model, "device": size.device, "engine": "torch", "patch": size.patch}
    settings |= {"overlap": 0.0, "batch": size.batches[-1]}
    done: list[float] = []
    told: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Progress):
            done.extend([time.perf_counter()] * (event.n_done - len(done)))
        elif event.kind in ("worker", "notice"):
            told.append(str(event.to_json()))

    started = time.perf_counter()
    with watched(size) as load, contextlib.ExitStack() as stack:
        client = None
        if kind == "shared":
            client = stack.enter_context(two_workers())
        else:
            settings["workers"] = 1
        try:
            target = str(out / "out.zarr")
            result = segment(source, target, parse_settings(settings), client=client, emit=note)
            found: dict[str, Any] = {"status": result.status, "objects": result.n_objects}
            found["peak_gb"] = {k: v / GB for k, v in result.device_peak_bytes.items()}
        except MegasegError as error:
            found = {"refused": str(error)}
    wall_s = time.perf_counter() - started
    gaps = [later - earlier for earlier, later in pairwise(done)]
    found |= {
        "wall_s": round(wall_s, 1),
        "gaps_s": [round(gap, 2) for gap in gaps],
        "told": told[:6],
        "dask_cuda": is_used(),
    }
    if sum(gaps) > 0:
        found["fields_per_s"] = round(len(gaps) / sum(gaps), 3)
    return {**found, **load}


def is_used() -> bool:
    """Return whether local workers are those of dask-cuda."""
    return bool(sys.modules.get("dask_cuda")) and find_spec("dask_cuda") is not None


@contextlib.contextmanager
def two_workers() -> Iterator[Any]:
    """Yield a client of two workers that see the same devices."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 3, "memory_limit": 0}
    quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options, **quiet) as cluster, Client(cluster) as client:
        yield client


@contextlib.contextmanager
def watched(size: Size) -> Iterator[dict[str, float]]:
    """Fill in how busy the GPU was, and how full, by its driver, each tenth of a second."""
    found: dict[str, float] = {}
    if size.device != "cuda" or find_spec("pynvml") is None:
        yield found
        return
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    is_over = threading.Event()
    busy: list[int] = []
    used: list[int] = []

    def watch() -> None:
        while not is_over.wait(0.1):
            busy.append(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)
            used.append(pynvml.nvmlDeviceGetMemoryInfo(device).used)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()
        found["gpu_busy_percent"] = round(sum(busy) / max(len(busy), 1), 1)
        found["gpu_used_gb"] = round(max(used, default=0) / GB, 2)


_JOB_S = 40.0
# In order of what is wanted first, each with the seconds that it may take.
STEPS: dict[str, tuple[Callable[[Acceptance], None], float]] = {
    "facts": (facts, 5),
    "ceilings": (ceilings, 5),
    "forward": (forward, 40),
    "kernels": (kernels, 15),
    "fields": (fields, 60),
    "bits": (bits, 15),
    "jobs": (jobs, _JOB_S),
    "out of memory": (out_of_memory, 15),
    "monai": (monai, 15),
    "choices": (choices, 40),
}


def main() -> None:
    """Run the steps, or one job for the run that asks for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for the lines of results")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in a minute")
    parser.add_argument("--seconds", type=float, default=440.0, help="what the run may take")
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--job", choices=tuple(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--choice", choices=tuple(CHOICES), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.job:
        print(json.dumps(run_job(options.job, options.source, options.model, options.out, size)))
        return
    if options.choice:
        print(json.dumps(run_choice(options.choice, options.model, size)))
        return
    Acceptance(options.out, size, options.seconds).run(options.only)


if __name__ == "__main__":
    main()
