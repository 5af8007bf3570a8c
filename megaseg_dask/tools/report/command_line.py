"""The command that repeats a run: every resolved option that can change a voxel, as people type it."""

import shlex
from collections.abc import Sequence

from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import Settings, is_result

# What only says where and how the work is done, and is part of repeating it all the same.
_ALSO = ("model", "wells", "fields", "acquisition", "memory", "endpoint", "anon")


def commands_of(plans: Sequence[Plan]) -> list[str]:
    """Return the shell commands that give the same output; parsed, that of one plan has its own fingerprint."""
    # Of fields of several forms each has a block of its own, and any gives the same voxels.
    without = ("block",) if len(plans) > 1 else ()
    return list(dict.fromkeys(_command_of(plan, without) for plan in plans))


def _command_of(plan: Plan, without: Sequence[str]) -> str:
    words = ["megaseg", "segment", plan.source.url, plan.target.url]
    for name, field in Settings.model_fields.items():
        value = getattr(plan.options, name)
        if (
            name in without
            or value in (None, field.default)
            or not (is_result(name) or name in _ALSO)
            or _is_implied(plan, name)
        ):
            continue
        # Several models are several options: a path may hold a comma.
        for each in value if name == "model" else [value]:
            words += [f"--{name.replace('_', '-')}"] + ([] if each is True else [_text(name, each)])
    return shlex.join(words)


def _is_implied(plan: Plan, name: str) -> bool:
    """Tell whether an option was only written down because the source leaves no choice."""
    extents = {"time": plan.source_image.extent("t"), "channel": plan.source_image.extent("c")}
    return extents.get(name) == 1


def _text(name: str, value: object) -> str:
    if name == "roi" and isinstance(value, tuple):
        return ",".join(f"{a}:{b}" for a, b in value)
    if name == "time" and isinstance(value, tuple):
        return ":".join("" if n is None else str(n) for n in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
