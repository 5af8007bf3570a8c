"""``--workers 0``: the same run in this process, without a cluster."""

import subprocess
import sys

import pytest

from megaseg_dask.errors import SettingsError, StoreError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.runner import segment
from megaseg_dask.run.serial import SerialDispatcher
from megaseg_dask.run.tasks import worker
from megaseg_dask.run.tasks.worker import Outcome
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image

SHAPE = (24, 64, 96)
OPTIONS = {"threads": 1, "block": "24,32,48", "threshold": "otsu", "fill_holes": 9}


@pytest.fixture
def source(tmp_path):
    return write_image(tmp_path / "image.zarr", blobs(SHAPE))


@pytest.mark.parametrize("block", ["24,32,48", "24,64,96"])
def test_this_process_writes_the_bytes_of_workers(block, source, tmp_path, tiny_bundle, client):
    options = {"model": str(tiny_bundle), **OPTIONS, "block": block}
    options["outputs"] = "labels,scores,mask,measurements"
    parallel, serial = tmp_path / "parallel.zarr", tmp_path / "serial.zarr"
    assert segment(str(source), str(parallel), parse_settings(options), client=client).log
    events = []
    settings = parse_settings({**options, "workers": 0})
    result = segment(str(source), str(serial), settings, emit=events.append)
    assert result.status == "done", result.failures
    assert contents(serial) == contents(parallel)
    assert not [event for event in events if event.kind == "worker"]
    assert segment(str(source), str(serial), settings).already_done


def test_a_block_in_work_tells_its_patches_and_the_log_is_no_output(
    source, tmp_path, tiny_bundle, monkeypatch
):
    monkeypatch.setattr("megaseg_dask.inference.block._TELL_PAUSE_S", -1.0)
    # Each event is then written at once, by the thread that runs the task.
    monkeypatch.setattr("megaseg_dask.run.log._MIN_PAUSE_S", -1.0)
    events = []
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "workers": 0, "block": "96"})
    result = segment(str(source), str(tmp_path / "out.zarr"), settings, emit=events.append)
    assert result.status == "done"
    assert not [event for event in events if event.kind == "notice"]
    told = [event for event in events if event.kind == "patches"]
    n_patches = told[0].n_patches
    assert n_patches > 1
    assert [event.n_predicted for event in told] == list(range(1, n_patches + 1))
    assert told[-1].left_s == 0


def test_an_interrupted_run_goes_on_and_computes_only_what_is_missing(
    source, tmp_path, tiny_bundle, monkeypatch
):
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "workers": 0})
    undisturbed, interrupted = tmp_path / "a.zarr", tmp_path / "b.zarr"
    assert segment(str(source), str(undisturbed), settings).status == "done"
    calls = []

    def stop(workspace, stage, index, original=worker.run_task):
        calls.append((stage, index))
        if calls[-1] == ("label", 2) and calls.count(("label", 2)) == 1:
            raise KeyboardInterrupt
        return original(workspace, stage, index)

    monkeypatch.setattr(worker, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        segment(str(source), str(interrupted), settings)
    finished = set(calls[:-1])
    assert segment(str(source), str(interrupted), settings).status == "done"
    assert {call for call in calls if calls.count(call) > 1}.isdisjoint(finished)
    assert contents(interrupted) == contents(undisturbed)


def test_no_module_of_a_cluster_is_imported(source, tmp_path, tiny_bundle):
    script = (
        "import sys\n"
        "from megaseg_dask.cli.app import main\n"
        "sys.argv[0] = 'megaseg'\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'distributed' not in sys.modules\n"
        "assert 'megaseg_dask.run.dispatcher' not in sys.modules\n"
    )
    arguments = ["segment", source, tmp_path / "out.zarr", "--model", tiny_bundle]
    arguments += ["--workers", "0", "--quiet"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)


def test_a_scheduler_or_a_cluster_is_refused_beside_it(source, tmp_path, tiny_bundle):
    settings = parse_settings({"model": str(tiny_bundle), "workers": 0, "scheduler": "tcp://a:1"})
    with pytest.raises(SettingsError, match="--workers 0 runs in this process"):
        segment(str(source), str(tmp_path / "out.zarr"), settings)


class FailingWorker:
    """Fails by its store in the first attempts of each task."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures = n_failures
        self.calls = []

    def attempt(self, stage: str, index: int) -> Outcome:
        self.calls.append(index)
        if self.calls.count(index) <= self.n_failures:
            error = StoreError("no answer")
            return Outcome(index, error=str(error), is_infrastructure=True)
        return Outcome(index)


@pytest.mark.parametrize(("n_failures", "n_calls", "error"), [(2, 3, ""), (3, 3, "no answer")])
def test_a_task_is_tried_again_as_often_as_on_workers(n_failures, n_calls, error, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    failing, tasks = FailingWorker(n_failures), [("segment", [0, 1]), ("", [])]
    dispatcher = SerialDispatcher(failing, Retries(max_retries=2))
    outcomes = list(dispatcher.outcomes(lambda size: tasks.pop(0)))
    assert [(stage, outcome.index, outcome.error) for stage, outcome in outcomes] == [
        ("segment", 0, error),
        ("segment", 1, error),
    ]
    assert len(failing.calls) == 2 * n_calls
    assert pauses == [0.5, 1.0] * 2
