"""Options of the command line, made from :class:`Settings`: declared once, checked once.

Typer reads the parameters of a command from its signature. A command that takes
settings declares ``**options``; :func:`with_options` completes its signature when
the command line is built. The declaration of the settings is imported only then:
``megaseg --help`` lists commands and needs no option.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megaseg_dask.events import Doubt
    from megaseg_dask.plan.settings import Settings

Command = Callable[..., None]

# Settings that open a store, for commands that take nothing else of a run.
STORE = ("endpoint", "anon", "storage_option")
# Of a run that is looked at: it has no workers, its name and model are options of the viewer, and
# its source is read once.
_NOT_LIVE = (
    "label_name",
    "model",
    "workers",
    "scheduler",
    "cluster",
    "follow",
    "follow_timeout",
    "settle",
    "on_volume",
)
# What finds a run again.
_TARGET_OPTIONS = ("label_name", "endpoint", "storage_option")


def without_options(command: Command) -> Command:
    """Return a command with the parameters that it declares itself, without ``**options``."""
    return _with_parameters(command, [])


def with_options(
    command: Command, settings: Sequence[str], *, shows_defaults: bool = True
) -> Command:
    """Return a command whose ``**options`` are options for these fields of :class:`Settings`."""
    parameters = [_parameter(name, shows_default=shows_defaults) for name in settings]
    return _with_parameters(command, parameters)


def all_settings() -> list[str]:
    """Return the names of all settings, in the order of their declaration."""
    from megaseg_dask.plan.settings import Settings

    return list(Settings.model_fields)


def live_settings() -> list[str]:
    """Return the names of the settings of a run that this process predicts by itself."""
    return [name for name in all_settings() if name not in _NOT_LIVE]


def _with_parameters(command: Command, options: list[inspect.Parameter]) -> Command:
    declared = inspect.signature(command).parameters.values()
    own = [parameter for parameter in declared if parameter.kind is not parameter.VAR_KEYWORD]

    @functools.wraps(command)
    def built(**values: Any) -> None:
        command(**values)

    signature = inspect.Signature([*own, *options])
    built.__signature__ = signature  # type: ignore[attr-defined]
    built.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return built


def _parameter(name: str, *, shows_default: bool) -> inspect.Parameter:
    """Return a setting as a parameter; the setting's own validator parses its text."""
    from megaseg_dask.plan.settings import Settings, declared, option_text

    field = Settings.model_fields[name]
    shown = declared(name)
    option = typer.Option(
        option_text(name),
        help=f"{shown.help}{_default_text(field.default) if shows_default else ''}",
        metavar=shown.metavar,
        rich_help_panel=shown.panel,
        show_default=False,
        autocompletion=_completion(shown.metavar),
    )
    is_flag = field.annotation is bool
    value_type: Any = bool if is_flag else str | None
    if name == "model":
        # The one option that may be repeated.
        value_type = list[str] | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_flag else None,
        annotation=Annotated[value_type, option],
    )


def _default_text(value: object) -> str:
    if value is None or value is False:
        return ""
    text = ",".join(value) if isinstance(value, tuple) else value
    return f" (default: {text})"


def _completion(metavar: str | None) -> Callable[[str], list[str]] | None:
    """Return a function that completes the plain words of a metavar such as ``auto|cpu``."""
    words = [word for word in (metavar or "").split("|") if re.fullmatch(r"[a-z0-9.]+", word)]
    if not words:
        return None

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def settings_of(options: dict[str, Any]) -> "Settings":
    """Return the options given on the command line as settings.

    Raises:
        SettingsError: for a value that cannot be used.
    """
    from megaseg_dask.plan.settings import parse_settings

    return parse_settings(given(options))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: typer passes ``None`` or false for the others."""
    return {name: value for name, value in options.items() if value not in (None, False, [])}


def open_stores(options: dict[str, Any], source: str | None) -> None:
    """Let this process open stores as the options say; ``--anon`` is about ``source``, or all.

    Raises:
        SettingsError: for a value that cannot be used.
    """
    settings = settings_of(options)
    from megaseg_dask.stores import StoreOptions, configure

    configure(
        StoreOptions.parse(settings.endpoint, settings.anon, settings.storage_option or (), source)
    )


def next_commands(
    target: str,
    settings: "Settings",
    *,
    failed: bool,
    table_label: str = "",
    doubts: Sequence["Doubt"] = (),
) -> list[tuple[str, str]]:
    """Return commands to type after a run, each with its purpose, and the table to read.

    Of doubts they try the options, without another prediction.

    The commands keep the options that are needed to find the target, but no secret.
    """
    from megaseg_dask.plan.command_line import command_line
    from megaseg_dask.plan.plan import table_of
    from megaseg_dask.stores import Location

    def command(name: str) -> str:
        return command_line(name, target, settings=settings, options=_TARGET_OPTIONS)

    report = (command("report"), "quality control")
    if failed:
        return [(command("status"), "what failed"), report]
    following = [report, (command("view"), "in a browser")]
    if "measurements" in settings.outputs:
        table = table_of(Location.of(target), settings.table, label_name=table_label)
        following.append((str(table), f"the table: pandas.read_{settings.table}"))
        if settings.regions:
            where = Location.of(target)
            regions = table_of(where, settings.table, "regions", table_label)
            following.append((str(regions), "the table of regions"))
    options = list(dict.fromkeys(doubt.option for doubt in doubts if doubt.option))
    if options and "scores" in settings.outputs:
        # To write another label image beside that of the run.
        words = [command_line("relabel", target, settings=settings, options=STORE), *options]
        following.append((" ".join([*words, "--label-name again"]), "no prediction again"))
    return following
