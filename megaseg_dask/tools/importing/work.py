"""The tasks of an import: blocks of planes are copied, and coarser levels follow from them."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.errors import SourceError, TaskError
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.import_plan import ImportPlan, ImportTask
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.run.lease import Leases, Permit
from megaseg_dask.run.losses import wrote
from megaseg_dask.run.state import TaskSummary
from megaseg_dask.run.tasks.pyramids import reduce_box
from megaseg_dask.stores import Location, clear_array_cache, noting
from megaseg_dask.tools.importing.files import ImageFile, open_file
from megaseg_dask.tools.importing.planning import require_same_file

PLAN = "plan.json"
# A plate has thousands of files.
_MAX_OPEN_FILES = 8


@dataclass(frozen=True, slots=True)
class ImportAssignment:
    """The import that a process works for: its folder, its plan, and the lease of its client."""

    run: Location
    fingerprint: str
    lease_id: str

    def open_work(self) -> "ImportWork":
        """Return the tasks of the import.

        Raises:
            TaskError: Another plan is recorded there by now.
        """
        clear_array_cache()
        plan = ImportPlan.model_validate_json(self.run.get(PLAN) or b"{}")
        if plan.fingerprint != self.fingerprint:
            raise TaskError(f"{self.run}/{PLAN} was replaced while this import was going on")
        permit = Permit(Leases(runs_folder(plan.target)), self.lease_id)
        return ImportWork(plan, permit)


class ImportWork:
    """The tasks of an import, and the files that they keep open."""

    tasks_at_once = 1

    def __init__(self, plan: ImportPlan, permit: Permit) -> None:
        """Write only while the permit holds."""
        self._plan = plan
        self._permit = permit
        self._files: OrderedDict[int, ImageFile] = OrderedDict()

    def prepare(self, stage: str) -> None:
        """Do nothing: no engine runs."""

    def run_task(self, stage: str, index: int) -> TaskSummary:
        """Write one block of a level; the summary tells what was written."""
        self._permit.renew()
        task = self._plan.task(stage, index)
        with noting() as notes:
            if task.level == 0:
                self._write(task, self._read_planes(task))
            else:
                self._reduce(task)
        return TaskSummary(wrote=wrote(self._plan, notes))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, task: ImportTask, values: NDArray[Any]) -> None:
        self._permit.require()
        volume_of(self._plan, task).write(task.box, values)

    def _read_planes(self, task: ImportTask) -> NDArray[Any]:
        box = task.box
        _, rows, columns = box.slices
        values = np.empty(box.shape, task.image.image.dtype)
        for number, z in enumerate(range(box.start[0], box.stop[0])):
            file, place = self._find(task, z)
            plane = file.read_plane(*place, rows, columns)
            if plane.shape != box.shape[1:]:
                raise SourceError(f"{task}: plane {z} has {plane.shape}, not {box.shape[1:]}")
            values[number] = plane
        return values

    def _find(self, task: ImportTask, z: int) -> tuple[ImageFile, tuple[int, int, int]]:
        """Return the file of a plane, and the plane's timepoint, channel and number in it."""
        for part in task.image.parts:
            place = part.place(task.t, task.c, z)
            if place is not None:
                return self._open(part.file), place
        raise AssertionError(f"{task}: no file has plane {z}")

    def _open(self, number: int) -> ImageFile:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        source = self._plan.files[number]
        require_same_file(source)
        self._files[number] = open_file(Path(source.path), str(source.series), self._plan.axes)
        if len(self._files) > _MAX_OPEN_FILES:
            _, oldest = self._files.popitem(last=False)
            oldest.close()
        return self._files[number]

    def _reduce(self, task: ImportTask) -> None:
        """Compute a block of a coarser level, one write unit at a time."""
        step = task.image.step(task.level)
        below = replace(volume_of(self._plan, task, task.level - 1), is_whole=True)
        units = BlockGrid(step.coarse_shape, task.image.layout(task.level).write_unit)
        for position in units.iter_overlapping(task.box):
            box = units.core(position) & task.box
            is_ids = task.image.image.kind == "label image"
            values = reduce_box(below, box, step, by_mode=is_ids)
            self._permit.require()
            volume_of(self._plan, task).write(box, values)


def volume_of(plan: ImportPlan, task: ImportTask, level: int | None = None) -> Volume:
    """Return the volume that a task writes; with a ``level``, another level of it."""
    chosen = task.level if level is None else level
    where = plan.target / task.image.path
    volume = Volume.of(where, task.image.image, level=chosen, t=task.t, c=task.c)
    return volume
