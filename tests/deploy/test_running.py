"""What deploy/ runs.

The containers' commands as processes of this machine, and job arrays in a real SLURM.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from megaseg_dask.plan.settings import parse_settings
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import free_port
from tests.fixtures.slurm import running_slurm

DEPLOY = Path(__file__).parents[2] / "deploy"
OPTIONS = {"threads": 1, "block": "24,32,32", "overlap": 0}
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def path() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture
def source(tmp_path) -> Path:
    return write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))


@pytest.fixture
def expected(source, tmp_path, tiny_bundle) -> dict:
    target = tmp_path / "expected.zarr"
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS})
    result = segment_here(str(source), str(target), settings)
    assert result.status == "done", result.failures
    return contents(target)


class Rendered:
    """Containers of the manifests, with what Kubernetes and a site fill in."""

    def __init__(self, places: dict[str, str], variables: dict[str, str]) -> None:
        self.places, self.variables = places, variables
        [cluster] = yaml.safe_load_all((DEPLOY / "kubernetes/cluster.yaml").read_text())
        [job] = yaml.safe_load_all((DEPLOY / "kubernetes/job.yaml").read_text())
        pods = (cluster["spec"]["scheduler"], cluster["spec"]["worker"], job["spec"]["template"])
        self.containers = {c["name"]: c for pod in pods for c in pod["spec"]["containers"]}

    def command(self, name: str) -> tuple[list[str], dict[str, str]]:
        container = self.containers[name]
        written = {entry["name"]: entry["value"] for entry in container["env"]}
        known = {**self.variables, **written}
        words = [
            re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word)
            for word in container["args"]
        ]
        for old, new in self.places.items():
            words = [word.replace(old, new) for word in words]
            written = {key: value.replace(old, new) for key, value in written.items()}
        return words, {**path(), **self.variables, **written}

    @contextmanager
    def started(self, name: str) -> Iterator[subprocess.Popen]:
        words, environment = self.command(name)
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_what_the_containers_run(source, expected, tiny_bundle, tmp_path):
    port, dashboard, target = str(free_port()), str(free_port()), tmp_path / "out.zarr"
    places = {
        "megaseg-scheduler:8786": f"127.0.0.1:{port}",
        "0.0.0.0": "127.0.0.1",
        "8786": port,
        ":8787": f"127.0.0.1:{dashboard}",
        "s3://screens/plate.zarr": str(source),
        "s3://results/plate.zarr": str(target),
        "MegaSeg_v1": str(tiny_bundle),
        "DNA": "0",
        "cuda": "cpu",
        "24GB": "4GB",
        "/scratch": str(tmp_path / "scratch"),
    }
    (tmp_path / "scratch").mkdir()
    # As the operator does.
    variables = {
        "DASK_WORKER_NAME": "megaseg-default-worker-1",
        "DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{port}",
    }
    rendered = Rendered(places, variables)
    with rendered.started("scheduler") as scheduler, rendered.started("worker") as worker:
        words, environment = rendered.command("client")
        fixed = [word for key, value in OPTIONS.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(
            [*words, *fixed],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (scheduler.poll(), worker.poll()) == (None, None)
    assert '"status": "done"' in done.stdout.splitlines()[-1]
    found = contents(target)
    assert {k: v for k, v in found.items() if "/c/" in f"/{k}"} == {
        k: v for k, v in expected.items() if "/c/" in f"/{k}"
    }


def test_job_arrays_in_slurm(source, expected, tiny_bundle, tmp_path):
    target = tmp_path / "out.zarr"
    options = [
        "--model",
        str(tiny_bundle),
        *(w for k, v in OPTIONS.items() for w in (f"--{k}", str(v))),
    ]
    asked = "--cpus-per-task=1 --mem=1G --time=00:20:00"
    with running_slurm(tmp_path / "slurm", n_nodes=2) as slurm:
        environment = {
            **slurm.env,
            "PATH": f"{BIN}:{slurm.env['PATH']}",
            "SHARES": "4",
            "GPU": asked,
            "CPU": asked,
        }

        def submit() -> str:
            command = [DEPLOY / "slurm/array.sh", source, target, *options]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        said = submit()
        assert "segment of megaseg: job" in said
        assert "4 elements for 6 tasks" in said
        # An element of the first array that runs is taken away: what follows it never starts.
        jobs = slurm.jobs("RUNNING") or slurm.jobs()
        slurm.run("scancel", jobs[0])
        slurm.wait(600)
        assert not (target / "labels/megaseg/0/c").exists()
        said = submit()
        assert "join: job" in said
        slurm.wait(600)
        logs = "".join(log.read_text() for log in tmp_path.glob("slurm-*.out"))
    assert contents(target) == expected, logs
