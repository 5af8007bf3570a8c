"""Normalization of groups: a series, a well, an acquisition, a plate.

The oracle is NumPy over the pooled voxels, and a run with its mean and standard deviation.
"""

import json
from collections import defaultdict

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.plate import Acquisition, Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.status import status
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (16, 40, 44)
FIELDS = [
    Field("A", "1", "0", 0),
    Field("A", "1", "1", 1),
    Field("B", "1", "0", 0),
    Field("B", "1", "1", 1),
]


def voxels(number: int, dtype: str) -> np.ndarray:
    """Two timepoints of a field, which bleach, and are of another brightness in each field."""
    image = np.stack([blobs(SHAPE, seed=9 * number + t) for t in range(2)]).astype(np.float64)
    image *= np.reshape([1.0, 0.6], (2, 1, 1, 1)) * (1 + number)
    return image.astype(dtype)


def write_fields(folder, dtype="uint16") -> dict[str, np.ndarray]:
    acquisitions = (Acquisition(0, "first"), Acquisition(1, "second"))
    plate = Plate("0.5", "screen", ("A", "B"), ("1",), tuple(FIELDS), acquisitions)
    write_plate(Location.of(folder), plate, "0.5")
    images = {field.path: voxels(n, dtype) for n, field in enumerate(FIELDS)}
    for path, image in images.items():
        write_image(folder / path, image, axes="tzyx")
    return images


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    def call(source, target, emit=lambda _: None, **options):
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "scores_dtype": "float32",
            **options,
        }
        return segment_here(str(source), str(tmp_path / target), parse_settings(options), emit=emit)

    return call


def provenance(image) -> dict:
    return json.loads((image / "zarr.json").read_text())["attributes"]["megaseg"]


def group_of(kind: str, path: str) -> str:
    number = path.rpartition("/")[2]
    return {"series": path, "well": path[:3], "acquisition": number, "plate": ""}[kind]


@pytest.mark.parametrize(
    ("kind", "block", "dtype"),
    [
        ("series", None, "float32"),
        ("well", "16,16,32", "uint16"),
        ("acquisition", None, "uint16"),
        ("plate", "16,16,32", "float32"),
    ],
)
def test_a_group_has_the_statistics_of_its_pooled_voxels(run, tmp_path, kind, block, dtype):
    images = write_fields(tmp_path / "plate.zarr", dtype)
    options = {} if block is None else {"block": block}
    assert run(tmp_path / "plate.zarr", "out.zarr", normalization=kind, **options).exit_code == 0
    pooled = defaultdict(list)
    for path, image in images.items():
        pooled[group_of(kind, path)].append(image.ravel().astype(np.float64))
    for path in images:
        together = np.concatenate(pooled[group_of(kind, path)])
        found = provenance(tmp_path / "out.zarr" / path)
        assert found["settings"]["normalization"] == kind
        for row in found["normalization"]:
            assert_allclose(row["mean"], together.mean(), rtol=1e-6)
            assert_allclose(row["std"], together.std(), rtol=1e-6)
    path = "B/1/1"
    row = provenance(tmp_path / "out.zarr" / path)["normalization"][0]
    given = f"{row['mean']!r},{row['std']!r}"
    run(tmp_path / "plate.zarr" / path, "alone.zarr", normalization=given, **options)
    ours = zarr.open_array(tmp_path / "out.zarr" / path / "0", mode="r")[...]
    np.testing.assert_array_equal(ours, zarr.open_array(tmp_path / "alone.zarr/0")[...])


def test_a_series_needs_no_plate_and_a_well_does(run, tmp_path):
    image = voxels(0, "uint16")
    write_image(tmp_path / "movie.zarr", image, axes="tzyx")
    run(tmp_path / "movie.zarr", "out.zarr", normalization="series")
    rows = provenance(tmp_path / "out.zarr")["normalization"]
    assert {row["mean"] for row in rows} == {image.mean(dtype=np.float64)}
    with pytest.raises(SettingsError, match=r"--normalization well: the source is not a plate"):
        run(tmp_path / "movie.zarr", "other.zarr", normalization="well")


def files_of(folder) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_that_stops_while_it_measures_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    write_fields(tmp_path / "plate.zarr")
    options = {"normalization": "plate"}
    run(tmp_path / "plate.zarr", "whole/out.zarr", **options)
    seen = []

    def stop(workspace, stage, index, original=worker.run_task):
        seen.append(stage)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_task", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "plate.zarr", "out.zarr", **options)
    assert set(seen) == {"measure"}
    [state] = status(str(tmp_path / "out.zarr"))
    assert state.stages["measure"][0] == 3
    assert run(tmp_path / "plate.zarr", "out.zarr", **options).exit_code == 0
    assert files_of(tmp_path / "out.zarr") == files_of(tmp_path / "whole/out.zarr")
    assert run(tmp_path / "plate.zarr", "out.zarr", **options).already_done


def test_a_field_that_cannot_be_measured_leaves_its_group_failed(run, tmp_path):
    write_fields(tmp_path / "plate.zarr")
    chunk = next((tmp_path / "plate.zarr/A/1/1/0/c/0").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    whole = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    result = run(tmp_path / "plate.zarr", "out.zarr", normalization="well")
    failed = {failure.volume: failure for failure in result.failures}
    assert set(failed) == {f"A/1/{field} t={t} c=0" for field in "01" for t in range(2)}
    assert failed["A/1/1 t=0 c=0"].stage == "measure"
    assert "group (A/1 c=0) need A/1/1 t=0 c=0" in failed["A/1/0 t=1 c=0"].error
    assert (tmp_path / "out.zarr/B/1/0/0/c").exists()
    missing = provenance(tmp_path / "out.zarr/A/1/0")["missing_boxes"]
    assert [box["t"] for box in missing] == [0, 1]
    [state] = status(str(tmp_path / "out.zarr"))
    assert state.exit_code == 1
    chunk.write_bytes(whole)
    assert run(tmp_path / "plate.zarr", "out.zarr", normalization="well").exit_code == 0
    run(tmp_path / "plate.zarr", "whole/out.zarr", normalization="well")
    assert files_of(tmp_path / "out.zarr") == files_of(tmp_path / "whole/out.zarr")


def test_a_field_without_metadata_leaves_its_group_out_and_names_it(run, tmp_path):
    write_fields(tmp_path / "plate.zarr")
    lost = tmp_path / "plate.zarr/A/1/1/zarr.json"
    lost.rename(tmp_path / "lost.json")
    result = run(tmp_path / "plate.zarr", "out.zarr", normalization="well")
    told = {failure.volume: failure.error for failure in result.failures}
    assert set(told) == {"A/1/0", "A/1/1"}
    assert "statistics of its well need A/1/1" in told["A/1/0"]
    with pytest.raises(SourceError, match=r"statistics of its plate need A/1/1"):
        run(tmp_path / "plate.zarr", "other.zarr", normalization="plate")
    (tmp_path / "lost.json").rename(lost)
    assert run(tmp_path / "plate.zarr", "out.zarr", normalization="well").exit_code == 0
    run(tmp_path / "plate.zarr", "whole/out.zarr", normalization="well")
    for path in ("A/1/0", "A/1/1"):
        ours = zarr.open_array(tmp_path / "out.zarr" / path / "0", mode="r")[...]
        theirs = zarr.open_array(tmp_path / "whole/out.zarr" / path / "0", mode="r")[...]
        np.testing.assert_array_equal(ours, theirs)


def test_fields_of_several_forms_are_no_group(run, tmp_path):
    write_fields(tmp_path / "plate.zarr")
    write_image(tmp_path / "plate.zarr/B/1/1", voxels(0, "uint16")[:, :, :32], axes="tzyx")
    with pytest.raises(SettingsError, match=r"fields A/1/0 and B/1/1 of one group have different"):
        run(tmp_path / "plate.zarr", "out.zarr", normalization="plate")
    run(tmp_path / "plate.zarr", "out.zarr", normalization="series")
    run(tmp_path / "plate.zarr", "few.zarr", normalization="well", fields="0")
    with pytest.raises(SettingsError, match=r"of one group"):
        run(tmp_path / "plate.zarr", "few.zarr", normalization="well", wells="A/1", fields="1")


def test_what_a_group_predicted_is_labelled_again(run, tmp_path):
    write_fields(tmp_path / "plate.zarr")
    run(tmp_path / "plate.zarr", "out.zarr", normalization="well")
    run(tmp_path / "plate.zarr", "high.zarr", normalization="well", threshold=0.7)
    words = ["--label-name", "high", "--threshold", "0.7", "--workers", "0"]
    done = CliRunner().invoke(build_app(), ["relabel", str(tmp_path / "out.zarr"), *words])
    assert done.exit_code == 0, done.output
    ours, fresh = (
        zarr.open_array(tmp_path / name / "A/1/0/labels" / label / "0", mode="r")[...]
        for name, label in (("out.zarr", "high"), ("high.zarr", "megaseg"))
    )
    np.testing.assert_array_equal(ours, fresh)
