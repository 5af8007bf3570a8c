"""Settings: every option from text and from Python values, and one clear line for nonsense."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.settings import Settings, declared, parse_settings

# option: text as on the command line, the same as a Python value, what is stored
VALUES = [
    ("channel", "2", 2, "2"),
    ("channel", "DAPI", "DAPI", "DAPI"),
    ("time", "1:4", (1, 4), (1, 4)),
    ("time", "3:", [3, None], (3, None)),
    ("time", ":4", (0, 4), (0, 4)),
    ("time", ":", (0, None), (0, None)),
    ("time", "7", 7, (7, 8)),
    ("level", "1", np.int64(1), 1),
    ("nan_to_background", True, True, True),
    ("missing_chunks", "error", "error", "error"),
    ("model", "some/bundle.zip", Path("some/bundle.zip"), ("some/bundle.zip",)),
    ("model", ["a.zip", "b,c.zip"], (Path("a.zip"), "b,c.zip"), ("a.zip", "b,c.zip")),
    ("checkpoint", "epoch_012", "epoch_012", "epoch_012"),
    ("tta", True, True, True),
    ("keep_logits", True, True, True),
    ("patch", "16,32,32", (16, 32, 32), (16, 32, 32)),
    ("patch", "16x32x48", np.array([16, 32, 48]), (16, 32, 48)),
    ("patch", "64", 64, (64, 64, 64)),
    ("patch", "auto", "auto", "auto"),
    ("overlap", "0", 0, (0.0, 0.0, 0.0)),
    ("overlap", "0.25,0.5,0", [0.25, 0.5, 0], (0.25, 0.5, 0.0)),
    ("engine", "torch", "torch", "torch"),
    ("device", "cpu", "cpu", "cpu"),
    ("precision", "fp32", "fp32", "fp32"),
    ("batch", "4", 4, 4),
    ("threads", "1", 1, 1),
    ("outputs", "mask, labels", ["mask", "labels"], ("labels", "mask")),
    ("outputs", "scores", {"scores"}, ("scores",)),
    ("threshold", "0.25", 0.25, 0.25),
    ("connectivity", "3", 3, 3),
    ("min_size", "20", 20, 20),
    ("scores_dtype", "float32", "float32", "float32"),
    ("label_name", "nuclei-2.b_c", "nuclei-2.b_c", "nuclei-2.b_c"),
    ("table", "csv", "csv", "csv"),
    ("measure_channels", "all", "all", "all"),
    ("regions", "cells", "cells", "cells"),
    ("ome_zarr", "0.4", 0.4, "0.4"),
    ("overwrite", True, True, True),
    ("block", "32,64,64", [32, 64, 64], (32, 64, 64)),
    ("memory", "8GB", 8e9, 8 * 10**9),
    ("memory", "1.5 GiB", 3 * 2**29, 3 * 2**29),
    ("memory", "500mb", 5 * 10**8, 5 * 10**8),
    ("workers", "2", 2, 2),
    ("scheduler", "tcp://10.0.0.1:8786", "tcp://10.0.0.1:8786", "tcp://10.0.0.1:8786"),
    ("cluster", "slurm.yaml", Path("slurm.yaml"), "slurm.yaml"),
    ("retries", "0", 0, 0),
    ("timeout", "90", 90, 90.0),
    ("roi", "0:4,10:20,3:9", ((0, 4), (10, 20), (3, 9)), ((0, 4), (10, 20), (3, 9))),
    ("wells", "A/1,B/*", "A/1,B/*", "A/1,B/*"),
    ("fields", "0,2", "0,2", "0,2"),
    ("acquisition", "3", 3, 3),
    (
        "endpoint",
        "https://minio.example.org",
        "https://minio.example.org",
        "https://minio.example.org",
    ),
    ("anon", True, True, True),
    ("storage_option", "region=a, b=c", ["region=a", "b=c"], ("region=a", "b=c")),
    ("voxel_size", "model", "model", "model"),
    ("where", "cells", "cells", "cells"),
    ("where_margin", "2.5", 2.5, 2.5),
    ("unmarked", True, True, True),
    ("voxel_size", "0.29,0.108333,0.1", (0.29, 0.108333, 0.1), (0.29, 0.108333, 0.1)),
    ("threshold", "otsu", "otsu", "otsu"),
    ("fill_holes", "30", 30, 30),
    ("split", "distance", "distance", "distance"),
    ("split_depth", "0.5", 0.5, 0.5),
    ("follow", True, True, True),
    ("follow_timeout", "30m", 1800, 1800.0),
    ("settle", "0.5", 0.5, 0.5),
    ("on_volume", "notify --all", "notify --all", "notify --all"),
    ("normalization", "10.5,2", (10.5, 2), (10.5, 2.0)),
    ("normalization", "level:2", "level:2", "level:2"),
    ("normalization", "well", "well", "well"),
]


# What an option is about, where that is not there by default.
NEEDS = {
    "follow_timeout": {"follow": True},
    "settle": {"follow": True},
    "measure_channels": {"outputs": "labels,measurements"},
    "regions": {"outputs": "labels,measurements"},
}


def parsed(name: str, value: object) -> Settings:
    return parse_settings({**NEEDS.get(name, {}), name: value})


@pytest.mark.parametrize(("name", "text", "value", "stored"), VALUES)
def test_text_and_python_values_mean_the_same(name, text, value, stored):
    from_text = parsed(name, text)
    from_value = parsed(name, value)
    assert getattr(from_text, name) == stored
    assert type(getattr(from_text, name)) is type(stored)
    assert from_value == from_text


@pytest.mark.parametrize(("name", "text", "value", "stored"), VALUES)
def test_json_brings_back_the_same(name, text, value, stored):
    settings = parsed(name, text)
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_every_option_is_in_the_table_above():
    assert {name for name, *_ in VALUES} == set(Settings.model_fields)


NONSENSE = [
    ("follow", "x", "true or false"),
    ("unmarked", "x", "true or false"),
    ("follow_timeout", "soon", "a time such as 55m"),
    ("follow_timeout", "30", "it needs --follow"),
    ("settle", "-1", "0 or more"),
    ("settle", "3", "it needs --follow"),
    ("on_volume", "", "an empty text"),
    ("on_volume", " ", "expected a command"),
    ("on_volume", "echo 'a", "No closing quotation"),
    ("table", "xlsx", "'parquet' or 'csv'"),
    ("measure_channels", "", "an empty text"),
    ("measure_channels", "all", "add measurements to --outputs"),
    ("regions", "", "an empty text"),
    ("regions", "cells", "add measurements to --outputs"),
    ("where", "", "an empty text"),
    ("where_margin", "-1", "0 or more"),
    ("where_margin", "inf", "a finite number"),
    ("voxel_size", "0,1,1", "a number above 0"),
    ("voxel_size", "1,inf,1", "a finite number"),
    ("voxel_size", "1,2", "Z,Y,X"),
    ("voxel_size", "modell", "source or model"),
    ("channel", "", "expected a value, found an empty text"),
    ("time", "-1", "such as 0:10"),
    ("time", "5:2", "at least one timepoint"),
    ("time", "3:3", "at least one timepoint"),
    ("time", (0, -1), "at least one timepoint"),
    ("time", "a:b", "such as 0:10"),
    ("time", "", "such as 0:10"),
    ("time", "²", "such as 0:10"),
    ("level", "-1", "expected 0 or more"),
    ("level", "1.5", "expected a whole number"),
    ("level", True, "found true or false"),
    ("nan_to_background", "maybe", "expected true or false"),
    ("missing_chunks", "maybe", "fill"),
    ("model", "", "expected a value, found an empty text"),
    ("model", [], "expected at least 1, found 0"),
    ("checkpoint", "", "expected a value, found an empty text"),
    ("tta", "maybe", "expected true or false"),
    ("keep_logits", "maybe", "expected true or false"),
    ("patch", "a,b", "found 2"),
    ("patch", "a,b,c", "expected a whole number"),
    ("patch", "16,32", "three numbers"),
    ("patch", "16,32,32,32", "found 4"),
    ("patch", "-16,32,32", "expected a number above 0"),
    ("patch", (), "found 0"),
    ("patch", 0, "expected a number above 0"),
    ("patch", True, "found true or false"),
    ("overlap", "1.0", "expected a number below 1"),
    ("overlap", "-0.1", "expected 0 or more"),
    ("overlap", "nan", "expected a number below 1"),
    ("overlap", "0.5,0.5", "three numbers"),
    ("engine", "tensorflow", "'torch'"),
    ("device", "gpu", "'cuda'"),
    ("precision", "fp8", "'fp32'"),
    ("batch", "0", "expected a number above 0"),
    ("batch", "two", "expected a whole number"),
    ("threads", "-1", "expected a number above 0"),
    (
        "outputs",
        "labels,probabilities",
        "unknown 'probabilities'; choose from labels, scores, mask",
    ),
    ("outputs", "labels,,scores", "unknown ''"),
    ("outputs", "", "unknown ''"),
    ("outputs", [], "expected one or more of labels"),
    ("threshold", "2", "from 0 to 1"),
    ("threshold", "-0.5", "from 0 to 1"),
    ("threshold", "nan", "from 0 to 1"),
    ("threshold", "high", "or one of otsu, yen"),
    ("fill_holes", "-1", "expected 0 or more"),
    ("split", "shape", "'none' or 'distance'"),
    ("split_depth", "0", "a number above 0"),
    ("split_depth", "inf", "finite"),
    ("normalization", "10", "MEAN,STD, level:N, or one of series"),
    ("normalization", "10,0", "above 0"),
    ("normalization", "nan,1", "finite mean"),
    ("normalization", "level:-1", "MEAN,STD, level:N, or one of series"),
    ("timeout", "0", "expected a number above 0"),
    ("roi", "0:4,10:20", "z0:z1,y0:y1,x0:x1"),
    ("roi", "0:4,10:5,0:3", "at least one voxel"),
    ("wells", "", "expected a value, found an empty text"),
    ("fields", "", "expected a value, found an empty text"),
    ("acquisition", "-1", "expected 0 or more"),
    ("endpoint", "", "expected a value, found an empty text"),
    ("anon", "perhaps", "expected true or false"),
    ("storage_option", 3, "expected a list"),
    ("connectivity", "4", "1, 2 or 3"),
    ("connectivity", "0", "1, 2 or 3"),
    ("min_size", "-3", "expected 0 or more"),
    ("scores_dtype", "uint16", "'float32'"),
    ("label_name", "a/b", "letters, digits"),
    ("label_name", "..", "letters, digits"),
    ("label_name", ".hidden", "letters, digits"),
    ("label_name", "a\\b", "letters, digits"),
    ("label_name", "a\n", "letters, digits"),
    ("label_name", "zarr.json", "letters, digits"),
    ("label_name", "a" * 101, "at most 100 letters"),
    ("ome_zarr", "0.6", "'0.4' or '0.5'"),
    ("overwrite", "maybe", "expected true or false"),
    ("block", "0,1,1", "expected a number above 0"),
    ("block", "32,64", "three numbers"),
    ("memory", "lots", "such as 8GB"),
    ("memory", "1.2.3GB", "such as 8GB"),
    ("memory", "0", "expected a number above 0"),
    ("memory", "-8GB", "such as 8GB"),
    ("workers", "-1", "expected 0 or more"),
    ("scheduler", "", "expected a value, found an empty text"),
    ("cluster", "", "expected a value, found an empty text"),
    ("retries", "-1", "expected 0 or more"),
]


@pytest.mark.parametrize(("name", "value", "message"), NONSENSE)
def test_nonsense_names_option_value_and_what_is_expected(name, value, message):
    with pytest.raises(SettingsError) as raised:
        parse_settings({name: value})
    line = str(raised.value)
    assert line.startswith(f"--{name.replace('_', '-')} ")
    assert message in line
    assert line.count("expected") <= 1
    assert len(line.splitlines()) == 1


def test_every_option_refuses_something():
    assert {name for name, *_ in NONSENSE} == set(Settings.model_fields)


@given(
    st.sampled_from(sorted(Settings.model_fields)),
    st.text() | st.integers() | st.floats() | st.none(),
)
def test_any_value_is_taken_or_refused_by_name(name, value):
    try:
        settings = parse_settings({name: value})
    except SettingsError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert not refusal or refusal.startswith(f"--{name.replace('_', '-')} ")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"unknown option treshold; did you mean threshold\?"):
        parse_settings({"treshold": 0.4})
    with pytest.raises(SettingsError, match="unknown option zzz; choose from channel, "):
        parse_settings({"zzz": 1})


def test_settings_are_values():
    assert parse_settings({"block": "8,8,8"}) == Settings(block=(8, 8, 8))
    with pytest.raises(ValueError, match="frozen"):
        Settings().level = 1


def test_open_options_are_filled_and_given_ones_stay():
    settings = parse_settings({"patch": "16,32,32"}).filled(
        {"patch": (64, 64, 64), "overlap": (0.5,) * 3, "device": "cpu", "batch": 2}
    )
    assert settings.patch == (16, 32, 32)
    assert (settings.overlap, settings.device, settings.batch) == ((0.5,) * 3, "cpu", 2)


def test_only_how_and_where_may_change_when_a_run_resumes():
    free = {name for name in Settings.model_fields if not declared(name).changes_result}
    # The model counts by its digest, not by its name.
    assert free == {
        "model",
        "checkpoint",
        "memory",
        "workers",
        "scheduler",
        "cluster",
        "retries",
        "timeout",
        "overwrite",
        "endpoint",
        "anon",
        "storage_option",
        "wells",
        "fields",
        "acquisition",
        "follow",
        "follow_timeout",
        "settle",
        "on_volume",
        "unmarked",
    }


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_has_help_and_a_heading(name):
    assert declared(name).help.endswith((".", ")"))
    assert declared(name).panel
