"""Requests in threads: while a store answers one, others are on their way.

Reading one object takes milliseconds, mostly waiting; one at a time, a million
objects would take an hour. Threads take over the context of their caller.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MAX_THREADS = 32
_MAX_READERS = 16


def map_threaded(
    function: Callable[[T], R], items: Iterable[T], n_threads: int = _MAX_THREADS
) -> list[R]:
    """Call a function for each item in threads and return the results in the order of the items.

    The first error is raised; calls that have not begun by then are not made.
    """
    is_over = threading.Event()

    def call(item: T) -> R:
        # Calls begin in order: an earlier one has failed, and its error is raised.
        if is_over.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            is_over.set()
            raise

    with ThreadPoolExecutor(n_threads) as pool:
        futures = [pool.submit(copy_context().run, call, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            is_over.set()


def read_ahead(read: Callable[[T], R], keys: Iterable[T], n_ahead: int) -> Iterator[tuple[T, R]]:
    """Yield each key with the result of ``read``, in order; ``n_ahead`` results exist at most."""
    with ThreadPoolExecutor(min(n_ahead, _MAX_READERS)) as pool:
        pending: deque[tuple[T, Future[R]]] = deque()
        for key in keys:
            pending.append((key, pool.submit(copy_context().run, read, key)))
            if len(pending) == n_ahead:
                oldest, result = pending.popleft()
                yield oldest, result.result()
        for key, result in pending:
            yield key, result.result()


class _Quiet:
    """The threads that ignore warnings, whose filters are those of the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._filters = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._n_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._filters.close()


_QUIET = _Quiet()


@contextmanager
def ignored_warnings() -> Iterator[None]:
    """Ignore warnings in this block; the last thread that leaves such a block restores them.

    Of two threads with ``warnings.catch_warnings``, the first that leaves would restore them for
    both, and the second would let them be ignored for ever.
    """
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()
