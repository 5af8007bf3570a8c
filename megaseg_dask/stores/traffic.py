"""Requests to stores and the bytes that they move, counted in one place for all kinds of stores.

Each store of ours, and each store that zarr gets, adds to the count of its process. Whoever
reports work takes what was counted since the last report, so reports add up to all of it.
A request that failed and was made again counts once.
"""

import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add

# Keys of one answer to a request to list, and of one request to remove objects.
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests to stores, and the bytes of the objects that they moved.

    ``n_get`` counts objects, or parts of them, that are read, and looks at their sizes. In a
    folder of a disk the same is done with files.
    """

    n_put: int = 0
    n_get: int = 0
    n_list: int = 0
    n_delete: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(add, astuple(self), astuple(other)))

    def times(self, n: int) -> "Traffic":
        """Return the traffic of doing the same ``n`` times."""
        return Traffic(*(value * n for value in astuple(self)))

    def scaled(self, share: float) -> "Traffic":
        """Return the traffic of a share of the same, between 0 and 1."""
        return Traffic(*(round(value * share) for value in astuple(self)))

    @property
    def n_requests(self) -> int:
        """Requests of all kinds."""
        return self.n_put + self.n_get + self.n_list + self.n_delete

    def to_json(self) -> list[int]:
        """Return the values in the order of the fields."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, values: Sequence[int]) -> "Traffic":
        """Return the value that :meth:`to_json` wrote.

        Raises:
            ValueError: It is none.
        """
        if any(type(value) is not int or value < 0 for value in values):
            raise ValueError(f"{values!r} are no numbers of requests and bytes")
        return cls(*values)


NO_TRAFFIC = Traffic()


class _Meter:
    """What this process asked of stores since the last report."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted = NO_TRAFFIC

    def add(self, traffic: Traffic) -> None:
        with self._lock:
            self._counted += traffic

    def take(self) -> Traffic:
        with self._lock:
            counted = self._counted
            self._counted = NO_TRAFFIC
            return counted


_METER = _Meter()


def count_put(n_bytes: int) -> None:
    """Count an object that was written."""
    _METER.add(Traffic(n_put=1, bytes_written=n_bytes))


def count_get(n_bytes: int = 0) -> None:
    """Count an object, or a part of one, that was read or asked for."""
    _METER.add(Traffic(n_get=1, bytes_read=n_bytes))


def count_list(n_keys: int = 0) -> None:
    """Count a listing by the keys in it: an answer holds a thousand."""
    _METER.add(Traffic(n_list=max(1, -(-n_keys // PAGE))))


def count_delete(n: int = 1) -> None:
    """Count requests to remove objects."""
    _METER.add(Traffic(n_delete=n))


def take_traffic() -> Traffic:
    """Return what this process asked of stores since this was called the last time."""
    return _METER.take()
