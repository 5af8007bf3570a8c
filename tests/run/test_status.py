"""`megaseg status` tells from the journal alone: done 0, failed 1, pending 3."""

import json

import pytest
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here


def status(target) -> tuple[int, dict, dict]:
    done = CliRunner().invoke(build_app(), ["status", str(target), "--json"])
    run, result = map(json.loads, done.output.splitlines())
    assert result["event"] == "result"
    assert result["exit_code"] == done.exit_code
    return done.exit_code, run, result


@pytest.fixture
def settings(tiny_bundle):
    return parse_settings(
        {"model": str(tiny_bundle), "threads": 1, "block": "20,40,50", "overlap": 0, "retries": 0}
    )


def test_done_pending_and_no_run(tmp_path, settings):
    source = write_image(tmp_path / "image.zarr", blobs((40, 40, 100)))
    target = tmp_path / "out.zarr"

    def interrupt(event):
        if event.kind == "progress" and event.stage == "label" and event.n_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_here(str(source), str(target), settings, emit=interrupt)
    code, run, _ = status(target)
    assert code == 3
    assert run["stages"]["segment"] == [4, 4]
    assert run["stages"]["label"][0] < 4
    assert segment_here(str(source), str(target), settings).status == "done"
    assert status(target)[0] == 0
    nothing = CliRunner().invoke(build_app(), ["status", str(source)])
    assert nothing.exit_code == 2


def test_a_failure_is_named_until_a_later_run_mends_it(tmp_path, settings):
    image = blobs((40, 40, 100))
    source = write_image(tmp_path / "image.zarr", image, chunks=(20, 40, 50))
    target = tmp_path / "out.zarr"
    chunk = source / "0/c/1/0/1"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:10])
    assert segment_here(str(source), str(target), settings).status == "failed"
    code, run, result = status(target)
    assert (code, result["status"]) == (1, "failed")
    assert "0/c/1/0/1" in run["failures"][0]["error"]
    assert "FAILED" in CliRunner().invoke(build_app(), ["status", str(target)]).output
    chunk.write_bytes(good)
    assert segment_here(str(source), str(target), settings).status == "done"
    assert status(target)[:1] == (0,)
