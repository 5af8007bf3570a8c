"""`--cluster slurm.yaml` on a real SLURM.

Jobs that are cancelled in mid-run, refused, and given back.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.faults.test_faults import arrays, assert_same
from tests.fixtures.images import blobs, write_image
from tests.fixtures.slurm import Slurm, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = (40, 80, 100)

# Blocks of a test are quick; a job has to be cancelled while there is work left.
_SLOWLY = """
import time

import megaseg_dask.run.tasks.worker as tasks

run_task = getattr(tasks.run_task, "real", tasks.run_task)

def slowly(workspace, stage, index):
    if stage == "segment":
        with open({calls!r}, "a") as file:
            file.write(f"{{index}} ")
        time.sleep({seconds})
    return run_task(workspace, stage, index)

slowly.real = run_task
tasks.run_task = slowly
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with (
        running_slurm(tmp_path_factory.mktemp("slurm") / "state") as slurm,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, slurm.env[name])
        yield slurm


@pytest.fixture
def cluster_file(tmp_path, monkeypatch):
    """Write a cluster file.

    The folder it is run in, and where its jobs write, is the test's own.
    """
    monkeypatch.chdir(tmp_path)

    def write(seconds: float = 1, **changes) -> str:
        (tmp_path / "slowly.py").write_text(
            _SLOWLY.format(calls=str(tmp_path / "calls"), seconds=seconds)
        )
        options = {
            "cores": 1,
            "memory": "2GB",
            "walltime": "00:10:00",
            "interface": "lo",
            "queue": "main",
            "log_directory": str(tmp_path / "logs"),
            "local_directory": str(tmp_path / "scratch"),
            "worker_extra_args": ["--preload", str(tmp_path / "slowly.py")],
            **changes.pop("options", {}),
        }
        path = tmp_path / "slurm.yaml"
        path.write_text(
            yaml.safe_dump({"kind": "slurm", "workers": 2, **changes, "options": options})
        )
        return str(path)

    return write


@pytest.fixture
def request_of(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(20, 40, 50))

    def make(target: str, **options):
        options = {
            "model": str(tiny_bundle),
            "engine": "torch",
            "block": "20,40,50",
            "overlap": 0,
            "outputs": "labels,scores,mask",
            **options,
        }
        return str(source), str(tmp_path / target), parse_settings(options)

    return make


def test_a_job_that_is_cancelled_changes_no_voxel_and_is_replaced(
    slurm: Slurm, cluster_file, request_of, client
):
    source, undisturbed, settings = request_of("undisturbed.zarr", threads=1)
    assert segment(source, undisturbed, settings, client=client).status == "done"
    # Threads and memory are those of a job.
    source, target, settings = request_of("out.zarr", cluster=cluster_file())
    joined, cancelled = [], []

    def watch(event) -> None:
        if event.kind == "worker":
            joined.append(event)
        if (
            event.kind == "progress"
            and event.stage == "segment"
            and len(joined) == 2
            and not cancelled
        ):
            cancelled.append(slurm.jobs()[0])
            slurm.run("scancel", cancelled[0])

    result = segment(source, target, settings, emit=watch)
    assert result.status == "done", result.failures
    assert cancelled, "the run was over before a job could be cancelled"
    assert_same(arrays(target), arrays(undisturbed))
    # The run gave back what it took, and its certificates and copies of the model are gone.
    slurm.wait()
    assert not list(Path().glob(".megaseg-*"))
    assert not list(Path(result.run).glob("bundles/**/*.ckpt"))
    (record,) = [r for r in journal(result.run) if "session" in r]
    assert {worker["name"] for worker in record["session"]["workers"]} == {
        event.name for event in joined
    }


def journal(run: str) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted(Path(run, "journal").iterdir())
        for line in path.read_text().splitlines()
    ]


def test_what_slurm_refuses_is_told_in_its_words(slurm: Slurm, cluster_file, request_of):
    source, target, settings = request_of(
        "out.zarr", cluster=cluster_file(options={"queue": "nowhere"})
    )
    with pytest.raises(
        SettingsError, match="kind slurm: sbatch: error: invalid partition specified: nowhere"
    ):
        segment(source, target, settings)
    assert not Path(target).exists()
    assert not slurm.jobs()


def test_a_site_whose_commands_greet(slurm: Slurm, cluster_file, request_of, tmp_path, monkeypatch):
    """The run knows its jobs: it sees that they ended, and none of them stays in the queue."""
    for command in ("sbatch", "squeue"):
        script = tmp_path / "site" / command
        script.parent.mkdir(exist_ok=True)
        real = shutil.which(command)
        script.write_text(f"#!/bin/sh\necho 'Welcome to cluster 7, 24 nodes'\nexec {real} \"$@\"\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'site'}:{os.environ['PATH']}")
    source, target, settings = request_of("out.zarr", cluster=cluster_file())
    assert segment(source, target, settings).status == "done"
    # SLURM shows a cancelled job until its processes have ended.
    slurm.wait()
    source, target, settings = request_of(
        "other.zarr", cluster=cluster_file(options={"python": "/bin/false"})
    )
    with pytest.raises(SettingsError, match=r"jobs \d+, \d+ ended before their workers joined"):
        segment(source, target, settings)


def test_jobs_that_end_before_their_workers_join_are_not_waited_for(
    slurm: Slurm, cluster_file, request_of
):
    source, target, settings = request_of(
        "out.zarr", cluster=cluster_file(options={"python": "/bin/false"})
    )
    with pytest.raises(SettingsError, match=r"jobs \d+, \d+ ended before their workers joined"):
        segment(source, target, settings)
    assert not Path(target).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_ends_takes_its_jobs_along(number, slurm: Slurm, cluster_file, request_of):
    source, target, _ = request_of("out.zarr")
    options = [
        "--model",
        str(request_of("out.zarr")[2].model[0]),
        "--engine",
        "torch",
        "--block",
        "20,40,50",
    ]
    command = [
        sys.executable,
        "-m",
        "megaseg_dask",
        "segment",
        source,
        target,
        "--cluster",
        cluster_file(),
        "--json",
    ]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "progress" and slurm.jobs("RUNNING"):
                break
        jobs = slurm.jobs()
        process.send_signal(number)
        process.stdout.read()
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    # Nobody is left to cancel them after a kill: workers end when their scheduler is gone.
    slurm.wait(120)
    if number == signal.SIGTERM:
        for job in jobs:
            assert "JobState=CANCELLED" in slurm.run("scontrol", "show", "job", job)


def test_a_worker_leaves_before_its_wall_time_finishes_its_block_and_is_replaced(
    slurm: Slurm, cluster_file, request_of, tmp_path
):
    # A worker that opens its engine for longer than it lives would take no block.
    cluster = cluster_file(seconds=22, lifetime="20s", workers=1)
    source, target, settings = request_of("out.zarr", block="40,40,100", cluster=cluster)
    joined = []
    result = segment(
        source, target, settings, emit=lambda e: joined.append(e) if e.kind == "worker" else None
    )
    assert result.status == "done", result.failures
    # One after the other, each with the block that it had begun.
    assert len(joined) > 1
    assert sorted((tmp_path / "calls").read_text().split()) == ["0", "1"]
    slurm.wait()
