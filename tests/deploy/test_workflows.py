"""Workflows of deploy/: Snakemake runs its own; of Nextflow's the commands are run as they stand.

Nextflow is on no index, so its files are read by a linter's parser.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megaseg_dask.plan.settings import parse_settings
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

ROOT = Path(__file__).parents[2]
SNAKEFILE = ROOT / "deploy/snakemake/Snakefile"
NEXTFLOW = ROOT / "deploy/nextflow"
BIN = Path(sys.executable).parent
OPTIONS = {"overlap": 0, "block": "24,64,48"}
SNAKEMAKE = "snakemake==9.27.1"


@pytest.fixture
def source(tmp_path) -> Path:
    return write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))


@pytest.fixture
def options(tiny_bundle) -> str:
    words = [f"--{name} {value}" for name, value in OPTIONS.items()]
    return " ".join([f"--model {tiny_bundle}", *words])


def arrays_of_one_run(source: Path, target: Path, tiny_bundle: Path) -> dict[Path, bytes]:
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1, **OPTIONS})
    assert segment_here(str(source), str(target), settings).status == "done"
    return contents(target)


def environment(*folders: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, [*folders, BIN, os.environ["PATH"]]))
    return {**os.environ, "PATH": path}


# -- Snakemake


@pytest.fixture(scope="module")
def snakemake() -> Path:
    """Snakemake, in an environment of its own: it needs an older `packaging` than others."""
    folder = ROOT / ".venv-snakemake"
    program = folder / "bin/snakemake"
    mark = folder / f"{SNAKEMAKE}.installed"
    if not mark.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=200)
        pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", SNAKEMAKE]
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=280)
        if done.returncode:
            pytest.skip(f"Snakemake cannot be installed here: {done.stderr[-200:]}")
        mark.touch()
    return program


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_snakemake_goes_on_after_a_kill_to_the_arrays_of_one_run(
    snakemake, source, options, tiny_bundle, tmp_path
):
    config = {
        "source": str(source),
        "target": "out.zarr",
        "options": options,
        "threads": 1,
        # One job a stage: each starts Python, and the order of stages is what can go wrong.
        "shares": 1,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given = {"cwd": tmp_path, "env": environment()}
    command = [snakemake, "--snakefile", SNAKEFILE, "--configfile", "config.yaml", "--cores", "2"]
    wrong = subprocess.run(
        [*command, "--dry-run", "--config", "optoins=--tta"],
        capture_output=True,
        text=True,
        check=False,
        **given,
    )
    assert wrong.returncode == 1
    assert "unknown in the configuration: optoins" in wrong.stdout + wrong.stderr
    finished = tmp_path / "out.zarr.done"
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, **given)
    while not (finished / "megaseg/measure/1-of-1").exists():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (finished / "joined").exists()
    planned_ns = (finished / "stages.jsonl").stat().st_mtime_ns

    subprocess.run([*command, "--unlock"], check=True, capture_output=True, timeout=200, **given)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, **given
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (finished / "stages.jsonl").stat().st_mtime_ns == planned_ns
    expected = arrays_of_one_run(source, tmp_path / "expected.zarr", tiny_bundle)
    assert contents(tmp_path / "out.zarr") == expected


# -- Nextflow


def test_nextflow_files_are_read_and_each_label_has_resources():
    reftrace = pytest.importorskip("reftrace")
    module = reftrace.Module.from_file(str(NEXTFLOW / "main.nf"))
    assert isinstance(module, reftrace.Module), module
    labels = {label.value for process in module.processes for label in process.labels}
    assert [process.name for process in module.processes] == ["PREPARE", "PREDICT", "FINISH"]
    config = (NEXTFLOW / "nextflow.config").read_text()
    assert labels == set(re.findall(r"withLabel: (\w+)", config)) == {"megaseg_cpu", "megaseg_gpu"}
    asked = {parameter.name for parameter in module.params}
    block = re.search(r"params \{(.*?)\n\}", config, re.DOTALL)
    assert asked == set(re.findall(r"^    (\w+) =", block[1], re.MULTILINE))


class Commands:
    """The script of each process of main.nf, with what Nextflow fills in."""

    def __init__(self, folder: Path, values: dict[str, str]) -> None:
        self.folder = folder
        self.values = values
        text = (NEXTFLOW / "main.nf").read_text()
        found = re.findall(
            r'^process (\w+) \{.*?script:\s*"""(.*?)"""', text, re.DOTALL | re.MULTILINE
        )
        self.scripts = dict(found)

    def run(self, process: str, **values: str) -> Path:
        """Run a process in a folder of its own, by the shell that nextflow.config names."""
        known = {**self.values, **values}

        def fill(match: re.Match[str]) -> str:
            return match[1] or known[match[2]]

        script = re.sub(r"\\(.)|\$\{([^}]*)\}", fill, self.scripts[process])
        work = self.folder / f"{process}-{values.get('share', '')}"
        work.mkdir()
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", script],
            cwd=work,
            env=environment(NEXTFLOW / "bin"),
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, script + done.stdout + done.stderr
        return work


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_of_nextflow_give_the_arrays_of_one_run(source, options, tiny_bundle, tmp_path):
    config = (NEXTFLOW / "nextflow.config").read_text()
    assert "shell = ['/bin/bash', '-euo', 'pipefail']" in config
    target = tmp_path / "out.zarr"
    values = {
        "source": str(source),
        "target": str(target),
        "params.options": options,
        "params.label_name": "megaseg",
        "params.threads": "1",
        "params.shares": "2",
        "task.cpus": "1",
    }
    (tmp_path / "work").mkdir()
    commands = Commands(tmp_path / "work", values)
    shares = (commands.run("PREPARE") / "shares.txt").read_text().splitlines()
    assert shares == ["megaseg segment 1 2", "megaseg segment 2 2"]
    for line in reversed(shares):
        run, stage, share, count = line.split()
        commands.run("PREDICT", run=run, stage=stage, share=share, count=count)
    commands.run("FINISH")
    expected = arrays_of_one_run(source, tmp_path / "expected.zarr", tiny_bundle)
    assert contents(target) == expected
