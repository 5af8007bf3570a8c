"""Whole runs whose source, target, plan, journal and intermediate data live in a real S3 server, or behind HTTP."""

import warnings

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.errors import MegasegError
from megaseg_dask.run import segment, status
from megaseg_dask.settings import parse_settings
from megaseg_dask.stores import Location
from tests.images import blobs, write_image
from tests.stores.servers import range_server

SHAPE = (40, 60, 90)


def upload(folder, where: str) -> str:
    """Copy a local image to a store, object by object."""
    target = Location.of(where)
    for path in folder.rglob("*"):
        if path.is_file():
            target.put(str(path.relative_to(folder)), path.read_bytes())
    return where


def arrays(where: str) -> dict[str, np.ndarray]:
    group = Location.of(where).open_group()
    with warnings.catch_warnings():
        # The rows of a table lie in a group, where ngio has them, and are no Zarr node.
        warnings.filterwarnings("ignore", "Object at table.parquet")
        return {path: a[...] for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}


@pytest.fixture
def options(tiny_bundle):
    return {"model": str(tiny_bundle), "threads": 1, "block": "20,30,50", "overlap": 0, "outputs": "labels,scores,mask"}


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(20, 30, 45))


@pytest.fixture
def expected(image, tmp_path, options):
    target = str(tmp_path / "expected.zarr")
    assert segment(str(image), target, parse_settings(options)).status == "done"
    return arrays(target)


def assert_same(where: str, expected) -> None:
    found = arrays(where)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        assert_array_equal(found[path], values, err_msg=path)


def test_source_and_target_in_a_bucket(s3, folder, image, expected, options):
    source, target = upload(image, f"{folder}/image.zarr"), f"{folder}/out.zarr"
    settings = parse_settings({**options, "threshold": 0.5})
    result = segment(source, target, settings)
    assert result.status == "done", result.failures
    assert_same(target, expected)
    assert segment(source, target, settings).already_done
    (run,) = status(target)
    assert run.done
    # Nothing that is secret was written down.
    for key in Location.of(f"{target}.run").keys(""):
        assert b"secret" not in (Location.of(f"{target}.run").get(key) or b"").lower(), key
    labels_only = segment(source, source, parse_settings({**options, "outputs": "labels"}))
    assert labels_only.status == "done", labels_only.failures
    assert_array_equal(arrays(source)["labels/megaseg/0"], expected["labels/megaseg/0"])


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_run(own_s3, folder, image, expected, options):
    source, target = upload(image, f"{folder}/image.zarr"), f"{folder}/out.zarr"

    def kill(event):
        if event.kind == "progress" and event.stage == "label" and event.n_done:
            own_s3.kill()
            raise KeyboardInterrupt

    # What is to be written at the end waits for the store, too.
    impatient = parse_settings({**options, "retries": 0, "storage_option": "retry_timeout=5"})
    with pytest.raises((KeyboardInterrupt, MegasegError)):
        segment(source, target, impatient, emit=kill)
    own_s3.start()
    result = segment(source, target, parse_settings(options))
    assert result.status == "done", result.failures
    assert_same(target, expected)


def test_reading_over_http(image, expected, options, tmp_path):
    with range_server(image.parent) as url:
        result = segment(f"{url}/image.zarr", str(tmp_path / "out.zarr"), parse_settings(options))
    assert result.status == "done", result.failures
    assert_same(str(tmp_path / "out.zarr"), expected)


def test_a_bucket_that_is_not_there(s3, image, options):
    with pytest.raises(MegasegError, match="no such bucket") as raised:
        segment(str(image), "s3://nowhere-at-all/out.zarr", parse_settings(options))
    assert raised.value.exit_code == 2


def test_a_wrong_key(s3, folder, image, options, monkeypatch):
    source = upload(image, f"{folder}/image.zarr")
    from megaseg_dask.stores import forget

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    forget()
    with pytest.raises(MegasegError) as raised:
        segment(source, f"{folder}/out.zarr", parse_settings(options))
    assert raised.value.exit_code == 2
    assert "not-the-secret" not in str(raised.value)
