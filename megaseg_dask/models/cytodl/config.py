"""What a configuration states, where, and whether it is among what is carried out here.

A value is found by its dotted path. A value that only refers to another, as
``${data._aux.patch_shape}``, is followed; one that would have to be computed
states nothing. Names such as ``_target_`` are compared, never imported.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import one_line
from megaseg_dask.models.cytodl.safe_loading import short

Fixed: TypeAlias = Mapping[str, tuple[object, ...]]

REFERENCE = "reference value"  # the origin of what no file states
MAX_HOPS = 5  # from one reference to the next; a circle ends here too
_PATH = r"\$\{(\w+(?:\.\w+){0,9})\}"
_REFERENCE = re.compile(_PATH)
_PAIRS = re.compile(
    r"\$\{kv_to_dict:" + _PATH + r"\}"
)  # cyto-dl's way to write a mapping with computed keys


@dataclass(frozen=True, slots=True)
class Statement:
    """A value, and the file and path that state it."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} is {short(self.value)}"


Stated: TypeAlias = dict[str, Statement]  # by the name of the argument


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file, or the hyperparameters in a checkpoint."""

    name: str
    root: Any

    def at(self, path: str, hops: int = MAX_HOPS) -> Any:
        """The value at a dotted path; None where there is none, or where it is not known without computing it."""
        value = self.root
        for key in path.split("."):
            if isinstance(value, list) and re.fullmatch("[0-9]{1,4}", key):
                value = self.follow(value[int(key)], hops) if int(key) < len(value) else None
            else:
                value = self.follow(value.get(key), hops) if isinstance(value, Mapping) else None
        return value

    def follow(self, value: Any, hops: int = MAX_HOPS) -> Any:
        """The value that ``value`` refers to; None if it states nothing."""
        if not isinstance(value, str):
            return value
        if hops and (match := _REFERENCE.fullmatch(value)):
            return self.at(match[1], hops - 1)
        if hops and (match := _PAIRS.fullmatch(value)):
            return self._mapping(self.at(match[1], hops - 1), hops - 1)
        # Other `${...}` have to be computed, and these two stand for a value that nobody gave.
        return None if "${" in value or value in ("???", "MUST_OVERRIDE") else value

    def _mapping(self, pairs: Any, hops: int) -> dict[str, Any] | None:
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in pairs
        ):
            return None
        keys = [self.follow(key, hops) for key, _ in pairs]
        named = (key if isinstance(key, str) else f"unnamed_{i}" for i, key in enumerate(keys, 1))
        return {key: value for key, (_, value) in zip(named, pairs, strict=True)}

    def statement(self, path: str) -> Statement | None:
        """The value at a path, if one is stated."""
        value = self.at(path)
        return None if value is None else Statement(value, f"{self.name}: {one_line(path, 200)}")

    def unresolved(self, path: str) -> Statement | None:
        """What is written at a path, where that would have to be computed."""
        parent, _, key = path.rpartition(".")
        section = self.at(parent)
        value = section.get(key) if isinstance(section, Mapping) else None
        return (
            Statement(value, f"{self.name}: {path}")
            if value is not None and self.follow(value) is None
            else None
        )

    def section(self, path: str) -> Stated:
        """All that the mapping at a path states, by argument."""
        return dict(self._items(path))

    def _items(self, path: str) -> Iterator[tuple[str, Statement]]:
        section = self.at(path)
        for key in section if isinstance(section, Mapping) else ():
            if isinstance(key, str) and (value := self.follow(section[key])) is not None:
                yield key, Statement(value, f"{self.name}: {one_line(f'{path}.{key}', 200)}")

    def unknown(self, path: str) -> set[str]:
        """The keys of the mapping at a path whose values would have to be computed."""
        section = self.at(path)
        items = section.items() if isinstance(section, Mapping) else ()
        # A value that is no text is what it is.
        return {
            one_line(key)
            for key, value in items
            if isinstance(value, str) and self.follow(value) is None
        }

    def mentions(self, path: str, key: str) -> bool:
        """Whether the mapping at ``path`` has the key at all, known value or not."""
        section = self.at(path)
        return isinstance(section, Mapping) and key in section


def reference(*places: tuple[Source, str]) -> str:
    """The origin of a value that no file states, with what is written in its place if that is not understood."""
    written = next((found for source, path in places if (found := source.unresolved(path))), None)
    return f"{REFERENCE} ({written})" if written else REFERENCE


def same(value: object, expected: object) -> bool:
    """Equality that cannot fail on a foreign value; one size stands for every axis."""
    if isinstance(expected, Mapping):
        known = isinstance(value, Mapping) and value.keys() == expected.keys()
        return known and all(same(value[key], expected[key]) for key in expected)  # type: ignore[index]
    if not isinstance(expected, tuple):
        return isinstance(value, bool | int | float | str) and value == expected
    if isinstance(value, int):
        return all(same(value, each) for each in expected)
    if not isinstance(value, list | tuple) or len(value) != len(expected):
        return False
    return all(map(same, value, expected))


def require_known(stated: Stated, fixed: Fixed, free: Collection[str]) -> None:
    """Raise BundleError for an argument that is neither ``free`` nor has one of its ``fixed`` values."""
    for argument, statement in stated.items():
        if argument in free or any(
            same(statement.value, accepted) for accepted in fixed.get(argument, ())
        ):
            continue
        reason = (
            f"only {fixed[argument][0]} is run"
            if argument in fixed
            else "not an argument known here"
        )
        raise BundleError(f"{statement}; {reason}, so this model is not")


def class_name(target: object, packages: Collection[str]) -> str | None:
    """The class of a dotted name within one of the packages; None for anything else. Nothing is imported."""
    if isinstance(target, str) and re.fullmatch(r"\w+(\.\w+)+", target):
        known = any(target.startswith(f"{package}.") for package in packages)
        return target.rpartition(".")[2][:80] if known else None
    return None


def number(statement: Statement) -> float:
    """A finite number, as a float; raises BundleError for anything else."""
    value = statement.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise BundleError(f"{statement}; expected a finite number")
    return float(value)
