"""Arguments of a Fractal task, made from the one declaration of the settings.

Fractal draws a form from a JSON Schema that allows few types. A setting of another
type is an argument of text, as on the command line, where the setting's own
validator parses it.
"""

import inspect
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field

from megaseg_dask.plan.settings import Settings, declared
from megaseg_dask.plan.signature import plain_type

# Fractal chooses images and machines, and labels are written into the image, all of it.
_NOT_IN_A_FORM = (
    "time",
    "level",
    "roi",
    "wells",
    "fields",
    "acquisition",
    "device",
    "table",
    "scores_dtype",
    "keep_logits",
    "ome_zarr",
    "follow",
    "follow_timeout",
    "settle",
    "on_volume",
    "scheduler",
    "cluster",
    "endpoint",
    "anon",
    "storage_option",
    "timeout",
)
# The cores that a job asks for. Its threads do not follow from the machine: all jobs have as many.
N_CORES = 4
# In place of a default that is not for labels in the source, or that follows from the machine.
DEFAULTS: dict[str, object] = {
    "outputs": ["labels", "measurements"],
    "threads": N_CORES,
    "workers": 0,
}
_DEFAULT_TEXT = re.compile(r" \(default: .*\)$")
_SIMPLE = (int, float, str)


def with_settings(task: Callable[..., Any]) -> Callable[..., Any]:
    """Give a task the settings as arguments, in place of ``**settings``."""
    signature = inspect.signature(task)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [name for name in Settings.model_fields if name not in _NOT_IN_A_FORM]
    completed = signature.replace(parameters=[*own, *map(_parameter, names)])
    task.__signature__ = completed  # type: ignore[attr-defined]
    task.__annotations__ = {p.name: p.annotation for p in completed.parameters.values()}
    return task


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    value_type = _form_type(plain_type(field.annotation), declared(name).metavar or "")
    default = DEFAULTS.get(name, field.default)
    text = declared(name).help
    if name in DEFAULTS:
        text = _DEFAULT_TEXT.sub("", text)
    if isinstance(default, tuple):
        default = list(default)
    elif value_type is str:
        # A number, such as the threshold.
        default = str(default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[value_type, Field(description=text)],
    )


def _form_type(value_type: Any, metavar: str) -> Any:
    """Return the type of a form's field for a setting: text, unless a form has its type."""
    if value_type is bool or get_origin(value_type) is Literal:
        return value_type
    if value_type == tuple[str, ...]:
        return list[str]
    parts = [part for part in _parts(value_type) if part is not NoneType]
    # A number that may also be written in another way, such as 8GB, is text.
    is_simple = len(parts) == 1 and parts[0] in _SIMPLE and "|" not in metavar
    form_type = parts[0] if is_simple else str
    return form_type | None if NoneType in _parts(value_type) else form_type


def _parts(value_type: Any) -> tuple[Any, ...]:
    is_union = get_origin(value_type) in (Union, UnionType)
    return get_args(value_type) if is_union else (value_type,)
