"""The log of a run: a short text in its folder for each client that worked on it.

Object stores cannot append, so the text of a session is written anew as it
grows, whole, under a number of its own; a kill loses seconds of it. It is for
people: the journal knows more, and nothing ever reads a log. What cannot be
logged stops no run.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version

from megaseg_dask.errors import MegasegError
from megaseg_dask.events import Event, Result
from megaseg_dask.messages import Narrator, result_line
from megaseg_dask.plan.plan import Plan

FOLDER = "log"
# Written at most so often, and in a long run each time a hundredth of it is over.
_LEAST_S, _SHARE = 5.0, 0.01

Emit = Callable[[Event], None]


class RunLog:
    """The text of one session; ``url`` is where it is, empty if it could not be written."""

    def __init__(self, plan: Plan) -> None:
        self._run = plan.run
        self._narrator = Narrator()
        self._lines: list[str] = []
        self._key, self._is_new = "", False
        self._began = self._written = time.monotonic()
        engine = plan.engine
        self._add(
            f"megaseg-dask {version('megaseg-dask')} on {platform.node()}: {plan.source} to {plan.target}"
        )
        self._add(
            f"{plan.model.name} {plan.model.digest[:16]}, {engine.engine} {engine.precision} on "
            f"{engine.device}, plan {plan.fingerprint[:16]}"
        )
        self._try(self._create)

    @property
    def url(self) -> str:
        """Address of the text."""
        return (self._run / self._key).url if self._key else ""

    def note(self, event: Event) -> None:
        """Add what there is to say of an event, and write it if it is time."""
        for line in self._narrator.lines(event):
            self._add(line)
        if isinstance(event, Result):
            for warning in event.warnings:
                self._add(f"warning: {warning}")
            self._add(result_line(event))
        now = time.monotonic()
        if now - self._written > max(_LEAST_S, (now - self._began) * _SHARE):
            self.write()

    def say(self, text: str) -> None:
        """Add a line, and write."""
        self._add(text)
        self.write()

    def write(self) -> None:
        """Write what is new."""
        if self._key and self._is_new:
            # Nobody waits for a log: the journal, and the tasks, do that for the run.
            self._try(lambda: self._run.put(self._key, self._text(), patient=False))

    def _add(self, line: str) -> None:
        self._lines.append(
            f"{datetime.now().astimezone().isoformat(timespec='seconds')} {' '.join(line.split())}"
        )
        self._is_new = True

    def _create(self) -> None:
        """Take the next number that is free: a client that stood still keeps its own."""
        number = len(self._run.keys(FOLDER)) + 1
        while not self._run.create(f"{FOLDER}/{number:04d}.txt", self._text()):
            number += 1
        self._key = f"{FOLDER}/{number:04d}.txt"

    def _try(self, write: Callable[[], None]) -> None:
        # If the store is lost, the run will say so; if it comes back, the next piece has all of the text.
        with suppress(MegasegError):
            write()
            self._is_new = False
        self._written = time.monotonic()

    def _text(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


@contextmanager
def logged(plan: Plan) -> Iterator[RunLog]:
    """Open a log for this session, which tells how that ended, however it does."""
    log = RunLog(plan)
    try:
        yield log
    except BaseException as error:
        log.say(f"stopped: {str(error) or type(error).__name__}")
        raise
    finally:
        log.write()
