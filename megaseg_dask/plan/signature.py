"""Signatures and help of Python functions, made from the one declaration of the settings."""

import inspect
from collections.abc import Callable, Iterable
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from megaseg_dask.plan.settings import Settings, declared


def with_settings(
    function: Callable[..., Any], names: Iterable[str], *, has_defaults: bool = True
) -> None:
    """Give a function the signature and the help of some settings, in place of ``**settings``.

    Without defaults of its own, a setting that is not given is shown as ``...``.
    """
    signature = inspect.signature(function)
    own = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    added = [name for name in names if name not in own]
    parameters = list(own.values())
    for name in added:
        default = Settings.model_fields[name].default if has_defaults else ...
        parameters.append(_parameter(name, default))
    lines = [f"    {name}: {declared(name).help}" for name in added]
    head, raises, tail = inspect.getdoc(function).partition("Raises:\n")  # type: ignore[union-attr]
    function.__doc__ = "\n".join([head.rstrip(), "", "Settings:", *lines, "", raises + tail])
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]


def _parameter(name: str, default: object) -> inspect.Parameter:
    """Return a setting as a keyword; each one also takes the text of the command line."""
    annotation = plain_type(Settings.model_fields[name].annotation)
    if annotation is not bool:
        annotation = str | annotation
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def plain_type(annotation: Any) -> Any:
    """Return a type without the validators that its parts are annotated with."""
    origin = get_origin(annotation)
    if origin is None or origin is Literal:
        return annotation
    if origin is Annotated:
        return plain_type(get_args(annotation)[0])
    parts = [plain_type(part) for part in get_args(annotation)]
    if origin in (Union, UnionType):
        return reduce(or_, parts)
    return origin[tuple(parts)]
