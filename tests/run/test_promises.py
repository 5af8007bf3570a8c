"""Promises 1 and 2 at the level of the command's work: real network, real workers, real stores."""

import numpy as np
import pytest
import torch
import zarr
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity
from numpy.testing import assert_array_equal
from skimage.measure import label

from megaseg_dask.models import load_bundle
from megaseg_dask.models.build import build_network
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.bundles import one_thread
from tests.fixtures.engines import blur
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

# Between them: smaller than the patch, one patch, primes, long and thin, several patches each way.
SHAPES = [(16, 20, 23), (16, 32, 32), (17, 61, 43), (37, 16, 97), (40, 70, 66)]
OVERLAPS = [0.0, 0.25, 0.5]
BLOCKS = [(16, 32, 32), (13, 29, 31), (40, 35, 22)]


def run(source, target, bundle, *, by=segment_here, **options):
    fixed = {"model": str(bundle), "engine": "torch", "threads": 1, "scores_dtype": "float32"}
    settings = parse_settings({**fixed, **options})
    result = by(str(source), str(target), settings)
    assert result.status == "done", result.failures
    return zarr.open_group(target, mode="r")


def predict_whole(image, bundle, overlap, forward=None) -> np.ndarray:
    """What MONAI, and so cyto-dl, computes for the whole volume at once.

    The network is the bundle's, or ``forward`` in its place.
    """
    loaded = load_bundle(bundle)
    normalised = NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32))
    with torch.inference_mode(), one_thread():
        logits = sliding_window_inference(
            torch.as_tensor(np.asarray(normalised))[None],
            loaded.patch_shape,
            1,
            forward or build_network(loaded),
            overlap=overlap,
            mode="gaussian",
        )
    return torch.sigmoid(logits)[0, 0].numpy()


def require_split_is_unsplit(image, overlap, blocks, folder, bundle, forward=None) -> None:
    """Compare runs in some blocks with MONAI, with skimage, and bit by bit with each other."""
    source = write_image(folder / "image.zarr", image)
    expected = predict_whole(image, bundle, overlap, forward)
    unsplit = None
    for block in blocks:
        out = run(
            source,
            folder / f"{block}.zarr",
            bundle,
            overlap=overlap,
            outputs="labels,scores,mask",
            block=block,
        )
        scores, mask = out["0"][...], out["labels/megaseg_mask/0"][...]
        assert np.abs(scores - expected).max() <= 1e-5
        assert_array_equal(mask, scores > np.float32(0.5))
        assert_array_equal(out["labels/megaseg/0"][...], label(mask, connectivity=1))
        unsplit = scores if unsplit is None else unsplit
        assert_array_equal(scores, unsplit)
    assert 0.01 < mask.mean() < 0.99, "a constant mask would prove nothing"


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=map(str, SHAPES))
def test_split_equals_unsplit(number, tmp_path, tiny_bundle):
    """Each shape with one overlap and two blocks, by the network."""
    # No overlap for the largest: what costs is the network.
    overlap = OVERLAPS[(number + 2) % 3]
    block = BLOCKS[number % 3]
    image = blobs(SHAPES[number])
    require_split_is_unsplit(image, overlap, [None, block], tmp_path, tiny_bundle)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_equals_unsplit_in_any_block(shape, overlap, tmp_path, tiny_bundle, cheap_engine):
    """Each shape with each overlap and block, by an engine that depends on the whole patch.

    `tests/oracle/test_monai.py` tries any shape, block and overlap on arrays in memory.
    """

    def forward(patches):
        return torch.from_numpy(blur(patches.numpy()))

    blocks = [None, *BLOCKS]
    require_split_is_unsplit(blobs(shape), overlap, blocks, tmp_path, tiny_bundle, forward)


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
def test_openvino_is_split_invariant_and_close_to_the_reference(shape, tmp_path, tiny_bundle):
    pytest.importorskip("openvino")
    image = blobs(shape)
    source = write_image(tmp_path / "image.zarr", image)
    found = [
        run(
            source,
            tmp_path / f"{i}.zarr",
            tiny_bundle,
            engine="openvino",
            overlap=0.25,
            **options,
        )["0"][...]
        for i, options in enumerate([{}, *({"block": block} for block in BLOCKS)])
    ]
    for scores in found[1:]:
        assert_array_equal(scores, found[0])
    expected = predict_whole(image, tiny_bundle, 0.25)
    assert np.abs(found[0] - expected).max() < 1e-3
    one, other = found[0] > 0.5, expected > 0.5
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) >= 0.999


@pytest.mark.parametrize(("connectivity", "min_size"), [(1, 0), (2, 6), (3, 6)])
def test_labels_equal_skimages_labels_of_the_written_mask(
    connectivity, min_size, tmp_path, tiny_bundle, cheap_engine
):
    from tests.laws.test_labels import survivors

    source = write_image(tmp_path / "image.zarr", blobs((24, 50, 61), seed=3))
    for block in [(24, 50, 61), (13, 27, 31)]:
        target = tmp_path / f"{block}.zarr"
        options = {
            "connectivity": connectivity,
            "min_size": min_size,
            "outputs": "labels,mask",
            "overlap": 0,
        }
        out = run(source, target, tiny_bundle, block=block, threshold=0.93, **options)
        expected = survivors(
            label(out["labels/megaseg_mask/0"][...], connectivity=connectivity), min_size
        )
        assert_array_equal(out["labels/megaseg/0"][...], expected)
        assert expected.max() > 1


# PyTorch takes seconds to import in each worker.
@pytest.mark.parametrize(
    ("engine", "agreement"),
    [("openvino", 1e-3), pytest.param("torch", 1e-5, marks=pytest.mark.slow)],
)
def test_worker_counts_agree_bit_for_bit(engine, agreement, tmp_path, tiny_bundle):
    image = blobs((20, 40, 53), seed=5)
    source = write_image(tmp_path / "image.zarr", image)
    options = {"engine": engine, "block": (17, 23, 29), "overlap": 0.25}
    target = tmp_path / "out.zarr"
    out = run(source, target, tiny_bundle, by=segment, workers=2, **options)
    assert np.abs(out["0"][...] - predict_whole(image, tiny_bundle, 0.25)).max() <= agreement
    # One process that does one task at a time; tests that share a worker compare with it too.
    here = run(source, tmp_path / "here.zarr", tiny_bundle, **options)
    assert_array_equal(out["0"][...], here["0"][...])


def test_float_images_and_timepoints_and_channels(tmp_path, tiny_bundle):
    image = np.stack(
        [[blobs((18, 40, 36), seed=t * 2 + c) for c in range(2)] for t in range(3)]
    ).astype(">f4")
    source = write_image(tmp_path / "image.zarr", image, axes="tczyx", channels=["dna", "actin"])
    out = run(source, tmp_path / "out.zarr", tiny_bundle, channel="actin", block=(11, 40, 17))
    assert out["0"].shape == (3, 18, 40, 36)
    assert out["0"].chunks[0] == 1
    for t in range(3):
        expected = predict_whole(image[t, 1].astype("f4"), tiny_bundle, 0.5)
        assert np.abs(out["0"][t] - expected).max() <= 1e-5
        assert_array_equal(
            out["labels/megaseg/0"][t], label(out["0"][t] > np.float32(0.5), connectivity=1)
        )
    part = run(source, tmp_path / "part.zarr", tiny_bundle, channel=1, time="1:3")
    assert_array_equal(part["0"][...], out["0"][1:])


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_are_split_invariant_against_themselves(batch, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((20, 50, 61)))
    whole = run(source, tmp_path / "whole.zarr", tiny_bundle, batch=batch)
    split = run(source, tmp_path / "split.zarr", tiny_bundle, batch=batch, block=(11, 29, 23))
    assert_array_equal(whole["0"][...], split["0"][...])


def test_integers_without_an_exact_float_fail_on_both_paths(tmp_path, tiny_bundle):
    image = blobs((16, 40, 40)).astype(np.uint64) + np.uint64(2**63)
    source = write_image(tmp_path / "image.zarr", image)
    options = {"model": str(tiny_bundle), "threads": 1, "overlap": 0}
    for name, block in [("whole", {}), ("staged", {"block": "16,20,20"})]:
        settings = parse_settings({**options, **block})
        result = segment_here(str(source), str(tmp_path / f"{name}.zarr"), settings)
        assert "subtract the offset" in result.failures[0].error


def test_a_constant_volume_is_called_meaningless(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", np.full((16, 32, 40), 7, np.uint8))
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1})
    result = segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    [doubt] = [doubt for doubt in result.doubts if doubt.about == "constant"]
    assert doubt.text == "all voxels have one value, so its objects mean nothing"
