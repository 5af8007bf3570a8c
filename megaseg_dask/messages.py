"""Text for people: events, durations, sizes and names, each on one line.

A night has a hundred thousand tasks. A stage therefore gets a line ever less
often, and only the first failures get one: an hour or a night is some hundred
lines. What is left out is in the journal.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from megaseg_dask.events import (
    Doubt,
    Epoch,
    Event,
    Failure,
    Fetching,
    Following,
    Notice,
    PatchProgress,
    Progress,
    Result,
    Started,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# The pause between two lines of a stage: at least five seconds, and a thirtieth of the run so far.
_MIN_PAUSE_S = 5.0
_PAUSE_SHARE = 1 / 30
_MAX_FAILURES = 20
_MAX_NOTICES = 50

# What is expected of a value, by pydantic's name of the fault.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "missing": "a value, found none",
    "too_short": "at least {min_length}, found {actual_length}",
    "too_long": "at most {max_length}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "{le:g} or less",
}

# -- events as lines


class Narrator:
    """Turn events into log lines, rate-limited per stage."""

    def __init__(
        self, min_pause_s: float = _MIN_PAUSE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._min_pause_s = min_pause_s
        self._clock = clock
        self._began = clock()
        self._last_line: dict[str, float] = {}
        self._n_failures = 0
        self._n_notices = 0
        self._is_following = False
        # The newest of each stage that had no line.
        self._untold: dict[str, Progress] = {}

    def lines(self, event: Event) -> list[str]:
        """Return the lines for an event; may be empty."""
        match event:
            case Started():
                return [started_line(event)]
            case Epoch():
                return [epoch_line(event)]
            case Notice():
                self._n_notices += 1
                more = "further notices are not shown; they are in the log"
                return _first_lines(event.text, self._n_notices, _MAX_NOTICES, more)
            case Failure():
                self._n_failures += 1
                more = "further failures are not shown; megaseg status lists them"
                return _first_lines(failure_line(event), self._n_failures, _MAX_FAILURES, more)
            case Following():
                is_first = not self._is_following
                self._is_following = True
                if not self._is_due("following", is_first or event.is_over):
                    return []
                # How each stage ended, where that had no line.
                stages = self._untold.values() if event.is_over else ()
                return [*map(progress_line, stages), following_line(event)]
            case Fetching():
                is_over = event.n_bytes == event.total_bytes
                return [fetching_line(event)] if self._is_due(event.model, is_over) else []
            case Progress():
                # A run that follows its source ends each stage again and again.
                is_over = event.is_over and not self._is_following
                self._untold[event.stage] = event
                if not self._is_due(event.stage, is_over):
                    return []
                return [progress_line(self._untold.pop(event.stage))]
            case PatchProgress():
                return [patches_line(event)] if self._is_due(event.stage, False) else []
        return []

    def _is_due(self, subject: str, is_over: bool) -> bool:
        """Return whether a stage or download gets a line now; those that run at once take turns."""
        now = self._clock()
        last_line = self._last_line.setdefault(subject, now)
        pause = max(self._min_pause_s, (now - self._began) * _PAUSE_SHARE)
        is_due = is_over or now - last_line > pause * len(self._last_line)
        if is_due:
            self._last_line[subject] = now
        return is_due


def _first_lines(line: str, number: int, max_number: int, more: str) -> list[str]:
    """Return the line of an event by its number: after the last allowed one ``more``, once."""
    if number <= max_number:
        return [line]
    return [more] if number == max_number + 1 else []


def started_line(event: Started) -> str:
    """Return how many tasks a run has, and the fields and channels that it takes."""
    line = count(event.n_tasks, "task")
    if event.n_done:
        line += f", {event.n_done} of them done before"
    subject = subject_text(event.fields, event.channels)
    if subject:
        line += f"; {subject}"
    if event.dashboard:
        line += f"; dashboard {event.dashboard}"
    return line


def subject_text(fields: Sequence[str], channels: Sequence[str]) -> str:
    """Return what a run is about: its fields of a plate, and the channels that it takes."""
    parts = []
    if fields:
        noun = "field" if len(fields) == 1 else f"{len(fields)} fields"
        parts.append(f"{noun} {first_few(fields)}")
    if channels:
        parts.append(f"channel {', '.join(channels)}")
    return "; ".join(parts)


def progress_line(event: Progress) -> str:
    """Return the state of a stage: tasks, time, rates, failures and the time left."""
    words = [
        f"{stage_phrase(event.stage)}: {event.n_done}/{count(event.n_tasks, 'task')}",
        f"{event.elapsed_s:.1f} s",
        *rates(event),
        failed_text(event),
        left_text(event),
    ]
    return ", ".join(filter(None, words))


def patches_line(event: PatchProgress) -> str:
    """Return how many patches of the blocks in work are predicted, and the time left."""
    words = [f"{stage_phrase(event.stage)}: {patches_text(event)}", left_text(event)]
    return ", ".join(filter(None, words))


def patches_text(event: PatchProgress) -> str:
    """Return how many patches of the blocks in work are predicted."""
    return f"{event.n_predicted} of {count(event.n_patches, 'patch', 'patches')}"


def rates(event: Progress) -> list[str]:
    """Return the speed of a stage in its unit and in voxels; empty before the first task ends."""
    texts = []
    if event.unit and event.units_per_s:
        texts.append(f"{event.units_per_s:.3g} {event.unit}/s")
    if event.voxels_per_s:
        texts.append(f"{event.voxels_per_s / 1e6:.3g} Mvoxel/s")
    return texts


def failed_text(event: Progress) -> str:
    """Return how many tasks of a stage failed; empty if none did."""
    return f"{event.n_failed} failed" if event.n_failed else ""


def left_text(event: Progress | PatchProgress) -> str:
    """Return the time left; empty if it is unknown or the stage is over."""
    if not event.left_s or (isinstance(event, Progress) and event.is_over):
        return ""
    return f"about {duration(event.left_s)} left"


def failure_line(failure: Failure) -> str:
    """Return the task that failed, or the field that cannot be planned, and the cause."""
    if not failure.box:
        return f"FAILED {failure.volume}: {failure.error}"
    stage = stage_phrase(failure.stage)
    return f"FAILED {stage}, {failure.volume}, box {failure.box}: {failure.error}"


def doubt_line(doubt: Doubt) -> str:
    """Return why a result is doubtful, and what to try."""
    return f"{doubt.text}; {doubt.advice}"


def epoch_line(event: Epoch) -> str:
    """Return the losses of an epoch, and the best epoch."""
    training = _loss_text(event.training_loss)
    validation = _loss_text(event.validation_loss)
    is_best = event.best_epoch == event.epoch
    best = "the best so far" if is_best else f"best was epoch {event.best_epoch}"
    epoch = f"epoch {event.epoch} ({event.epoch + 1} of {event.max_epochs})"
    return f"{epoch}: loss {training}, validation {validation}, {best}"


def _loss_text(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4f}"


def fetching_line(event: Fetching) -> str:
    """Return how much of a model is received."""
    received = f"{size_text(event.n_bytes)} of {size_text(event.total_bytes)}"
    return f"fetching {event.model} from {event.source}: {received}"


def following_line(event: Following) -> str:
    """Return how far a source that is followed is, and what is waited for."""
    if not event.n_announced:
        why = f" ({event.reason})" if event.reason else ""
        return f"waiting for {event.source}{why}"
    line = f"{event.n_there} of {count(event.n_announced, 'timepoint')} are there"
    if event.n_done:
        line += f", {event.n_done} are done"
    if event.is_over:
        line += "; the run waits for no more"
    elif event.n_done >= event.n_there:
        line += "; waiting for more"
        if event.waited_s >= 1:
            line += f", nothing changed for {duration(event.waited_s)}"
    return f"{line} ({event.reason})" if event.reason else line


def result_line(result: Result) -> str:
    """Return how a run ended."""
    line = f"{result.status} after {result.wall_s:.1f} s"
    if result.n_objects is not None:
        line += f", {count(result.n_objects, 'object')}"
    if result.failures:
        line += f", {count(len(result.failures), 'failure')}"
    return line


# -- names of stages

# Shown to people; JSON, the journal and ``megaseg task`` keep the names.
STAGE_PHRASES = {
    "volume": "segmenting volumes",
    "import": "copying planes",
    "measure": "measuring intensities",
    "pool": "joining intensities of groups",
    "segment": "predicting blocks",
    "reread": "reading scores",
    "histogram": "counting scores",
    "cutoff": "finding the threshold",
    "threshold": "applying the threshold",
    "holes": "finding holes",
    "holes-seams": "comparing holes at borders",
    "holes-join": "joining holes across blocks",
    "fill": "filling holes",
    "label": "finding objects in blocks",
    "seams": "comparing objects at borders",
    "join": "joining objects across blocks",
    "split": "splitting objects",
    "rank": "ordering objects",
    "relabel": "numbering objects",
    "measurements": "measuring objects",
    "table": "writing the table of objects",
}
_LEVEL_STAGE = "downsample-"


def stage_phrase(stage: str) -> str:
    """Return what a stage does, in words; the name of a stage that has none."""
    if stage.startswith(_LEVEL_STAGE):
        return f"writing pyramid level {stage.removeprefix(_LEVEL_STAGE)}"
    return STAGE_PHRASES.get(stage, stage)


# -- numbers and names as text


def count(n: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{n} {noun}" if n == 1 else f"{n} {plural or f'{noun}s'}"


def duration(seconds: float, *, exact: bool = False) -> str:
    """Return a time in seconds, minutes, or hours and minutes.

    An ``exact`` one has three digits below 100 seconds, and then the seconds of its minutes.
    """
    if exact and seconds < 100:
        return f"{seconds:.3g} s"
    if exact and seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds > 90 else f"{seconds:.0f} s"


def size_text(n_bytes: float) -> str:
    """Return a number of bytes in the largest unit below it."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def version_of(package: str) -> str:
    """Return the version of an installed package, "missing" of another, as of a tree of source."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def install_command(extra: str) -> str:
    """Return a command that installs what an extra of this package has, wherever that came from.

    It names the packages themselves: this package is on no index. Where it was never installed,
    the command is for its checkout.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("megaseg-dask") or []
    except PackageNotFoundError:
        requirements = []
    marker = re.compile(rf"extra == .{re.escape(extra)}.$")
    packages = [text.split(";")[0].strip() for text in requirements if marker.search(text)]
    quoted = [f"'{package}'" for package in packages or [f".[{extra}]"]]
    return f"pip install {' '.join(quoted)}"


def one_line(text: object, max_length: int = 80) -> str:
    """Return foreign text for a message: cut, on one line, and without control characters."""
    words = str(text)[:max_length].split()
    return "".join(c if c.isprintable() else "?" for c in " ".join(words))


def first_few(names: Iterable[object], max_names: int = 3) -> str:
    """Return the first names in alphabetical order, and ``…`` if there are more."""
    listed = sorted(map(one_line, names))
    more = ["…"] if len(listed) > max_names else []
    return ", ".join(listed[:max_names] + more)


def validation_message(problem: "ErrorDetails") -> str:
    """Return what pydantic expected of a value, in our words."""
    expected = _EXPECTED.get(problem["type"])
    if expected:
        return f"expected {expected.format(**problem.get('ctx', {}))}"
    return problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def closest(word: str, words: Iterable[str]) -> str | None:
    """Return the most similar of some words, for "did you mean"; ``None`` if none is similar.

    Small and capital letters are alike.
    """
    by_letters = {each.casefold(): each for each in words}
    for letters in get_close_matches(word.casefold(), list(by_letters), n=1):
        return by_letters[letters]
    return None


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the advice that ends a line about an unknown word: the closest one, or all."""
    all_words = list(words)
    word_meant = closest(word, all_words)
    if word_meant:
        return f"; did you mean {word_meant}?"
    return f"; choose from {', '.join(all_words)}"
