"""Resolved settings: what is recorded of them, and that no form of a value is lost on the way."""

import pytest
from pydantic import TypeAdapter

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.plan.resolved import (
    Automatic,
    Fixed,
    Given,
    OfLevel,
    OfVolume,
    Resolved,
    Where,
    normalization_of,
    threshold_of,
    where_of,
)
from megaseg_dask.plan.settings import Settings, declared, parse_settings

VALUES = {
    "channels": (2, 0),
    "times": (1, 4),
    "level": 1,
    "roi": Box((0, 4, 8), (16, 40, 60)),
    "voxel_size_um": (0.5, 0.25, 0.25),
    "where": Where("cells", 1.5),
    "nan_to_background": True,
    "missing_chunks": "error",
    "normalization": OfLevel(2),
    "patch": (16, 32, 32),
    "overlap": (0.5, 0.25, 0.0),
    "engine": EngineSpec("torch", "cpu", "fp32", 3, True),
    "batch": 2,
    "outputs": ("labels", "scores", "measurements"),
    "threshold": Automatic("otsu"),
    "connectivity": 2,
    "min_size": 5,
    "fill_holes": 7,
    "split_depth": 0.6,
    "scores_dtype": "float32",
    "keep_logits": True,
    "label_name": "cells",
    "measure_channels": (1, 2),
    "regions": "cells/0",
    "table": "csv",
    "ome_zarr": "0.4",
    "block": (16, 64, 64),
}


def test_options_are_those_that_can_change_the_result_in_their_order():
    names = [name for name in Settings.model_fields if declared(name).changes_result]
    assert list(Resolved(**VALUES).options()) == names


def test_options_as_settings_are_the_same_values():
    resolved = Resolved(**VALUES)
    settings = resolved.as_settings(parse_settings({"retries": 5, "patch": "auto"}))
    assert settings.retries == 5
    assert settings.channel == "2,0"
    assert settings.roi == ((0, 16), (4, 40), (8, 60))
    assert (settings.threads, settings.tta) == (3, True)
    assert normalization_of(settings) == resolved.normalization
    assert threshold_of(settings) == resolved.threshold
    assert where_of(settings) == resolved.where
    assert parse_settings(resolved.options()) == settings.model_copy(update={"retries": 3})


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, OfVolume()), ("level:0", OfLevel(0)), ("level:2", OfLevel(2)), ("3,2", Given(3, 2))],
)
@pytest.mark.parametrize("threshold", [Fixed(0.0), Fixed(1.0), Automatic("li")])
def test_json_brings_back_the_same_form(text, expected, threshold):
    normalization = normalization_of(parse_settings({"normalization": text}))
    assert normalization == expected
    values = {**VALUES, "normalization": normalization, "threshold": threshold, "roi": None}
    resolved = Resolved(**values)
    adapter = TypeAdapter(Resolved)
    assert adapter.validate_json(adapter.dump_json(resolved)) == resolved
