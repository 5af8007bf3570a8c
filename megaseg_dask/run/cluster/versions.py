"""Versions of client, scheduler and workers.

A difference is refused where it can change a bit or break a task, and else noted.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import ENGINES
from megaseg_dask.inference.engine_names import EngineName

# How many leading parts of each version must agree. Tasks are our own functions, sent by name;
# packages that compute decide the last bits; Dask talks to itself; and pickles of functions do not
# travel between minor versions of Python.
_N_PARTS = {
    "python": 2,
    "megaseg-dask": 9,
    "dask": 9,
    "distributed": 9,
    "monai": 2,
    "numpy": 1,
    "zarr": 1,
}
# The scheduler computes nothing.
_OF_SCHEDULER = {"python", "dask", "distributed"}

Versions = Mapping[str, str | None]


def require_versions(
    client: Any, engine: EngineName, device: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Compare this client with its scheduler and all workers.

    Return the leading parts of the version of each package that later workers must
    have, and notes of differences that do not matter. Dask's own means are used, which
    need none of our code at the other end.

    Raises:
        SettingsError: A version differs where it matters.
    """
    n_parts = _n_parts(engine)
    packages = [name for name in n_parts if name != "python"]
    versions = client.get_versions(packages=packages)
    mine = versions["client"]["packages"]
    notes = list(compare(mine, versions["scheduler"]["packages"], engine, "the scheduler"))
    theirs = {
        address: (of_worker or {}).get("packages", {})
        for address, of_worker in versions["workers"].items()
    }
    for address, packages_there in theirs.items():
        notes += compare(mine, packages_there, engine, f"worker {address}")
    if device == "cuda":
        notes += compare_builds({a: found["torch"] for a, found in theirs.items()})
    required = {name: _public(mine[name]).split(".")[: n_parts[name]] for name in packages}
    return required, list(dict.fromkeys(notes))


def compare(mine: Versions, theirs: Versions, engine: EngineName, owner: str) -> Iterator[str]:
    """Yield a note for each package that differs where it does not matter.

    ``owner`` is the process whose versions are ``theirs``.

    Raises:
        SettingsError: A version differs where it matters.
    """
    for name, n_parts in _n_parts(engine).items():
        if owner == "the scheduler" and name not in _OF_SCHEDULER:
            continue
        here = _public(mine.get(name))
        there = _public(theirs.get(name))
        if theirs.get(name) is None:
            raise SettingsError(f"{owner} has no {name}; install {name} {here} there")
        if here.split(".")[:n_parts] != there.split(".")[:n_parts]:
            raise SettingsError(
                f"{owner} has {name} {there}, this client has {here}: results could differ; "
                "install the same version on both"
            )
        if here != there and name != "python":
            yield f"{owner} has {name} {there}, this client has {here}"


def compare_builds(versions: Versions) -> Iterator[str]:
    """Yield a note if the PyTorch of some workers, by address, is built for another CUDA.

    Raises:
        SettingsError: One is built for CPUs.
    """
    builds: dict[str, str] = {}
    for address, version in versions.items():
        build = str(version).partition("+")[2]
        if build == "cpu":
            raise SettingsError(
                f"worker {address} has torch {version}, which is built for CPUs, and the run is on "
                "cuda; install a CUDA build there"
            )
        builds.setdefault(build, address)
    if len(builds) > 1:
        found = [f"{address} has {build or 'that of PyPI'}" for build, address in builds.items()]
        yield (
            f"workers have several builds of torch, whose last bits may differ: {', '.join(found)}"
        )


def _n_parts(engine: EngineName) -> Mapping[str, int]:
    return {**_N_PARTS, **ENGINES[engine].versions}


def _public(version: str | None) -> str:
    # 2.13.0+cpu computes what 2.13.0+cu126 does, where there is no GPU.
    return str(version).partition("+")[0].partition(".final")[0]
