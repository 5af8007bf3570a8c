import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from megaseg_dask.models import NewBundle, load_bundle, save_bundle
from megaseg_dask.models.build import build_network
from starter.calibrate import best_cut, calibrate, fold, iter_pairs
from tests.fixtures.bundles import PATCH_SHAPE, TINY, one_thread, seeded_network


def images_with_known_scores(rng, n=12):
    """Yield logits, and structure by the chance that the sigmoid of a logit is."""
    for _ in range(n):
        logits = rng.normal(rng.uniform(-3, 0), 2.5, (16, 32, 32)).astype(np.float32)
        yield logits, rng.random(logits.shape) < expit(logits)


@pytest.mark.parametrize(("scale", "shift"), [(0.4, 0.0), (2.5, 1.5), (1.0, -2.0)])
def test_a_known_distortion_is_taken_back(scale, shift):
    true = list(images_with_known_scores(np.random.default_rng(1)))
    found = calibrate([((scale * logits + shift), truth) for logits, truth in true])
    assert found.scale == pytest.approx(1 / scale, rel=0.03)
    assert found.likely_shift == pytest.approx(-shift / scale, abs=0.06)
    # The best cut is what the distortion made of the true one.
    assert found.shift == pytest.approx(-best_cut(true) - shift / scale, abs=0.12)


def test_half_is_then_the_threshold_of_the_best_dice():
    """Structure begins at a score of 0.8; scores below it are noise."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (4, 16, 32, 32)).astype(np.float32)
    pairs = [(one, one > logit(0.8)) for one in logits]
    found = calibrate([(one + rng.normal(0, 0.1, one.shape), truth) for one, truth in pairs])
    assert expit(-found.shift / found.scale) == pytest.approx(0.8, abs=0.02)


def test_refuses_images_that_teach_nothing():
    logits = np.linspace(-1, 1, 4096, dtype=np.float32)
    with pytest.raises(ValueError, match="no image holds structure"):
        calibrate([(logits, np.zeros(4096, bool))])
    with pytest.raises(ValueError, match="not higher where structure is"):
        calibrate([(logits, logits < 0)])


def test_a_folded_network_gives_scaled_and_shifted_logits(tmp_path):
    save_bundle(tmp_path, NewBundle(TINY, PATCH_SHAPE, 0.25, 1), seeded_network().state_dict())
    before = load_bundle(tmp_path)
    save_bundle(tmp_path, NewBundle(TINY, PATCH_SHAPE, 0.25, 1), fold(before.weights, 1.7, -0.6))
    after = load_bundle(tmp_path)
    patch = torch.from_numpy(
        np.random.default_rng(0).normal(size=(1, 1, *PATCH_SHAPE)).astype(np.float32)
    )
    with one_thread(), torch.inference_mode():
        expected = 1.7 * build_network(before)(patch) - 0.6
        torch.testing.assert_close(build_network(after)(patch), expected, atol=1e-5, rtol=0)
    assert before.digest != after.digest


def test_every_kind_and_noise_calibrate_a_bundle(tmp_path):
    class Brightness:
        def logits(self, image):
            return image.astype(np.float32)

    pairs = list(iter_pairs(Brightness(), 1, (4, 24, 24)))
    assert {logits.shape for logits, _ in pairs} == {(4, 24, 24)}
    assert not pairs[-1][1].any()
    assert sum(bool(truth.any()) for _, truth in pairs) > 3
