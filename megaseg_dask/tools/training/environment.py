"""The Python environment of cyto-dl, beside ours.

Its pins (Python below 3.12, torch 2.0) exclude ours, and its licence forbids to
ship any of it. One command installs it in another environment, and it trains in
another process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megaseg_dask.errors import SettingsError, StoreError
from megaseg_dask.models.home import home

HOME = "MEGASEG_CYTODL"
INSTALL = "megaseg train --install"
# Written last: an environment without it is incomplete.
MARK = "megaseg-installed.txt"
_PYTHON = "3.11"

# What cyto-dl needs for this task, without its pins. Packages that use botocore ask for versions
# that exclude one another; these three agree, and spare pip a search of half an hour.
REQUIREMENTS = (
    "torch==2.13.0",
    "monai==1.6.1",
    "lightning==2.6.6",
    "numpy>=2",
    "tifffile>=2025.5.21",
    "hydra-core>=1.3,<1.4",
    "hydra-colorlog>=1.2",
    "pyrootutils>=1.0",
    "rich",
    "universal-pathlib",
    "pandas",
    "pyarrow",
    "scikit-image",
    "einops",
    "online-stats",
    "anndata",
    "mlflow",
    "boto3==1.43.117",
    "botocore==1.43.117",
    "aiobotocore==3.10.0",
    "bioio>=3",
    "bioio-ome-tiff>=1.4",
    "ome-zarr",
)
CYTODL = "cyto-dl==0.6.2"


def location() -> Path:
    """Return its folder: that of ``MEGASEG_CYTODL``, else ``cyto-dl`` in the models' cache."""
    chosen = os.environ.get(HOME)
    return Path(chosen).expanduser().absolute() if chosen else home() / "cyto-dl"


def find_python() -> Path:
    """Return the Python of cyto-dl's environment.

    Raises:
        SettingsError: if it is not installed; the message has the command that installs it.
    """
    folder = location()
    python = _python_of(folder)
    if not (folder / MARK).exists() or not python.exists():
        advice = f"run `{INSTALL}` once (2 GB), or set {HOME} to the environment that it is in"
        raise SettingsError(f"training needs cyto-dl, and {folder} does not have it: {advice}")
    return python


def install(report: Callable[[str], None]) -> Path:
    """Install cyto-dl's environment, unless it is there, and return its folder.

    Raises:
        SettingsError: without a Python that cyto-dl runs on.
        StoreError: if pip fails.
    """
    folder = location()
    if (folder / MARK).exists():
        return folder
    python = find_base_python()
    report(f"installing cyto-dl in {folder}: 2 GB, some minutes")
    # pip continues an installation that was interrupted.
    _run([python, "-m", "venv", str(folder)], folder)
    options = ["--quiet", "--disable-pip-version-check"]
    # Python compiles the modules that it imports, which are few.
    options.append("--no-compile")
    pip_install = [str(_python_of(folder)), "-m", "pip", "install", *options]
    _run([*pip_install, *REQUIREMENTS], folder)
    _run([*pip_install, "--no-deps", CYTODL], folder)
    (folder / MARK).write_text("\n".join([*REQUIREMENTS, CYTODL]) + "\n")
    return folder


def find_base_python() -> str:
    """Return a Python of the version that cyto-dl needs.

    Raises:
        SettingsError: if there is none.
    """
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if ours == _PYTHON:
        return sys.executable
    python = shutil.which(f"python{_PYTHON}")
    if python is None:
        raise SettingsError(
            f"cyto-dl needs Python {_PYTHON}, this is {ours} and there is no python{_PYTHON} on "
            f"the PATH: install one (`uv python install {_PYTHON}` for instance) and try again"
        )
    return python


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: list[str], folder: Path) -> None:
    problem = f"cyto-dl was not installed in {folder}"
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StoreError(f"{problem}: {error}") from error
    if ended.returncode:
        advice = f"fix that and run `{INSTALL}` again"
        raise StoreError(f"{problem}: {_cause_of(ended.stderr)}; {advice}")


def _cause_of(stderr: str) -> str:
    """Return the first line that names an error, else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if "error" in line.lower():
            return line
    return lines[-1] if lines else "no reason given"
