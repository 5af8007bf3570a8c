"""Texts of the command line, and values of Python, become values of settings; what is neither is refused in words.

Each function takes what it does not understand as it is: the declaration of the
option then says what is wrong with it.
"""

import math
import os
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from megaseg_dask.algorithms.threshold_methods import METHODS

_BYTES = {
    "": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_three(value: Any) -> Any:
    """Return three numbers from ``z,y,x``, or one number three times."""
    if isinstance(value, str):
        value = value.replace("x", ",").split(",")
    parts = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(parts) not in (1, 3):
        raise ValueError(f"expected three numbers z,y,x, or one for all axes; found {len(parts)}")
    return parts * 3 if len(parts) == 1 else parts


def parse_patch(value: Any) -> Any:
    """Return three numbers from ``z,y,x``, or ``auto`` as it is."""
    return value if isinstance(value, str) and value == "auto" else parse_three(value)


def parse_bytes(value: Any) -> Any:
    """Return the number of bytes that a size such as ``8GB`` means."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+|\d*\.\d+)\s*([KMGT]I?B|)", value.strip().upper())
    if not found:
        raise ValueError("expected a size such as 8GB or 500MiB")
    return int(float(found[1]) * _BYTES[found[2]])


def parse_duration(value: Any) -> Any:
    """Return the seconds that a time such as ``55m``, ``1h30m`` or ``01:00:00`` means."""
    if not isinstance(value, str):
        return value
    # YAML reads 01:00:00 in base 60, quoted it comes here.
    if found := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", value.strip(), re.ASCII):
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif value.strip() and (
        found := re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.strip(), re.ASCII)
    ):
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
    else:
        raise ValueError("expected a time such as 55m, 1h30m or 90s")
    return 3600 * hours + 60 * minutes + seconds


def parse_roi(value: Any) -> Any:
    """Return start and stop per axis from ``z0:z1,y0:y1,x0:x1``."""
    if not isinstance(value, str):
        return value
    parts = [part.split(":") for part in value.split(",")]
    if len(parts) != 3 or any(
        len(part) != 2 or not all(map(str.isdecimal, map(str.strip, part))) for part in parts
    ):
        raise ValueError("expected z0:z1,y0:y1,x0:x1, in voxels of the level that is segmented")
    return tuple((int(a), int(b)) for a, b in parts)


def require_box(value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Raise :class:`ValueError` if a range of a region is empty or begins below zero."""
    if any(a < 0 or b <= a for a, b in value):
        raise ValueError("expected ranges of one voxel or more, counted from 0")
    return value


def parse_names(value: Any) -> Any:
    """Return the parts of a list that is separated by commas."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def parse_time(value: Any) -> Any:
    """Return a half-open range of timepoints from ``0:10``, ``5:`` or ``7``."""
    if isinstance(value, Integral):
        return (int(value), int(value) + 1)
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d*)(:?)(\d*)", value.strip(), re.ASCII)
    if not found or value.strip() == "":
        raise ValueError("expected timepoints such as 0:10, 5: or 7")
    first, colon, stop = found.groups()
    return (int(first or 0), int(stop) if stop else None) if colon else (int(first), int(first) + 1)


def parse_threshold(value: Any) -> Any:
    """Return a score from 0 to 1, or the name of a method."""
    if isinstance(value, str) and value in METHODS:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number from 0 to 1, or one of {', '.join(METHODS)}") from None
    if not 0 <= number <= 1:
        raise ValueError("expected a score from 0 to 1")
    return number


def parse_normalization(value: Any) -> Any:
    """Return mean and standard deviation from ``MEAN,STD``, or ``level:N`` as it is."""
    if isinstance(value, str) and re.fullmatch(r"level:\d+", value.strip(), re.ASCII):
        return value.strip()
    parts = value.split(",") if isinstance(value, str) else value
    try:
        mean, std = map(float, parts)
    except (TypeError, ValueError):
        raise ValueError("expected two numbers MEAN,STD, or level:N") from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError("expected a finite mean and a standard deviation above 0")
    return (mean, std)


def require_range(value: tuple[int, int | None]) -> tuple[int, int | None]:
    """Raise :class:`ValueError` if a range of timepoints is empty or begins below zero."""
    first, stop = value
    if first < 0 or (stop is not None and stop <= first):
        raise ValueError("expected a range of one timepoint or more, counted from 0")
    return value


def parse_text(value: Any) -> Any:
    """Return text as it is, and what Python has in its place as text."""
    # From Python a channel may be an index, a model a Path and a version a number.
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value == "":
        raise ValueError("expected something")
    return str(value) if isinstance(value, Integral | float) else value


def parse_models(value: Any) -> Any:
    """Return one model, or several, as texts."""
    # A path may hold a comma: the command line names several by repeating the option.
    return (
        tuple(map(parse_text, value)) if isinstance(value, list | tuple) else (parse_text(value),)
    )


def parse_whole(value: Any) -> Any:
    """Return the whole number that a text means."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d+", value, re.ASCII) else value
