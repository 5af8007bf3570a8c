"""Whole runs: source, target, plan, journal and intermediate data in a real S3 server, or HTTP."""

import time
import warnings

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.cli.app import main
from megaseg_dask.errors import MegasegError, StoreError
from megaseg_dask.ngff.group import open_group
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import relabel, segment
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import KEY, SECRET, range_server

SHAPE = (40, 60, 90)


def upload(folder, where: str) -> str:
    """Copy a local image to a store, object by object."""
    target = Location.of(where)
    for path in folder.rglob("*"):
        if path.is_file():
            target.put(str(path.relative_to(folder)), path.read_bytes())
    return where


def arrays(where: str) -> dict[str, np.ndarray]:
    group = open_group(Location.of(where))
    with warnings.catch_warnings():
        # The rows of a table lie in a group, where ngio has them, and are no Zarr node.
        warnings.filterwarnings("ignore", "Object at table.parquet")
        return {
            path: a[...] for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)
        }


@pytest.fixture(scope="module")
def options(tiny_bundle):
    return {
        "model": str(tiny_bundle),
        "engine": "openvino",
        "threads": 1,
        "block": "20,30,50",
        "overlap": 0,
        "outputs": "labels,scores,mask",
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    return write_image(folder / "image.zarr", blobs(SHAPE), chunks=(20, 30, 45))


@pytest.fixture(scope="module")
def expected(image, options):
    target = str(image.parent / "expected.zarr")
    assert segment_here(str(image), target, parse_settings(options)).status == "done"
    return arrays(target)


def assert_same(where: str, expected) -> None:
    found = arrays(where)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        assert_array_equal(found[path], values, err_msg=path)


def test_source_and_target_in_a_bucket(s3, folder, image, expected, options):
    source, target = upload(image, f"{folder}/image.zarr"), f"{folder}/out.zarr"
    settings = parse_settings({**options, "workers": 1})
    result = segment(source, target, settings)
    assert result.status == "done", result.failures
    assert_same(target, expected)
    assert segment_here(source, target, settings).already_done
    (run,) = status(target)
    assert run.done
    # Nothing that is secret was written down.
    for key in Location.of(f"{target}.run").keys(""):
        assert b"secret" not in (Location.of(f"{target}.run").get(key) or b"").lower(), key
    labels_only = segment_here(source, source, parse_settings({**options, "outputs": "labels"}))
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
    impatient = parse_settings(
        {**options, "workers": 1, "retries": 0, "storage_option": "retry_timeout=5"}
    )
    with pytest.raises((KeyboardInterrupt, MegasegError)):
        segment(source, target, impatient, emit=kill)
    own_s3.start()
    result = segment_here(source, target, parse_settings(options))
    assert result.status == "done", result.failures
    assert_same(target, expected)


@pytest.mark.slow
def test_a_store_that_is_gone_is_waited_for_once_and_told_once(own_s3, folder, image, options):
    """A store that is waited for 20 s.

    The journal, the lease and what else is left do not each take as long again.
    """
    source, target = upload(image, f"{folder}/image.zarr"), f"{folder}/out.zarr"
    killed = []

    def kill(event):
        if event.kind == "progress" and event.stage == "label" and event.n_done and not killed:
            own_s3.kill()
            killed.append(time.monotonic())

    patient = parse_settings(
        {**options, "workers": 1, "retries": 0, "storage_option": "retry_timeout=20"}
    )
    with pytest.raises(StoreError, match="connection refused") as raised:
        segment(source, target, patient, emit=kill)
    assert raised.value.exit_code == 1
    assert time.monotonic() - killed[0] < 70
    own_s3.start()
    assert segment_here(source, target, parse_settings(options)).status == "done"


def test_commands_on_a_target_take_the_options_of_its_store(
    s3_server, folder, image, options, monkeypatch, capsys
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def megaseg(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code)

    store, target = (
        ("--endpoint", s3_server.url, "--storage-option", "region=us-east-1"),
        f"{folder}/out.zarr",
    )
    fixed = ("--model", options["model"], "--threads", "1", "--overlap", "0", "--block", "20,30,50")
    fixed += ("--engine", "openvino")
    assert megaseg("plan", image, target, *fixed, *store, "--record") == 0
    assert megaseg("task", target, "measure", "999", *store) == 2
    assert megaseg("task", target, "measure", "0", *store) == 0
    assert megaseg("status", target, *store) == 3
    assert megaseg("segment", image, target, *fixed, "--workers", "0", *store) == 0
    assert megaseg("status", target, "--label-name", "megaseg", *store) == 0
    assert megaseg("evaluate", target, target, *store) == 0
    assert "1.000" in capsys.readouterr().out
    assert megaseg("status", target, "--label-name", "other", *store) == 2
    assert "no run of the name other" in capsys.readouterr().err
    assert megaseg("status", target, "--anon", *store) == 2
    assert "the data are not public: remove --anon" in capsys.readouterr().err


def test_reading_over_http(image, expected, options, tmp_path):
    with range_server(image.parent) as url:
        target = str(tmp_path / "out.zarr")
        result = segment_here(f"{url}/image.zarr", target, parse_settings(options))
    assert result.status == "done", result.failures
    assert_same(str(tmp_path / "out.zarr"), expected)


def test_a_bucket_that_is_not_there(s3, image, options):
    with pytest.raises(MegasegError, match="no such bucket") as raised:
        segment_here(str(image), "s3://nowhere-at-all/out.zarr", parse_settings(options))
    assert raised.value.exit_code == 2


def test_a_wrong_key(s3, folder, image, options, monkeypatch):
    source = upload(image, f"{folder}/image.zarr")
    from megaseg_dask.stores import clear_store_caches

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    clear_store_caches()
    with pytest.raises(MegasegError) as raised:
        segment_here(source, f"{folder}/out.zarr", parse_settings(options))
    assert raised.value.exit_code == 2
    assert "not-the-secret" not in str(raised.value)


def test_masks_in_a_bucket_and_of_stored_chunks_are_those_of_files(s3, folder, options, tmp_path):
    settings = {**options, "scores_dtype": "float32", "unmarked": True}
    local = write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(20, 30, 45))
    (local / "0/c/1/1/1").unlink()
    mask = np.zeros(SHAPE, "uint8")
    mask[5:12, 40:50, 3:20] = 1
    place = write_image(tmp_path / "mask.zarr", mask)
    source = upload(local, f"{folder}/image.zarr")
    remote = upload(place, f"{folder}/mask.zarr")
    for number, (here, there) in enumerate([(str(place), remote), ("data", "data")]):
        for image, where, target in (
            (str(local), here, str(tmp_path / f"{number}.zarr")),
            (source, there, f"{folder}/{number}.zarr"),
        ):
            result = segment_here(image, target, parse_settings({**settings, "where": where}))
            assert result.status == "done"
        written = arrays(f"{folder}/{number}.zarr")
        for path, values in arrays(str(tmp_path / f"{number}.zarr")).items():
            assert_array_equal(written[path], values)
        assert written["0"].any()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_scores_in_a_bucket_are_labelled_again(workers, s3, folder, image, options, tmp_path):
    """And split there, as on the disk; also on a worker."""
    again = {"label_name": "again", "threshold": 0.6, "split": "distance"}
    target, here = f"{folder}/again.zarr", str(tmp_path / "here.zarr")
    for where, n_workers in ((target, workers), (here, 0)):
        assert segment_here(str(image), where, parse_settings(options)).status == "done"
        settings = parse_settings({**again, "workers": n_workers})
        result = relabel(where, settings)
        assert result.status == "done", result.failures
        assert relabel(where, settings).already_done
    assert_same(target, arrays(here))
    assert arrays(here)["labels/again/0"].max() > 1
