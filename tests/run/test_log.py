"""The log of a run: a text for each client that worked on it, on the store of the target."""

import re
from pathlib import Path

import pytest

from megaseg_dask.events import Progress
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.log import RunLog
from megaseg_dask.run.runner import segment
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d \S.*")


@pytest.fixture
def source(tmp_path) -> Path:
    return write_image(tmp_path / "image.zarr", blobs((32, 40, 44)))


def wanted(tiny_bundle, **options):
    return parse_settings({"model": str(tiny_bundle), "threads": 1, "overlap": 0, **options})


def test_each_client_leaves_one(source, tmp_path, tiny_bundle, client):
    chunk = next(p for p in (source / "0").rglob("*") if p.is_file() and p.name != "zarr.json")
    good = chunk.read_bytes()
    chunk.write_bytes(b"nothing")
    settings, events = wanted(tiny_bundle, block="16,40,44"), []
    target = str(tmp_path / "out.zarr")
    failed = segment(str(source), target, settings, client=client, emit=events.append)
    assert failed.exit_code == 1
    first = Path(failed.log)
    assert first == tmp_path / "out.zarr.run/megaseg/log/0001.txt"
    lines = first.read_text().splitlines()
    assert all(map(LINE.fullmatch, lines))
    assert str(source) in lines[0]
    assert any("FAILED" in line and "is corrupt" in line for line in lines)
    assert "failed after" in lines[-1]
    told = [e for e in events if isinstance(e, Progress)]
    assert told[-1].n_failed == len(failed.failures)

    chunk.write_bytes(good)
    done = segment(str(source), target, settings, client=client)
    assert done.status == "done", done.failures
    assert Path(done.log).name == "0002.txt"
    text = Path(done.log).read_text()
    assert "done after" in text
    assert f", {done.n_objects} objects" in text
    assert "blocks/s" in text
    assert "failed after" in first.read_text()
    # Nothing to do leaves none.
    assert segment(str(source), target, settings, client=client).log == ""


def test_who_is_interrupted_says_so(source, tmp_path, tiny_bundle, client):
    def stop(event):
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(
            str(source), str(tmp_path / "out.zarr"), wanted(tiny_bundle), client=client, emit=stop
        )
    (log,) = (tmp_path / "out.zarr.run/megaseg/log").iterdir()
    assert "stopped: KeyboardInterrupt" in log.read_text()


def test_a_log_that_cannot_be_written_stops_nothing(
    source, tmp_path, tiny_bundle, client, monkeypatch
):
    target = tmp_path / "out.zarr"
    assert segment(str(source), str(target), wanted(tiny_bundle), client=client).status == "done"
    plan = RunFolder(runs_folder(Location.of(target)) / "megaseg").read_plan()
    folder = plan.run.path / "log"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    log = RunLog(plan.run, ["anything"])
    log.end()
    assert log.url == ""
    assert folder.read_text() == "in the way"
