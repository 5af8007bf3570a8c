import json
from dataclasses import dataclass

import imageio.v3 as iio
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_local

from benchmarks.prediction import opened
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.models import NewBundle, save_bundle
from starter import cases, pictures, thresholds
from starter import compare as command
from starter.cases import Row, Sample
from starter.compare import Comparison, compare, judge, measure_noise, measure_rows
from starter.reliability import THRESHOLDS, Table, describe, expected_error, reliability
from tests.fixtures.bundles import PATCH_SHAPE, TINY, one_thread, seeded_network

SHAPE = (8, 40, 48)


# -- thresholds


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(3)
    truth = np.zeros(SHAPE, bool)
    truth[2:6, 10:20, 8:30] = True
    return Sample(rng.poisson(20 + 30 * truth).astype(np.uint16), truth)


def test_a_local_threshold_in_slices_is_that_of_scikit_image(sample):
    """Its offset is absolute; ours is in deviations."""
    block = 15
    smooth = gaussian_filter(sample.image.astype(np.float64), 1)
    ground = np.stack([threshold_local(plane, block) for plane in smooth])
    offset = 0.6
    expected = smooth - ground > offset * (smooth - ground).std()
    name = f"slices, Gaussian block {block}, smoothed 1, offset {offset}"
    found = thresholds.local_dice(sample.image, sample.truth)
    number = thresholds.local_settings().index(name)
    assert found.shape == (len(thresholds.local_settings()),)
    assert found[number] == pytest.approx(evaluate(expected, sample.truth).dice, abs=2e-3)


def test_the_best_local_threshold_finds_an_object_that_no_global_one_does():
    truth = np.zeros(SHAPE, bool)
    truth[2:6, 18:22, 4:44] = True
    slope = np.linspace(0, 400, SHAPE[2])
    image = (100 + slope + 80 * truth).astype(np.uint16)
    best = thresholds.local_dice(image, truth).max()
    every_global = [evaluate(image > gray, truth).dice for gray in np.unique(image)]
    assert best > 0.9 > max(every_global)


# -- what scores mean


def test_dice_at_each_threshold_is_that_of_the_mask():
    rng = np.random.default_rng(0)
    scores = rng.random((4, 20, 20)).astype(np.float32)
    # A score at a threshold is not above it.
    scores[0, 0, :9] = THRESHOLDS[::6].astype(np.float32)
    truth = rng.random(scores.shape) < scores
    expected = [evaluate(scores > np.float32(cut), truth).dice for cut in THRESHOLDS]
    table = Table.of(scores, truth)
    assert_allclose(table.dice(), expected, rtol=1e-12)
    assert table.dice_at_half == pytest.approx(evaluate(scores > 0.5, truth).dice)


def test_probabilities_are_on_the_diagonal_and_others_are_not():
    rng = np.random.default_rng(1)
    chance = rng.random(200_000).astype(np.float32)
    truth = rng.random(chance.shape) < chance
    right = Table.of(chance, truth)
    columns = reliability(right)
    assert_allclose(columns["mean_score"], columns["fraction_true"], atol=0.02)
    assert expected_error(right) < 0.01
    too_generous = Table.of(np.sqrt(chance), truth)
    assert expected_error(too_generous) == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
    found = describe([too_generous])
    assert found["best_threshold"] == pytest.approx(np.sqrt(right_cut(right)), abs=0.05)
    assert found["dice_at_half_less_best"] < 0


def right_cut(table):
    return THRESHOLDS[int(table.dice().argmax())]


def test_scores_of_nothing_have_no_best_threshold():
    empty = Table.of(np.full(100, 0.01, np.float32), np.zeros(100, bool))
    found = describe([empty])
    assert "best_threshold" not in found
    assert found["reliability"]["mean_score"][1:] == [None] * 9
    assert found["expected_error_of_doubtful"] == 0


# -- the command


@dataclass(frozen=True)
class Constant:
    """A model that says one score everywhere, or the image's gray value."""

    value: float | None = None

    def scores(self, image):
        if self.value is None:
            return (image / image.max()).astype(np.float32)
        return np.full(image.shape, self.value, np.float32)


@pytest.fixture
def comparison(tmp_path):
    models = {"new": Constant(), "old": Constant(0.9)}
    return Comparison(models, tmp_path, shape=SHAPE, noise_shape=SHAPE, n=2)


def test_rows_of_a_group_have_a_mean_and_one_diagram(comparison, sample):
    def rows(shape, n):
        truth = sample.truth
        perfect = Sample(np.where(truth, 200, 10).astype(np.uint8), truth)
        return [
            Row("easy", "group", lambda: iter([perfect] * n)),
            Row("noisy", "group", lambda: iter([sample])),
        ]

    found = measure_rows(comparison, "part", rows)
    share = sample.truth.mean()
    assert found["rows"]["easy"]["new"] == 1
    assert found["rows"]["easy"]["Otsu"] == 1
    assert found["rows"]["noisy"]["old"] == pytest.approx(2 * share / (1 + share), abs=1e-4)
    mean = found["means"]["group, mean"]
    assert mean["one local"] <= mean["best local"]
    assert found["one_local"]["group"] in thresholds.local_settings()
    assert mean["new"] == pytest.approx((1 + found["rows"]["noisy"]["new"]) / 2, abs=1e-4)
    assert found["scores"]["group"]["old"]["images"] == 3
    assert found["scores"]["group"]["old"]["expected_error"] == pytest.approx(0.9 - share, abs=1e-3)


def test_what_is_found_in_noise_is_counted(comparison):
    found = measure_noise(comparison)["rows"]
    assert set(found) >= {"Poisson", "few photons", "Gaussian", "blurred", "8 bits", "simulated"}
    for row in found.values():
        assert row["old, objects"] == comparison.n
        assert row["old, voxels"] == comparison.n * np.prod(SHAPE)
        assert row["old, largest score"] == 0.9


def test_noise_and_simulations_are_the_same_in_each_run():
    once, again = (list(cases.iter_noise((4, 20, 20), 2)) for _ in range(2))
    for (name, image), (_, same) in zip(once, again, strict=True):
        assert image.dtype == (np.uint8 if name == "8 bits" else image.dtype)
        assert image.std() > 0
        np.testing.assert_array_equal(image, same)
    row = cases.hard_rows((8, 32, 32), 1)[0]
    one, other = (next(row.make()) for _ in range(2))
    np.testing.assert_array_equal(one.image, other.image)


def test_8_bits_and_saturation_change_the_image_alone(sample):
    coarse = cases.in_8_bits(sample)
    assert coarse.image.dtype == np.uint8
    assert len(np.unique(coarse.image)) <= 70
    assert coarse.truth is sample.truth
    clipped = cases.saturated(sample).image
    assert (clipped[sample.truth] == clipped.max()).mean() >= 0.5


def test_the_parts_of_a_bundle_are_kept_after_each_and_added(tmp_path, monkeypatch):
    """The real command on a tiny bundle: voxels of another size, noise, pictures."""
    # What it is made of is tested elsewhere: one image at one size will do.
    monkeypatch.setattr(command, "iter_stacks", lambda data, synthetic: iter(()))
    monkeypatch.setattr(command, "SCALES", (0.5,))
    monkeypatch.setattr(command, "RESCALED_KINDS", ("tubes",))
    bundle = tmp_path / "bundle"
    size_um = (0.3, 0.1, 0.1)
    new = NewBundle(TINY, PATCH_SHAPE, 0.25, 1, size_um)
    save_bundle(bundle, new, seeded_network().state_dict())
    file = tmp_path / "result.json"
    with one_thread(), opened(str(bundle), "torch") as model:
        comparison = Comparison({"new": model}, tmp_path, (32, 32, 32), PATCH_SHAPE, n=1)
        compare(comparison, ["voxel-size"], file)
        compare(comparison, ["noise"], file)
        kept = json.loads(file.read_text())
        assert set(kept["parts"]) == {"voxel-size", "noise"}
        assert kept["bundles"]["new"]["digest"] == model.bundle.digest
        assert kept["machine"]["cores"] >= 1
        rows = kept["parts"]["voxel-size"]["rows"]
        assert rows.keys() == {"simulated tubes, voxels × 2"}
        assert rows["simulated tubes, voxels × 2"].keys() == {"new, source", "new, model"}
        comparison.n = 2
        compare(comparison, ["noise"], file)
    assert set(json.loads(file.read_text())["parts"]) == {"noise"}


def test_pictures_are_drawn(tmp_path, sample):
    slices = tmp_path / "new" / "slices.png"
    pictures.draw_slices(slices, sample.image, [sample.truth, ~sample.truth])
    _, y, x = SHAPE
    assert iio.imread(slices).shape == (3 * y, 6 * x)
    scores = Table.of(sample.truth.astype(np.float32), sample.truth)
    pictures.draw_reliability(tmp_path / "r.png", "title", {"new": reliability(scores)})
    assert iio.imread(tmp_path / "r.png").ndim == 3


def test_judging_predicts_nothing_again(sample):
    scores = {"new": sample.truth.astype(np.float32)}
    judged = judge(sample, scores)
    assert judged.tables["new"].dice_at_half == 1
    assert 0 < judged.otsu < judged.otsu_smoothed <= 1
