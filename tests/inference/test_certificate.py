"""An engine proves itself against float32 PyTorch, or is not used."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import zarr

from megaseg_dask.errors import SettingsError
from megaseg_dask.inference import certificate, conversion, engine
from megaseg_dask.inference.certificate import Certificate, Claim, compare
from megaseg_dask.inference.engine import EngineSpec, close_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.models import load_bundle
from megaseg_dask.plan import precision
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans, run_tasks
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.runner import segment
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from tests.fixtures.bundles import one_thread
from tests.fixtures.images import blobs, write_image

OPENVINO = EngineSpec("openvino", "cpu", "fp32", 1)
HALF = EngineSpec("torch", "cpu", "bf16", 1)
PATCH = np.random.default_rng(0).standard_normal((1, 16, 32, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder without certificates, and an engine that is opened anew."""
    monkeypatch.setattr(certificate, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(certificate, "_made", {})
    close_engine()
    yield tmp_path / "home"
    close_engine()


@pytest.fixture
def converts(tmp_path, monkeypatch):
    """A home without conversions."""
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tiny_bundle):
    return ModelRef.of({str(tiny_bundle): load_bundle(tiny_bundle)})


@pytest.fixture
def references(monkeypatch):
    """Forward passes of float32 PyTorch."""
    passes = []

    def count(self, patches, original=TorchEngine.__call__):
        if self._half is None:
            passes.append(patches.shape)
        return original(self, patches)

    monkeypatch.setattr(TorchEngine, "__call__", count)
    return passes


@pytest.fixture
def flipped(monkeypatch, converts):
    """A conversion in which the sign of one weight is wrong."""

    def convert(bundle, original=conversion.convert):
        weights = dict(bundle.weights)
        name = "input_block.conv1.conv.weight"
        weights[name] = weights[name].clone()
        weights[name][0, 0, 1, 1, 1] *= -1
        with one_thread():
            return original(replace(bundle, weights=weights))

    monkeypatch.setattr(conversion, "convert", convert)


def claim(model, spec=OPENVINO, **values):
    return Claim(model, spec, 1, (16, 32, 32), **values)


# -- what is compared


def logits(scores):
    scores = np.asarray(scores, np.float64)
    return np.log(scores / (1 - scores)).astype(np.float32)


def test_dice_and_the_largest_difference_are_those_of_the_masks_and_scores():
    rng = np.random.default_rng(1)
    expected = rng.uniform(0.01, 0.99, (1, 8, 8, 8))
    found = np.clip(expected + rng.uniform(-0.1, 0.1, expected.shape), 0.01, 0.99)
    for threshold in (0.5, 0.7):
        a, b = expected > threshold, found > threshold
        result = compare(logits(expected), logits(found[None]), HALF, threshold)
        assert result.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
        assert result.n_voxels == (a != b).sum()
        assert result.largest_difference == pytest.approx(np.abs(found - expected).max(), rel=1e-2)


def test_empty_masks_are_alike_and_a_few_voxels_of_a_small_one_refuse_nothing():
    dark = logits(np.full((1, 16, 16, 16), 0.1))
    assert compare(dark, dark[None], HALF).dice == 1
    small = dark.copy()
    small[0, :2, 0, 0] = 1
    result = compare(dark, small[None], HALF)
    assert (result.dice, result.n_voxels, result.holds) == (0, 2, False)
    small[0, :2, 0, 0] = 1e-3
    assert compare(dark, small[None], HALF).holds


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_never_hold(value):
    dark = logits(np.full((1, 4, 4, 4), 0.1))
    broken = dark.copy()
    broken[0, 0, 0, 0] = value
    result = compare(dark, broken[None], HALF)
    assert not result.holds
    assert Certificate.from_json(json.loads(json.dumps(asdict(result)))) == result


# -- when it is made, and kept


def test_float32_pytorch_needs_none_and_reads_nothing(model):
    assert claim(model, replace(OPENVINO, engine="torch")).prove(pytest.fail) is None


def test_in_float32_it_is_made_once_and_then_believed_for_all_images(model, references, home):
    made = claim(model).prove(lambda: PATCH)
    assert made.holds
    assert made.dice == 1
    assert 0 < made.largest_difference < 1e-4
    certificate._made.clear()
    assert claim(model).prove(pytest.fail) == made
    assert len(references) == 1
    # Another patch, batch or threshold is another claim.
    assert replace(claim(model), batch=2).prove(lambda: PATCH).holds
    assert len(references) == 2


def test_a_damaged_or_altered_one_is_made_again(model, references, home):
    made = claim(model).prove(lambda: PATCH)
    [file] = (home / "certificates").iterdir()
    for damage in (lambda text: text[:-9], lambda text: text.replace('"dice": 1.0', '"dice": 0.9')):
        certificate._made.clear()
        file.write_text(damage(file.read_text()))
        assert claim(model).prove(lambda: PATCH) == made
    assert len(references) == 3


def test_nothing_is_kept_of_a_patch_without_contrast(model, references, home):
    flat = claim(model).prove(lambda: np.zeros_like(PATCH))
    assert flat.holds
    assert not (home / "certificates").exists()
    claim(model).prove(lambda: PATCH)
    assert len(references) == 2


def test_half_precision_is_proven_on_each_image(model, references):
    first = claim(model, HALF).prove(lambda: PATCH)
    assert 1e-4 < first.largest_difference < 0.5
    certificate._made.clear()
    assert claim(model, HALF).prove(lambda: PATCH.copy()) == first
    assert len(references) == 1
    claim(model, HALF).prove(lambda: 2 * PATCH)
    assert len(references) == 2


def test_mirrored_averages_are_compared_with_mirrored_averages(model, references):
    assert claim(model, replace(OPENVINO, tta=True)).prove(lambda: PATCH).largest_difference < 1e-4
    assert len(references) == 8


# -- what a run does


@pytest.fixture
def source(tmp_path):
    return str(write_image(tmp_path / "image.zarr", blobs((16, 40, 40))))


def settings(tiny_bundle, **options):
    return parse_settings({"model": str(tiny_bundle), "threads": 1, "workers": 0, **options})


def test_a_run_records_its_certificate_in_the_journal_and_its_rule_in_the_output(
    source, tmp_path, tiny_bundle
):
    target = tmp_path / "out.zarr"
    assert segment(source, str(target), settings(tiny_bundle, engine="openvino")).status == "done"
    [plan] = RunFolder.plans(Location.of(str(target)))
    [found] = Journal.read(plan).certificates
    assert found.holds
    assert "openvino in fp32 against float32 PyTorch on one patch: Dice 1" in str(found)
    required = {"against": "torch fp32", "min_dice": 0.999, "max_difference": 1e-3}
    assert zarr.open_group(target).attrs["megaseg"]["certificate"] == required


def test_a_wrong_conversion_is_refused_before_anything_is_written(
    source, tmp_path, tiny_bundle, flipped
):
    target = tmp_path / "out.zarr"
    with pytest.raises(SettingsError, match=r"openvino in fp32 .* choose --engine torch"):
        segment(source, str(target), settings(tiny_bundle, engine="openvino"))
    assert not target.exists()
    assert not list(tmp_path.rglob("plan.json"))


def test_a_task_of_a_job_array_refuses_a_wrong_conversion_too(
    source, tmp_path, tiny_bundle, flipped
):
    options = settings(tiny_bundle, engine="openvino")
    [plan] = record_plans(source, str(tmp_path / "out.zarr"), options)
    [failure] = run_tasks(plan, "volume", [0]).failures
    assert "choose --engine torch" in failure.error


def test_the_norms_of_a_stride_of_3_as_they_were_are_refused(model, monkeypatch, converts):
    """Windows that do not divide an extent leave voxels out of the norms."""
    monkeypatch.setattr(conversion, "_window", lambda extent: min(5, extent))
    assert not claim(model).prove(lambda: PATCH).holds


def test_a_precision_of_ours_becomes_float32_and_a_chosen_one_is_refused(
    source, tmp_path, tiny_bundle, monkeypatch
):
    kind = engine.ENGINES["torch"]
    offered = replace(kind, precisions={"cpu": ("fp32", "bf16")})
    monkeypatch.setitem(engine.ENGINES, "torch", offered)
    monkeypatch.setattr(precision, "LEAST_VOXELS", 1)
    monkeypatch.setattr(precision, "measure_gain", lambda *_: 1.7)

    def predict(self, patches, original=TorchEngine.__call__):
        logits = original(self, patches)
        return logits if self._half is None else logits - 2

    monkeypatch.setattr(TorchEngine, "__call__", predict)
    told = []
    target = tmp_path / "out.zarr"
    options = settings(tiny_bundle, engine="torch")
    assert segment(source, str(target), options, emit=told.append).status == "done"
    assert any("the run continues in float32" in getattr(event, "text", "") for event in told)
    assert zarr.open_group(target).attrs["megaseg"]["engine"]["precision"] == "fp32"
    assert segment(source, str(target), options).already_done
    chosen = settings(tiny_bundle, engine="torch", precision="bf16")
    with pytest.raises(SettingsError, match=r"torch in bf16 .* choose --precision fp32"):
        segment(source, str(tmp_path / "chosen.zarr"), chosen)
