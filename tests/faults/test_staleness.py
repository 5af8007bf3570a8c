"""What was computed in the absence of something is computed again when it is there.

The rules follow from the declarations of the stages. Here they are derived by force: any tasks
fail, in several runs one after the other, and at the end all bytes are those of a run in which
none did.
"""

import random

import pytest

from megaseg_dask.errors import DataError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.stages import STAGES
from megaseg_dask.run.job_array import record_plans
from megaseg_dask.run.tasks import worker
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (16, 32, 96)
OPTIONS = {
    "engine": "torch",
    "threads": 1,
    "block": "16,32,32",
    "overlap": 0,
    "threshold": "otsu",
    "fill_holes": 30,
    "split": "distance",
    "min_size": 3,
    "outputs": "labels,scores,mask,measurements",
}


class Faults:
    """Tasks that fail, in this process."""

    def __init__(self) -> None:
        self.failing: set[tuple[str, int]] = set()

    def run_task(self, workspace, stage, index, original=worker.run_task):
        if (stage, index) in self.failing:
            raise DataError(f"{stage} {index} was made to fail")
        return original(workspace, stage, index)


@pytest.fixture
def faults(monkeypatch):
    faults = Faults()
    monkeypatch.setattr(worker, "run_task", faults.run_task)
    return faults


class Runs:
    """Runs of one small volume, each on a target of its own."""

    def __init__(self, folder, bundle, faults) -> None:
        self._folder = folder
        image = blobs(SHAPE)
        # The range of the logits, and so the bins of their histogram, need all blocks.
        image[:, :, :32] //= 2
        image[:, :, 64:] *= 2
        self._source = write_image(folder / "image.zarr", image)
        self._settings = parse_settings({"model": str(bundle), **OPTIONS})
        self._faults = faults
        [plan] = record_plans(str(self._source), str(folder / "planned.zarr"), self._settings)
        self.tasks = [(s.name, index) for s in plan.stages for index in range(s.n_tasks)]
        self._calm = self.end("calm", [])

    def end(self, name, rounds):
        """Run with the failing tasks of each round, then without any; return what is there."""
        target = self._folder / f"{name}.zarr"
        for failing in rounds:
            self._faults.failing = set(failing)
            segment_here(str(self._source), str(target), self._settings)
        self._faults.failing = set()
        result = segment_here(str(self._source), str(target), self._settings)
        assert result.status == "done", result.failures
        table = target.with_name(f"{target.name}.measurements.parquet")
        return {**contents(target), "table": table.read_bytes()}

    def assert_as_calm(self, name, rounds):
        found = self.end(name, rounds)
        assert found.keys() == self._calm.keys(), rounds
        different = [key for key, data in found.items() if data != self._calm[key]]
        assert not different, (rounds, different)


@pytest.fixture
def runs(tmp_path, tiny_bundle, faults):
    return Runs(tmp_path, tiny_bundle, faults)


# Each of them alone decides the range of all logits, the threshold, or the holes at its seams.
FEW = [
    [[("segment", 0)]],
    [[("segment", 2)]],
    [[("segment", 2), ("histogram", 0)]],
    [[("segment", 2)], [("histogram", 1)]],
    [[("threshold", 1), ("label", 2)]],
]


@pytest.mark.parametrize("rounds", FEW, ids=str)
def test_what_was_computed_without_a_task_is_computed_again(rounds, runs):
    runs.assert_as_calm("out", rounds)


@pytest.mark.slow
def test_each_task_fails_alone(runs):
    for number, task in enumerate(runs.tasks):
        runs.assert_as_calm(f"out{number}", [[task]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_tasks_fail_in_several_runs(seed, runs):
    chance = random.Random(seed)
    for number in range(20):
        n_rounds = chance.randint(1, 3)
        rounds = [chance.sample(runs.tasks, chance.randint(1, 5)) for _ in range(n_rounds)]
        runs.assert_as_calm(f"out{number}", rounds)


def test_a_task_is_told_only_what_its_stage_declares(runs, faults, monkeypatch):
    """A need that is not declared has no rule, so nothing fulfills it."""
    told = {}

    def look(workspace, stage, index, original=worker.run_task):
        volume, _ = workspace.plan.split_index(stage, index)
        told[stage] = workspace.state(volume)
        return original(workspace, stage, index)

    monkeypatch.setattr(worker, "run_task", look)
    runs.end("out", [])
    needs = {stage.name: stage.needs for stage in STAGES}
    for name, state in told.items():
        declared = needs[name.partition("-1")[0]]
        assert bool(state.statistics) == ("statistics" in declared), name
        known = state.output(0)
        assert (known.low is not None) == ("scores" in declared), name
        assert (known.threshold is not None) == ("threshold" in declared), name
