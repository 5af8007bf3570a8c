"""What is installed: wheel and sdist, what pip resolves, the conda recipe, the lock file."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Run a command as a user does, elsewhere, and return what it printed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# -- wheel and sdist


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that is built from the sdist, each in an environment of its own, as packagers do."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megaseg_dask", tree / "megaseg_dask", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run([sys.executable, "-m", "build", "--outdir", folder, tree], folder)
    [_] = folder.glob("*.tar.gz")
    [made] = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package(wheel):
    package = ROOT / "megaseg_dask"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if name.startswith("megaseg_dask/")}
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_runs_offline_from_a_wheel(wheel, tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run([*pip, wheel], tmp_path)
    # What the package needs comes from this environment, after what was installed there.
    [site] = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import megaseg_dask; print(megaseg_dask.__file__)"
    assert run([python, "-c", code], tmp_path).startswith(str(site))
    # A proxy at which nobody listens: whatever asks the network fails.
    nobody = "http://127.0.0.1:9"
    offline = {"MEGASEG_OFFLINE": "1", "HTTPS_PROXY": nobody, "HTTP_PROXY": nobody}
    home = {"MEGASEG_HOME": str(tmp_path / "home")}
    said = run([tmp_path / "venv/bin/megaseg", "demo", "made"], tmp_path, **offline, **home)
    assert "Dice" in said
    assert (tmp_path / "made/segmented.zarr/zarr.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_extra_resolves_with_our_constraints(extra):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    constraints = ["--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run([*command, *constraints, f"{ROOT}[{extra}]"], ROOT)


# -- conda

# Names that conda-forge gives to packages that an index of Python has under other names.
CONDA_NAMES = {"torch": "pytorch", "dask": "dask-core"}


def of_conda(requirement: str) -> str:
    """Return what a recipe has for a requirement of Python."""
    parsed = Requirement(requirement)
    name = CONDA_NAMES.get(parsed.name, parsed.name)
    limits = sorted(map(str, parsed.specifier), key=lambda limit: limit.startswith("<"))
    return f"{name} {','.join(limits)}".strip()


def test_the_recipe_needs_what_the_package_needs():
    rattler = pytest.importorskip("rattler_build", reason="pip install py-rattler-build")
    recipe = rattler.Stage0Recipe.from_file(str(ROOT / "deploy/conda/recipe.yaml"))
    [rendered] = recipe.render()
    made = rendered.recipe.to_dict()
    assert made["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    [python, *needed] = made["requirements"]["run"]
    assert python == f"python {PROJECT['requires-python']}"
    assert needed == [of_conda(requirement) for requirement in PROJECT["dependencies"]]
    [(command, target)] = PROJECT["scripts"].items()
    assert made["build"]["python"]["entry_points"] == [f"{command} = {target}"]


# -- the lock file


def test_the_lock_file_has_what_the_package_needs_in_the_releases_that_are_tested():
    pin = re.compile(r"^([a-z][a-z0-9.-]*)==(\S+)", re.M)
    locked = dict(pin.findall((ROOT / "requirements.lock").read_text()))
    tested = dict(pin.findall((ROOT / "constraints.txt").read_text()))
    extras = PROJECT["optional-dependencies"]
    locked_extras = ("demo", "view", "dashboard", "openvino", "import")
    needed = [*PROJECT["dependencies"], *(line for name in locked_extras for line in extras[name])]
    for requirement in map(Requirement, needed):
        assert locked.get(requirement.name, "none") in requirement.specifier, "run: make lock"
    pinned = locked.keys() & tested.keys()
    assert {name: locked[name] for name in pinned} == {name: tested[name] for name in pinned}
