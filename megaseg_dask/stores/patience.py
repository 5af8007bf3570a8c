"""Failed requests to a store are made again, all of them by these rules.

A store's client waits while the store is silent, restarts or is too busy. It
gives up at once where a connection breaks in the middle of an answer, where an
answer says that the request came too slowly, and where access is denied for a
moment. Such a request is made again a few times.
"""

import time
from asyncio import sleep
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from obstore import exceptions

from megaseg_dask.stores.failures import is_store_failure, understand

T = TypeVar("T")

_FIRST_PAUSE_S = 0.5
# Most denials are meant so. Metadata that are absent are denied too, where a store may not be
# listed.
_FIRST_PAUSE_IF_DENIED_S = 0.1
_MAX_PAUSE_S = 10.0

# Answers, and not failures.
_ANSWERS = (
    FileNotFoundError,
    exceptions.AlreadyExistsError,
    exceptions.NotModifiedError,
    exceptions.NotSupportedError,
    exceptions.PreconditionError,
)
# No repetition helps, or the client has waited already.
_LASTING = ("certificate", "host", "ranges", "refused")


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a request is made again, and within how many seconds the last attempt begins."""

    max_retries: int
    wait_s: float

    @property
    def once(self) -> "Patience":
        """Patience for one repetition, where a failure is an ordinary answer."""
        return replace(self, max_retries=min(self.max_retries, 1))

    def ask(self, request: Callable[[], T]) -> T:
        """Make a request, again if it fails; raises its last error."""
        attempts = _Attempts(self)
        while True:
            try:
                return request()
            except Exception as error:
                pause_s = attempts.pause_after(error)
            time.sleep(pause_s)

    async def ask_async(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request, again if it fails; raises its last error."""
        attempts = _Attempts(self)
        while True:
            try:
                return await request()
            except Exception as error:
                pause_s = attempts.pause_after(error)
            await sleep(pause_s)


class _Attempts:
    """The attempts of one request."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._n_failed = 0
        self._stop_s = time.monotonic() + patience.wait_s

    def pause_after(self, error: Exception) -> float:
        """Return the seconds until the next attempt; raises the error if there is none."""
        self._n_failed += 1
        is_over = time.monotonic() > self._stop_s
        if self._n_failed > self._patience.max_retries or is_over or not may_pass(error):
            raise error
        is_denied = understand(error).kind == "denied"
        first_s = _FIRST_PAUSE_IF_DENIED_S if is_denied else _FIRST_PAUSE_S
        return min(first_s * 2.0 ** (self._n_failed - 1), _MAX_PAUSE_S)


def may_pass(error: Exception) -> bool:
    """Return whether a store's error may be over at the next attempt."""
    if not is_store_failure(error) or isinstance(error, _ANSWERS):
        return False
    cause = understand(error)
    is_lasting = cause.is_of_request or cause.kind in _LASTING
    return cause.kind == "denied" or not is_lasting
