"""Several files of one pattern: each name says which part of the image or the plate it is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import first_few, nearest

# What each named part may be. A channel ends where the pattern goes on.
_PARTS = {
    "well": r"[A-Za-z]{1,2}[-_]?\d{1,3}",
    "row": r"[A-Za-z]{1,2}|\d{1,3}",
    "column": r"\d{1,3}",
    "field": r"[A-Za-z0-9]+",
    "time": r"\d+",
    "channel": r"[^/]+?",
    "z": r"\d+",
}
_WELL = re.compile(r"([A-Za-z]+)[-_]?(\d+)")
# The axes that files of one image may be spread over, as they follow each other in its array.
SPREAD = ("time", "channel", "z")


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one image: each by its values of time, channel and z, empty if it has none.

    ``row``, ``column`` and ``field`` are its place in a plate, empty if there is none. ``values``
    are those of time, channel and z, in their order.
    """

    row: str
    column: str
    field: str
    files: Mapping[tuple[str, str, str], Path]
    values: tuple[tuple[str, ...], ...]

    @property
    def path(self) -> str:
        """Path of the image below the target."""
        return "/".join(filter(None, (self.row, self.column, self.field)))


def group_files(files: Sequence[Path], pattern: str | None) -> list[Group]:
    """Return the images that files make together.

    Raises:
        SettingsError: There is no pattern for several files, it names unknown parts, a file does
            not match it, two files are one part, or a part has no file.
    """
    if pattern is None:
        if len(files) > 1:
            raise SettingsError(
                f"{len(files)} files: say with --pattern what their names mean, such as "
                f"{_guess(files)}; its parts are {_names()}"
            )
        return [Group("", "", "", {("", "", ""): files[0]}, (("",),) * len(SPREAD))]
    matching = _compile(pattern)
    found: dict[tuple[str, str, str], dict[tuple[str, str, str], Path]] = {}
    for path in files:
        match = matching.fullmatch(path.as_posix())
        if match is None:
            raise SettingsError(f"--pattern {pattern}: {path.name} does not match it")
        parts = match.groupdict(default="")
        spread = (parts.get("time", ""), parts.get("channel", ""), parts.get("z", ""))
        of_image = found.setdefault(_place(parts), {})
        if spread in of_image:
            raise SettingsError(
                f"--pattern {pattern}: {of_image[spread]} and {path} are the same part"
            )
        of_image[spread] = path
    return [_complete(place, found[place]) for place in sorted(found, key=_natural_all)]


def _compile(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w*)\}", pattern)
    text = ""
    seen: set[str] = set()
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            # As in a shell, * is anything in one name.
            text += re.escape(piece).replace(r"\*", "[^/]*")
        elif piece not in _PARTS:
            raise SettingsError(
                f"--pattern {pattern}: no part is named {piece!r}{nearest(piece, _PARTS)}; the "
                f"parts are {_names()}"
            )
        elif piece in seen:
            text += f"(?P={piece})"
        else:
            seen.add(piece)
            text += f"(?P<{piece}>{_PARTS[piece]})"
    if not seen:
        raise SettingsError(f"--pattern {pattern} has no part in braces; the parts are {_names()}")
    has_well = "well" in seen or {"row", "column"} <= seen
    if not has_well and {"field", "row", "column"} & seen:
        raise SettingsError(
            f"--pattern {pattern}: fields are those of wells; add {{well}}, or {{row}} and "
            "{column}"
        )
    # The ends of paths: folders above them need not be in the pattern.
    return re.compile(f"(?:.*/)?{text}")


def _names() -> str:
    return ", ".join(f"{{{name}}}" for name in _PARTS)


def _guess(files: Sequence[Path]) -> str:
    """Return a pattern in which the first number that differs between two names is the time."""
    first = files[0].name
    second = files[1].name
    for one, other in zip(re.finditer(r"\d+", first), re.finditer(r"\d+", second), strict=False):
        if one[0] != other[0]:
            return f"{first[: one.start()]}{{time}}{first[one.end() :]}"
    return "{well}_{field}_t{time}_{channel}.tif"


def _place(parts: Mapping[str, str]) -> tuple[str, str, str]:
    """Return row, column and field, all empty if the pattern has no well."""
    row = parts.get("row", "")
    column = parts.get("column", "")
    well = _WELL.fullmatch(parts.get("well", ""))
    if well is not None:
        row = well[1]
        column = well[2]
    if not row:
        return "", "", ""
    return row.upper(), _plain(column), _plain(parts.get("field", "") or "0")


def _plain(text: str) -> str:
    return str(int(text)) if text.isdecimal() else text


def _complete(place: tuple[str, str, str], files: Mapping[tuple[str, str, str], Path]) -> Group:
    columns = zip(*files, strict=True)
    values = tuple(tuple(sorted(set(column), key=_natural)) for column in columns)
    group = Group(*place, files, values)
    for time in values[0]:
        for channel in values[1]:
            absent = [z for z in values[2] if (time, channel, z) not in files]
            if absent:
                wanted = zip(SPREAD, (time, channel, first_few(absent)), strict=True)
                words = ", ".join(f"{name} {value}" for name, value in wanted if value)
                where = f"{group.path}: " if group.path else ""
                raise SettingsError(
                    f"{where}no file is {words}; add it, or leave out the files beside it"
                )
    return group


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Return what sorts 10 after 9."""
    pieces = re.split(r"(\d+)", text)
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in pieces)


def _natural_all(texts: Iterable[str]) -> tuple[tuple[tuple[int, str], ...], ...]:
    return tuple(map(_natural, texts))
