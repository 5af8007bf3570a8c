"""Values that a configuration states, with their origin; and the check that each is carried out.

A value is found by its dotted path. A value that only refers to another, as
``${data._aux.patch_shape}``, is followed; one that would have to be computed states nothing. Names
such as ``_target_`` are compared, never imported.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import one_line
from megaseg_dask.models.cytodl.safe_loading import short

# Argument → the values of it that are carried out here, the reference's first.
Accepted: TypeAlias = Mapping[str, tuple[object, ...]]

REFERENCE = "reference value"  # the origin of a value that no file states
CYTODL_PACKAGES = ("cyto_dl", "aics_im2im")
MAX_HOPS = 5  # from one reference to the next; a circle ends here too
_UNKNOWN_TEXTS = ("???", "MUST_OVERRIDE")  # a value that nobody gave
_PATH = r"\$\{(\w+(?:\.\w+){0,9})\}"
_REFERENCE = re.compile(_PATH)
# cyto-dl's way to write a mapping with computed keys.
_PAIRS = re.compile(r"\$\{kv_to_dict:" + _PATH + r"\}")


@dataclass(frozen=True, slots=True)
class Statement:
    """A value, and the file and path that state it."""

    value: object
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} is {short(self.value)}"

    def number(self) -> float:
        """Return the value as a finite number; raises `BundleError` for anything else."""
        value = self.value
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38:
            return float(value)
        raise BundleError(f"{self}; expected a finite number")


Section: TypeAlias = dict[str, Statement]  # by the name of the argument


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file, or the hyperparameters in a checkpoint."""

    name: str
    root: object

    def at(self, path: str, hops: int = MAX_HOPS) -> object:
        """Return the value at a dotted path; None if absent, or if it would have to be computed."""
        value = self.root
        for key in path.split("."):
            value = self.follow(_child(value, key), hops)
        return value

    def follow(self, value: object, hops: int = MAX_HOPS) -> object:
        """Return the value that ``value`` refers to; None if it states nothing."""
        if not isinstance(value, str):
            return value
        if hops and (match := _REFERENCE.fullmatch(value)):
            return self.at(match[1], hops - 1)
        if hops and (match := _PAIRS.fullmatch(value)):
            return self._mapping(self.at(match[1], hops - 1), hops - 1)
        # Other `${...}` would have to be computed.
        is_unknown = "${" in value or value in _UNKNOWN_TEXTS
        return None if is_unknown else value

    def _mapping(self, pairs: object, hops: int) -> dict[str, object] | None:
        if not isinstance(pairs, list):
            return None
        found: dict[str, object] = {}
        for number, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                return None
            key = self.follow(pair[0], hops)
            found[key if isinstance(key, str) else f"unnamed_{number}"] = pair[1]
        return found

    def statement(self, path: str) -> Statement | None:
        """Return the value at a path, if one is stated."""
        value = self.at(path)
        return None if value is None else self._stated(value, path)

    def _stated(self, value: object, path: str) -> Statement:
        return Statement(value, f"{self.name}: {one_line(path, 200)}")

    def unresolved(self, path: str) -> Statement | None:
        """Return what is written at a path, where that would have to be computed."""
        parent, _, key = path.rpartition(".")
        value = self._entries(parent).get(key)
        if value is None or self.follow(value) is not None:
            return None
        return Statement(value, f"{self.name}: {path}")

    def section(self, path: str) -> Section:
        """Return all that the mapping at a path states, by argument."""
        stated: Section = {}
        for key, written in self._entries(path).items():
            value = self.follow(written)
            if isinstance(key, str) and value is not None:
                stated[key] = self._stated(value, f"{path}.{key}")
        return stated

    def uncomputed(self, path: str) -> set[str]:
        """Return the keys of the mapping at a path whose values would have to be computed."""
        return {
            one_line(key)
            for key, value in self._entries(path).items()
            if isinstance(value, str) and self.follow(value) is None
        }

    def mentions(self, path: str, key: str) -> bool:
        """Return whether the mapping at ``path`` has the key at all, whatever its value."""
        return key in self._entries(path)

    def _entries(self, path: str) -> Mapping[object, object]:
        value = self.at(path)
        return value if isinstance(value, Mapping) else {}


def _child(value: object, key: str) -> object:
    """Return an entry of a mapping, or of a list by its number; None where there is none."""
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and re.fullmatch("[0-9]{1,4}", key) and int(key) < len(value):
        return value[int(key)]
    return None


def reference_origin(places: Sequence[tuple[Source, str]]) -> str:
    """Return the origin of a value that no file states.

    It mentions what is written at the first of the places whose value would have to be computed.
    """
    for source, path in places:
        if written := source.unresolved(path):
            return f"{REFERENCE} ({written})"
    return REFERENCE


def is_same(value: object, expected: object) -> bool:
    """Return whether a foreign value equals ours; one number stands for every axis."""
    if isinstance(expected, Mapping):
        if not isinstance(value, Mapping) or value.keys() != expected.keys():
            return False
        return all(is_same(value[key], expected[key]) for key in expected)
    if not isinstance(expected, tuple):
        return isinstance(value, bool | int | float | str) and value == expected
    if isinstance(value, int):
        return all(is_same(value, each) for each in expected)
    if not isinstance(value, list | tuple) or len(value) != len(expected):
        return False
    return all(map(is_same, value, expected))


def require_accepted(section: Section, accepted: Accepted, free: Collection[str]) -> None:
    """Check each argument that a section states; those in ``free`` may have any value.

    Raises:
        BundleError: An argument is not known, or has a value that is not carried out.
    """
    for argument, statement in section.items():
        values = accepted.get(argument, ())
        if argument in free or any(is_same(statement.value, value) for value in values):
            continue
        reason = f"only {values[0]} is run" if values else "not an argument known here"
        raise BundleError(f"{statement}; {reason}, so this model is not")


def class_name(target: object, packages: Collection[str]) -> str | None:
    """Return the class of a dotted name within one of the packages, which is not imported."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        return None
    if not any(target.startswith(f"{package}.") for package in packages):
        return None
    return target.rpartition(".")[2][:80]
