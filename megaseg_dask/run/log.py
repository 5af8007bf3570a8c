"""The log of a run: a short text in its folder for each client that worked on it.

Object stores cannot append, so the text of a session is written whole again as
it grows, under its own number; a kill loses seconds of it. It is for people:
the journal holds more, and the package never reads a log. A log that cannot be
written stops no run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime

from megaseg_dask.errors import MegasegError
from megaseg_dask.events import Event, Result
from megaseg_dask.messages import Narrator, doubt_line, result_line
from megaseg_dask.stores import Location

FOLDER = "log"
# The text is written at most this often, and in a long run after each hundredth of its time.
_MIN_PAUSE_S = 5.0
_PAUSE_SHARE = 0.01


class RunLog:
    """The text of one session."""

    def __init__(self, run: Location, head: Sequence[str]) -> None:
        """Create the text with the lines of its head, under the next free number."""
        self._run = run
        self._narrator = Narrator()
        self._lines = [_stamped(line) for line in head]
        self._key = ""
        self._began_s = time.monotonic()
        self._written_s = self._began_s
        with suppress(MegasegError):
            self._key = self._create()

    def _create(self) -> str:
        number = len(self._run.keys(FOLDER)) + 1
        while not self._run.create(f"{FOLDER}/{number:04d}.txt", self._text()):
            number += 1
        return f"{FOLDER}/{number:04d}.txt"

    @property
    def url(self) -> str:
        """Address of the text; empty if it could not be created."""
        return (self._run / self._key).url if self._key else ""

    def note(self, event: Event) -> None:
        """Add the lines of an event, and write the text if it is time."""
        self._lines += map(_stamped, self._narrator.lines(event))
        if isinstance(event, Result):
            warnings = [f"warning: {warning}" for warning in event.warnings]
            doubts = [f"doubt: {doubt_line(doubt)}" for doubt in event.doubts]
            self._lines += map(_stamped, [*warnings, *doubts, result_line(event)])
        now = time.monotonic()
        if now - self._written_s > max(_MIN_PAUSE_S, (now - self._began_s) * _PAUSE_SHARE):
            self.write()

    def end(self, error: BaseException | None = None) -> None:
        """Write the last lines: the error that stopped the session, if one did."""
        if error is not None:
            self._lines.append(_stamped(f"stopped: {str(error) or type(error).__name__}"))
        self.write()

    def write(self) -> None:
        """Write the text, if the store answers at once: the next time it is written whole again."""
        if self._key:
            with suppress(MegasegError):
                self._run.put(self._key, self._text(), patient=False)
        self._written_s = time.monotonic()

    def _text(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _stamped(line: str) -> str:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"{now} {' '.join(line.split())}"


@contextmanager
def logged(run: Location, head: Sequence[str]) -> Iterator[RunLog]:
    """Open the log of a session; it ends with the session, also with one that is stopped."""
    log = RunLog(run, head)
    try:
        yield log
    except BaseException as error:
        log.end(error)
        raise
    log.end()
