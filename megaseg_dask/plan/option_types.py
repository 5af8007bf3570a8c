"""Types of options: each takes the text of the command line and the values of Python.

A type first parses text. It passes on everything else as it is, and pydantic then
says what is wrong with it.
"""

import math
import os
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Annotated, Literal, SupportsFloat, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, TypeAdapter

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.ngff.versions import VersionName

_SIZE = re.compile(r"(\d+|\d*\.\d+)\s*([KMGT]I?B)?", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+)", re.ASCII)
_UNITS = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII)
_TIMES = re.compile(r"(\d*)(:?)(\d*)", re.ASCII)
_LIMITS = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
# Volumes that may have one normalization: of a field, a well, an acquisition or a plate.
GROUPS = ("series", "well", "acquisition", "plate")
_LEVEL = re.compile(r"level:\d+", re.ASCII)
_WHOLE = re.compile(r"\d+", re.ASCII)

# Whose voxels, in place of three sizes.
_SIZES = ("source", "model")
_BYTE_SIZE = TypeAdapter(ByteSize)


# -- text and numbers


def parse_text(value: object) -> object:
    """Return text as it is, and paths and numbers as text.

    Raises:
        ValueError: The text is empty.
    """
    # From Python a channel may be an index, a model a Path and a version a number.
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value == "":
        raise ValueError("expected a value, found an empty text")
    if isinstance(value, Integral | float):
        return str(value)
    return value


def parse_names(value: object) -> object:
    """Return the parts of a list that is separated by commas."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(","))


def parse_models(value: object) -> object:
    """Return one model, or several, as texts."""
    # A path may hold a comma: the command line names several by repeating the option.
    models = value if isinstance(value, list | tuple) else (value,)
    return tuple(map(parse_text, models))


def parse_whole(value: object) -> object:
    """Return the whole number that a text means."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    return value


def bytes_of(text: str) -> int:
    """Return the number of bytes that a size such as ``8GB`` means.

    Raises:
        ValueError: The text is no size.
    """
    # ByteSize alone also takes what only begins with a size, such as 1.2.3GB.
    if not _SIZE.fullmatch(text.strip()):
        raise ValueError("expected a size such as 8GB or 500MiB")
    return int(_BYTE_SIZE.validate_python(text.strip()))


def seconds_of(text: str) -> int:
    """Return the seconds that a time such as ``55m``, ``1h30m`` or ``01:00:00`` means.

    Raises:
        ValueError: The text is no time.
    """
    text = text.strip()
    match = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    if not text or not match:
        raise ValueError("expected a time such as 55m, 1h30m or 90s")
    hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _parse_bytes(value: object) -> object:
    return bytes_of(value) if isinstance(value, str) else value


def _parse_seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return seconds_of(value)


def _parse_duration(value: object) -> object:
    # YAML reads 01:00:00 in base 60; in quotes it is a text.
    return seconds_of(value) if isinstance(value, str) else value


# -- numbers per axis


def parse_three(value: object) -> tuple[object, ...]:
    """Return three values from ``z,y,x``, or one value three times.

    Raises:
        ValueError: There are neither three values nor one.
    """
    values = _values_of(value.replace("x", ",") if isinstance(value, str) else value)
    if len(values) == 1:
        return values * 3
    if len(values) != 3:
        raise ValueError(f"expected three numbers z,y,x, or one for all axes; found {len(values)}")
    return values


def _values_of(value: object) -> tuple[object, ...]:
    if isinstance(value, str):
        return tuple(value.split(","))
    return tuple(value) if isinstance(value, Iterable) else (value,)


def parse_patch(value: object) -> object:
    """Return three values from ``z,y,x``, or ``auto`` as it is."""
    if isinstance(value, str) and value == "auto":
        return value
    return parse_three(value)


def parse_roi(value: object) -> object:
    """Return start and stop per axis from ``z0:z1,y0:y1,x0:x1``.

    Raises:
        ValueError: The text is no such box.
    """
    if not isinstance(value, str):
        return value
    limits = [_LIMITS.fullmatch(axis) for axis in value.split(",")]
    matches = [match for match in limits if match]
    if len(limits) != 3 or len(matches) != 3:
        raise ValueError("expected z0:z1,y0:y1,x0:x1, in voxels of the level that is segmented")
    return tuple((int(match[1]), int(match[2])) for match in matches)


def parse_times(value: object) -> object:
    """Return a half-open range of timepoints from ``0:10``, ``5:`` or ``7``.

    Raises:
        ValueError: The text is no such range.
    """
    if isinstance(value, Integral):
        return (int(value), int(value) + 1)
    if not isinstance(value, str):
        return value
    text = value.strip()
    match = _TIMES.fullmatch(text)
    if not text or not match:
        raise ValueError("expected timepoints such as 0:10, 5: or 7")
    first, colon, stop = match.groups()
    if not colon:
        return (int(first), int(first) + 1)
    return (int(first or 0), int(stop) if stop else None)


# -- either a number or a method


def parse_threshold(value: object) -> float | str:
    """Return a score from 0 to 1, or the name of a method.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str) and value in METHODS:
        return value
    try:
        score = _number(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number from 0 to 1, or one of {', '.join(METHODS)}") from None
    if not 0 <= score <= 1:
        raise ValueError("expected a score from 0 to 1; 128 of 255 is 0.5")
    return score


def parse_normalization(value: object) -> tuple[float, float] | str:
    """Return mean and standard deviation from ``MEAN,STD``; ``level:N`` and groups as they are.

    Raises:
        ValueError: It is neither.
    """
    text = value.strip() if isinstance(value, str) else ""
    if _LEVEL.fullmatch(text) or text in GROUPS:
        return text
    try:
        mean, std = map(_number, _values_of(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"expected two numbers MEAN,STD, level:N, or one of {', '.join(GROUPS)}"
        ) from None
    is_finite = math.isfinite(mean) and math.isfinite(std)
    if not is_finite or std <= 0:
        raise ValueError("expected a finite mean and a standard deviation above 0")
    return mean, std


def _number(value: object) -> float:
    if not isinstance(value, str | SupportsFloat):
        raise TypeError(value)
    return float(value)


def parse_voxel_size(value: object) -> object:
    """Return three sizes from ``z,y,x``, or ``source`` and ``model`` as they are.

    Raises:
        ValueError: The text is neither; one size for all axes is rarely meant.
    """
    if isinstance(value, str) and value in _SIZES:
        return value
    values = _values_of(value)
    try:
        sizes = tuple(map(_number, values))
    except (TypeError, ValueError):
        raise ValueError(f"expected three sizes Z,Y,X in µm, {' or '.join(_SIZES)}") from None
    if len(sizes) != 3:
        raise ValueError(
            f"expected three sizes Z,Y,X in µm, such as 0.29,0.108,0.108; found {len(sizes)}"
        )
    return sizes


# -- ranges


def _require_box(box: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    for start, stop in box:
        if not 0 <= start < stop:
            raise ValueError("expected ranges of at least one voxel, counted from 0")
    return box


def _require_times(times: tuple[int, int | None]) -> tuple[int, int | None]:
    first, stop = times
    is_empty = stop is not None and stop <= first
    if first < 0 or is_empty:
        raise ValueError("expected a range of at least one timepoint, counted from 0")
    return times


# -- the types

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Distance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Limits: TypeAlias = tuple[int, int]

Text = Annotated[str, BeforeValidator(parse_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
Models = Annotated[tuple[str, ...], BeforeValidator(parse_models), Field(min_length=1)]
Bytes = Annotated[Positive, BeforeValidator(_parse_bytes)]
Seconds = Annotated[PositiveFloat, BeforeValidator(_parse_duration)]
Wait = Annotated[Distance, BeforeValidator(_parse_seconds)]
Triple = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(parse_three)]
Patch = Annotated[
    tuple[Positive, Positive, Positive] | Literal["auto"], BeforeValidator(parse_patch)
]
VoxelSize = Annotated[
    tuple[PositiveFloat, PositiveFloat, PositiveFloat] | Literal["source", "model"],
    BeforeValidator(parse_voxel_size),
]
Fractions = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(parse_three)]
Roi = Annotated[
    tuple[Limits, Limits, Limits], BeforeValidator(parse_roi), AfterValidator(_require_box)
]
Times = Annotated[
    tuple[int, int | None], BeforeValidator(parse_times), AfterValidator(_require_times)
]
Threshold = Annotated[float | str, BeforeValidator(parse_threshold)]
MeanStd = Annotated[tuple[float, float] | str, BeforeValidator(parse_normalization)]
Version = Annotated[VersionName, BeforeValidator(parse_text)]
Connectivity = Annotated[Literal[1, 2, 3], BeforeValidator(parse_whole)]
