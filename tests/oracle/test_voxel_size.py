"""Another voxel size: resample the whole volume by SciPy, predict it by MONAI, and come back."""

import numpy as np
import pytest
import torch
import xarray
import zarr
from monai.inferers import sliding_window_inference
from monai.transforms import NormalizeIntensity
from numpy.testing import assert_allclose, assert_array_equal

import megaseg_dask
from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.models import load_bundle
from megaseg_dask.models.build import build_network
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.bundles import OVERLAP, PATCH_SHAPE, one_thread
from tests.fixtures.engines import blur
from tests.fixtures.grids import interpolated, resampled
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (24, 40, 52)
SPACING = {"z": 0.5, "y": 0.25, "x": 0.25}
BLOCKS = (SHAPE, (24, 20, 16), (11, 17, 29))
# Wanted size in µm, and the voxels of the grid.
CASES = {
    "finer": ((0.3, 0.15, 0.2), (40, 67, 65)),
    "coarser": ((0.7, 0.6, 0.5), (17, 17, 26)),
    "mixed": ((0.25, 0.4, 0.2), (48, 25, 65)),
    "one axis": ((0.5, 0.25, 0.4), (24, 40, 32)),
    "1.005": ((0.5, 0.25125, 0.249), SHAPE),
    "anisotropic": ((0.11, 0.5, 0.1), (109, 20, 130)),
}


@pytest.fixture(scope="module")
def image():
    return blobs(SHAPE)


@pytest.fixture(scope="module")
def source(image, tmp_path_factory):
    return write_image(tmp_path_factory.mktemp("source") / "image.zarr", image, scale=SPACING)


def settings_of(bundle, block, size, **options):
    return parse_settings(
        {
            "model": str(bundle),
            "threads": 1,
            "block": block,
            "scores_dtype": "float32",
            "voxel_size": size,
            **options,
        }
    )


def oracle(image, grid_shape, network):
    normalised = np.asarray(NormalizeIntensity(channel_wise=True)(image[None].astype(np.float32)))
    on_grid = resampled(normalised[0], grid_shape).astype(np.float32)
    logits = sliding_window_inference(
        torch.from_numpy(on_grid)[None, None],
        PATCH_SHAPE,
        1,
        network,
        overlap=OVERLAP,
        mode="gaussian",
    )
    return sigmoid(interpolated(logits[0, 0].numpy(), image.shape).astype(np.float32))


def outputs(target):
    arrays = ("0", "labels/megaseg/0")
    return [zarr.open_array(target / path, mode="r")[...] for path in arrays]


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_whole_volume_at_any_block(
    name, image, source, tmp_path, tiny_bundle, cheap_engine
):
    size, grid_shape = CASES[name]
    results = []
    for number, block in enumerate(BLOCKS):
        target = tmp_path / f"{number}.zarr"
        settings = settings_of(tiny_bundle, block, size)
        assert segment_here(str(source), str(target), settings).status == "done"
        results.append(outputs(target))
    scores, labels = results[0]
    expected = oracle(image, grid_shape, lambda x: torch.from_numpy(blur(x.numpy())))
    assert_allclose(scores, expected, atol=1e-5)
    assert labels.max() > 0
    for others in results[1:]:
        assert_array_equal(others[0], scores)
        assert_array_equal(others[1], labels)
    lazily = megaseg_dask.predict(
        megaseg_dask.open_image(source)["0"]["image"],
        str(tiny_bundle),
        threads=1,
        block=(16, 40, 30),
        voxel_size=size,
    )
    # In this process, where the engine is replaced, though a client of workers may be open.
    assert_array_equal(lazily.compute(scheduler="threads").values, scores)


def test_a_size_that_is_the_sources_changes_no_bit(source, tmp_path, tiny_bundle, cheap_engine):
    for name, size in {"own": "source", "same": CASES["1.005"][0]}.items():
        settings = settings_of(tiny_bundle, BLOCKS[1], size)
        segment_here(str(source), str(tmp_path / f"{name}.zarr"), settings)
    pairs = zip(outputs(tmp_path / "same.zarr"), outputs(tmp_path / "own.zarr"), strict=True)
    for same, own in pairs:
        assert_array_equal(same, own)


def test_a_network_on_workers_gives_the_scores_of_the_whole_volume(
    image, source, tmp_path, tiny_bundle, client
):
    size, grid_shape = CASES["mixed"]
    network = build_network(load_bundle(tiny_bundle))
    with one_thread(), torch.inference_mode():
        expected = oracle(image, grid_shape, network)
    for block in (BLOCKS[0], BLOCKS[2]):
        target = tmp_path / f"{block[0]}.zarr"
        settings = settings_of(tiny_bundle, block, size, engine="torch", threshold="otsu")
        assert segment(str(source), str(target), settings, client=client).status == "done"
    whole = outputs(tmp_path / "24.zarr")
    assert_allclose(whole[0], expected, atol=1e-5)
    for values, of_whole in zip(outputs(tmp_path / "11.zarr"), whole, strict=True):
        assert_array_equal(values, of_whole)


def test_a_region_and_a_level_are_those_of_the_whole_volume(
    image, tmp_path, tiny_bundle, cheap_engine
):
    levels = [np.repeat(np.repeat(image, 2, 1), 2, 2), image]
    fine = {**SPACING, "y": 0.125, "x": 0.125}
    source = str(write_image(tmp_path / "image.zarr", *levels, scale=fine))
    size, _ = CASES["coarser"]
    options = {"level": 1, "normalization": "level:1"}
    whole = settings_of(tiny_bundle, BLOCKS[2], size, **options)
    segment_here(source, str(tmp_path / "whole.zarr"), whole)
    part = settings_of(tiny_bundle, BLOCKS[1], size, roi="5:20,0:33,11:44", **options)
    segment_here(source, str(tmp_path / "part.zarr"), part)
    scores, _ = outputs(tmp_path / "whole.zarr")
    assert_array_equal(outputs(tmp_path / "part.zarr")[0], scores[5:20, :33, 11:44])


def test_an_array_without_a_size_is_refused(tiny_bundle):
    array = xarray.DataArray(np.zeros(SHAPE, np.uint16), dims=list("zyx"))
    with pytest.raises(megaseg_dask.errors.SettingsError, match="z has no unit"):
        megaseg_dask.predict(array, str(tiny_bundle), voxel_size=(1, 1, 1))
