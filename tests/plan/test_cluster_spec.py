"""Cluster files.

What they say, what is refused in one line, and what each kind asks its library for.
"""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.cluster_spec import Cluster, cluster_of, read_cluster
from megaseg_dask.plan.planner import memory_of
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.cluster import start
from megaseg_dask.run.cluster.versions import compare

JOB = {"cores": 8, "memory": "32GB", "interface": "lo"}


def read(tmp_path: Path, text: str) -> Cluster:
    (tmp_path / "cluster.yaml").write_text(text)
    return read_cluster(str(tmp_path / "cluster.yaml"))


REFUSED = [
    ("", "expected keys and values"),
    ("- kind", "expected keys and values"),
    ("kind: [slurm", "while parsing a flow sequence"),
    ("kind: slrum", "kind: expected 'local', 'cuda', 'scheduler', 'slurm'"),
    ("workers: 3", "kind: expected a value, found none"),
    ("kind: slurm\nworker: 3", "unknown key worker; did you mean workers?"),
    ("kind: slurm\nadaptive: {max: 3}", "unknown key adaptive.max; did you mean maximum?"),
    ("kind: slurm\nadaptive: {minimum: 3, maximum: 2}", "adaptive: maximum 2 is below minimum 3"),
    ("kind: slurm\nworkers: 0", "workers: expected a number above 0"),
    (
        "kind: slurm\nworkers: 2\nadaptive: {maximum: 2}",
        "workers and adaptive: give only one of them",
    ),
    ("kind: slurm\nlifetime: soon", "lifetime: expected a time such as 55m"),
    (
        "kind: slurm\nlifetime: 5m\nlifetime_stagger: 5m",
        "lifetime_stagger: must be less than lifetime",
    ),
    (
        'kind: slurm\nlifetime: 1h\noptions: {walltime: "01:00:00"}',
        "must be less than options.walltime",
    ),
    ("kind: slurm\noptions: {walltime: 12:00:00}", "options.walltime: write it in quotes"),
    ("kind: slurm\noptions: {memory: 8 bananas}", "options.memory 8 bananas: "),
    ("kind: slurm\ntls: maybe", "tls: expected true, false, or the keys ca_file, cert and key"),
    ("kind: slurm\ntls: {ca_fil: a}", "unknown key tls.ca_fil; did you mean ca_file?"),
    ("kind: scheduler", "address is needed with kind scheduler"),
    ("kind: local\naddress: tcp://a:1", "address is needed with kind scheduler"),
    (
        "kind: scheduler\naddress: tcp://a:1\nworkers: 2",
        "workers: the scheduler decides this",
    ),
    ("kind: scheduler\naddress: tls://a:1\ntls: true", "give ca_file, cert and key"),
    (
        "kind: scheduler\naddress: tls://a:1\ntls: {ca_file: /no, cert: /no, key: /no}",
        "tls: /no is not there",
    ),
    ("kind: kubernetes\ntls: true", "the operator does not encrypt"),
    ("kind: custom", "class is needed with kind custom"),
    ("kind: local\nclass: distributed:LocalCluster", "with kind custom, and allowed only there"),
    ("kind: custom\nclass: LocalCluster", "class: expected package:Class, such as"),
    ("kind: custom\nclas: distributed:LocalCluster", "unknown key clas; did you mean class?"),
]


@pytest.mark.parametrize(
    ("text", "message"), REFUSED, ids=[text.replace("\n", ", ") for text, _ in REFUSED]
)
def test_what_makes_no_sense_is_one_line(text, message, tmp_path):
    with pytest.raises(SettingsError) as raised:
        read(tmp_path, text)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"--cluster {tmp_path / 'cluster.yaml'}: ")
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_two_addresses_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: No such file"):
        read_cluster(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(SettingsError, match="--scheduler and --cluster: give only one of them"):
        cluster_of(parse_settings({"scheduler": "tcp://a:1", "cluster": "a.yaml"}))


def test_the_plan_follows_from_what_a_job_has(tmp_path):
    found = read(
        tmp_path,
        "kind: slurm\ndevice: cuda\n"
        "options: {cores: 8, memory: 32GB, processes: 2, walltime: '1:40:00'}",
    )
    assert found.defaults() == {"device": "cuda", "threads": 4}
    assert found.memory_bytes() == 12_800_000_000
    assert found.lifetime_s == (5100.0, 300.0)
    options = {"cluster": str(tmp_path / "cluster.yaml")}
    assert memory_of(parse_settings(options), found, "cpu") == 12_800_000_000
    with pytest.raises(SettingsError, match=r"may plan with 12\.8 GB"):
        memory_of(parse_settings({**options, "memory": "13GB"}), found, "cpu")
    assert read(tmp_path, "kind: local").defaults() == {}


def test_the_command_line_goes_before_the_file(tmp_path):
    read(tmp_path, "kind: slurm\nadaptive: {maximum: 5}")
    found = cluster_of(parse_settings({"cluster": str(tmp_path / "cluster.yaml"), "workers": 3}))
    assert (found.workers, found.adaptive) == (3, None)


# kind: its directive for cores, and for memory.
SCRIPTS = {
    "slurm": "#SBATCH --cpus-per-task=8",
    "pbs": "ncpus=8:mem=30GB",
    "lsf": "#BSUB -n 8",
    "sge": "#$ -N dask-worker",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_job_runs_one_task_at_a_time_with_our_settings_over_tls(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        cluster = start._batch(Cluster(kind=kind, workers=2, options=JOB), stack)
        stack.callback(cluster.close)
        script = cluster.job_script()
        assert SCRIPTS[kind] in script
        assert script.rpartition("--nthreads")[2].split()[0] == "1", "the last one counts"
        assert "export DASK_INTERNAL_INHERIT_CONFIG=" in script
        assert cluster.scheduler_address.startswith("tls://")
        assert cluster.dashboard_link.startswith("http://127.0.0.1:")
        (folder,) = tmp_path.glob(".megaseg-*")
        assert folder.stat().st_mode & 0o77 == 0, "others could read the key"
        assert f"--tls-key {folder}/" in script
        assert "PRIVATE KEY" not in script
    assert not list(tmp_path.glob(".megaseg-*"))


def test_jobs_of_a_class_that_is_named_are_those_of_the_file(tmp_path, monkeypatch):
    """As docs/clusters.md has it, for HTCondor."""
    for name in ("condor_submit", "condor_rm"):
        (tmp_path / name).write_text("#!/bin/sh\necho 1 job submitted to cluster 7.\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    block = r"^```text\n(kind: custom\nclass: dask_jobqueue.*?)^```"
    [text] = re.findall(block, page, re.M | re.S)
    wanted = read(tmp_path, text)
    options = {**wanted.options, "scheduler_options": {"dashboard_address": "127.0.0.1:0"}}
    with ExitStack() as stack:
        cluster = start._custom(wanted.model_copy(update={"options": options}), stack)
        stack.callback(cluster.close)
        script = cluster.job_script()
    assert "request_gpus = 1" in script
    assert "--nthreads 3" in script


@pytest.mark.parametrize("kind", ["local", "slurm", "kubernetes"])
def test_options_that_a_library_does_not_take_are_refused(kind):
    with (
        pytest.raises(SettingsError, match=f"options: {kind} takes no local_directry"),
        ExitStack() as stack,
    ):
        start._KINDS[kind](Cluster(kind=kind, options={"local_directry": "/scratch"}), stack)


def test_where_no_jobs_are_submitted_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = Cluster(kind="pbs", workers=1, tls=False, options=JOB)
    with (
        pytest.raises(SettingsError, match="kind pbs: there is no qsub command here"),
        start.started(wanted),
    ):
        pass


@pytest.mark.parametrize(
    ("module", "kind", "package"),
    [
        ("dask_jobqueue", "lsf", "dask-jobqueue"),
        ("dask_kubernetes.operator", "kubernetes", "dask-kubernetes"),
    ],
)
def test_a_library_that_is_not_installed_is_one_line(module, kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(SettingsError, match=f"pip install '{package}"),
        start.started(Cluster(kind=kind)),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_installed:Cluster", "No module named 'not_installed'; install its package"),
        ("distributed:LocalClustr", "distributed has no LocalClustr; did you mean LocalCluster?"),
        ("distributed:Client", "Client: expected a class of Dask clusters, with the methods"),
    ],
)
def test_a_class_that_starts_no_cluster_is_one_line(name, message):
    custom = Cluster.model_validate({"kind": "custom", "class": name})
    with pytest.raises(SettingsError) as raised, start.started(custom):
        pass
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"class {name}: ")
    assert "\n" not in str(raised.value)


class StrictCluster:
    """A class of clusters by its methods, which no library knows."""

    def __init__(self, *, cores: int) -> None:
        self.cores = cores

    def scale(self, n: int) -> None:
        raise RuntimeError(f"the site has\nno room for {n}")

    def adapt(self, **limits: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"n_workers": 2},
            r"options\.n_workers: this follows from the rest of the file; remove it",
        ),
        ({"threads": 2}, r"kind custom: .*unexpected keyword argument 'threads'"),
        ({"cores": 2}, r"kind custom: the site has no room for 3"),
    ],
)
def test_what_a_custom_class_refuses_is_one_line(options, message):
    custom = Cluster.model_validate(
        {"kind": "custom", "class": f"{__name__}:StrictCluster", "workers": 3, "options": options}
    )
    with pytest.raises(SettingsError, match=message), start.started(custom):
        pass


def test_only_kubernetes_workers_get_gpus_and_all_get_our_settings():
    resources = {"limits": {"nvidia.com/gpu": "1", "memory": "32G"}}
    spec = start.kubernetes_spec(
        "cells", image="registry.example.org/megaseg", resources=resources, env={"A": "b"}
    )
    (scheduler,) = spec["spec"]["scheduler"]["spec"]["containers"]
    (worker,) = spec["spec"]["worker"]["spec"]["containers"]
    assert scheduler["resources"] == {"limits": {"memory": "32G"}}
    assert worker["resources"] == resources
    assert worker["args"][:4] == ["dask", "worker", "--nthreads", "1"]
    for container in (scheduler, worker):
        assert {"A", "DASK_INTERNAL_INHERIT_CONFIG"} == {
            variable["name"] for variable in container["env"]
        }


def test_kubernetes_up_to_the_first_call_of_its_server(monkeypatch, tmp_path):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    code = """
import sys
from megaseg_dask.run.cluster.start import started
from megaseg_dask.plan.cluster_spec import Cluster
from megaseg_dask.errors import SettingsError
try:
    with started(Cluster(kind="kubernetes", workers=1)):
        pass
except SettingsError as error:
    sys.exit(str(error))
"""
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "config")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "kind kubernetes: " in done.stderr
    assert "connect" in done.stderr.lower()


MINE = {
    "python": "3.11.7.final.0",
    "megaseg-dask": "0.1.0",
    "dask": "2026.7.1",
    "distributed": "2026.7.1",
    "torch": "2.13.0+cpu",
    "openvino": "2026.4.1",
    "monai": "1.6.1",
    "numpy": "2.4.6",
    "zarr": "3.1.6",
}


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("megaseg-dask", "0.1.1", True),
        ("megaseg-dask", None, True),
        ("python", "3.12.1.final.0", True),
        ("python", "3.11.9.final.0", False),
        ("distributed", "2026.8.0", True),
        ("torch", "2.12.0+cpu", True),
        ("torch", "2.13.0+cu126", False),
        ("openvino", None, False),
        ("monai", "1.5.0", True),
        ("numpy", "2.3.0", False),
        ("zarr", "2.18.0", True),
    ],
)
def test_versions_that_matter_are_refused(name, version, refused):
    theirs = {**MINE, name: version}
    if refused:
        with pytest.raises(SettingsError, match=rf"a worker has (no )?{name}"):
            list(compare(MINE, theirs, "torch", "a worker"))
        return
    notes = list(compare(MINE, theirs, "torch", "a worker"))
    assert notes == (["a worker has numpy 2.3.0, this client has 2.4.6"] if name == "numpy" else [])
    assert list(compare(MINE, {**MINE, name: version}, "torch", "the scheduler")) == []


def test_a_network_that_openvino_runs_needs_it_everywhere():
    with pytest.raises(SettingsError, match="a worker has no openvino"):
        list(compare(MINE, {**MINE, "openvino": None}, "openvino", "a worker"))


def test_workers_on_gpus_up_to_where_cuda_is_asked_for():
    from megaseg_dask.inference.gpu import visible_devices

    if n := len(visible_devices()):
        with (
            pytest.raises(SettingsError, match=f"{n + 1} workers: there are {n} GPUs here"),
            ExitStack() as stack,
        ):
            start._cuda(Cluster(kind="cuda", workers=n + 1), stack)
        return
    with (
        pytest.raises(SettingsError, match="PyTorch finds no GPU here"),
        start.started(Cluster(kind="cuda")),
    ):
        pass


def test_what_is_set_for_a_run_leaves_the_defaults_of_dask_behind():
    """Dask's defaults come with an import, and would go with what was set around it."""
    code = """
from megaseg_dask.errors import SettingsError
from megaseg_dask.run.cluster import connection
import types, dask
from megaseg_dask.plan.settings import parse_settings
settings = parse_settings({"scheduler": "tcp://127.0.0.1:1"})
plan = types.SimpleNamespace(settings=settings, engine=types.SimpleNamespace(device="cpu"))
connection.START_S = 1
try:
    with connection.connect(plan):
        pass
except SettingsError:
    pass
dask.config.get("distributed.comm.tls.ciphers")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
