"""When a failed task is tried again, and when a store is taken for lost: the same rules everywhere.

Only failures of a store or a connection are tried again: data that cannot be
segmented fail again. A store that is lost fails every task, so the run stops
early, and the next run resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megaseg_dask.errors import MegasegError
from megaseg_dask.run.tasks.worker import Outcome
from megaseg_dask.stores import Location

_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 10.0
# After this many store failures in a row the disk is full or the store is gone: no matter of one
# chunk any more.
_MAX_FAILURES_IN_A_ROW = 5


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a task is tried again after its first attempt."""

    max_retries: int

    @property
    def n_attempts(self) -> int:
        """Attempts of a task in all."""
        return self.max_retries + 1

    def allow(self, attempt: int) -> bool:
        """Return whether a task whose ``attempt`` failed, from 1 on, is tried again."""
        return attempt <= self.max_retries

    def pause_s(self, attempt: int) -> float:
        """Return the seconds to wait before an attempt, from 2 on."""
        return min(_FIRST_PAUSE_S * 2.0 ** (attempt - 2), _MAX_PAUSE_S)


class StoreWatch:
    """Finds out from the outcomes of tasks whether a store of the run is lost."""

    def __init__(self, stores: Sequence[Location]) -> None:
        """Watch the stores of a run: source and target."""
        self._stores = stores
        self._n_in_a_row = 0

    def is_lost_after(self, outcome: Outcome) -> bool:
        """Return whether a store is lost, now that a task ended for good."""
        if not outcome.error:
            self._n_in_a_row = 0
        if not outcome.is_infrastructure or outcome.device:
            return False
        self._n_in_a_row += 1
        return self._n_in_a_row >= _MAX_FAILURES_IN_A_ROW or not self._stores_answer()

    def _stores_answer(self) -> bool:
        """Ask each store once.

        A task that waited for a store in vain need not be followed by others that do.
        """
        try:
            return all(store.probe() for store in self._stores)
        except MegasegError:
            return False
