"""Shell commands for the user: options as people type them."""

import shlex
from collections.abc import Container
from itertools import chain
from typing import Any

from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import is_secret

# Several values are several options: a path may contain a comma.
_REPEATED = "model"


def command_line(
    command: str, *addresses: object, settings: Settings, options: Container[str]
) -> str:
    """Return ``megaseg COMMAND ADDRESS... --OPTION VALUE...`` for a shell.

    Of the settings named by ``options``, those that differ from their defaults are given.
    Secrets among the options of a store are left out.
    """
    words = ["megaseg", command, *map(str, addresses)]
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if name in options and value not in (None, field.default):
            words += _option(name, value)
    return shlex.join(words)


def _option(name: str, value: object) -> list[str]:
    """Return the words of one option."""
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    if name == _REPEATED and isinstance(value, tuple):
        return list(chain(*((option, str(each)) for each in value)))
    text = _text(name, value)
    return [option, text] if text else []


def _text(name: str, value: Any) -> str:
    match name:
        case "roi":
            return ",".join(f"{start}:{stop}" for start, stop in value)
        case "time":
            return ":".join("" if bound is None else str(bound) for bound in value)
        case "storage_option":
            value = tuple(option for option in value if not is_secret(option))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
