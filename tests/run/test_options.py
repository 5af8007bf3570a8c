"""Options that look at the whole volume.

Automatic thresholds, holes, other normalisations; staged and in one task.
"""

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from skimage import filters
from skimage.measure import label
from skimage.morphology import remove_small_holes, remove_small_objects

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (24, 50, 70)
ONE, MANY = "24,50,70", "13,29,37"


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    image = blobs(SHAPE)
    source = write_image(tmp_path / "image.zarr", image, image[::2, ::2, ::2])

    def call(block=MANY, source=source, **options):
        name = f"{len(list(tmp_path.iterdir()))}.zarr"
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "outputs": "labels,scores,mask",
            "scores_dtype": "float32",
            "block": block,
            **options,
        }
        result = segment_here(str(source), str(tmp_path / name), parse_settings(options))
        assert result.status == "done", result.failures
        group = zarr.open_group(tmp_path / name, mode="r")
        found = {
            kind: group[path][...]
            for kind, path in {
                "scores": "0",
                "labels": "labels/megaseg/0",
                "mask": "labels/megaseg_mask/0",
            }.items()
        }
        return found, dict(group.attrs)["megaseg"]

    return call


def logits_of(scores: np.ndarray) -> np.ndarray:
    return np.log(scores / (1 - scores))


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_of_the_whole_volume_at_any_block(method, run):
    if method == "minimum":
        pytest.skip("noise has no two modes; tests/laws/test_threshold_laws.py has images that do")
    staged, from_stages = run(threshold=method)
    whole, from_whole = run(block=ONE, threshold=method)
    for kind, values in staged.items():
        assert_array_equal(values, whole[kind], err_msg=kind)
    (found,) = from_stages["threshold"]
    assert from_stages["threshold"] == from_whole["threshold"]
    assert from_stages["settings"]["threshold"] == method
    # Scores are float32, so the logits that they give back are near those that were used.
    expected = getattr(filters, f"threshold_{method}")(
        logits_of(whole["scores"].astype(np.float64)).astype(np.float32)
    )
    span = np.ptp(logits_of(whole["scores"].astype(np.float64)))
    assert abs(found["threshold"] - expected) < span / 256
    assert 0 < staged["mask"].mean() < 1


@pytest.mark.parametrize("connectivity", [1, 3])
def test_holes_of_the_whole_volume_at_any_block(connectivity, run):
    plain, _ = run(connectivity=connectivity)
    filled, _ = run(connectivity=connectivity, fill_holes=40, min_size=30)
    whole, _ = run(block=ONE, connectivity=connectivity, fill_holes=40, min_size=30)
    expected = remove_small_holes(
        plain["mask"].astype(bool), max_size=40, connectivity=connectivity
    )
    assert expected.sum() > plain["mask"].sum(), "nothing to fill in this image"
    objects = remove_small_objects(label(expected, connectivity=connectivity), max_size=29)
    for found in (filled, whole):
        assert_array_equal(found["mask"], expected)
        assert_array_equal(found["labels"], label(objects > 0, connectivity=connectivity))


def test_a_given_normalisation_takes_no_pass_over_the_source(run):
    expected, before = run()
    (known,) = before["normalization"]
    found, after = run(normalization=f"{known['mean']!r},{known['std']!r}")
    assert_array_equal(found["scores"], expected["scores"])
    assert after["normalization"] == before["normalization"]
    other, _ = run(normalization="0,1")
    assert not np.array_equal(other["scores"], expected["scores"])


def test_the_statistics_of_a_coarser_level(run):
    coarse = blobs(SHAPE)[::2, ::2, ::2]
    staged, record = run(normalization="level:1")
    whole, _ = run(block=ONE, normalization="level:1")
    assert_array_equal(staged["scores"], whole["scores"])
    assert record["normalization"][0]["mean"] == pytest.approx(coarse.mean(), rel=1e-12)
    assert record["settings"]["normalization"] == "level:1"
    with pytest.raises(SettingsError, match="level from 0 to 1"):
        run(normalization="level:2")


@pytest.mark.parametrize("block", [ONE, MANY])
def test_a_nan_that_nobody_measured_is_still_an_error(block, tmp_path, tiny_bundle, cheap_engine):
    image = blobs(SHAPE).astype(np.float32)
    image[3, 4, 5] = np.nan
    source = write_image(tmp_path / "image.zarr", image)
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "overlap": 0,
        "block": block,
        "normalization": "1000,400",
    }
    result = segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    assert result.status == "failed"
    assert "(3, 4, 5) is nan" in result.failures[0].error


@pytest.mark.parametrize("block", [ONE, MANY])
def test_nan_as_background_has_no_part_in_a_threshold(block, tmp_path, tiny_bundle, cheap_engine):
    image = blobs(SHAPE).astype(np.float32)
    image[:, :10] = np.nan
    source = write_image(tmp_path / "image.zarr", image)
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "overlap": 0,
        "block": block,
        "threshold": "otsu",
        "nan_to_background": True,
        "outputs": "mask,scores",
    }
    result = segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    assert result.status == "done", result.failures
    mask = zarr.open_group(tmp_path / "out.zarr", mode="r")["labels/megaseg_mask/0"][...]
    assert not mask[:, :10].any()
    assert mask[:, 10:].any()


def test_intermediate_data_are_gone_after_success(run, tmp_path):
    run(threshold="otsu", fill_holes=10)
    assert not list(tmp_path.glob("*.run/megaseg/work"))
