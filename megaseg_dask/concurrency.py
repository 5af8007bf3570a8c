"""Many requests at once: of the time that a store takes to answer, most goes by in waiting."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 32


def at_once(function: Callable[[T], R], items: Iterable[T], n_threads: int = _THREADS) -> list[R]:
    """Call a function for each item, many at a time, and return the results in the order of the items.

    The first error ends it: what had not begun by then is not done.
    """
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, items))
