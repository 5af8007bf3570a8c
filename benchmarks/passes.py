"""One window on one thread, in processor seconds: MONAI eager and each engine, and the peak beside.

    python -m benchmarks.passes

Wall time says little on a machine that others use too; the processor seconds of one thread do.
Each case is a process of its own: the instructions of kernels are chosen once in a process. The
peak is that of a large matrix product of the same library in the same process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.field import write_untrained
from benchmarks.machine import describe, keep
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.engine import EngineSpec, open_apart
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models import NetworkSpec
from megaseg_dask.models.registry import load

# By network: a window of MegaSeg_v1 takes ten times as long.
PATCHES = {"light": (64, 128, 128), "MegaSeg_v1": (32, 64, 64)}
N_PASSES = 2
MATRIX = 1536
# Multiplications and additions of the convolutions of such a window.
GFLOP = {"light": 26.6, "MegaSeg_v1": 59.2}
CASES = {
    "MONAI eager": ("monai", "fp32", ""),
    "torch": ("torch", "fp32", ""),
    "openvino": ("openvino", "fp32", ""),
    "openvino, kernels of AVX2": ("openvino", "fp32", "AVX2"),
    "openvino, bf16": ("openvino", "bf16", ""),
}


def measure() -> dict[str, Any]:
    """Return seconds and peak of each case, by network."""
    found: dict[str, Any] = {"machine": describe(), "patches": PATCHES, "gflop": GFLOP}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "light": "starter",
            "MegaSeg_v1": str(write_untrained(Path(folder), NetworkSpec().filters)),
        }
        for network, model in models.items():
            found[network] = {
                name: _in_a_process(network, model, *case) for name, case in CASES.items()
            }
    return found


def _in_a_process(
    network: str, model: str, engine: str, precision: str, instructions: str
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.passes", "--case"]
    command += [network, model, engine, precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if instructions:
        environment["ONEDNN_MAX_CPU_ISA"] = instructions
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def run_case(network: str, model: str, engine: str, precision: str) -> dict[str, float]:
    """Return the least processor seconds of a window, and the peak before and after."""
    patch = np.random.default_rng(0).standard_normal((1, 1, *PATCHES[network])).astype(np.float32)
    product = _product_of_openvino if engine == "openvino" else _product_of_torch
    peaks = [product()]
    if engine == "monai":
        seconds = least_s(_monai_pass(model, patch))
    else:
        path, bundle = load(model)
        spec = EngineSpec(engine, "cpu", precision, 1)  # type: ignore[arg-type]
        with open_apart(ModelRef.of({str(path): bundle}), spec) as opened:
            seconds = least_s(_pass(opened, patch))
    peaks.append(product())
    return {"cpu_s": round(seconds, 3), "peak_gflop_per_s": round(max(peaks), 1)}


def _pass(engine: Engine, patch: np.ndarray) -> Callable[[], object]:
    return lambda: engine(patch)


def _monai_pass(model: str, patch: np.ndarray) -> Callable[[], object]:
    import torch
    from monai.inferers import sliding_window_inference

    from megaseg_dask.models.build import build_network

    torch.set_num_threads(1)
    network = build_network(load(model)[1])
    image = torch.from_numpy(patch)
    window = patch.shape[2:]

    def run() -> object:
        with torch.inference_mode():
            return sliding_window_inference(image, window, 1, network, 0.25, mode="gaussian")

    return run


def least_s(work: Callable[[], object]) -> float:
    """Return the processor seconds of some work, all threads, when it is warm."""
    work()
    seconds = []
    for _ in range(N_PASSES):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def _product_of_torch() -> float:
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn((MATRIX, MATRIX))
    return 2 * MATRIX**3 / least_s(lambda: matrix @ matrix) / 1e9


def _product_of_openvino() -> float:
    import openvino
    from openvino import opset13 as ops

    shape = [MATRIX, MATRIX]
    inputs = [ops.parameter(shape, np.float32) for _ in "ab"]
    model = openvino.Model([ops.matmul(*inputs, False, False)], inputs)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return 2 * MATRIX**3 / least_s(lambda: request.infer({0: matrix, 1: matrix})) / 1e9


def main() -> None:
    """Measure all cases and keep the result, or measure one for the process that asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case)))
        return
    keep("passes", measure())


if __name__ == "__main__":
    main()
