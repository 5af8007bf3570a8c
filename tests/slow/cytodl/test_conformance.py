"""What cyto-dl predicts with a bundle that it trained, and what we predict with it: the same.

On both engines of a CPU. Logits within 1e-4; masks of p > 0.5 differ only within 1e-5 of it,
those of Otsu in 5
voxels at most.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from tifffile import imread, imwrite

from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid
from megaseg_dask.algorithms.normalization import Normalization, measure
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec, open_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models import load_bundle
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.images import blobs, write_image
from tests.slow.cytodl.conftest import events_of, locked, megaseg

# The first test of a session may have to install cyto-dl.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BLOCK = (13, 29, 40)
ENGINES = ("torch", "openvino")
# Of every case: engine, block and the version of OME-Zarr.
RUNS = [
    ("torch", None, "0.4"),
    ("torch", BLOCK, "0.4"),
    ("torch", BLOCK, "0.5"),
    ("openvino", None, "0.5"),
]
METHODS = {"logits": None, "otsu": "threshold_otsu"}


@dataclass(frozen=True)
class Case:
    """An image, the channel of it, and how its patches are cut."""

    shape: tuple[int, ...]
    patch: tuple[int, int, int]
    overlap: float
    axes: str = "zyx"
    channel: int = 0

    @property
    def image(self) -> np.ndarray:
        return blobs(self.shape, seed=sum(self.shape))

    def volume(self, t: int = 0) -> np.ndarray:
        return self.image if self.axes == "zyx" else self.image[t, self.channel]


CASES = {
    "overlap a quarter": Case((40, 70, 66), (16, 32, 32), 0.25),
    "overlap none": Case((37, 61, 43), (16, 32, 32), 0.0),
    "roi larger than the image": Case((20, 41, 36), (32, 64, 64), 0.25),
    "two channels and timepoints": Case((2, 2, 18, 40, 33), (16, 32, 32), 0.25, "tczyx", channel=1),
}


@pytest.fixture(scope="session")
def predicted(cytodl, trained, shared) -> Path:
    """A folder with what cyto-dl predicts, and a checkpoint with the names of a compiled model."""
    folder = shared / "predicted"
    with locked(shared / "predicted.lock"):
        if not (folder / "compiled.ckpt").exists():
            folder.mkdir()
            (checkpoint,) = (trained / "checkpoints").glob("*.ckpt")
            asked = []
            for name, case in CASES.items():
                # Of a series cyto-dl predicts the first timepoint alone: each gets a file of its
                # own.
                for t in range(case.shape[0] if case.axes == "tczyx" else 1):
                    file = folder / f"{name} {t}.ome.tif"
                    values = case.image if case.axes == "zyx" else case.image[t]
                    imwrite(
                        file, values, ome=True, metadata={"axes": case.axes[-values.ndim :].upper()}
                    )
                    asked += [
                        {
                            "bundle": str(trained),
                            "checkpoint": str(checkpoint),
                            "image": str(file),
                            "channel": case.channel,
                            "patch": case.patch,
                            "overlap": case.overlap,
                            "method": method,
                            "out": str(folder / f"{name} {t} {kind}"),
                        }
                        for kind, method in METHODS.items()
                    ]
            request = folder / "cases.json"
            request.write_text(
                json.dumps(
                    {"cases": asked, "compile": [str(checkpoint), str(folder / "compiled.ckpt")]}
                )
            )
            command = [cytodl / "bin/python", "-I", Path(__file__).with_name("predict.py"), request]
            done = subprocess.run(command, capture_output=True, text=True, timeout=800)
            assert done.returncode == 0, done.stderr[-3000:]
    return folder


def theirs(predicted: Path, name: str, kind: str, t: int = 0) -> np.ndarray:
    (file,) = (predicted / f"{name} {t} {kind}" / "seg").glob("*.tif")
    return imread(file).squeeze()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_logits_of_any_blocks_are_cytodls(name, engine, predicted, trained):
    case, bundle = CASES[name], load_bundle(trained)
    volume = case.volume()
    model = ModelRef.of({str(trained): bundle})
    whole, grid = Box.of(volume.shape), PatchGrid(volume.shape, case.patch, (case.overlap,) * 3)
    prepare = Preparation(bundle.preprocessing.steps, (Normalization.of(measure(volume, whole)),))
    expected = theirs(predicted, name, "logits")
    with open_engine(model, EngineSpec(engine, "cpu", "fp32", threads=1)) as network:
        for core in (whole, *BlockGrid(volume.shape, BLOCK)):
            values = volume[grid.read_box(core).slices][None]
            (output,) = network.predict_block(Block(core, values, Patches(grid), prepare))
            assert np.abs(output.logits() - expected[core.slices]).max() <= 1e-4


@pytest.mark.parametrize(("engine", "block", "version"), RUNS)
@pytest.mark.parametrize("name", CASES)
def test_scores_and_masks_are_cytodls(
    name, engine, block, version, predicted, trained, tmp_path, client
):
    case = CASES[name]
    source = write_image(tmp_path / "image.zarr", case.image, axes=case.axes, version=version)
    options = {
        "patch": case.patch,
        "overlap": case.overlap,
        "channel": str(case.channel),
        "block": block,
        "outputs": "labels,scores,mask",
        "scores_dtype": "float32",
        "model": str(trained),
        "engine": engine,
        "threads": 1,
    }
    for threshold in (0.5, "otsu"):
        target = tmp_path / f"{threshold}.zarr"
        given = {key: value for key, value in options.items() if value is not None}
        settings = parse_settings(given | {"threshold": threshold})
        assert segment(str(source), str(target), settings, client=client).status == "done"
        require_cytodls(predicted, name, target, threshold)


def require_cytodls(predicted: Path, name: str, target: Path, threshold: float | str) -> None:
    group = zarr.open_group(target, mode="r")
    for t in range(CASES[name].shape[0] if CASES[name].axes == "tczyx" else 1):
        scores, mask = (
            group[path][t] if group[path].ndim == 4 else group[path][...]
            for path in ("0", "labels/megaseg_mask/0")
        )
        p = 1 / (1 + np.exp(-theirs(predicted, name, "logits", t).astype(np.float64)))
        assert np.abs(scores - p).max() <= 1e-5
        if threshold == "otsu":
            assert (mask != theirs(predicted, name, "otsu", t)).sum() <= 5
        else:
            differing = mask != (p > 0.5)
            assert np.abs(p[differing] - 0.5).max(initial=0) <= 1e-5
        # A mask that is all or nothing would prove nothing.
        assert 0 < mask.mean() < 1


def test_the_command_with_two_workers_is_cytodl(predicted, trained, tmp_path):
    name = "overlap a quarter"
    case = CASES[name]
    source, target = write_image(tmp_path / "image.zarr", case.image), tmp_path / "out.zarr"
    options = {
        "--model": trained,
        "--engine": "torch",
        "--workers": 2,
        "--threads": 1,
        "--block": "24,40,40",
        "--threshold": "otsu",
        "--scores-dtype": "float32",
        "--outputs": "labels,scores,mask",
        "--patch": "16,32,32",
        "--overlap": 0.25,
    }
    flat = [part for option in options.items() for part in option]
    assert events_of(megaseg("segment", source, target, "--json", *flat))[-1]["status"] == "done"
    require_cytodls(predicted, name, target, "otsu")


def test_a_compiled_model_is_the_same_bundle(predicted, trained):
    compiled, plain = load_bundle(predicted / "compiled.ckpt"), load_bundle(trained)
    assert compiled.weights.keys() == plain.weights.keys()
    for key, value in plain.weights.items():
        assert_array_equal(compiled.weights[key].numpy(), value.numpy())
    assert (compiled.network, compiled.patch_shape) == (plain.network, plain.patch_shape)
