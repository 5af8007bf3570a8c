"""Chunks that the source lacks: counted, an error, or all of a volume."""

import json
import re

import numpy as np
import pytest

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import DataError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Absent, Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import range_server
from tests.stores.test_runs import upload

SHAPE = (32, 48, 48)
CHUNK = (16, 24, 24)


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    def call(source, target, **options):
        options = {"model": str(tiny_bundle), "threads": 1, "overlap": 0, **options}
        return segment_here(str(source), str(tmp_path / target), parse_settings(options))

    return call


@pytest.fixture(params=["chunk of v2", "chunk of v3", "shard", "chunk of a shard"])
def source(request, tmp_path):
    """An image of two timepoints, of which the first lacks something, and how many."""
    image = np.stack([blobs(SHAPE, seed=t) + 1 for t in range(2)])
    path = tmp_path / "image.zarr"
    if request.param == "chunk of v2":
        write_image(path, image, axes="tzyx", version="0.4", chunks=(1, *CHUNK))
        (path / "0/0/1/0/1").unlink()
        return path, Absent(1, 0)
    if request.param == "chunk of v3":
        write_image(path, image, axes="tzyx", chunks=(1, *CHUNK))
        (path / "0/c/0/1/0/1").unlink()
        return path, Absent(1, 0)
    if request.param == "chunk of a shard":
        image[0, :16, 24:, :24] = 0
        image[0, 16:, :24, :24] = 0
    write_image(path, image, axes="tzyx", chunks=(1, *CHUNK), shards=(1, 32, 24, 48))
    if request.param == "shard":
        (path / "0/c/0/0/1/0").unlink()
        return path, Absent(1, 0)
    return path, Absent(0, 2)


@pytest.mark.parametrize("block", [None, "16,24,48"])
def test_what_is_missing_is_counted_for_each_volume(source, run, tmp_path, block):
    path, absent = source
    options = {} if block is None else {"block": block}
    result = run(path, "out.zarr", **options)
    assert result.exit_code == 0
    n = absent.objects + absent.inner
    [warning] = [text for text in result.warnings if "of the source" in text]
    chunks = "1 chunk of the source is" if n == 1 else f"{n} chunks of the source are"
    assert warning.startswith(f"{chunks} missing")
    assert f"(t=0 c=0: {n})" in warning
    assert ("in shards" in warning) == bool(absent.inner)


@pytest.mark.parametrize("block", [None, "16,24,48"])
def test_what_is_missing_is_an_error_if_asked_for(source, run, tmp_path, block):
    path, _ = source
    options = {} if block is None else {"block": block}
    result = run(path, "out.zarr", missing_chunks="error", **options)
    assert result.exit_code == 1
    assert {failure.volume for failure in result.failures} == {"t=0 c=0"}
    assert "--missing-chunks fill" in result.failures[0].error
    assert "is missing; restore it" in result.failures[0].error
    given = run(path, "given.zarr", missing_chunks="error", normalization="9,3", **options)
    assert {failure.volume for failure in given.failures} == {"t=0 c=0"}


def test_a_source_that_lacks_nothing_is_no_error(run, tmp_path):
    # Voxels that are the fill value, and are written.
    image = np.zeros(SHAPE, np.uint16)
    image[:16] = blobs((16, 48, 48), seed=0)
    write_image(tmp_path / "image.zarr", image, chunks=CHUNK, config={"write_empty_chunks": True})
    result = run(tmp_path / "image.zarr", "out.zarr", missing_chunks="error")
    assert result.exit_code == 0
    assert not [text for text in result.warnings if "missing" in text]


def break_encoding(path):
    document = json.loads((path / "0/zarr.json").read_text())
    document["chunk_key_encoding"] = {"name": "v2", "configuration": {"separator": "."}}
    (path / "0/zarr.json").write_text(json.dumps(document))


def remove_chunks(path):
    for chunk in [found for found in (path / "0/c").rglob("*") if found.is_file()]:
        chunk.unlink()


def remove_a_timepoint(path):
    for chunk in [found for found in (path / "0/c/1").rglob("*") if found.is_file()]:
        chunk.unlink()


@pytest.mark.parametrize("missing_chunks", ["fill", "error"])
@pytest.mark.parametrize("options", [{}, {"block": "16,24,48"}, {"normalization": "9,3"}])
@pytest.mark.parametrize(
    ("damage", "cause", "times"),
    [
        (break_encoding, r"the array has c/0/0/0/0: .*chunk_key_encoding", {0, 1}),
        (remove_chunks, r"no chunk at all: the copy is incomplete, or another --level", {0, 1}),
        (remove_a_timepoint, r"has others, so this timepoint or channel was not written", {1}),
    ],
)
def test_a_volume_without_any_chunk_fails(
    run, tmp_path, damage, cause, times, options, missing_chunks
):
    image = np.stack([blobs(SHAPE, seed=t) + 1 for t in range(2)])
    write_image(tmp_path / "image.zarr", image, axes="tzyx", chunks=(1, *CHUNK))
    damage(tmp_path / "image.zarr")
    result = run(tmp_path / "image.zarr", "out.zarr", missing_chunks=missing_chunks, **options)
    assert {failure.volume for failure in result.failures} == {f"t={t} c=0" for t in times}
    if missing_chunks == "fill":
        assert re.search(cause, result.failures[0].error)
        assert "none of the 8 chunks" in result.failures[0].error


def test_on_a_bucket_and_on_the_web(tmp_path, s3):
    """The same counts, and the same error, as on a disk."""
    image = np.stack([blobs(SHAPE, seed=t) + 1 for t in range(2)])
    image[0, :16, 24:, :24] = 0
    path = tmp_path / "image.zarr"
    write_image(path, image, axes="tzyx", chunks=(1, *CHUNK), shards=(1, 32, 24, 48))
    (path / "0/c/1/0/1/0").unlink()
    upload(path, "s3://private/missing.zarr")
    with range_server(tmp_path) as url:
        for address in (path, "s3://private/missing.zarr", f"{url}/image.zarr"):
            require_counts(Location.of(address))


def require_counts(location: Location) -> None:
    volumes = [Volume.of(location, read_image(location), t=t) for t in range(2)]
    box = Box.of(SHAPE)
    counts = [volume.count_absent(box, volume.read(box)) for volume in volumes]
    assert counts == [Absent(0, 1), Absent(1, 0)]
    for t in range(2):
        strict = Volume(volumes[t].location, volumes[t].axis_names, t, needs_chunks=True)
        with pytest.raises(DataError, match="is missing; restore it"):
            strict.read(box)


@pytest.mark.parametrize(
    ("block", "last"),
    [(None, "volume"), pytest.param("16,24,48", "table", marks=pytest.mark.slow)],
)
def test_what_a_measured_channel_lacks_is_counted_and_read_when_it_is_back(
    block, last, run, tmp_path, monkeypatch
):
    values = np.stack([[blobs(SHAPE, seed=2 * t + c) + 1 for c in range(2)] for t in range(2)])
    path = write_image(tmp_path / "image.zarr", values, axes="tczyx", chunks=(1, 1, *CHUNK))
    chunk = path / "0/c/0/1/1/0/1"
    chunk.rename(tmp_path / "hidden")
    options = {"channel": "0", "measure_channels": "1", "outputs": "labels,measurements"}
    if block is not None:
        options["block"] = block
    result = run(path, "out.zarr", **options)
    assert result.status == "done"
    assert any("1 chunk of the source is missing" in text for text in result.warnings)
    result = run(path, "error.zarr", missing_chunks="error", **options)
    assert result.exit_code == 1
    assert "c/0/1/1/0/1 is missing" in result.failures[0].error
    original = worker.run_task

    def show_before(workspace, stage, index):
        if (stage, index) == (last, 1) and not chunk.exists():
            (tmp_path / "hidden").rename(chunk)
        return original(workspace, stage, index)

    # What was measured in its absence is measured again.
    monkeypatch.setattr(worker, "run_task", show_before)
    result = run(path, "back.zarr", **options)
    assert result.status == "done"
    assert not result.warnings
    run(path, "anew.zarr", **options)
    back, anew = (tmp_path / f"{name}.zarr.measurements.parquet" for name in ("back", "anew"))
    assert back.read_bytes() == anew.read_bytes()
