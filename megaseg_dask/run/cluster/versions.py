"""Versions of client, scheduler and workers: what differs is refused where it can change a bit or break a task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import ENGINES
from megaseg_dask.inference.engine_names import EngineName

# How many parts of its version have to agree: tasks are our own functions, sent by name; what computes decides the last
# bits; Dask talks to itself; and pickles of functions do not travel between minor versions of Python.
_PARTS = {
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


def packages_of(engine: EngineName) -> list[str]:
    """Return what has to be asked for, beside Python."""
    return [name for name in {**_PARTS, **ENGINES[engine].versions} if name != "python"]


def compare(mine: Versions, theirs: Versions, engine: EngineName, who: str) -> Iterator[str]:
    """Yield a note for each package that differs where it does not matter.

    Raises :class:`SettingsError` at the first that matters; ``who`` is whose versions are ``theirs``.
    """
    needed = {**_PARTS, **ENGINES[engine].versions}
    for name, n in needed.items():
        if who == "the scheduler" and name not in _OF_SCHEDULER:
            continue
        here, there = mine.get(name), theirs.get(name)
        if there is None:
            raise SettingsError(f"{who} has no {name}; install {name} {_public(here)} there")
        if _parts(here)[:n] != _parts(there)[:n]:
            raise SettingsError(
                f"{who} has {name} {_public(there)}, this client has {_public(here)}: it would give "
                "other results, or fail; install the same on both"
            )
        if _public(here) != _public(there) and name != "python":
            yield f"{who} has {name} {_public(there)}, this client has {_public(here)}"


def _public(version: str | None) -> str:
    # 2.13.0+cpu computes what 2.13.0+cu126 does, where there is no GPU.
    return str(version).partition("+")[0].partition(".final")[0]


def _parts(version: str | None) -> Sequence[str]:
    return _public(version).split(".")


def require_versions(client: Any, engine: EngineName) -> tuple[dict[str, list[str]], list[str]]:
    """Compare this client with its scheduler and all workers; return what later workers must have, and notes.

    The first are the leading parts of the version of each package. Asked by Dask's own means, which need no code of
    ours at the other end. Raises :class:`SettingsError`.
    """
    found = client.get_versions(packages=packages_of(engine))
    mine = found["client"]["packages"]
    notes = list(compare(mine, found["scheduler"]["packages"], engine, "the scheduler"))
    for address, versions in found["workers"].items():
        notes += compare(mine, (versions or {}).get("packages", {}), engine, f"worker {address}")
    needed = {**_PARTS, **ENGINES[engine].versions}
    insisted = {name: list(_parts(mine[name]))[: needed[name]] for name in packages_of(engine)}
    return insisted, list(dict.fromkeys(notes))
