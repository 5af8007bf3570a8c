"""Faults in real workers: what a task does before it begins is read from a file, and each task leaves a line.

Nothing of the package knows of this: it comes in as a worker's preload, so
that a worker which was started again has it too.
"""

import json
from collections import Counter
from pathlib import Path

_PRELOAD = """
import json, os, signal, time
from pathlib import Path

import megaseg_dask.tasks as tasks
from megaseg_dask.engines.pytorch import TorchEngine

folder = Path({folder!r})
# A preload is executed twice.
run_task = getattr(tasks.run_task, "real", tasks.run_task)
forward = getattr(TorchEngine.__call__, "real", TorchEngine.__call__)

def haunted(plan, stage, index):
    with (folder / f"calls-{{os.getpid()}}").open("a") as file:
        file.write(json.dumps([stage, index]) + "\\n")
    fault = json.loads((folder / "faults.json").read_text()).get(f"{{stage}} {{index}}")
    if fault == "exit":
        os._exit(1)
    if fault == "stop":
        (folder / "faults.json").write_text("{{}}")
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleep":
        (folder / "faults.json").write_text("{{}}")
        time.sleep(3600)
    if fault == "bug":
        raise ZeroDivisionError("a bug")
    return run_task(plan, stage, index)

def counted(self, patches):
    with (folder / f"forward-{{os.getpid()}}").open("a") as file:
        file.write(".")
    return forward(self, patches)

haunted.real, counted.real = run_task, forward
tasks.run_task, TorchEngine.__call__ = haunted, counted
"""


class Haunted:
    """Workers with faults; counts what they did."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lift()

    def poison(self, stage: str, index: int, fault: str) -> None:
        path = self._folder / "faults.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), f"{stage} {index}": fault}))

    def lift(self) -> None:
        (self._folder / "faults.json").write_text("{}")

    def forget(self) -> None:
        for path in [*self._folder.glob("calls-*"), *self._folder.glob("forward-*")]:
            path.unlink()

    @property
    def preload(self) -> str:
        return _PRELOAD.format(folder=str(self._folder))

    @property
    def calls(self) -> Counter:
        """How often each task began."""
        lines = [line for path in self._folder.glob("calls-*") for line in path.read_text().splitlines()]
        return Counter(tuple(json.loads(line)) for line in lines)

    @property
    def n_forward(self) -> int:
        """How many forward passes were made."""
        return sum(len(path.read_text()) for path in self._folder.glob("forward-*"))
