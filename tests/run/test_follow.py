"""``--follow``: the result is that of one run on the finished source, and valid at every moment.

The writer takes a step wherever the follower would wait: no clock, no process, each interleaving
the same in each run.
"""

from collections.abc import Iterator

import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import follow
from tests.fixtures.runs import segment_here
from tests.fixtures.writers import LiveImage, LivePlate, files_of, first_difference

OPTIONS = {
    "channel": "dna",
    "threads": 1,
    "overlap": 0,
    "patch": "16,32,32",
    "outputs": "labels,scores,measurements",
    "settle": 0,
    "threshold": 0.9,
}


@pytest.fixture
def run(tiny_bundle, cheap_engine):
    def call(source, target, emit=lambda _: None, **options):
        settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, **options})
        return segment_here(str(source), str(target), settings, emit=emit)

    return call


@pytest.fixture
def at_each_look(monkeypatch):
    """Let a writer take a step wherever the follower waits."""

    def use(steps: Iterator[str]) -> list[str]:
        taken = []

        def pause(self, look_s=0.0):
            step = next(steps, None)
            if step is None:
                # Nothing more will happen: no wait is needed to see that.
                self._timeout_s = 0.0
            else:
                taken.append(step)

        monkeypatch.setattr(follow._Watch, "pause", pause)
        return taken

    return use


def require_as_one_run(run, source, target, **options):
    """Compare a target with that of one run on the finished source, byte for byte."""
    expected = target.with_name("expected.zarr")
    assert run(source, expected, settle=None, **options).status == "done"
    assert not first_difference(files_of(target), files_of(expected))
    tables = [path.with_name(f"{path.name}.measurements.parquet") for path in (target, expected)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.parametrize("style", ["append", "full"])
def test_a_series_that_is_followed_is_as_one_run(style, run, at_each_look, tmp_path):
    source = tmp_path / "live.zarr"
    at_each_look(LiveImage(source, style, 3).steps_of())
    result = run(source, tmp_path / "out.zarr", follow=True)
    assert (result.status, result.warnings) == ("done", [])
    require_as_one_run(run, source, tmp_path / "out.zarr")
