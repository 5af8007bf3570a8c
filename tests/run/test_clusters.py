"""Clusters that this machine can be.

A scheduler and workers started apart over TLS, pinned workers, local ones.
"""

import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from distributed import Client, Security

from megaseg_dask.errors import SettingsError
from megaseg_dask.events import Joined
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster import worker_plugin
from megaseg_dask.run.cluster.connection import connect as open_workers_of
from megaseg_dask.run.cluster.gpus import GpuCluster
from megaseg_dask.run.cluster.workers import Workers
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location, StoreOptions
from tests.faults.test_faults import arrays, assert_same
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

ENGINE = EngineSpec("torch", "cpu", "fp32", threads=1)


class Apart:
    """A Dask scheduler and workers as somebody else starts them.

    Other processes, certificates in files.
    """

    def __init__(self, folder: Path) -> None:
        made = Security.temporary()
        self.tls = {
            "ca_file": folder / "ca.pem",
            "cert": folder / "cert.pem",
            "key": folder / "key.pem",
        }
        for name, text in zip(
            self.tls, (made.tls_ca_file, made.tls_client_cert, made.tls_client_key), strict=True
        ):
            self.tls[name].write_text(text)
        self.folder, self.processes = folder, []
        self.start(
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--protocol",
            "tls",
            "--scheduler-file",
            str(folder / "scheduler.json"),
            "--no-dashboard",
        )
        deadline = time.monotonic() + 200
        while (
            not (folder / "scheduler.json").exists() or not (folder / "scheduler.json").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.address = json.loads((folder / "scheduler.json").read_text())["address"]

    def start(self, program: str, *options: str, path: str = "") -> subprocess.Popen:
        """Start one of Dask's programs; what lies at ``path`` is found before all else."""
        files = [f"--tls-{name.replace('_', '-')}={file}" for name, file in self.tls.items()]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([path, *sys.path] if path else sys.path),
        }
        command = [sys.executable, "-m", f"distributed.cli.{program}", *files, *options]
        with (self.folder / f"{program}.log").open("a") as log:
            # Elsewhere: what an editable installation left in this folder would be found before all
            # else.
            started = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log
            )
            self.processes.append(started)
        return self.processes[-1]

    def worker(self, name: str, path: str = "") -> subprocess.Popen:
        scratch = ["--local-directory", str(self.folder / "scratch")]
        options = [
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
            "--no-dashboard",
            "--name",
            name,
            *scratch,
        ]
        return self.start("dask_worker", self.address, *options, path=path)

    def client(self) -> Client:
        files = {f"tls_client_{name}": str(self.tls[name]) for name in ("cert", "key")}
        security = Security(tls_ca_file=str(self.tls["ca_file"]), require_encryption=True, **files)
        return Client(self.address, security=security, timeout=200)

    @contextmanager
    def while_there(self, process: subprocess.Popen, n: int):
        """Wait until there are ``n`` workers, and end this one afterwards."""
        with self.client() as client:
            client.wait_for_workers(n, timeout=200)
            yield client
            _end(process)
            while len(client.nthreads()) >= n:
                time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    apart = Apart(tmp_path_factory.mktemp("apart"))
    apart.worker("first")
    yield apart
    for process in reversed(apart.processes):
        _end(process)


@pytest.fixture
def other_version(tmp_path) -> str:
    """A folder in which this package is said to be of another version."""
    folder = tmp_path / "other/megaseg_dask-0.0.1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: megaseg-dask\nVersion: 0.0.1\n")
    return str(folder.parent)


@pytest.fixture
def request_of(tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((20, 40, 100)), chunks=(20, 40, 50))

    def make(target: str, **options):
        options = {
            "engine": "openvino",
            "threads": 1,
            "block": "20,40,50",
            "overlap": 0,
            "model": str(tiny_bundle),
            **options,
        }
        return str(source), str(tmp_path / target), parse_settings(options)

    return make


@pytest.fixture
def shared(apart, tmp_path) -> str:
    """The cluster file of that scheduler."""
    path = tmp_path / "shared.yaml"
    files = {name: str(file) for name, file in apart.tls.items()}
    path.write_text(yaml.safe_dump({"kind": "scheduler", "address": apart.address, "tls": files}))
    return str(path)


def test_a_scheduler_started_apart_over_tls(apart, shared, request_of, tiny_bundle, tmp_path):
    source, expected, settings = request_of("expected.zarr")
    assert segment_here(source, expected, settings).status == "done"

    # The bundle is gone as soon as the run began: workers have it from beside the run.
    bundle = tmp_path / "gone.ckpt"
    bundle.write_bytes(tiny_bundle.read_bytes())
    events = []

    def hear(event) -> None:
        events.append(event)
        if event.kind == "started":
            bundle.unlink()

    source, target, settings = request_of("out.zarr", model=str(bundle), cluster=shared)
    result = segment(source, target, settings, emit=hear)
    assert result.status == "done", result.failures
    assert_same(arrays(result.target), arrays(expected))
    assert [event.name for event in events if event.kind == "worker"] == ["first"]
    # Its scheduler has Dask's defaults, which is said.
    notices = [event.text for event in events if event.kind == "notice"]
    assert any("worker-saturation 1.1, not 1.0" in text for text in notices), notices
    assert not (Path(result.run) / "bundles").exists()
    # It is not ours to end, and is left as it was: without our options, which may be secret.
    with apart.client() as other:
        assert len(other.nthreads()) == 1
        assert not other.run_on_scheduler(
            lambda dask_scheduler: worker_plugin.NAME in dask_scheduler.worker_plugins
        )


def test_a_scheduler_with_certificates_is_not_talked_to_without(apart, request_of, tmp_path):
    source, target, settings = request_of("out.zarr", scheduler=apart.address)
    with pytest.raises(SettingsError, match=r"tls://.*certificates in a cluster file"):
        segment(source, target, settings)
    assert not Path(target).exists()


def test_a_worker_of_another_version_is_refused(apart, shared, request_of, other_version):
    source, target, settings = request_of("out.zarr", cluster=shared)
    with (
        apart.while_there(apart.worker("other", other_version), 2),
        pytest.raises(
            SettingsError, match=r"worker tls://\S+ has megaseg-dask 0.0.1, this client has"
        ),
    ):
        segment(source, target, settings)
    assert not Path(target).exists()


def test_a_worker_of_another_version_that_comes_late_is_sent_away(
    apart, request_of, other_version, tmp_path
):
    with apart.client() as client:
        events = []
        workers = Workers(client, ENGINE, emit=events.append)
        workers.check_workers()
        with workers.ready(_NoModel, Location.of(tmp_path / "run"), StoreOptions()):
            other = apart.worker("other", other_version)
            good = apart.worker("second")
            deadline = time.monotonic() + 200
            while other.poll() is None or len(client.nthreads()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            workers.watch(2)
        _end(good)
    assert {event.name for event in events if event.kind == "worker"} == {"first", "second"}
    assert [
        e.text for e in events if "was refused: it has megaseg-dask 0.0.1" in getattr(e, "text", "")
    ]


class _NoModel:
    bundles = ()


def test_each_gpu_worker_sees_one_device_also_after_it_was_lost():
    """Without a GPU: devices are names in an environment, which is where CUDA reads them."""
    devices = ["GPU-a", "GPU-b"]
    options = {
        "threads_per_worker": 1,
        "memory_limit": 0,
        "dashboard_address": "127.0.0.1:0",
        "host": "127.0.0.1",
    }

    def seen(client) -> set:
        return set(client.run(lambda: __import__("os").environ["CUDA_VISIBLE_DEVICES"]).values())

    with GpuCluster(devices, 2, **options) as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=200)
        assert seen(client) == {"GPU-a", "GPU-b"}
        cluster.scale(1)
        while len(client.nthreads()) > 1:
            time.sleep(0.05)
        cluster.scale(2)
        client.wait_for_workers(2, timeout=200)
        assert seen(client) == {"GPU-a", "GPU-b"}


def test_two_workers_on_one_gpu_are_refused(client):
    workers = Workers(client, ENGINE)
    for name in ("one", "two"):
        workers.joined[name] = Joined(name, name, "host", 8, 0, "NVIDIA H100", "GPU-a")
    with pytest.raises(SettingsError, match="workers one and two share GPU GPU-a on host"):
        workers._require_own_devices({"one", "two"})
    workers._require_own_devices({"one"})


def listening() -> set[tuple[str, int]]:
    """Return the addresses on which this process and those that it started listen."""
    here = psutil.Process()
    addresses = set()
    for process in [here, *here.children(recursive=True)]:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    addresses.add(tuple(connection.laddr))
    return addresses


def hear(port: int, security: Security | None) -> bytes:
    """Return the first bytes that a port tells to a stranger with certificates of its own, or none.

    A Dask server without TLS greets everybody.
    """
    with suppress(ConnectionError, ssl.SSLError), ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=200))
        if security is not None:
            context = security.get_connection_args("client")["ssl_context"]
            context.verify_mode = ssl.CERT_NONE
            connection = stack.enter_context(context.wrap_socket(connection))
        # The empty line ends what a web server takes for a request.
        connection.sendall(bytes(100) + b"\r\n\r\n")
        return connection.recv(1)
    return b""


TLS_ALERT = b"\x15"
WEB_SERVER = b"H"
PAGES = ("", "status", "info/main/workers.html", "json/identity.json", "metrics", "health")


def answers_the_web(port: int) -> bool:
    """Return whether a port answers a browser with any page."""
    for page in PAGES:
        with suppress(OSError, HTTPException):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=200).close()
            return True
    return False


def test_a_stranger_is_refused_on_every_port_of_a_local_run(request_of):
    [(plan, _)] = plan_runs(*request_of("out.zarr", workers=2))
    before = listening()
    known = set(sys.path)
    pages = []
    with open_workers_of(plan) as workers:
        workers.client.wait_for_workers(2, timeout=200)
        assert all(address.startswith("tls://127.0.0.1") for address in workers.client.nthreads())
        addresses = listening() - before
        assert {host for host, _ in addresses} == {"127.0.0.1"}
        # Scheduler and workers; both have a port for web pages too.
        assert len(addresses) >= 6
        stranger = Security.temporary()
        for _, port in addresses:
            heard = hear(port, None)
            assert heard in (b"", TLS_ALERT, WEB_SERVER)
            if heard != WEB_SERVER:
                assert hear(port, stranger) == b""
            elif answers_the_web(port):
                pages.append(port)
        # Dask imports from there.
        imported = {path for path in sys.path if "dask-scratch-space" in path} - known
        assert imported
        for path in imported:
            (folder,) = [p for p in Path(path).parents if p.name.startswith("megaseg-")]
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Dask's page, where it is installed.
    assert len(pages) <= bool(find_spec("bokeh"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how_many",
    ["workers: 1", "adaptive: {minimum: 1, maximum: 2}"],
)
def test_local_workers_over_tls(how_many, request_of, tmp_path):
    path = tmp_path / "local.yaml"
    path.write_text(f"kind: local\n{how_many}\n")
    source, target, settings = request_of("out.zarr", cluster=str(path))
    events = []
    result = segment(source, target, settings, emit=events.append)
    assert result.status == "done", result.failures
    addresses = [event.address for event in events if event.kind == "worker"]
    assert addresses
    assert all(address.startswith("tls://127.0.0.1") for address in addresses)


# Clusters of the tests before leave a socket to the garbage collector, which may run here.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_workers_of_any_class_of_clusters(request_of, tmp_path):
    path = tmp_path / "custom.yaml"
    path.write_text(
        "kind: custom\nclass: distributed:LocalCluster\nworkers: 1\n"
        # In this process: a class alone knows its options.
        "options: {threads_per_worker: 1, host: 127.0.0.1, memory_limit: 0, "
        'dashboard_address: null, processes: false, protocol: "tcp://"}\n'
    )
    source, target, settings = request_of("out.zarr", cluster=str(path))
    events = []
    result = segment(source, target, settings, emit=events.append)
    assert result.status == "done", result.failures
    assert len([event for event in events if event.kind == "worker"]) == 1
