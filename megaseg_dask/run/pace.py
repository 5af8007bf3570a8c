"""How a stage gets on: what was done before this run, what since, and how fast."""

import math
import time
from dataclasses import dataclass, field

from megaseg_dask.events import Progress
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.stages import PlannedStage


@dataclass
class Pace:
    """Counts the tasks of a stage; ``voxels`` and ``units`` are those of a task, on average."""

    stage: str
    n_done: int
    n_tasks: int
    voxels: float
    unit: str
    units: float
    n_failed: int = 0
    began: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.n_before = self.n_done

    @classmethod
    def of(cls, plan: Plan, stage: PlannedStage, n_done: int) -> "Pace":
        """Begin to count a stage of a plan."""
        voxels = len(plan.volumes) * math.prod(plan.volume_shape) / stage.n_tasks
        if plan.grid(stage) is not None:
            return cls(stage.name, n_done, stage.n_tasks, voxels, "blocks", 1.0)
        # A field of a plate is a volume for each timepoint and channel.
        n_images = len({volume.image for volume in plan.volumes})
        unit, units = ("fields", n_images / len(plan.volumes)) if plan.plate else ("volumes", 1.0)
        return cls(stage.name, n_done, stage.n_tasks, voxels, unit, units)

    @property
    def n_ended(self) -> int:
        """Tasks that are finished or failed."""
        return self.n_done + self.n_failed

    def progress(self) -> Progress:
        """Return the event that tells it now."""
        self.shown = time.monotonic()
        elapsed_s, n = self.shown - self.began, self.n_done - self.n_before
        per_s = n / elapsed_s if elapsed_s else 0.0
        left_s = (self.n_tasks - self.n_ended) / per_s if per_s else None
        return Progress(
            self.stage,
            self.n_done,
            self.n_tasks,
            round(elapsed_s, 3),
            per_s * self.voxels,
            left_s,
            self.n_failed,
            self.unit,
            per_s * self.units,
        )
