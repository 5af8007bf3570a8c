"""GPUs that failed during a run: which of them are given another process, and which are left out.

An error of CUDA ends the use of a GPU by one process, and mostly not more: the next
process may compute there. Two processes that failed are no accident, unless it was the
same task that ended both. So a task that failed on a GPU is tried on another one, where
there is one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

# A stage and an index.
Task: TypeAlias = tuple[str, int]


@dataclass
class FailedDevices:
    """The tasks that failed on each GPU, by its UUID, and by the address of the process."""

    _tasks: dict[str, dict[str, set[Task]]] = field(default_factory=dict)

    def add(self, device: str, process: str, *tasks: Task) -> None:
        """Note that a process failed on a GPU, in tasks or before its first."""
        processes = self._tasks.setdefault(device, {})
        processes.setdefault(process, set()).update(tasks)

    def of_tasks(self, tasks: Iterable[Task]) -> set[str]:
        """Return the GPUs on which one of these tasks failed."""
        wanted = set(tasks)
        found = set()
        for device, processes in self._tasks.items():
            if not wanted.isdisjoint(set().union(*processes.values())):
                found.add(device)
        return found

    def iter_left_out(self) -> Iterator[str]:
        """Yield GPUs on which two processes failed, and no task has part in all of that."""
        for device, processes in self._tasks.items():
            if len(processes) > 1 and not set.intersection(*processes.values()):
                yield device
