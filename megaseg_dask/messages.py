"""Which events of a run are worth a line, and in which words: for a terminal that is no terminal, and for the log.

A night has a hundred thousand tasks. So a stage tells how it gets on ever more
seldom, and of many failures the first are told: an hour or a night is some
hundred lines, and what is left out is in the journal.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from megaseg_dask.events import Event

Fields = Mapping[str, Any]

# A line every five seconds at first, and then each time a thirtieth of what passed is over.
_LEAST_S, _SHARE = 5.0, 1 / 30
_MOST_FAILURES, _MOST_NOTICES = 20, 50


class Narrator:
    """Words events, and keeps silent where that says no less."""

    def __init__(
        self, least_s: float = _LEAST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._least_s, self._clock, self._began = least_s, clock, clock()
        self._told: dict[str, float] = {}
        self._n: dict[str, int] = {"failure": 0, "notice": 0}

    def lines(self, event: Event) -> list[str]:
        """Return what there is to say of an event; often nothing."""
        fields = event.as_dict()
        match event.kind:
            case "started":
                return [started_line(fields)]
            case "epoch":
                return [epoch_line(fields)]
            case "notice":
                return self._capped(
                    "notice", str(fields["text"]), _MOST_NOTICES, "further such lines are left out"
                )
            case "failure":
                line, more = (
                    failure_line(fields),
                    "further failures are not shown here; megaseg status lists them",
                )
                return self._capped("failure", line, _MOST_FAILURES, more)
            case "fetching":
                over = fields["n_bytes"] == fields["total_bytes"]
                return (
                    [fetching_line(fields)] if self._is_due(str(fields["model"]), over=over) else []
                )
            case "progress":
                over = is_over(fields)
                return (
                    [progress_line(fields)] if self._is_due(str(fields["stage"]), over=over) else []
                )
        return []

    def _capped(self, kind: str, line: str, most: int, more: str) -> list[str]:
        self._n[kind] += 1
        return [line] if self._n[kind] <= most else [more] if self._n[kind] == most + 1 else []

    def _is_due(self, what: str, *, over: bool) -> bool:
        """Tell whether it is time for a line; stages that run at once share the lines among them."""
        now = self._clock()
        last = self._told.setdefault(what, now)
        pause = max(self._least_s, (now - self._began) * _SHARE) * len(self._told)
        if over or now - last > pause:
            self._told[what] = now
            return True
        return False


def is_over(fields: Fields) -> bool:
    """Tell whether nothing is left of a stage."""
    return bool(fields["n_done"] + fields["n_failed"] >= fields["n_tasks"])


def started_line(fields: Fields) -> str:
    """Say how much there is to do."""
    n = fields["n_tasks"]
    resumed = f", {fields['n_done']} of them done before" if fields["n_done"] else ""
    dashboard = f"; dashboard {fields['dashboard']}" if fields["dashboard"] else ""
    return f"{n} {'task' if n == 1 else 'tasks'}{resumed}{dashboard}"


def progress_line(fields: Fields) -> str:
    """Say how a stage gets on."""
    parts = [
        f"{fields['stage']}: {fields['n_done']}/{fields['n_tasks']} tasks",
        f"{fields['elapsed_s']:.1f} s",
        *rates(fields),
        failed_text(fields),
        left_text(fields),
    ]
    return ", ".join(filter(None, parts))


def rates(fields: Fields) -> list[str]:
    """Return the speeds of a stage, in blocks or fields and in voxels; none before there is one."""
    found = (
        [f"{fields['units_per_s']:.3g} {fields['unit']}/s"]
        if fields["unit"] and fields["units_per_s"]
        else []
    )
    found += [f"{fields['voxels_per_s'] / 1e6:.3g} Mvoxel/s"] if fields["voxels_per_s"] else []
    return found


def failed_text(fields: Fields) -> str:
    """Return how many tasks of a stage failed so far."""
    return f"{fields['n_failed']} failed" if fields["n_failed"] else ""


def left_text(fields: Fields) -> str:
    """Return the time that is left; nothing where it is not known, or over."""
    return (
        f"about {duration(fields['left_s'])} left"
        if fields["left_s"] and not is_over(fields)
        else ""
    )


def failure_line(fields: Fields) -> str:
    """Name what failed, and why."""
    return f"FAILED {fields['stage']} {fields['volume']} box {fields['box']}: {fields['error']}"


def epoch_line(fields: Fields) -> str:
    """Say how a training gets on."""
    training, validation = (
        "not a number" if fields[key] is None else f"{fields[key]:.4f}"
        for key in ("training_loss", "validation_loss")
    )
    best = (
        "the best so far"
        if fields["best_epoch"] == fields["epoch"]
        else f"best was epoch {fields['best_epoch']}"
    )
    epoch = f"epoch {fields['epoch']} ({fields['epoch'] + 1} of {fields['max_epochs']})"
    return f"{epoch}: loss {training}, validation {validation}, {best}"


def fetching_line(fields: Fields) -> str:
    """Say how much of a model is there."""
    received = f"{size_text(fields['n_bytes'])} of {size_text(fields['total_bytes'])}"
    return f"fetching {fields['model']} from {fields['source']}: {received}"


def result_line(fields: Fields) -> str:
    """Say how a run ended."""
    n = len(fields["failures"])
    objects = "" if fields["n_objects"] is None else f", {fields['n_objects']} objects"
    failed = f", {n} {'failure' if n == 1 else 'failures'}" if n else ""
    return f"{fields['status']} after {fields['wall_s']:.1f} s{objects}{failed}"


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def size_text(n: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
