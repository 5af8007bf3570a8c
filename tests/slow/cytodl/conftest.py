"""cyto-dl itself, in an environment of its own, and one small bundle that it trained.

The environment is the one that MEGASEG_CYTODL names, else `.venv-cyto` in the
checkout, made once by what `megaseg train --install` calls and kept.
"""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tifffile import imwrite

from megaseg_dask.errors import MegasegError
from megaseg_dask.models import NetworkSpec
from megaseg_dask.tools.training import environment
from starter.simulation import simulate
from tests.fixtures.bundles import write_checkpoint

ROOT = Path(__file__).parents[3]
NETWORK = NetworkSpec(filters=(4, 8, 8, 16, 16))
PATCH = (16, 32, 32)


@contextmanager
def locked(path: Path):
    """One test process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def cytodl() -> Path:
    """The folder of cyto-dl's environment."""
    folder = Path(os.environ.get(environment.HOME) or ROOT / ".venv-cyto").absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, locked(folder.with_name(f"{folder.name}.lock")):
        patch.setenv(environment.HOME, str(folder))
        try:
            environment.install(lambda line: None)
        except MegasegError as error:
            pytest.skip(f"cyto-dl cannot be installed here: {error}")
    return folder


@pytest.fixture(autouse=True)
def _environment(cytodl, monkeypatch):
    monkeypatch.setenv(environment.HOME, str(cytodl))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder for all test processes of this session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cytodl"
    folder.mkdir(exist_ok=True)
    return folder


def megaseg(*arguments, **options) -> subprocess.Popen:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "megaseg_dask", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


def events_of(process: subprocess.Popen, timeout: float = 500) -> list[dict]:
    """What a command with --json told until its end, which must be good."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out[-2000:] + err[-2000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="session")
def manifest(shared) -> Path:
    """A CSV manifest of small simulated nuclei: three to learn from, one to validate."""
    folder = shared / "images"
    with locked(shared / "manifest.lock"):
        if not (folder / "images.csv").exists():
            folder.mkdir(exist_ok=True)
            rows = ["raw,seg,split"]
            for i in range(4):
                made = simulate(i, (24, 48, 48), "nuclei", difficulty=0.2)
                for name, values in (("raw", made.image), ("seg", made.mask.astype(np.uint8) * 7)):
                    imwrite(
                        folder / f"{i}_{name}.ome.tif", values, ome=True, metadata={"axes": "ZYX"}
                    )
                rows.append(f"{i}_raw.ome.tif,{i}_seg.ome.tif,{'val' if i == 3 else 'train'}")
            (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return folder / "images.csv"


@pytest.fixture(scope="session")
def start(shared) -> Path:
    """A checkpoint to begin from: it makes the network a small one."""
    with locked(shared / "start.lock"):
        path = shared / "start.ckpt"
        return path if path.exists() else write_checkpoint(path, NETWORK)


def training(manifest, start, out, *options) -> list:
    """Arguments of a small training."""
    return [
        "train",
        manifest,
        "--recipe",
        "MegaSeg_light",
        "--from",
        start,
        "--out",
        out,
        "--patch",
        "16,32,32",
        "--learning-rate",
        "0.003",
        "--decay",
        "0.9",
        "--accelerator",
        "cpu",
        "--json",
        *options,
    ]


@pytest.fixture(scope="session")
def trained(cytodl, shared, manifest, start) -> Path:
    """A bundle of six epochs, and what its training told beside it."""
    out, told = shared / "trained", shared / "told.json"
    with locked(shared / "trained.lock"):
        if not told.exists():
            options = {"env": {**os.environ, environment.HOME: str(cytodl), "OMP_NUM_THREADS": "1"}}
            events = events_of(
                megaseg(*training(manifest, start, out, "--max-epochs", "6"), **options)
            )
            told.write_text(json.dumps(events))
    return out
