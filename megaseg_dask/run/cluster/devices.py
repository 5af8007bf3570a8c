"""GPUs that failed during a run: which of them are given another process, and which are left out.

An error of CUDA ends the use of a GPU by one process, and mostly not more: the next
process may compute there. Two processes that failed are no accident, unless it was the
same task that ended both.
"""

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

    def is_left_out(self, device: str) -> bool:
        """Return whether two processes failed on a GPU, and no task has part in all of that."""
        processes = list(self._tasks.get(device, {}).values())
        return len(processes) > 1 and not set.intersection(*processes)
