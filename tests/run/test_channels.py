"""Networks of several inputs and outputs.

One prediction, and for each output scores, a threshold and labels.
"""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, NormalizeIntensity, ScaleIntensityRange
from numpy.testing import assert_array_equal
from skimage.filters import threshold_otsu
from skimage.measure import label

from megaseg_dask.errors import SettingsError
from megaseg_dask.models import load_bundle
from megaseg_dask.models.build import build_network
from megaseg_dask.ngff.image import read_image
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from tests.fixtures.bundles import (
    TINY,
    one_thread,
    train_config,
    write_checkpoint,
    write_folder,
)
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (18, 45, 50)
BLOCKS = [None, (13, 29, 31)]
TWO_IN = replace(TINY, in_channels=2, out_channels=3)
ZSCORE = NormalizeIntensity(channel_wise=True)


def run(source, target, bundle, **options):
    options = {
        "model": str(bundle),
        "engine": "torch",
        "threads": 1,
        "overlap": 0,
        "scores_dtype": "float32",
        **options,
    }
    result = segment_here(str(source), str(target), parse_settings(options))
    assert result.status == "done", result.failures
    return zarr.open_group(target, mode="r"), result


def predict_whole(image: np.ndarray, bundle, prepare=ZSCORE) -> np.ndarray:
    """The logits (outputs, z, y, x) that MONAI gives for an image (channels, z, y, x)."""
    loaded = load_bundle(bundle)
    with torch.inference_mode(), one_thread():
        logits = sliding_window_inference(
            torch.as_tensor(np.asarray(prepare(image.astype(np.float32))))[None],
            loaded.patch_shape,
            1,
            build_network(loaded),
            overlap=0,
            mode="gaussian",
        )
    return logits[0].numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def filled(mask: np.ndarray, most: int) -> np.ndarray:
    holes = label(~mask, connectivity=1)
    small = np.bincount(holes.ravel()) <= most
    small[0] = False
    return mask | small[holes]


@pytest.fixture(scope="module")
def two_in(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bundle") / "two-in.ckpt", TWO_IN, seed=9)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "heads.ckpt"
    return write_checkpoint(
        path, replace(TINY, out_channels=2), heads={"nuclei": (1, 2), "Golgi": (0, 1)}
    )


@pytest.fixture(scope="module")
def image():
    return np.stack([blobs(SHAPE, seed=c) * (1 + c) for c in range(3)])


@pytest.mark.parametrize("threshold", [pytest.param(0.5, marks=pytest.mark.slow), "otsu"])
def test_several_channels_are_predicted_together(threshold, image, two_in, tmp_path):
    source = write_image(
        tmp_path / "image.zarr", image, axes="czyx", channels=["dna", "er", "actin"]
    )
    logits = predict_whole(image[[2, 0]], two_in)
    outputs, unsplit = "labels,scores,mask,measurements", None
    for i, block in enumerate(BLOCKS):
        options = {
            "channel": "actin,dna",
            "outputs": outputs,
            "threshold": threshold,
            "fill_holes": 3,
            "block": block,
        }
        target = tmp_path / f"{i}.zarr"
        out, result = run(source, target, two_in, **options)
        scores = out["0"][...]
        assert np.abs(scores - sigmoid(logits)).max() <= 1e-5
        unsplit = scores if unsplit is None else unsplit
        assert_array_equal(scores, unsplit)
        found, n_objects = read_image(Location.of(str(target))), 0
        assert (found.axis_names, found.levels[0].shape) == (("c", "z", "y", "x"), (3, *SHAPE))
        table = pq.read_table(f"{target}.measurements.parquet").to_pandas()
        provenance = out.attrs["megaseg"]
        assert [n["c"] for n in provenance["normalization"]] == [2, 0]
        for k in range(3):
            mask, labels = (
                out[f"labels/megaseg_seg-{k}_mask/0"][...],
                out[f"labels/megaseg_seg-{k}/0"][...],
            )
            assert_array_equal(labels, label(mask, connectivity=1))
            assert 0.01 < mask.mean() < 0.99
            cutoff = threshold_otsu(logits[k]) if threshold == "otsu" else 0.0
            # But for logits at the threshold.
            assert (mask != filled(logits[k] > cutoff, 3)).mean() < 1e-3
            if threshold == "otsu":
                entry = provenance["threshold"][k]
                assert entry["output"] == f"seg-{k}"
                assert entry["threshold"] == pytest.approx(cutoff, abs=1e-4)
            rows = table[table["output"] == f"seg-{k}"]
            assert rows["volume_voxels"].tolist() == np.bincount(labels.ravel())[1:].tolist()
            assert rows["intensity_sum"].sum() == image[2][labels > 0].sum()
            n_objects += int(labels.max())
        assert result.n_objects == n_objects


def test_each_head_has_labels_of_its_name(heads, tmp_path):
    image = blobs(SHAPE)
    source = write_image(tmp_path / "image.zarr", image)
    scores = sigmoid(predict_whole(image[None], heads))
    for i, block in enumerate(BLOCKS):
        out, _ = run(source, tmp_path / f"{i}.zarr", heads, block=block)
        assert np.abs(out["0"][...] - scores).max() <= 1e-5
        assert sorted(out["labels"]) == ["megaseg_golgi", "megaseg_nuclei-0", "megaseg_nuclei-1"]
        for k, name in enumerate(["nuclei-0", "nuclei-1", "golgi"]):
            expected = label(out["0"][k] > np.float32(0.5), connectivity=1)
            assert_array_equal(out[f"labels/megaseg_{name}/0"][...], expected)


def test_channels_one_by_one_and_several_heads(image, heads, tmp_path):
    series = np.stack([image, image[::-1]])
    source = write_image(
        tmp_path / "image.zarr", series, axes="tczyx", channels=["dna", "er", "actin"]
    )
    out, _ = run(
        source,
        tmp_path / "out.zarr",
        heads,
        channel="er,dna",
        outputs="labels,scores",
        time="1:2",
    )
    assert out["0"].shape == (1, 6, *SHAPE)
    for i, (name, c) in enumerate([("er", 1), ("dna", 0)]):
        expected = sigmoid(predict_whole(series[1, c][None], heads))
        assert np.abs(out["0"][0, 3 * i : 3 * i + 3] - expected).max() <= 1e-5
        golgi = label(out["0"][0, 3 * i + 2] > np.float32(0.5), connectivity=1)
        assert_array_equal(out[f"labels/megaseg_{name}_golgi/0"][0], golgi)


def test_labels_in_the_source_and_a_region(image, two_in, tmp_path):
    source = write_image(tmp_path / "image.zarr", image[:2], axes="czyx")
    whole, _ = run(source, tmp_path / "whole.zarr", two_in, channel="0,1")
    part, _ = run(source, tmp_path / "part.zarr", two_in, channel="0,1", roi="1:17,5:40,3:44")
    assert_array_equal(part["0"][...], whole["0"][:, 1:17, 5:40, 3:44])
    inside, _ = run(source, source, two_in, channel="0,1", outputs="labels")
    for k in range(3):
        assert_array_equal(
            inside[f"labels/megaseg_seg-{k}/0"][...], whole[f"labels/megaseg_seg-{k}/0"][...]
        )


def test_a_number_missing_in_one_channel_is_background_in_all(image, two_in, tmp_path):
    values = image[:2].astype(np.float32)
    values[1, 4:6, 7:30, 8] = np.nan
    source = write_image(tmp_path / "image.zarr", values, axes="czyx")
    unsplit = None
    for i, block in enumerate(BLOCKS):
        options = {"channel": "0,1", "nan_to_background": True, "block": block}
        out, _ = run(source, tmp_path / f"{i}.zarr", two_in, **options)
        assert not out["0"][:, 4:6, 7:30, 8].any()
        unsplit = out["0"][...] if unsplit is None else unsplit
        assert_array_equal(out["0"][...], unsplit)
    refused = segment_here(
        str(source),
        str(tmp_path / "no.zarr"),
        parse_settings({"model": str(two_in), "channel": "0,1", "engine": "torch", "threads": 1}),
    )
    assert "(4, 7, 8) is nan" in refused.failures[0].error


RANGE = {"a_min": 200, "a_max": 1500, "b_min": -1.5, "b_max": 2.0, "clip": True}
PREPARED = {
    "clipped": ([("ScaleIntensityRange", RANGE)], [ScaleIntensityRange(**RANGE)]),
    "two numbers": (
        [("NormalizeIntensity", {"subtrahend": 900, "divisor": 380.5})],
        [NormalizeIntensity(subtrahend=900, divisor=380.5)],
    ),
    "one after the other": (
        [
            ("NormalizeIntensity", {"channel_wise": True}),
            ("ScaleIntensityRange", RANGE | {"a_min": -1, "a_max": 1.7}),
        ],
        [ZSCORE, ScaleIntensityRange(**(RANGE | {"a_min": -1, "a_max": 1.7}))],
    ),
    "nothing": ([], []),
}


@pytest.mark.parametrize(
    ("name", "dtype"), list(zip(PREPARED, ["uint16", "float32"] * 2, strict=True))
)
def test_other_preprocessing_is_monais(name, dtype, tmp_path):
    transforms, theirs = PREPARED[name]
    config = train_config()
    config["data"]["transforms"]["predict"]["transforms"] = [
        {"_target_": f"monai.transforms.{kind}d", "keys": "raw", **arguments}
        for kind, arguments in transforms
    ]
    bundle = write_folder(tmp_path / "bundle", config=config)
    image = blobs(SHAPE, dtype=dtype)
    source = write_image(tmp_path / "image.zarr", image)
    scores = sigmoid(predict_whole(image[None], bundle, Compose(theirs)))[0]
    unsplit = None
    for i, block in enumerate(BLOCKS):
        out, _ = run(source, tmp_path / f"{i}.zarr", bundle, block=block)
        assert np.abs(out["0"][...] - scores).max() <= 1e-5
        unsplit = out["0"][...] if unsplit is None else unsplit
        assert_array_equal(out["0"][...], unsplit)


def test_what_does_not_fit_the_model_is_refused(image, two_in, tmp_path):
    source = write_image(
        tmp_path / "image.zarr", image, axes="czyx", channels=["dna", "er", "actin"]
    )

    def refusal(**options) -> str:
        with pytest.raises(SettingsError) as raised:
            plan_runs(
                str(source),
                str(tmp_path / "out.zarr"),
                parse_settings({"model": str(two_in), **options}),
            )
        return str(raised.value)

    assert "--channel dna: the model needs 2 channels" in refusal(channel="dna")
    assert "--channel 0,1,2: the model needs 2 channels" in refusal(channel="0,1,2")
    assert "choose one with --channel: 0 (dna)" in refusal()
    config = train_config()
    del config["data"]["transforms"]["predict"]["transforms"][1]
    options = {
        "model": str(write_folder(tmp_path / "bundle", config=config)),
        "channel": 0,
        "normalization": "5,2",
    }
    assert "does not use a z-score; it prepares images by none" in refusal(**options)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "engine"), [("48,128,256", "openvino"), ("48,128,128", "torch")])
def test_measured_peaks_stay_below_the_projection(block, engine, two_in, tmp_path):
    source = write_image(
        tmp_path / "image.zarr",
        np.stack([blobs((48, 128, 256), seed=c) for c in range(2)]),
        axes="czyx",
    )
    options = {
        "model": str(two_in),
        "threads": 1,
        "engine": engine,
        "patch": "48,128,128",
        "overlap": 0,
        "block": block,
        "channel": "0,1",
        "workers": 1,
    }
    [(plan, _)] = plan_runs(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    result = segment(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    assert result.status == "done"
    for stage, peak in result.peak_bytes.items():
        assert 50e6 < peak <= plan.projected_bytes[stage.split("-")[0]], (
            stage,
            peak,
            plan.projected_bytes,
        )
