"""The stages of a run, each declared once: what it computes, over what, and what its absence costs.

A new stage is one entry of :data:`STAGES` and one function below
``megaseg_dask.run.tasks``. The planner, the projection of memory, the schedule,
job arrays, workers and the report read what they need from here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megaseg_dask.errors import SettingsError
from megaseg_dask.plan import memory
from megaseg_dask.plan.memory import Sizes
from megaseg_dask.plan.resolved import Resolved

# The blocks of the finest level; parts of the source that are measured; a volume as a whole; or
# the blocks of each coarser level.
Over = Literal["blocks", "parts", "volume", "levels"]
# Its own block alone; the mask, the labels or the table of the volume; or all of the volume.
Loss = Literal["block", "mask", "labels", "table", "volume"]
# What the summaries of a stage's tasks tell of their volume.
Fact = Literal["statistics", "scores", "threshold", "objects"]


def _always(_: Resolved) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Stage:
    """What is known of a stage before any plan.

    ``function`` is ``module.function`` below ``megaseg_dask.run.tasks``. It is called
    with a workspace, a volume or an :class:`~megaseg_dask.plan.plan.Output`, and the number
    of the block, part or volume; over levels also with the level.
    """

    name: str
    function: str
    over: Over
    # Whether a task is about one output of the network, or all of them at once.
    per: Literal["volume", "output"] = "output"
    when: Callable[[Resolved], bool] = _always
    # Without a function it takes less than the stage before it.
    memory: Callable[[Sizes], int] | None = None
    # Whether its memory counts also where it is left out: the block then does not depend on that.
    is_reserved: bool = False
    # A local stage reads only the same block of stages before it: a block that was computed again
    # redoes nothing of its neighbors.
    local: bool = False
    # What it has to know of the whole volume: it is told nothing else.
    needs: tuple[Fact, ...] = ()
    # What is missing if a task fails for good.
    loss: Loss = "block"
    # Milliseconds a block, or one task a volume: a process that joins a run finishes these stages.
    quick: bool = False
    # Arrays that it reads or writes, and their dtypes; in the run folder if they are no output.
    arrays: Mapping[str, str] = field(default_factory=dict, hash=False)
    tells: tuple[Fact, ...] = ()


# All stages of a volume that is one block, in memory.
WHOLE_VOLUME = Stage(
    "volume",
    "whole_volume.segment_volume",
    over="volume",
    per="volume",
    memory=memory.whole_volume_bytes,
    loss="volume",
    tells=("statistics", "scores", "threshold", "objects"),
)

# The same where scores are read: nothing of the source is measured.
WHOLE_VOLUME_AGAIN = replace(WHOLE_VOLUME, tells=("scores", "threshold", "objects"))

# The stages of a volume of several blocks, in order.
STAGES = (
    Stage(
        "measure",
        "statistics.measure_block",
        over="parts",
        per="volume",
        when=Resolved.measures_voxels,
        memory=memory.measure_bytes,
        is_reserved=True,
        # Without statistics nothing of a volume can be predicted.
        loss="volume",
        tells=("statistics",),
    ),
    Stage(
        "pool",
        "statistics.require_group",
        over="volume",
        per="volume",
        when=Resolved.pools_statistics,
        needs=("statistics",),
        # As without its own: the statistics are those of the whole group.
        loss="volume",
        quick=True,
    ),
    Stage(
        "segment",
        "scores.segment_block",
        over="blocks",
        per="volume",
        when=Resolved.predicts,
        memory=memory.segment_bytes,
        needs=("statistics",),
        tells=("scores",),
    ),
    Stage(
        "reread",
        "relabelling.read_block",
        over="blocks",
        per="volume",
        when=Resolved.rereads,
        memory=memory.reread_bytes,
        tells=("scores",),
    ),
    Stage(
        "histogram",
        "thresholds.tabulate_block",
        over="blocks",
        when=Resolved.finds_threshold,
        memory=memory.histogram_bytes,
        local=True,
        needs=("scores",),
        arrays={"logits": "float32"},
    ),
    Stage(
        "cutoff",
        "thresholds.find_cutoff",
        over="volume",
        when=Resolved.finds_threshold,
        memory=memory.cutoff_bytes,
        needs=("scores",),
        loss="mask",
        quick=True,
        tells=("threshold",),
    ),
    Stage(
        "threshold",
        "thresholds.threshold_block",
        over="blocks",
        when=Resolved.finds_threshold,
        memory=memory.threshold_bytes,
        local=True,
        needs=("threshold",),
    ),
    Stage(
        "holes",
        "components.label_holes",
        over="blocks",
        when=Resolved.fills_holes,
        memory=memory.holes_bytes,
        local=True,
        arrays={"unfilled": "uint8", "holes": "uint32"},
    ),
    Stage(
        "holes-seams",
        "components.pair_seams_of_holes",
        over="blocks",
        when=Resolved.fills_holes,
        loss="mask",
        quick=True,
    ),
    Stage(
        "holes-join",
        "components.join_holes",
        over="volume",
        when=Resolved.fills_holes,
        loss="mask",
        quick=True,
    ),
    Stage(
        "fill",
        "components.fill_block",
        over="blocks",
        when=Resolved.fills_holes,
        memory=memory.fill_bytes,
    ),
    Stage(
        "label",
        "components.label_block",
        over="blocks",
        when=Resolved.writes_labels,
        memory=memory.label_bytes,
        is_reserved=True,
        local=True,
        arrays={"mask": "uint8", "fragments": "uint32"},
    ),
    Stage(
        "seams",
        "components.pair_seams",
        over="blocks",
        when=Resolved.writes_labels,
        memory=memory.seams_bytes,
        is_reserved=True,
        loss="labels",
        quick=True,
    ),
    Stage(
        "join",
        "components.join_objects",
        over="volume",
        when=Resolved.writes_labels,
        memory=memory.joining_bytes,
        is_reserved=True,
        loss="labels",
        quick=True,
        tells=("objects",),
    ),
    Stage(
        "split",
        "splitting.split_objects",
        over="blocks",
        when=Resolved.splits_objects,
        memory=memory.split_bytes,
        # An object may lie in many blocks.
        loss="labels",
    ),
    Stage(
        "rank",
        "splitting.rank_objects",
        over="volume",
        when=Resolved.splits_objects,
        memory=memory.rank_bytes,
        loss="labels",
        quick=True,
        tells=("objects",),
    ),
    Stage(
        "relabel",
        "components.relabel_block",
        over="blocks",
        when=Resolved.writes_labels,
        memory=memory.relabel_bytes,
        is_reserved=True,
    ),
    Stage(
        "measurements",
        "measurements.measure_objects",
        over="blocks",
        when=Resolved.measures_objects,
        memory=memory.measurements_bytes,
        is_reserved=True,
        loss="table",
    ),
    Stage(
        "table",
        "measurements.collect_objects",
        over="volume",
        when=Resolved.measures_objects,
        memory=memory.table_bytes,
        is_reserved=True,
        loss="table",
        quick=True,
    ),
    Stage(
        "downsample",
        "pyramids.downsample_block",
        over="levels",
        memory=memory.downsample_bytes,
        is_reserved=True,
    ),
)


def declared(name: str) -> Stage:
    """Return the stage of a name.

    Raises:
        SettingsError: If there is none.
    """
    for stage in (WHOLE_VOLUME, *STAGES):
        if stage.name == name:
            return stage
    raise SettingsError(f"no stage {name}")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of one plan.

    Its tasks may run in any order as soon as the stages before it are done for their volume.
    ``level`` is the level of the pyramid whose blocks it computes. It is 0 except for stages
    over levels.
    """

    declared: Stage
    n_tasks: int
    per_volume: int
    level: int = 0

    @property
    def name(self) -> str:
        """The name that people and the journal use."""
        return f"{self.declared.name}-{self.level}" if self.level else self.declared.name

    def depends_on(self, stage: "PlannedStage") -> bool:
        """Return whether tasks that are done change if tasks of an earlier stage run again.

        A local stage reads its own block alone, which was not there before.
        """
        needed = set(self.declared.needs)
        return not self.declared.local or not needed.isdisjoint(stage.declared.tells)

    @property
    def loses_block(self) -> bool:
        """Whether a failed task leaves a hole of one block in all later stages."""
        return self.declared.over == "blocks" and self.declared.loss == "block"

    @property
    def skips_missing(self) -> bool:
        """Whether it has nothing to do where a block is missing."""
        return self.declared.over == "blocks"


def project(sizes: Sizes, resolved: Resolved, *, is_one_block: bool) -> dict[str, int]:
    """Return the peak bytes of one task of each stage, beside those of an idle worker."""
    chosen = (WHOLE_VOLUME,) if is_one_block else STAGES
    return {
        stage.name: stage.memory(sizes)
        for stage in chosen
        if stage.memory and (stage.is_reserved or stage.when(resolved))
    }
