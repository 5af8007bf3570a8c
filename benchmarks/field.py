"""One field: each engine against MONAI eager, which is what cyto-dl runs.

The network and the windows are the same.

Ours is the whole job, from Zarr to scores, labels and pyramid, with the
options' defaults; MONAI's and nnU-Net's are the forward passes and blending
alone, in a process with the system's defaults. Beside the wall time stand
processor seconds, of all processes: on a machine that others use too, only
those compare. MONAI runs first and last, each of ours twice, and the quicker
time counts. How far scores are apart is asked of a run of its own, which
keeps them as float32. nnU-Net is left out where nnunetv2 is not installed.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet
from monai.transforms import NormalizeIntensity

from benchmarks.machine import describe, keep
from benchmarks.scale import cluster
from megaseg_dask.algorithms.geometry import PatchGrid
from megaseg_dask.models import NetworkSpec
from megaseg_dask.models.build import build_network
from megaseg_dask.models.registry import load
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location, open_array
from megaseg_dask.tools.sample import write_sample
from starter.simulation import simulate

PUBLISHED_SHAPE = (65, 624, 924)


@dataclass(frozen=True)
class Case:
    """Options of a run, and what its worker finds in its environment."""

    options: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "torch": Case({"engine": "torch"}),
    "openvino": Case({"engine": "openvino"}),
    "openvino, kernels of AVX2": Case({"engine": "openvino"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "openvino, bf16": Case({"engine": "openvino", "precision": "bf16"}),
    "openvino, patch auto": Case({"engine": "openvino", "patch": "auto"}),
    "openvino, bf16, patch auto": Case(
        {"engine": "openvino", "precision": "bf16", "patch": "auto"}
    ),
}

# Writes the seconds of each forward pass of a worker to a file.
TIMED_ENGINE = """
import time
from megaseg_dask.inference.openvino import OpenVinoEngine
from megaseg_dask.inference.pytorch import TorchEngine

def timed(cls):
    predict = cls.__call__

    def __call__(self, patches):
        began = time.perf_counter()
        logits = predict(self, patches)
        with open(LOG, "a") as file:
            file.write(f"{time.perf_counter() - began}\\n")
        return logits

    cls.__call__ = __call__

timed(OpenVinoEngine)
timed(TorchEngine)
"""


def measure(
    shape: tuple[int, ...] = PUBLISHED_SHAPE,
    model: str = "starter",
    cases: Collection[str] = tuple(CASES),
) -> dict[str, Any]:
    """Return seconds of MONAI and of each case, their ratios, and how far the scores are apart."""
    from megaseg_dask.inference.openvino import has_bfloat16

    machine = describe()
    made = simulate(0, shape, "nuclei", difficulty=0.2)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "field.zarr"
        write_sample(Location.of(source), made.image, made.mask.astype(np.uint16))
        [(plan, _)] = plan_runs(
            str(source), f"{folder}/none.zarr", parse_settings({"model": model})
        )
        monai, expected = _run_monai(made.image, model, plan.patch_grid)
        nnunet = _run_nnunet(made.image, model, plan.patch_grid, expected)
        for name in cases:
            case = CASES[name]
            if case.options.get("precision") != "bf16" or has_bfloat16():
                found[name] = _run(source, Path(folder) / name, case, model, expected)
        monai_s, monai_cpu_s = min(monai, _run_monai(made.image, model, plan.patch_grid)[0])
    for result in found.values():
        result["ratio"] = round(monai_s / result["wall_s"], 2)
        result["ratio_cpu"] = round(monai_cpu_s / result["cpu_s"], 2)
    return {
        "machine": machine,
        "shape": shape,
        "model": Path(model).name,
        "windows": len(plan.patch_grid),
        "monai_s": round(monai_s, 1),
        "monai_cpu_s": round(monai_cpu_s, 1),
        "nnunet": nnunet,
        "ours": found,
    }


def _run_monai(
    image: np.ndarray, model: str, grid: PatchGrid
) -> tuple[tuple[float, float], np.ndarray]:
    """Return wall and processor seconds, and the scores."""
    before = cpu_s()
    wall_s, scores = predict_by_monai(image, model, grid.patch_shape, grid.overlap)
    return (wall_s, cpu_s() - before), scores


def _run(
    source: Path, targets: Path, case: Case, model: str, expected: np.ndarray
) -> dict[str, Any]:
    options = {"model": model, **case.options}
    exact = f"{targets}-float32.zarr"
    log = Path(f"{targets}.passes")
    folder = Path(f"{targets}.workers")
    folder.mkdir()
    preload = TIMED_ENGINE.replace("LOG", repr(str(log)))
    with cluster(folder, 1, preload, environment=case.environment) as running:
        # The first run of a worker holds its imports and the compilation of the network; later
        # ones show the pace.
        started = time.perf_counter()
        of_first = parse_settings({**options, "scores_dtype": "float32", "outputs": "scores"})
        segment(str(source), exact, of_first, client=running["client"])
        first_s = time.perf_counter() - started

        def again(target: str) -> dict[str, Any]:
            log.unlink()
            before = cpu_s()
            started = time.perf_counter()
            result = segment(str(source), target, parse_settings(options), client=running["client"])
            wall_s = time.perf_counter() - started
            spent_s = cpu_s() - before
            [(plan, journal)] = plan_runs(str(source), target, parse_settings(options))
            passes = [float(line) for line in log.read_text().splitlines()]
            task_s = journal.timings["volume"].seconds
            return {
                "first_run_s": round(first_s, 1),
                "wall_s": round(wall_s, 1),
                "task_s": round(task_s, 1),
                "cpu_s": round(spent_s, 1),
                "patches": len(passes),
                "patch_s": round(sum(passes) / len(passes), 3),
                "patch_shape": plan.patch_grid.patch_shape,
                "share_not_inference": round(1 - sum(passes) / task_s, 3),
                "projected_bytes": plan.projected_bytes,
                "peak_bytes": result.peak_bytes,
            }

        best = min((again(f"{targets}-{n}.zarr") for n in range(2)), key=lambda run: run["wall_s"])
    scores = np.asarray(open_array(Location.of(exact) / "0")[...])
    return {**best, **_compare(scores, expected)}


def _compare(scores: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    mask = scores > 0.5
    expected_mask = expected > 0.5
    n_voxels = max(mask.sum() + expected_mask.sum(), 1)
    dice = float(2 * (mask & expected_mask).sum() / n_voxels)
    return {
        "largest_difference": float(np.abs(scores - expected).max()),
        "dice_with_monai": round(dice, 6),
    }


def _run_nnunet(
    image: np.ndarray, model: str, grid: PatchGrid, expected: np.ndarray
) -> dict[str, Any]:
    if importlib.util.find_spec("nnunetv2") is None:
        return {"failed": "nnunetv2 is not installed"}
    before = cpu_s()
    took_s, n_windows, scores = predict_by_nnunet(image, model, grid)
    spent_s = cpu_s() - before
    return {
        "wall_s": round(took_s, 1),
        "cpu_s": round(spent_s, 1),
        "windows": n_windows,
        **_compare(scores, expected),
    }


def cpu_s() -> float:
    """Return processor seconds of this process and of those that it started and that still run."""
    own = psutil.Process()
    used = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(times.user + times.system for times in used))


def predict_by_monai(
    image: np.ndarray, model: str, patch_shape: Any, overlap: Any
) -> tuple[float, np.ndarray]:
    """Return the seconds and the scores of MONAI's own loop over the whole volume."""
    network = build_network(load(model)[1])
    started = time.perf_counter()
    normalised = NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32))
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.as_tensor(np.asarray(normalised))[None],
            patch_shape,
            1,
            network,
            overlap=overlap,
            mode="gaussian",
        )
        scores = torch.sigmoid(logits)[0, 0].numpy()
    return time.perf_counter() - started, scores


def predict_by_nnunet(
    image: np.ndarray, model: str, grid: PatchGrid
) -> tuple[float, int, np.ndarray]:
    """Return the seconds, windows and scores of nnU-Net's own predictor, given our network.

    As many windows, of the same size and weights. They lie at equal distances, where MONAI pushes
    the last ones back.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    step = 1 - grid.overlap[0]
    predictor = nnUNetPredictor(
        tile_step_size=step,
        use_mirroring=False,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    predictor.network = build_network(load(model)[1])
    # What a trained nnU-Net reads from its plans: no more of them is asked while it predicts.
    predictor.configuration_manager = SimpleNamespace(patch_size=list(grid.patch_shape))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=1)
    started = time.perf_counter()
    normalised = NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32))
    tensor = torch.as_tensor(np.asarray(normalised))
    n_windows = len(predictor._internal_get_sliding_window_slicers(tensor.shape[1:]))
    with torch.inference_mode():
        scores = torch.sigmoid(predictor.predict_sliding_window_return_logits(tensor).float())[
            0
        ].numpy()
    return time.perf_counter() - started, n_windows, scores


def write_untrained(folder: Path, filters: tuple[int, ...]) -> Path:
    """Write a checkpoint with random weights: its speed is that of trained ones."""
    torch.manual_seed(0)
    network = DynUNet(spatial_dims=3, **asdict(NetworkSpec(filters=filters)))
    path = folder / f"filters-{'-'.join(map(str, filters))}.ckpt"
    torch.save(
        {
            "state_dict": {
                f"backbone.{name}": values for name, values in network.state_dict().items()
            }
        },
        path,
    )
    return path


def main() -> None:
    """Measure one shape and model, and keep the result under a name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=",".join(map(str, PUBLISHED_SHAPE)))
    parser.add_argument("--model", default="starter")
    parser.add_argument("--name", default="field")
    parser.add_argument("--filters", help="an untrained network with these, in place of --model")
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split(",")))
    model = options.model
    with tempfile.TemporaryDirectory() as folder:
        if options.filters:
            filters = tuple(map(int, options.filters.split(",")))
            model = str(write_untrained(Path(folder), filters))
        keep(options.name, measure(shape, model))


if __name__ == "__main__":
    main()
