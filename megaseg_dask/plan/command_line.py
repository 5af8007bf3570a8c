"""Shell commands for the user: options as people type them."""

import shlex
from collections.abc import Container

from megaseg_dask.plan.settings import Settings, option_text
from megaseg_dask.stores import is_secret


def command_line(
    command: str,
    *addresses: object,
    settings: Settings,
    options: Container[str],
    repeats_defaults: bool = False,
) -> str:
    """Return ``megaseg COMMAND ADDRESS... --OPTION VALUE...`` for a shell.

    Of the settings named by ``options``, those that differ from their defaults are given, or all
    that have a value.
    Secrets among the options of a store are left out.
    """
    words = ["megaseg", command, *map(str, addresses)]
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if name not in options or value is None:
            continue
        if value == field.default and not repeats_defaults:
            continue
        option = option_text(name)
        if value is True:
            words.append(option)
            continue
        for text in _texts(name, value):
            words += [option, text]
    return shlex.join(words)


def _texts(name: str, value: object) -> list[str]:
    """Return the value of an option, or the values of one that is repeated."""
    if not isinstance(value, tuple):
        return [str(value)]
    match name:
        case "model":
            # A path may contain a comma.
            return [str(model) for model in value]
        case "roi":
            return [",".join(f"{start}:{stop}" for start, stop in value)]
        case "time":
            return [":".join("" if bound is None else str(bound) for bound in value)]
        case "storage_option":
            public = ",".join(option for option in value if not is_secret(option))
            return [public] if public else []
    return [",".join(map(str, value))]
