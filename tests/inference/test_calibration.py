"""Timing of forward passes: once an hour for each network, engine, patch and batch of a machine."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from megaseg_dask.errors import EngineError
from megaseg_dask.inference import calibration, engine
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.calibration import measure_gain, measure_patch_s
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import BundleRef, ModelRef

SHAPE = (16, 32, 32)
SPEC = EngineSpec("openvino", "cpu", "fp32", 1)
BUNDLE = BundleRef("bundle", "name", "digest")
MODEL = ModelRef((BUNDLE,), "gaussian", 1, ("seg",), ())
AN_HOUR_S = 3600


class Counted(Engine):
    """An engine that counts how often it is opened."""

    n_opened = 0

    def __init__(self, *_: object) -> None:
        Counted.n_opened += 1

    def __call__(self, patches):
        return patches


@pytest.fixture
def n_timed(monkeypatch, tmp_path):
    """Return a function that says how often forward passes were timed, on a new machine."""
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "_open_bundle", Counted)
    Counted.n_opened = 0
    return lambda: Counted.n_opened


def measure(model=MODEL, spec=SPEC, batch=1, shape=SHAPE) -> float:
    return measure_patch_s(model, spec, batch, shape)


def test_the_same_passes_are_timed_once(n_timed):
    assert measure() == measure()
    moved = replace(MODEL, bundles=(replace(BUNDLE, path="elsewhere"),))
    assert measure(moved) == measure()
    assert n_timed() == 1


OTHER = {
    "weights": {"model": replace(MODEL, bundles=(replace(BUNDLE, digest="other"),))},
    "two models": {"model": replace(MODEL, bundles=(BUNDLE, replace(BUNDLE, digest="other")))},
    "engine": {"spec": replace(SPEC, engine="torch")},
    "precision": {"spec": replace(SPEC, precision="bf16")},
    "threads": {"spec": replace(SPEC, threads=2)},
    "mirrored": {"spec": replace(SPEC, tta=True)},
    "batch": {"batch": 2},
    "patch": {"shape": (32, 32, 16)},
    "channels": {"model": replace(MODEL, in_channels=2)},
}


@pytest.mark.parametrize("case", OTHER)
def test_other_passes_are_timed_again(case, n_timed):
    measure()
    before = n_timed()
    measure(**OTHER[case])
    assert n_timed() > before


@pytest.mark.parametrize("changed", ["processor", "version"])
def test_another_machine_is_timed_again(changed, n_timed, monkeypatch):
    measure()
    name = {"processor": "processor", "version": "version_of"}[changed]
    monkeypatch.setattr(f"megaseg_dask.inference.calibration.{name}", lambda *_: "another")
    measure()
    assert n_timed() == 2


def test_an_hour_later_they_are_timed_again_and_the_shorter_time_counts(n_timed, tmp_path):
    measure()
    [kept] = tmp_path.glob("speeds/*.json")
    for seconds, is_shorter in (("1e-12", True), ("1e12", False)):
        kept.write_text(seconds)
        before = time.time() - AN_HOUR_S - 60
        os.utime(kept, (before, before))
        assert (measure() == float(seconds)) == is_shorter
        assert measure() < 1e12
    assert n_timed() == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[1]", b"\xff"])
def test_a_damaged_record_is_timed_again(damage, n_timed, tmp_path):
    seconds = measure()
    [kept] = tmp_path.glob("speeds/*.json")
    kept.write_bytes(damage)
    assert isinstance(measure(), float)
    assert n_timed() == 2
    assert seconds > 0


def test_a_folder_that_cannot_be_written_keeps_nothing(n_timed, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("MEGASEG_HOME", str(file))
    assert measure() > 0
    measure()
    assert n_timed() == 2


# -- what bfloat16 gains


class Paced(Engine):
    """An engine whose passes take as long as its precision says, by a clock of its own."""

    seconds: ClassVar = {"fp32": 0.02, "bf16": 0.01}
    asked: ClassVar = []
    now_s: ClassVar = 0.0

    def __init__(self, ref, spec):
        Paced.asked.append(spec.precision)
        if spec.precision not in Paced.seconds:
            raise EngineError("the plan needs bfloat16 arithmetic, which this CPU does not have")
        self._precision = spec.precision

    def __call__(self, patches):
        Paced.now_s += Paced.seconds[self._precision]
        return patches


@pytest.fixture
def paced(monkeypatch, tmp_path):
    """Passes of known lengths, measured in this process, on a new machine."""
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "_open_bundle", Paced)
    monkeypatch.setattr(calibration, "_measure_apart", lambda question: question.measure())
    monkeypatch.setattr(Paced, "asked", [])
    clock = SimpleNamespace(perf_counter=lambda: Paced.now_s, time=time.time)
    monkeypatch.setattr(calibration, "time", clock)
    return Paced


def test_what_bfloat16_gains_is_measured_once_and_kept_for_good(paced, tmp_path):
    gain = measure_gain(MODEL, SPEC, 1, SHAPE)
    assert gain == pytest.approx(2)
    assert paced.asked == ["fp32", "bf16"]
    [kept] = tmp_path.glob("speeds/bf16-*.json")
    last_year = time.time() - 365 * 24 * AN_HOUR_S
    os.utime(kept, (last_year, last_year))
    assert measure_gain(MODEL, SPEC, 1, SHAPE) == gain
    assert len(paced.asked) == 2
    measure_gain(MODEL, SPEC, 1, (16, 32, 48))
    assert len(paced.asked) == 4


def test_a_processor_without_bfloat16_gains_nothing_and_is_asked_once(paced, monkeypatch):
    monkeypatch.setattr(paced, "seconds", {"fp32": 0.001})
    assert measure_gain(MODEL, SPEC, 1, SHAPE) == 0
    assert measure_gain(MODEL, SPEC, 1, SHAPE) == 0
    assert paced.asked == ["fp32", "bf16"]


def test_a_measurement_that_fails_gains_nothing_and_is_made_again(paced, monkeypatch, tmp_path):
    def fails(question):
        raise EngineError("the engine could not be measured: Killed")

    monkeypatch.setattr(calibration, "_measure_apart", fails)
    assert measure_gain(MODEL, SPEC, 1, SHAPE) == 0
    assert not list(tmp_path.glob("speeds/*"))
