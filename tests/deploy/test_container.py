"""The container's steps in an environment of their own, on this machine.

No image is built, all else is run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from tests.fixtures.images import blobs, write_image

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/container/Dockerfile"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Steps that need a container, or an index that only a site's network reaches.
_OF_CONTAINERS = ("useradd",)


def steps(variant: str) -> list[tuple[str, str]]:
    """Return the instructions of the stages of one variant, with its arguments filled in."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [
        line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")
    ]
    found: list[tuple[str, str]] = []
    arguments, is_ours = {"VARIANT": variant}, True
    for word, rest in lines:
        if word == "FROM":
            is_ours = not re.search(rf" AS torch-(?!{re.escape(variant)}\b)", rest)
        elif word == "ARG":
            name, _, value = rest.partition("=")
            if is_ours:
                arguments.setdefault(name, value)
        elif is_ours:
            found.append((word, re.sub(r'"?\$\{(\w+)\}"?', lambda m: arguments[m[1]], rest)))
    return found


def test_each_step_runs_and_what_it_makes_segments_an_image(tmp_path):
    source, home = tmp_path / "src", tmp_path / "opt/megaseg"
    source.mkdir()
    environment = {
        "PATH": f"{home}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    environment |= {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("PIP_", "SSL_", "REQUESTS_"))
    }
    # Modules are compiled when they are imported, and most never are.
    environment["PIP_COMPILE"] = "0"

    def run(command: str, **more) -> str:
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            **more,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    for word, rest in steps("cpu"):
        if word == "COPY" and not rest.startswith("--from"):
            *names, target = rest.split()
            for name in names:
                place = source / target
                if (ROOT / name).is_dir():
                    shutil.copytree(
                        ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / name, place)
        elif word == "RUN" and not rest.startswith(_OF_CONTAINERS):
            # Whatever index this machine's pip is set to stands for those of the Dockerfile.
            command = re.sub(r"--(extra-)?index-url \S+", "", rest).replace(
                "/opt/megaseg", str(home)
            )
            run(f"{sys.executable} {command[7:]}" if command.startswith("python ") else command)

    # As the container's user does, away from the sources.
    shutil.rmtree(source)
    source.mkdir()
    assert "Usage: megaseg" in run("megaseg --help")
    assert "openvino" in run("megaseg doctor")
    write_image(source / "cells.zarr", blobs((24, 40, 48)))
    run("megaseg segment cells.zarr out.zarr --model starter --workers 1 --quiet")
    assert zarr.open_group(source / "out.zarr", mode="r")["labels/megaseg/0"].shape == (24, 40, 48)
