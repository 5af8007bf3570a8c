"""A conversion that is kept is what was converted, or it is converted again."""

import logging
import shutil

import numpy as np
import pytest

from megaseg_dask.inference import conversion
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.inference.ensemble import BundleRef
from megaseg_dask.inference.openvino import OpenVinoEngine
from megaseg_dask.models import read_bundle
from tests.fixtures.bundles import one_thread

SPEC = EngineSpec("openvino", "cpu", "fp32", 1)
_CONVERTED = {}
PATCHES = np.random.default_rng(0).standard_normal((1, 1, 32, 32, 32)).astype(np.float32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def reference(tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    return BundleRef(str(tiny_bundle), bundle.name, bundle.digest)


@pytest.fixture
def conversions(monkeypatch):
    made = []

    def convert(bundle, original=conversion.convert):
        made.append(bundle.digest)
        # A conversion takes a second, and gives the same network each time.
        if bundle.digest not in _CONVERTED:
            with one_thread():
                _CONVERTED[bundle.digest] = original(bundle)
        return _CONVERTED[bundle.digest].clone()

    monkeypatch.setattr(conversion, "convert", convert)
    return made


def predict(reference):
    return OpenVinoEngine(reference, SPEC)(PATCHES)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def remove(path):
    path.unlink()


HARMS = [("model.xml", zero), ("model.bin", cut), ("sha256", remove)]
OTHER_HARMS = [
    pytest.param("model.xml", cut, marks=pytest.mark.slow),
    pytest.param("model.xml", remove, marks=pytest.mark.slow),
    pytest.param("model.bin", zero, marks=pytest.mark.slow),
    pytest.param("model.bin", remove, marks=pytest.mark.slow),
    pytest.param("sha256", zero, marks=pytest.mark.slow),
    pytest.param("sha256", cut, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "harm"), [*HARMS, *OTHER_HARMS])
def test_a_damaged_conversion_is_made_again(name, harm, home, reference, conversions):
    expected = predict(reference)
    [kept] = (home / "openvino").iterdir()
    np.testing.assert_array_equal(predict(reference), expected)
    assert len(conversions) == 1
    harm(kept / name)
    np.testing.assert_array_equal(predict(reference), expected)
    assert len(conversions) == 2
    np.testing.assert_array_equal(predict(reference), expected)
    assert len(conversions) == 2
    assert [path.name for path in (home / "openvino").iterdir()] == [kept.name]


def test_a_home_that_cannot_be_written_is_told_and_costs_a_conversion(
    home, reference, conversions, caplog, monkeypatch
):
    home.write_text("a file in the place of the folder")
    with caplog.at_level(logging.WARNING):
        predict(reference)
    assert "the converted network cannot be stored" in caplog.text
    home.unlink()

    def is_full(*_, **__):
        raise RuntimeError("Exception from src/core:\nNo space left on device")

    monkeypatch.setattr("openvino.save_model", is_full)
    caplog.clear()
    predict(reference)
    assert "No space left on device), so each worker converts it again" in caplog.text
    assert len(conversions) == 2
    shutil.rmtree(home)
