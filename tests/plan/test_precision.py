"""Bfloat16 is chosen where it pays, once, in the plan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaseg_dask.errors import SettingsError
from megaseg_dask.inference import certificate, engine
from megaseg_dask.inference.certificate import Certificate, Claim
from megaseg_dask.inference.engine import close_engine
from megaseg_dask.inference.pytorch import TorchEngine
from megaseg_dask.plan import precision
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans, run_tasks
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.request import Request, plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.run.tasks.proof import prove_engine
from tests.fixtures.images import blobs, write_image


@pytest.fixture
def request_of(tmp_path, tiny_bundle, monkeypatch):
    """A request whose 25 patches are as many as of a long run, on PyTorch with bfloat16."""
    monkeypatch.setattr(precision, "LEAST_VOXELS", 25 * 16 * 32 * 32)
    kind = engine.ENGINES["torch"]
    offered = replace(kind, precisions={"cpu": ("fp32", "bf16")})
    monkeypatch.setitem(engine.ENGINES, "torch", offered)
    source = write_image(tmp_path / "image.zarr", blobs((16, 96, 96)))

    def make(**options):
        options = {"model": str(tiny_bundle), "engine": "torch", "threads": 1, **options}
        return str(source), str(tmp_path / "out.zarr"), parse_settings(options)

    return make


@pytest.fixture
def gain(monkeypatch):
    """Return a function that says how much bfloat16 gains on this machine."""

    def set_gain(value):
        monkeypatch.setattr(precision, "measure_gain", lambda *_: value)

    set_gain(1.7)
    return set_gain


@pytest.fixture
def never_measured(monkeypatch):
    monkeypatch.setattr(precision, "measure_gain", pytest.fail)


def planned(request):
    told = []
    [(plan, _)] = plan_runs(*request, told.append)
    return plan, [event.text for event in told if event.kind == "notice"]


def test_a_long_run_is_planned_in_bfloat16_where_that_is_quicker(request_of, gain):
    plan, told = planned(request_of())
    assert plan.engine.precision == "bf16"
    assert plan.resolved.options()["precision"] == "bf16"
    assert told == [
        "bfloat16 is 1.7 times as fast as float32 on this machine: the run uses it if a test on "
        "this data passes; --precision fp32 keeps float32"
    ]
    of_workers = [planned(request_of(workers=n))[0].fingerprint for n in (0, 1, 2, 8)]
    assert set(of_workers) == {plan.fingerprint}


@pytest.mark.parametrize("value", [0.0, 1.0, 1.29])
def test_a_small_gain_changes_nothing(value, request_of, gain):
    gain(value)
    plan, told = planned(request_of())
    assert (plan.engine.precision, told) == ("fp32", [])


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"roi": "0:16,0:40,0:40"},
        {"scheduler": "tcp://127.0.0.1:1"},
    ],
)
def test_nothing_is_measured_for_other_runs(options, request_of, never_measured):
    assert planned(request_of(**options))[0].engine.precision == "fp32"


def test_nothing_is_measured_for_workers_elsewhere(request_of, never_measured):
    request = Request(*request_of(), is_here=False)
    [(plan, _)] = request.open_runs()
    assert plan.engine.precision == "fp32"


# -- when it does not prove itself


@pytest.fixture
def proven_anew(tmp_path, monkeypatch):
    """No certificates of other tests, and none kept from one look to the next."""
    monkeypatch.setattr(certificate, "_find", lambda key: None)
    monkeypatch.setattr(certificate, "_keep", lambda key, found: None)
    close_engine()
    yield
    close_engine()


@pytest.fixture
def half_is_off_by(monkeypatch):
    """Return a function that says how far logits in bfloat16 are off."""
    offsets = [0.0]

    def predict(self, patches, original=TorchEngine.__call__):
        if self._half is None:
            return original(self, patches)
        self.use_float32(is_used=True)
        return original(self, patches) + offsets[-1]

    monkeypatch.setattr(TorchEngine, "__call__", predict)
    return offsets.append


def test_a_run_that_began_in_bfloat16_goes_on_in_it_or_not_at_all(
    request_of, gain, proven_anew, half_is_off_by, monkeypatch
):
    """As on a machine of another kind: nothing is predicted in two precisions."""
    request = request_of(workers=0, block="16,48,48")
    real = Request.__init__
    # Its plan is recorded as that of a run on this machine.
    monkeypatch.setattr(Request, "__init__", lambda *args, **_: real(*args))
    [plan] = record_plans(*request)
    assert plan.engine.precision == "bf16"
    assert not run_tasks(plan, "measure", [0]).failures
    assert not run_tasks(plan, "segment", [0]).failures
    half_is_off_by(-2)
    [failure] = run_tasks(plan, "segment", [1]).failures
    assert "torch in bf16 against float32 PyTorch on one patch: Dice" in failure.error
    with pytest.raises(SettingsError, match=r"choose --precision fp32 together with --overwrite"):
        segment(*request)
    journal = Journal.read(plan)
    assert journal.done("segment").tolist() == [True, False, False, False]


# -- on what it proves itself


def test_half_precision_is_proven_in_three_places_and_the_worst_counts(
    request_of, gain, proven_anew, monkeypatch
):
    source, target, settings = request_of()
    values = np.stack([blobs((16, 96, 96), t) for t in range(20)])
    write_image(Path(source), values, axes="tzyx")
    [(plan, _)] = plan_runs(source, target, settings)
    boxes = []
    dice = iter([0.9995, 0.9991, 0.9998])

    def compare(self, engine, patch):
        boxes.append(patch)
        return Certificate("torch", "bf16", 0.5, next(dice), 100, 0.1)

    monkeypatch.setattr(Claim, "_compare", compare)
    assert prove_engine(plan).dice == 0.9991
    # Of the first, a middle and the last volume: at half, a quarter and three quarters.
    for patch, t, y in zip(boxes, (0, 8, 19), (32, 16, 48), strict=True):
        expected = values[t, :, y : y + 32, y : y + 32].astype(np.float64)
        expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(patch[0], expected, atol=1e-5)
    # The first that does not hold tells enough.
    dice = iter([0.9995, 0.5])
    assert not prove_engine(plan).holds


def test_the_memory_of_the_proof_is_planned(request_of, gain):
    half, _ = planned(request_of())
    proof = half.reference_bytes(half.proof_patch)
    assert max(half.projected_bytes.values()) >= proof
    # The reference itself proves nothing.
    exact = half.with_precision("fp32")
    assert exact.engine.is_reference
    large = exact.reference_bytes((160, 256, 256))
    for plan, is_planned in ((half, True), (exact, False)):
        of_large = plan.model_copy(update={"proof_patch": (160, 256, 256)})
        of_large.__dict__.pop("projected_bytes", None)
        assert (max(of_large.projected_bytes.values()) >= large) is is_planned
