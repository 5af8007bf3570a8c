"""cyto-dl in an environment of its own.

Its pins (Python below 3.12, torch 2.0) rule out ours, and its licence that any
of it is shipped here. So it is installed beside, by one command, and trains in
a process of its own.
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
_PYTHON = "3.11"

# What cyto-dl needs for this task, without its pins. botocore's users ask for versions that exclude one another; these
# three agree, and spare pip a search of half an hour.
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
_DONE = "megaseg-installed.txt"  # written last: an environment without it is half of one


def location() -> Path:
    """Where cyto-dl's environment is: ``MEGASEG_CYTODL``, else ``cyto-dl`` in the folder of the models' cache."""
    given = os.environ.get(HOME)
    return Path(given).expanduser().absolute() if given else home() / "cyto-dl"


def find_python() -> Path:
    """Return the Python of cyto-dl's environment; raises :class:`SettingsError` with the command that makes it."""
    python = _python_of(location())
    if not (location() / _DONE).exists() or not python.exists():
        raise SettingsError(
            f"training needs cyto-dl, and {location()} does not have it: run `{INSTALL}` once (2 GB), or set {HOME} to "
            "the environment that it is in"
        )
    return python


def install(say: Callable[[str], None]) -> Path:
    """Make cyto-dl's environment, unless it is there; returns its folder.

    Raises :class:`SettingsError` without a Python that cyto-dl runs on, :class:`StoreError` if pip fails.
    """
    folder = location()
    if (folder / _DONE).exists():
        return folder
    base = _find_base()
    say(f"installing cyto-dl in {folder}: 2 GB, some minutes")
    # What an interrupted installation left is taken up by pip.
    _run([base, "-m", "venv", str(folder)], folder)
    # Python compiles what it imports, which is a small part of it.
    pip = [
        str(_python_of(folder)),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
    ]
    _run([*pip, *REQUIREMENTS], folder)
    _run([*pip, "--no-deps", CYTODL], folder)
    (folder / _DONE).write_text("\n".join([*REQUIREMENTS, CYTODL]) + "\n")
    return folder


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _find_base() -> str:
    if f"{sys.version_info.major}.{sys.version_info.minor}" == _PYTHON:
        return sys.executable
    found = shutil.which(f"python{_PYTHON}")
    if found is None:
        raise SettingsError(
            f"cyto-dl needs Python {_PYTHON}, this is {sys.version_info.major}.{sys.version_info.minor} and there is "
            f"no python{_PYTHON} on the PATH: install one (`uv python install {_PYTHON}` for instance) and try again"
        )
    return found


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StoreError(f"cyto-dl was not installed in {folder}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        cause = next(
            (line for line in lines if "error" in line.lower()),
            lines[-1] if lines else "no reason given",
        )
        raise StoreError(
            f"cyto-dl was not installed in {folder}: {cause.strip()}; mend that and run `{INSTALL}` again"
        )
