"""Mirrored patches and several models.

Their logits are averaged, patch by patch, and nothing else changes.
"""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import xarray
import zarr
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity
from numpy.testing import assert_array_equal

import megaseg_dask
from megaseg_dask.errors import MegasegError, TargetError
from megaseg_dask.models import load_bundle
from megaseg_dask.models.build import build_network
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from tests.fixtures.bundles import (
    OVERLAP,
    PATCH_SHAPE,
    TINY,
    one_thread,
    train_config,
    write_checkpoint,
    write_folder,
)
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.models.test_registry import run as run  # the command line, in this process

# Two patches in z and x; in y the patch is larger.
SHAPE = (18, 30, 40)
BLOCKS = [None, (13, 30, 31)]
MIRRORS = [axes for n in range(4) for axes in combinations((2, 3, 4), n)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return [write_checkpoint(folder / f"{seed}.ckpt", seed=seed) for seed in range(2)]


def average_whole(image: np.ndarray, bundles, mirrors) -> np.ndarray:
    """The scores of MONAI's sliding window over a predictor that averages."""
    networks = [build_network(load_bundle(bundle)) for bundle in bundles]

    def predict(patches: torch.Tensor) -> torch.Tensor:
        logits = [
            network(patches.flip(axes)).flip(axes) for network in networks for axes in mirrors
        ]
        return torch.stack(logits).mean(dim=0)

    normalised = torch.as_tensor(
        np.asarray(NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32)))
    )
    with torch.inference_mode(), one_thread():
        logits = sliding_window_inference(
            normalised[None], PATCH_SHAPE, 1, predict, overlap=0, mode="gaussian"
        )
    return torch.sigmoid(logits)[0, 0].numpy()


# Number of models, mirrored or not, engine and its agreement with MONAI.
CASES = {
    "mirrored": (1, True, "torch", 1e-5),
    "two models": (2, False, "torch", 1e-5),
    "two models, mirrored": (2, True, "torch", 1e-5),
    "through OpenVINO": (2, True, "openvino", 1e-3),
}
FAST = ("mirrored", "two models")
SLOW = ("two models, mirrored", "through OpenVINO")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_averages_are_monais_at_any_block(name, bundles, tmp_path):
    n_models, tta, engine, agreement = CASES[name]
    image = blobs(SHAPE)
    source = write_image(tmp_path / "image.zarr", image)
    expected = average_whole(image, bundles[:n_models], MIRRORS if tta else [()])
    assert np.abs(expected - average_whole(image, bundles[:1], [()])).max() > 1e-3
    options = {
        "model": list(map(str, bundles[:n_models])),
        "tta": tta,
        "engine": engine,
        "overlap": 0,
        "threads": 1,
    }
    written = []
    for i, block in enumerate(BLOCKS):
        settings = parse_settings({**options, "scores_dtype": "float32", "block": block})
        assert segment_here(str(source), str(tmp_path / f"{i}.zarr"), settings).status == "done"
        out = zarr.open_group(tmp_path / f"{i}.zarr", mode="r")
        written.append(out["0"][...])
        provenance = out.attrs["megaseg"]
        assert provenance["engine"]["tta"] is tta
        names = [model["name"] for model in provenance["model"].get("averaged", [])]
        assert names == (["0", "1"] if n_models == 2 else [])
    assert np.abs(written[0] - expected).max() <= agreement
    assert_array_equal(written[1], written[0])
    models = options.pop("model")
    lazy = megaseg_dask.predict(xarray.DataArray(image, dims=list("zyx")), models, **options)
    assert_array_equal(lazy.values, written[0])


def test_another_average_is_another_run(bundles, tmp_path):
    source, target = write_image(tmp_path / "image.zarr", blobs(SHAPE)), str(tmp_path / "out.zarr")
    options = {"engine": "torch", "threads": 1, "overlap": 0}
    first = parse_settings({**options, "model": list(map(str, bundles))})
    assert segment_here(str(source), target, first).status == "done"
    assert segment_here(str(source), target, first).already_done
    for change in ({"model": str(bundles[0])}, {"model": list(map(str, bundles)), "tta": True}):
        with pytest.raises(TargetError, match="belongs to another run"):
            plan_runs(str(source), target, parse_settings({**options, **change}))


def other_bundles(folder):
    config = train_config()
    config["data"]["transforms"]["predict"]["transforms"][1] |= {"subtrahend": 5, "divisor": 2}
    two = {"seg": None, "other": None}
    return {
        "two outputs": (
            write_checkpoint(folder / "outputs.ckpt", heads=two),
            "has outputs ('seg', 'other')",
        ),
        "another normalisation": (
            write_folder(folder / "steps", config=config),
            "has steps (Step(name='subtract",
        ),
        "another window": (
            write_checkpoint(
                folder / "window.ckpt",
                hyper_parameters={
                    "inference_args": {
                        "roi_size": list(PATCH_SHAPE),
                        "overlap": OVERLAP,
                        "mode": "constant",
                    }
                },
            ),
            "has window constant",
        ),
        "another patch": (
            write_checkpoint(folder / "patch.ckpt", seed=3, patch_shape=(32, 32, 32)),
            "has patch_shape (32, 32, 32)",
        ),
        "another overlap": (
            write_checkpoint(folder / "overlap.ckpt", seed=3, overlap=0.25),
            "has overlap (0.25,",
        ),
        "itself": (write_checkpoint(folder / "same.ckpt", TINY), "the same model is given twice"),
    }


OTHERS = [
    "two outputs",
    "another normalisation",
    "another window",
    "another patch",
    "another overlap",
    "itself",
]


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_do_not_agree_are_refused_by_name(name, bundles, tmp_path):
    other, message = other_bundles(tmp_path)[name]
    source = write_image(tmp_path / "image.zarr", blobs((32, 37, 50)))
    options = {"model": [str(bundles[0]), str(other)], "threads": 1}
    with pytest.raises(MegasegError) as raised:
        plan_runs(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    assert message in str(raised.value)
    assert str(other) in str(raised.value)
    assert raised.value.exit_code == 2
    if name in ("another patch", "another overlap"):
        given = parse_settings({**options, "patch": PATCH_SHAPE, "overlap": 0})
        [(plan, _)] = plan_runs(str(source), str(tmp_path / "out.zarr"), given)
        assert len(plan.model.bundles) == 2


def test_the_command_takes_several_models(bundles, tmp_path, run):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    models = [part for bundle in bundles for part in ("--model", bundle)]
    code, out, err = run(
        "plan", source, tmp_path / "out.zarr", *models, "--tta", "--threads", 1, "--json"
    )
    assert code == 0, err
    plan = json.loads(out)
    assert plan["model"]["name"] == "0 + 1"
    assert plan["options"]["tta"] is True
    one = json.loads(
        run("plan", source, tmp_path / "out.zarr", *models[:2], "--threads", 1, "--json")[1]
    )
    assert plan["model"]["parameters"] == 2 * one["model"]["parameters"]
    assert plan["fingerprint"] != one["fingerprint"]
    assert all(plan["projected_bytes"][stage] > n for stage, n in one["projected_bytes"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("block", "engine"), [("48,128,256", "openvino"), ("48,128,128", "torch")])
def test_measured_peaks_stay_below_the_projection(block, engine, bundles, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs((48, 128, 256)))
    options = {
        "model": list(map(str, bundles)),
        "tta": True,
        "threads": 1,
        "patch": "48,128,128",
        "overlap": 0,
        "workers": 1,
    }
    settings = parse_settings({**options, "engine": engine, "block": block})
    [(plan, _)] = plan_runs(str(source), str(tmp_path / "out.zarr"), settings)
    result = segment(str(source), str(tmp_path / "out.zarr"), settings)
    assert result.status == "done"
    for stage, peak in result.peak_bytes.items():
        assert 50e6 < peak <= plan.projected_bytes[stage.split("-")[0]], (
            stage,
            peak,
            plan.projected_bytes,
        )
