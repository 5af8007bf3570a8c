"""The record of a run is damaged, lost, or cannot be read for a moment: no task is lost."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megaseg_dask.errors import MegasegError, TargetError
from megaseg_dask.events import Event, Progress, Result, Started
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import journal
from megaseg_dask.run.job_array import join_run, read_plan
from megaseg_dask.run.status import status
from megaseg_dask.stores.arrays import clear_array_cache
from megaseg_dask.tools.report.write import write_report
from tests.fixtures.disk import Disk, read_tree, write_tree
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (20, 20, 60)
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "absent": lambda whole: None,
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "of another version": lambda whole: b"{}",
}


class Run:
    """A small run of two blocks, in this process."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        self.target = self.folder / "out.zarr"
        self.record = self.folder / "out.zarr.run/megaseg"
        self.n_before = -1
        self._bundle = bundle
        write_image(self.folder / "image.zarr", blobs(SHAPE), chunks=(20, 20, 20))

    def go(self, stop_in: str = "", **options) -> Result:
        """Run, as a new process would; perhaps until a stage begins."""
        clear_array_cache()

        def listen(event: Event) -> None:
            if isinstance(event, Started):
                self.n_before = event.n_done
            if isinstance(event, Progress) and event.stage == stop_in:
                raise KeyboardInterrupt

        given = {
            "model": str(self._bundle),
            "engine": "torch",
            "threads": 1,
            "overlap": 0,
            "block": "20,20,30",
            "retries": 0,
            **options,
        }
        settings = parse_settings(given)
        return segment_here(
            str(self.folder / "image.zarr"), str(self.target), settings, emit=listen
        )

    def end(self) -> str:
        """Run, and return how it ended."""
        try:
            return self.go().status
        except MegasegError as error:
            return str(error)

    def stop_in(self, stage: str) -> int:
        """Run until a stage begins; return how many tasks are done."""
        with pytest.raises(KeyboardInterrupt):
            self.go(stop_in=stage)
        return self.n_done

    @property
    def n_done(self) -> int:
        (run,) = status(str(self.target))
        return sum(done for done, _ in run.stages.values())

    def damage_plan(self, damage: Callable[[bytes], bytes | None]) -> None:
        path = self.record / "plan.json"
        data = damage(path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)


@pytest.fixture
def run(tmp_path, tiny_bundle) -> Run:
    return Run(tmp_path, tiny_bundle)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_lost_plan_is_known_again_by_its_target_and_its_journal(damage, run):
    n_done = run.stop_in("label")
    assert n_done
    run.damage_plan(damage)
    assert run.go().status == "done"
    assert run.n_before == n_done
    n_done = run.n_done
    run.damage_plan(damage)
    assert run.go().already_done
    # It is recorded again.
    assert run.n_done == n_done


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_its_plan_the_target_of_another_run_stays_until_overwritten(damage, run):
    run.stop_in("label")
    run.damage_plan(damage)
    before = read_tree(run.target)
    with pytest.raises(TargetError, match="--overwrite"):
        run.go(threshold=0.4)
    assert read_tree(run.target) == before
    assert run.go(threshold=0.4, overwrite=True).status == "done"
    assert run.go(threshold=0.4).already_done


NEED_THE_PLAN = {
    "status": status,
    "report": write_report,
    "join": lambda target: join_run(target, "megaseg"),
    "task": lambda target: read_plan(target, "megaseg"),
}


@pytest.mark.parametrize("command", NEED_THE_PLAN.values(), ids=NEED_THE_PLAN)
@pytest.mark.parametrize("damage", ["absent", "empty"])
def test_a_command_that_needs_the_plan_says_what_writes_it_anew(damage, command, run):
    run.stop_in("segment")
    run.damage_plan(DAMAGES[damage])
    with pytest.raises(
        TargetError,
        match=r"plan\.json (is damaged|does not exist any more).* run the same megaseg segment",
    ):
        command(str(run.target))


def interrupt_in_label(run: Run) -> tuple[dict[str, bytes], int, dict[str, bytes]]:
    """Return the target of a calm run; tasks done, and files left, by one that is interrupted."""
    run.go()
    calm = read_tree(run.target)
    for path in (run.target, run.record.parent):
        shutil.rmtree(path)
    n_done = run.stop_in("label")
    return calm, n_done, read_tree(run.folder)


def fail_reads_of_a_resumed_run(run: Run, n_trials: int) -> None:
    """Let one read of a resumed run fail, time and again.

    Whatever fails, no finished task is forgotten, and the next run ends as if nothing had been.
    """
    calm, n_done, before = interrupt_in_label(run)
    disk = Disk(run.folder)
    with disk.failing():
        run.go()
    n_reads = disk.n_reads
    for fail_at in random.Random(17).sample(range(n_reads), n_trials):
        shutil.rmtree(run.folder)
        write_tree(run.folder, before)
        with disk.failing(fail_at):
            end = run.end()
        assert end in ("done", "failed") or "Stale file handle" in end
        assert run.go().status == "done"
        assert run.n_before in (-1, n_done) or run.n_before > n_done, fail_at
        assert read_tree(run.target) == calm, fail_at


def test_a_read_that_fails_once_loses_no_finished_task(run):
    fail_reads_of_a_resumed_run(run, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_read_that_fails_loses_a_finished_task(run):
    fail_reads_of_a_resumed_run(run, 60)


def damage_journals_of_a_resumed_run(run: Run, n_trials: int) -> None:
    """Damage one record of an interrupted run, time and again; the next run ends as a calm one."""
    calm, n_done, before = interrupt_in_label(run)
    segments = [name for name in before if "/journal/" in name]
    assert len(segments) > 2
    rng = random.Random(25)
    for trial in range(n_trials):
        name = rng.choice(segments)
        whole = before[name]
        at = rng.randrange(len(whole))
        damaged = {
            "lost": None,
            "cut": whole[:at],
            "zeros": whole[:at].ljust(len(whole), b"\0"),
            "a byte": whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :],
            "not UTF-8": whole[:at] + b"\xff\xfe" + whole[at:],
            "of another": before[rng.choice(segments)],
            "twice": whole + whole,
            "huge": whole + b" " * 10_000_000,
        }
        kind = rng.choice(list(damaged))
        shutil.rmtree(run.folder)
        write_tree(run.folder, {**before, name: damaged[kind] or b""})
        if damaged[kind] is None:
            (run.folder / name).unlink()
        assert run.n_done <= n_done
        assert run.go().status == "done", (trial, kind)
        assert read_tree(run.target) == calm, (trial, kind)
        assert run.go().already_done, (trial, kind)


@pytest.fixture
def many_records(monkeypatch):
    monkeypatch.setattr(journal, "_MIN_SEGMENT_S", 0.0)


def test_a_damaged_record_is_done_again(run, many_records, cheap_engine):
    damage_journals_of_a_resumed_run(run, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_damaged_record_is_done_again(run, many_records, cheap_engine):
    damage_journals_of_a_resumed_run(run, 100)
