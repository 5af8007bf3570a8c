"""The fast tests on each Python from 3.11 to 3.14 that is installed: `make matrix`.

Each Python gets an environment of its own. Python 3.11 has the releases in constraints.txt, with
which everything is tested. The others have the newest releases of what computes and stores, and
else the same. This file needs the standard library alone, so that any Python can start it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
TESTED = "3.11"
EXTRAS = "dashboard,demo,docs,view,test"
# Of the newest stack no release of these is stated.
COMPUTING = {
    "connected-components-3d",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-image",
    "scipy",
    "torch",
    "xarray",
    "zarr",
}


@dataclass(frozen=True)
class Outcome:
    """What the tests said on one Python."""

    python: str
    stack: str
    releases: str
    passed: int
    failed: int
    skipped: int


def answers(interpreter: str | Path, code: str) -> str | None:
    """Return what an interpreter prints, None if it does not start."""
    try:
        done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(interpreter: str | Path) -> str | None:
    """Return "3.12", or None if this is no Python that starts."""
    return answers(interpreter, "import sys; print('%d.%d' % sys.version_info[:2])")


def find_python(version: str) -> str | None:
    """Return an interpreter of this version: on the PATH, or of pyenv."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    of_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for interpreter in [*filter(None, [on_path]), *of_pyenv]:
        # A shim of pyenv may be on the PATH for a version that is not chosen.
        if version_of(interpreter) == version:
            return str(interpreter)
    return None


def install(interpreter: str, folder: Path, stack: str) -> Path:
    """Make an environment, or bring it up to date, and return its Python."""
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    stated = [line for line in lines if stack == "tested" or not is_of(COMPUTING, line)]
    constraints.write_text("\n".join(stated) + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", constraints, "-e", f".[{EXTRAS}]"], cwd=ROOT, check=True)
    return python


def is_of(packages: set[str], line: str) -> bool:
    """Tell whether a line of constraints.txt is of one of these packages."""
    return line.partition("==")[0] in packages


def run_tests(
    python: Path, folder: Path, version: str, stack: str, tests: Sequence[str]
) -> Outcome:
    """Run the fast tests in an environment and count what they say."""
    counts = folder / "counts.xml"
    counts.unlink(missing_ok=True)
    workers = os.environ.get("WORKERS", str(os.cpu_count() or 2))
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "-n", workers, "--dist", "loadfile"]
    # Not the caller's tree: each environment has this one, editable.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*command, f"--junit-xml={counts}", *tests], cwd=ROOT, env=environment)
    if not counts.exists():
        return Outcome(version, stack, releases_of(python), 0, 1, 0)
    suites = list(ElementTree.parse(counts).iter("testsuite"))

    def total(*names: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites for name in names)

    failed = total("failures", "errors")
    skipped = total("skipped")
    passed = total("tests") - failed - skipped
    return Outcome(version, stack, releases_of(python), passed, failed, skipped)


def releases_of(python: Path) -> str:
    """Return the releases that an environment has of what matters most."""
    code = "from importlib.metadata import version\nfor name in {}: print(name, version(name))"
    shown = answers(python, code.format(sorted(COMPUTING))) or "not all installed"
    return ", ".join(shown.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix and print a table; 0 if every Python that is installed passed."""
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("tests", nargs="*", default=["tests"], help="tests to run, all by default")
    parser.add_argument(
        "--pythons", nargs="+", default=[], help="interpreters in place of those found"
    )
    parser.add_argument(
        "--stack", choices=["tested", "newest"], help="the same one for each Python"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".matrix", help="for the environments"
    )
    wanted = parser.parse_args(arguments)
    found = {version: find_python(version) for version in VERSIONS}
    if wanted.pythons:
        found = {version_of(python) or python: python for python in wanted.pythons}
    outcomes = []
    for version, interpreter in found.items():
        if interpreter is None or version not in VERSIONS:
            print(f"Python {version}: skipped, it is not installed", flush=True)
            continue
        stack = wanted.stack or ("tested" if version == TESTED else "newest")
        print(f"Python {version}, {stack} releases: {interpreter}", flush=True)
        folder = wanted.folder / f"{version}-{stack}"
        try:
            python = install(interpreter, folder, stack)
        except subprocess.CalledProcessError as error:
            print(f"Python {version}: cannot be installed ({error})", flush=True)
            outcomes.append(Outcome(version, stack, "not installed", 0, 1, 0))
            continue
        outcomes.append(run_tests(python, folder, version, stack, wanted.tests))
    for o in outcomes:
        counts = f"{o.passed} passed, {o.failed} failed, {o.skipped} skipped"
        print(f"Python {o.python}, {o.stack}: {counts} ({o.releases})")
    return int(not outcomes or any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
