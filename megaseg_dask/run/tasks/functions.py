"""The functions of the stages, found by the names under which stages declare them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from megaseg_dask.plan.plan import Output
from megaseg_dask.plan.stages import PlannedStage, Stage
from megaseg_dask.run.state import OutputState, TaskSummary
from megaseg_dask.run.workspace import Workspace


def run_on_volume(
    workspace: Workspace, stage: PlannedStage, volume: int, number: int
) -> TaskSummary:
    """Run the task of a stage on all outputs of a volume; ``number`` is its block or part."""
    if stage.declared.per == "volume":
        summary: TaskSummary = function_of(stage.declared)(workspace, volume, number)
        return summary
    outputs = workspace.plan.outputs_of(volume)
    states = [run_on_output(workspace, stage, output, number) for output in outputs]
    return TaskSummary(by_output=tuple(states))


def run_on_output(
    workspace: Workspace, stage: PlannedStage, output: Output, number: int
) -> OutputState:
    """Run the task of a stage on one output of a volume."""
    function = function_of(stage.declared)
    if stage.level:
        state: OutputState = function(workspace, output, number, stage.level)
    else:
        state = function(workspace, output, number)
    return state


def function_of(stage: Stage) -> Callable[..., Any]:
    """Return the function that a stage declares."""
    module, _, name = stage.function.partition(".")
    function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
    return function
