"""What surrounds a run stops it in order, is refused at once, or does not matter."""

import asyncio
import errno
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client

from megaseg_dask.cli.app import _INTERRUPTS
from megaseg_dask.errors import EngineError, SettingsError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster.dask_config import CONFIG
from megaseg_dask.run.dispatcher import open_workers
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

MEGASEG = [sys.executable, "-m", "megaseg_dask"]
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(write_image(tmp_path_factory.mktemp("source") / "image.zarr", blobs((20, 40, 50))))


@pytest.fixture
def options(tiny_bundle) -> dict[str, object]:
    return {"model": str(tiny_bundle), "engine": "torch", "threads": 1, "overlap": 0}


# -- streams


@pytest.mark.skipif(not FULL.exists(), reason="no device that is full")
def test_full_streams_stop_no_run_and_lost_results_are_a_failure(source, options, tmp_path):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [*MEGASEG, "segment", source, str(tmp_path / "out.zarr"), "--workers=0", *arguments]
    with FULL.open("w") as full:
        ended = subprocess.run([*command, "--json"], stdout=full, stderr=full)
    assert ended.returncode == 1
    status = [*MEGASEG, "status", str(tmp_path / "out.zarr")]
    assert subprocess.run(status, stdout=subprocess.DEVNULL).returncode == 0, "it was not finished"
    with FULL.open("w") as full:
        ended = subprocess.run(status, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "megaseg: not all results could be printed on stdout: No space left on device\n"
    )


@pytest.mark.skipif(not FULL.exists(), reason="no device that is full")
@pytest.mark.parametrize("words", [["--help"], ["models", "--help"]], ids=" ".join)
def test_help_that_cannot_be_printed_is_a_failure(words):
    with FULL.open("w") as full:
        ended = subprocess.run([*MEGASEG, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "megaseg: not all results could be printed on stdout: No space left on device\n"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stop_nothing(closed):
    command = f'"$0" -m megaseg_dask doctor --help {closed}'
    ended = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_file_never_takes_the_place_of_a_closed_stream():
    script = (
        "from megaseg_dask.cli.app import _open_standard_streams as o; o(); "
        "assert open('/dev/null').fileno() > 2; print('done')"
    )
    command = ["sh", "-c", f'"$0" -c "{script}" <&- 2>&-', sys.executable]
    assert subprocess.run(command, stdout=subprocess.PIPE).stdout == b"done\n"


def test_a_reader_that_leaves_stops_nothing(source, tmp_path):
    command = [*MEGASEG, "status", str(tmp_path / "nothing.zarr"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "not all results could be printed on stdout: Broken pipe" in err


def test_letters_that_a_terminal_lacks_stop_nothing(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*MEGASEG, "segment", "--help"]
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0


# -- signals

_WAIT = """
import os, sys, time
from megaseg_dask.cli import app
from megaseg_dask.cli.exit_codes import exit_codes

app._catch_signals()
try:
    with exit_codes(False):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(300)
except Exception as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize("number", _INTERRUPTS)
def test_what_ends_a_process_ends_it_in_order(number):
    command = [sys.executable, "-c", _WAIT, str(int(number))]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        # Tests in the background may have been started with signals that are ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert ended.returncode == 130
    assert "run the same command again to resume" in ended.stderr


def test_what_the_caller_ignores_is_ignored():
    script = 'trap \'\' HUP; exec "$0" -c "$1"'
    check = (
        "import signal; from megaseg_dask.cli import app; app._catch_signals(); "
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    )
    assert subprocess.run(["sh", "-c", script, sys.executable, check]).returncode == 0


def test_the_signals_are_those_of_terminals_and_batch_systems():
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT} <= set(_INTERRUPTS)


# -- limits and processes


def test_a_process_that_may_open_few_files_is_refused(source, tmp_path):
    command = [*MEGASEG, "segment", source, str(tmp_path / "out.zarr"), "--model=starter"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)),
    )
    assert ended.returncode == 2
    assert "may open 32 files" in ended.stderr
    assert "ulimit -n 152" in ended.stderr


def segment_with_workers(source: str, target: str, options: dict[str, object]) -> str:
    """Return the message of the refusal."""
    try:
        segment(source, target, parse_settings({**options, "workers": 1}))
    except SettingsError as error:
        return str(error)
    return "it was not refused"


def test_a_worker_that_may_start_no_workers_is_refused(source, options, tmp_path, client):
    target = str(tmp_path / "out.zarr")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_pool = pool.apply(segment_with_workers, (source, target, options))
    in_task = client.submit(segment_with_workers, source, target, options).result()
    for message in (in_pool, in_task):
        assert "this process is a worker of" in message
        assert "workers=0" in message
    assert not Path(target).exists()


@pytest.mark.parametrize("kind", ["asynchronous", "closed", "address"])
def test_a_client_that_cannot_be_used_is_refused(kind, source, options, tmp_path, client):
    address = client.scheduler.address

    async def use() -> None:
        if kind == "address":
            use_client(address)
        async with Client(address, asynchronous=True) as other:
            if kind == "asynchronous":
                use_client(other)
        if kind == "closed":
            use_client(other)

    def use_client(given: object) -> None:
        settings = parse_settings(options)
        with pytest.raises(SettingsError, match=r"^client: "):
            segment(source, str(tmp_path / "out.zarr"), settings, client=given)

    asyncio.run(use())
    assert not (tmp_path / "out.zarr").exists()


# -- decoration


def test_a_link_to_the_dashboard_that_cannot_be_made_stops_nothing(
    client, source, options, tmp_path
):
    [(plan, _)] = plan_runs(source, str(tmp_path / "out.zarr"), parse_settings(options))
    with dask.config.set({"distributed.dashboard.link": "{NO_SUCH_VARIABLE}/{host}:{port}"}):
        with pytest.raises(KeyError):
            _ = client.dashboard_link
        with open_workers(plan, client, lambda _: None) as executor:
            assert executor.dashboard is None


# -- volumes with nothing to segment


def test_blocks_that_all_failed_leave_no_automatic_threshold(options, tmp_path, monkeypatch):
    source = write_image(tmp_path / "image.zarr", blobs((20, 40, 100)), chunks=(20, 40, 50))
    settings = parse_settings({**options, "block": "20,40,50", "threshold": "otsu", "retries": 0})

    def fail(*_: object) -> None:
        raise OSError("no device")

    monkeypatch.setattr("megaseg_dask.inference.pytorch.TorchEngine.__call__", fail)
    result = segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    assert result.status == "failed"
    errors = [failure.error for failure in result.failures]
    assert any("no device" in error for error in errors)
    assert not [error for error in errors if "reduce()" in error]


def test_a_constant_volume_of_floats_is_said_to_be_constant(options, tmp_path):
    # The mean of ten thousands of tenths is not a tenth.
    source = write_image(tmp_path / "image.zarr", np.full((20, 40, 50), 0.1))
    result = segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    [doubt] = [doubt for doubt in result.doubts if doubt.about == "constant"]
    assert doubt.text == "all voxels have one value, so its objects mean nothing"


BEGINNINGS = {
    "killed": (
        "import os\nos.kill(os.getpid(), 9)",
        r"killed by SIGKILL; memory may have run out \(this machine, or its container, has",
    ),
    "an error": ("raise ValueError('no such device')", "could not start: .*no such device"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("preload", "reason"),
    [
        pytest.param(*BEGINNINGS["killed"], id="killed"),
        pytest.param(*BEGINNINGS["an error"], id="an error", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_ends_as_it_starts_is_told_with_its_cause(
    preload, reason, source, options, tmp_path, monkeypatch
):
    monkeypatch.setitem(CONFIG, "distributed.worker.preload", [preload])
    settings = parse_settings({**options, "workers": 1})
    with pytest.raises(EngineError, match=reason) as caught:
        segment(str(source), str(tmp_path / "out.zarr"), settings)
    assert "__main__" not in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


def test_a_scratch_folder_that_cannot_be_made_is_refused(source, options, tmp_path):
    settings = parse_settings({**options, "workers": 1})
    with dask.config.set({"temporary-directory": str(tmp_path / "absent/folder")}):
        with pytest.raises(SettingsError, match="DASK_TEMPORARY_DIRECTORY"):
            segment(str(source), str(tmp_path / "out.zarr"), settings)
    assert not (tmp_path / "out.zarr").exists()


def test_a_system_without_shared_memory_is_refused(source, options, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    settings = parse_settings({**options, "workers": 1})
    with pytest.raises(SettingsError, match=r"make /dev/shm writable, or run .* --workers 0"):
        segment(str(source), str(tmp_path / "out.zarr"), settings)
    assert not (tmp_path / "out.zarr").exists()
