"""Several files of one pattern: each name says which part of the image or the plate it is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import count, first_few, nearest
from megaseg_dask.tools.importing.files import FileSeries

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
    """The series of files that are one image: each by its values of time, channel and z.

    A value is empty if the pattern has no such part.

    ``row``, ``column`` and ``field`` are its place in a plate, empty if there is none. ``values``
    are those of time, channel and z, in their order.
    """

    row: str
    column: str
    field: str
    files: Mapping[tuple[str, str, str], FileSeries]
    values: tuple[tuple[str, ...], ...]

    @property
    def path(self) -> str:
        """Path of the image below the target."""
        return "/".join(filter(None, (self.row, self.column, self.field)))


def group_files(
    files: Sequence[FileSeries], pattern: str | None, *, allow_missing: bool = False
) -> list[Group]:
    """Return the images that series of files make together.

    A pattern with a colon is that of ``FILE:SERIES``, the names of both. Otherwise several series
    of a file are the fields of a well, which is A/1 without a pattern.

    Raises:
        SettingsError: There is no pattern for several files, it names unknown parts, a file does
            not match it, two files are one part, a part has no file, or a field lacks what others
            have and that is not allowed.
    """
    if pattern is None:
        return _without_pattern(files)
    matching = _compile(pattern)
    has_series = ":" in pattern
    found: dict[tuple[str, str, str], dict[tuple[str, str, str], FileSeries]] = {}
    for file in files:
        text = f"{file.path.as_posix()}:{file.name}" if has_series else file.path.as_posix()
        match = matching.fullmatch(text)
        if match is None:
            name = f"{file.path.name}:{file.name}" if has_series else file.path.name
            raise SettingsError(f"--pattern {pattern}: {name} does not match it")
        parts = match.groupdict(default="")
        if file.n_series > 1 and not has_series:
            parts["field"] = _field_of_series(file, parts, pattern)
        spread = (parts.get("time", ""), parts.get("channel", ""), parts.get("z", ""))
        of_image = found.setdefault(_place(parts), {})
        if spread in of_image:
            raise SettingsError(
                f"--pattern {pattern}: {of_image[spread]} and {file} are the same part"
            )
        of_image[spread] = file
    groups = [_complete(place, found[place]) for place in sorted(found, key=_natural_all)]
    if not allow_missing:
        _require_same_parts(groups)
    return groups


def _without_pattern(files: Sequence[FileSeries]) -> list[Group]:
    """Return one image, or the series of one file as fields of the well A/1."""
    paths = list(dict.fromkeys(file.path for file in files))
    if len(paths) > 1:
        raise SettingsError(
            f"{count(len(paths), 'file')}: describe their names with --pattern, such as "
            f"{_guess([path.name for path in paths])}; its parts are {_names()}"
        )
    unspread = (("",),) * len(SPREAD)
    if len(files) == 1:
        return [Group("", "", "", {("", "", ""): files[0]}, unspread)]
    return [Group("A", "1", str(file.number), {("", "", ""): file}, unspread) for file in files]


def _field_of_series(file: FileSeries, parts: Mapping[str, str], pattern: str) -> str:
    if not (parts.get("well") or parts.get("row")) or parts.get("field"):
        raise SettingsError(
            f"--pattern {pattern}: {file.path} has {file.n_series} series; add a colon and a "
            "pattern of their names, such as *:{well}_{field}, or use a pattern with {well} "
            "alone: the series become its fields"
        )
    return str(file.number)


def _require_same_parts(groups: Sequence[Group]) -> None:
    """Raise :class:`SettingsError` if a field lacks a time, channel or plane that others have."""
    lacking = []
    for number, name in enumerate(SPREAD):
        everywhere = {value for group in groups for value in group.values[number]}
        for group in groups:
            absent = sorted(everywhere - set(group.values[number]), key=_natural)
            if absent:
                lacking.append(f"{group.path} has no {name} {first_few(absent)}")
    if lacking:
        raise SettingsError(
            f"files are missing that other fields have: {first_few(lacking)}; add them, or write "
            "the fields as they are with --allow-missing"
        )


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
            f"--pattern {pattern}: fields need wells; add {{well}}, or {{row}} and {{column}}"
        )
    # Folders above the files need not be in the pattern.
    return re.compile(f"(?:.*/)?{text}")


def _names() -> str:
    return ", ".join(f"{{{name}}}" for name in _PARTS)


def _guess(names: Sequence[str]) -> str:
    """Return a pattern in which the first number that differs between two names is the time."""
    first = names[0]
    second = names[1]
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


def _complete(
    place: tuple[str, str, str], files: Mapping[tuple[str, str, str], FileSeries]
) -> Group:
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
