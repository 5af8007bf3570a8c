"""What Python users get: signatures made from the settings, results with data, scripts that run."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray

import megaseg_dask
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.lazy import _SETTINGS
from megaseg_dask.plan.settings import Settings, declared
from megaseg_dask.run.cluster import main_module
from tests.fixtures.images import blobs, write_image

SHAPE = (16, 32, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("source")
    return str(write_image(folder / "image.zarr", blobs(SHAPE)))


@pytest.fixture(scope="module")
def options(tiny_bundle) -> dict[str, object]:
    return {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "overlap": 0, "workers": 0}


@pytest.fixture(scope="module")
def result(source, options, tmp_path_factory) -> megaseg_dask.Result:
    target = tmp_path_factory.mktemp("target") / "out.zarr"
    return megaseg_dask.segment(source, target, outputs="labels,scores,measurements", **options)


# -- signatures


@pytest.mark.parametrize(
    ("function", "names"), [("segment", Settings.model_fields), ("predict", _SETTINGS)]
)
def test_each_setting_is_a_keyword_with_its_default_type_and_help(function, names):
    function = getattr(megaseg_dask, function)
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in set(names) - {"model"}:
        assert parameters[name].default == Settings.model_fields[name].default
        assert parameters[name].annotation is not parameters[name].empty
        assert "Validator" not in str(parameters[name].annotation)
        assert f"    {name}: {declared(name).help}" in inspect.getdoc(function)


def test_an_unknown_keyword_is_refused_with_the_nearest(source, tmp_path):
    with pytest.raises(SettingsError, match="did you mean threshold"):
        megaseg_dask.segment(source, tmp_path / "out.zarr", treshold=0.4)


# -- results


def test_a_result_gives_labels_table_and_report(result):
    labels = result.labels
    assert isinstance(labels, xarray.DataArray)
    assert labels.chunks is not None, "it is lazy"
    assert (labels.dims, labels.shape) == (("z", "y", "x"), SHAPE)
    assert int(labels.max()) == result.n_objects
    pandas = pytest.importorskip("pandas")
    assert isinstance(result.table, pandas.DataFrame)
    assert len(result.table) == result.n_objects
    assert "<html" in Path(result.report()).read_text()


def test_a_result_without_measurements_says_how_to_get_them(source, options, tmp_path):
    result = megaseg_dask.segment(source, tmp_path / "out.zarr", outputs="scores", **options)
    with pytest.raises(SettingsError, match="outputs='labels,scores,measurements'"):
        _ = result.table
    with pytest.raises(SettingsError, match="or none"):
        _ = result.labels


# -- labelling again


def test_labels_are_made_again_with_data_of_their_own(result, source, options, tmp_path):
    megaseg_dask.segment(source, tmp_path / "out.zarr", **options)
    outputs = "labels,measurements"
    again = megaseg_dask.relabel(
        tmp_path / "out.zarr", label_name="again", threshold=0.6, outputs=outputs, workers=0
    )
    assert isinstance(again, megaseg_dask.Result)
    assert int(again.labels.max()) == again.n_objects == len(again.table)
    assert again.table.volume_voxels.sum() == int((again.labels > 0).sum()) > 0
    with pytest.raises(SettingsError, match="does not take treshold; did you mean threshold"):
        megaseg_dask.relabel(tmp_path / "out.zarr", label_name="b", treshold=0.4)
    with pytest.raises(SettingsError, match="does not take overlap"):
        megaseg_dask.relabel(tmp_path / "out.zarr", label_name="b", overlap=0.5)
    parameters = inspect.signature(megaseg_dask.relabel).parameters
    assert parameters["threshold"].default is ...
    assert "overlap" not in parameters
    assert f"    min_size: {declared('min_size').help}" in inspect.getdoc(megaseg_dask.relabel)


# -- arrays


def test_segment_refuses_an_array_with_the_next_step(tmp_path):
    with pytest.raises(SettingsError, match=r"found a numpy\.ndarray; write .* or call .*predict"):
        megaseg_dask.segment(np.zeros(SHAPE), tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_an_array_is_predicted_as_the_same_image_with_coordinates(options):
    values = blobs(SHAPE)
    model = options["model"]
    kept = {"engine": "torch", "threads": 1, "overlap": 0}
    scores = megaseg_dask.predict(values, model, spacing_um=(0.3, 0.1, 0.2), **kept)
    assert scores.dims == ("z", "y", "x")
    assert scores.x.attrs["units"] == "µm"
    np.testing.assert_allclose(scores.x[:3], [0, 0.2, 0.4])
    named = xarray.DataArray(values, dims=["z", "y", "x"])
    np.testing.assert_array_equal(scores, megaseg_dask.predict(named, model, **kept))


@pytest.mark.parametrize(
    ("image", "spacing", "error", "words"),
    [
        (np.zeros((2, *SHAPE)), None, SourceError, "has 4 dimensions"),
        ("image.zarr", None, SourceError, "is a str"),
        (xarray.DataTree(), None, SourceError, "pass one of them, such as image\\['0/image'\\]"),
        (np.zeros(SHAPE), (1, 2), SettingsError, "three positive numbers"),
        (np.zeros(SHAPE), (1, 0, 1), SettingsError, "three positive numbers"),
        (xarray.DataArray(np.zeros(SHAPE), dims=list("zyx")), (1, 1, 1), SettingsError, "coord"),
    ],
)
def test_what_is_no_volume_is_refused(image, spacing, error, words):
    with pytest.raises(error, match=words):
        megaseg_dask.predict(image, spacing_um=spacing)


# -- notebooks and scripts


def test_a_notebook_shows_steps_and_bars(source, options, tmp_path, monkeypatch):
    """IPython's display is the one thing that a test replaces: it needs a browser."""
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = str
    handle = type("Handle", (), {"update": lambda self, html: shown.append(html)})()
    display.display = lambda *_, **__: handle
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: type("Shell", (), {"kernel": object()})()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    megaseg_dask.segment(source, tmp_path / "out.zarr", **options)
    assert "reading the image" in shown[0]
    assert "segmenting volumes" in shown[-1]
    assert 'value="1" max="1"' in shown[-1]
    n_shown = len(shown)
    megaseg_dask.segment(source, tmp_path / "other.zarr", progress=False, **options)
    assert len(shown) == n_shown


@pytest.mark.parametrize(
    ("text", "spec", "is_advised"),
    [
        ("segment()", None, True),
        ("if __name__ == '__main__': segment()", None, False),
        ("segment()", object(), False),
        (None, None, False),
    ],
)
def test_the_advice_about_the_main_guard_is_for_scripts_without_it(
    text, spec, is_advised, tmp_path, monkeypatch
):
    main = ModuleType("__main__")
    main.__spec__ = spec
    if text is not None:
        script = tmp_path / "script.py"
        script.write_text(text)
        main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert bool(main_module.advice()) == is_advised


@pytest.mark.slow
def test_a_script_on_standard_input_starts_workers(source, options, tmp_path):
    call = {**options, "workers": 1}
    script = (
        f"import megaseg_dask\nprint(megaseg_dask.segment({source!r}, 'o.zarr', **{call}).status)"
    )
    ended = subprocess.run(
        [sys.executable, "-"], input=script, text=True, capture_output=True, cwd=tmp_path
    )
    assert ended.stdout == "done\n", ended.stderr
