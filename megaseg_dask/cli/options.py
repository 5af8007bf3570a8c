"""Options of the command line, made from :class:`Settings`: declared once, checked once."""

import inspect
import re
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from megaseg_dask.plan.settings import Settings, declared, parse_settings

# What opens a store, for commands that take nothing else of a run.
STORE = ("endpoint", "anon", "storage_option")


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options for these fields of :class:`Settings`, or for all, in place of ``**options``."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        options = [_option(name) for name in names or Settings.model_fields]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return command

    return give


def _option(name: str) -> inspect.Parameter:
    """Return a field as a command line option; its text is parsed by the field's own validator."""
    field, extra = Settings.model_fields[name], declared(name)
    info = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description}{_default(field.default)}",
        metavar=extra["metavar"],
        rich_help_panel=extra["panel"],
        show_default=False,
        autocompletion=_completion(extra["metavar"]),
    )
    # Of an option that may be repeated typer makes a list.
    kind = bool if field.annotation is bool else list[str] | None if name == "model" else str | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[kind, info],
    )


def _completion(metavar: str | None) -> Callable[[str], list[str]] | None:
    """Return what a shell may offer: the words among the values of an option."""
    words = [word for word in (metavar or "").split("|") if re.fullmatch(r"[a-z0-9.]+", word)]
    return (
        (lambda incomplete: [word for word in words if word.startswith(incomplete)])
        if words
        else None
    )


def open_stores(options: dict[str, Any], source: str | None) -> None:
    """Let this process open stores as the options of a command say; ``--anon`` is about ``source``, or about all."""
    settings = settings_of(options)
    from megaseg_dask.run.runner import store_options
    from megaseg_dask.stores import configure

    configure(store_options(source, settings))


def next_commands(target: str, settings: Settings, *, failed: bool) -> list[tuple[str, str]]:
    """Return what to type after a run, and what for; the options that find the target again are kept."""
    from megaseg_dask.stores import is_secret

    words = [target]
    if settings.label_name != Settings.model_fields["label_name"].default:
        words += ["--label-name", settings.label_name]
    words += ["--endpoint", settings.endpoint] if settings.endpoint else []
    for option in settings.storage_option or ():
        words += [] if is_secret(option) else ["--storage-option", option]
    rest = shlex.join(words)
    looks = [
        (f"megaseg report {rest}", "quality control"),
        (f"megaseg view {rest}", "in a browser"),
    ]
    return [(f"megaseg status {rest}", "what failed"), looks[0]] if failed else looks


def _default(value: object) -> str:
    if value is None or value is False:
        return ""
    return f" (default: {','.join(value) if isinstance(value, tuple) else value})"


def settings_of(options: dict[str, Any]) -> Settings:
    """Return what was given on the command line as settings; raises :class:`SettingsError`."""
    return parse_settings(
        {name: value for name, value in options.items() if value not in (None, False, [])}
    )
