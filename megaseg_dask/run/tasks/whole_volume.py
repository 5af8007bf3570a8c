"""A volume of one block: all its stages in one task, over a workspace in memory.

The stages are those of a larger volume, so the arithmetic is the same. The
source is read once, and each output is written once.
"""

from dataclasses import replace

from megaseg_dask.plan.plan import Output
from megaseg_dask.plan.stages import PlannedStage
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.tasks.functions import run_on_output, run_on_volume
from megaseg_dask.run.tasks.statistics import describe_volume
from megaseg_dask.run.workspace import MemoryWorkspace, Workspace

# Intermediate arrays that no stage after these reads.
_LAST_READ = {
    "threshold": ("logits",),
    "fill": ("unfilled", "holes"),
    "relabel": ("fragments",),
}


def segment_volume(workspace: Workspace, volume: int, _: int) -> TaskSummary:
    """Run all stages of one volume."""
    return _VolumeTask(workspace, volume).run()


class _VolumeTask:
    """The stages of one volume, and what they tell each other."""

    def __init__(self, workspace: Workspace, volume: int) -> None:
        self._plan = workspace.plan
        self._volume = volume
        self._workspace = MemoryWorkspace(workspace)
        self._summary = TaskSummary()
        self._by_output = [OutputState() for _ in self._plan.outputs_of(volume)]

    def run(self) -> TaskSummary:
        stages = self._plan.staged
        if self._plan.measure_level is None:
            # The settings give the statistics.
            self._summary = TaskSummary(statistics=describe_volume(self._plan, ()))
            self._update_state()
        for stage in stages:
            if stage.declared.per == "volume":
                self._run_on_volume(stage)
        # One output after the other: only one has its intermediate arrays in memory.
        for output in self._plan.outputs_of(self._volume):
            for stage in stages:
                if stage.declared.per == "output":
                    self._run_on_output(stage, output)
            self._workspace.forget(output)
        return replace(self._summary, by_output=tuple(self._by_output))

    def _run_on_volume(self, stage: PlannedStage) -> None:
        """Run a stage, and add up the summaries of its tasks."""
        summaries = [
            run_on_volume(self._workspace, stage, self._volume, number)
            for number in range(stage.per_volume)
        ]
        if "statistics" in stage.declared.tells:
            statistics = describe_volume(self._plan, summaries)
            self._summary = replace(self._summary, statistics=statistics)
        n_absent = self._summary.absent + sum(summary.absent for summary in summaries)
        n_inner = self._summary.absent_inner + sum(each.absent_inner for each in summaries)
        last = summaries[-1]
        self._summary = replace(
            self._summary,
            absent=n_absent,
            absent_inner=n_inner,
            batch=last.batch,
            repeated=last.repeated,
        )
        if last.by_output:
            self._by_output = list(last.by_output)
        self._update_state()

    def _run_on_output(self, stage: PlannedStage, output: Output) -> None:
        for number in range(stage.per_volume):
            told = run_on_output(self._workspace, stage, output, number)
            known = self._by_output[output.number]
            self._by_output[output.number] = known.updated(told)
        for kind in _LAST_READ.get(stage.name, ()):
            self._workspace.drop(kind, output)
        self._update_state()

    def _update_state(self) -> None:
        state = VolumeState(
            outputs=self._plan.arrays,
            statistics=self._summary.statistics,
            by_output=tuple(self._by_output),
        )
        self._workspace.set_state(state)
