"""What a run says.

Few lines for a long night, bars on a terminal, colours only where they are wanted.
"""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megaseg_dask.events import Failure, Following, Notice, PatchProgress, Progress, Started
from megaseg_dask.messages import (
    Narrator,
    duration,
    install_command,
    patches_line,
    progress_line,
    size_text,
)


def progress(
    n_done: int, *, n_tasks: int = 100, n_failed: int = 0, stage: str = "segment"
) -> Progress:
    return Progress(stage, n_done, n_tasks, 20.0, 3.1e6, 80.0, n_failed, "blocks", 1.5)


def test_a_line_has_speeds_failures_and_the_time_left():
    line = progress_line(progress(20, n_failed=2))
    assert (
        line == "predicting blocks: 20/100 tasks, 20.0 s, 1.5 blocks/s, 3.1 Mvoxel/s, 2 failed, "
        "about 80 s left"
    )
    # What failed does not come any more.
    assert "left" not in progress_line(progress(98, n_failed=2))


def test_a_block_in_work_has_its_patches_and_the_time_left():
    assert patches_line(PatchProgress("volume", 3, 12, left_s=90.0)) == (
        "segmenting volumes: 3 of 12 patches, about 90 s left"
    )
    assert patches_line(PatchProgress("segment", 1, 1, 2)) == "predicting blocks: 1 of 1 patch"


def test_twelve_hours_are_some_hundred_lines():
    """Ten stages at once, an event of each every fifth of a second."""
    now = [0.0]
    narrator, n, n_first_hour = Narrator(clock=lambda: now[0]), 0, 0
    for second in range(12 * 3600):
        for stage in range(10):
            now[0] = second + stage / 10
            n += len(narrator.lines(progress(1, stage=f"stage-{stage}")))
        n_first_hour += n if second == 3599 else 0
    assert 100 < n < 400
    assert n_first_hour > n / 4


def test_the_end_of_a_stage_is_always_told():
    narrator = Narrator(min_pause_s=1e9)
    assert narrator.lines(progress(0)) == []
    assert narrator.lines(progress(98, n_failed=1)) == []
    assert len(narrator.lines(progress(98, n_failed=2))) == 1


def test_a_run_that_follows_tells_at_its_end_how_each_stage_ended():
    narrator = Narrator(min_pause_s=1e9)
    beat = Following("live.zarr", n_there=3, n_done=2, n_announced=3)
    assert narrator.lines(beat) == ["3 of 3 timepoints are there, 2 are done"]
    # A stage ends again and again.
    assert narrator.lines(progress(2, n_tasks=2)) == []
    assert narrator.lines(progress(3, n_tasks=3)) == []
    stage, last = narrator.lines(replace(beat, n_done=3, is_over=True))
    assert stage.startswith("predicting blocks: 3/3 tasks")
    assert last == "3 of 3 timepoints are there, 3 are done; the run waits for no more"


@pytest.mark.parametrize(
    "event", [Failure("segment", 1, "A/1/0", "0:1", "why"), Notice("a worker was lost")]
)
def test_of_thousands_of_failures_the_first_are_told(event):
    narrator = Narrator()
    lines = [line for _ in range(1000) for line in narrator.lines(event)]
    assert len(lines) < 60
    assert "further" in lines[-1]


def test_a_scheduler_without_a_dashboard_has_none():
    assert Narrator().lines(Started("out.zarr", 5, 2)) == ["5 tasks, 2 of them done before"]
    of_plate = Started("out.zarr", 5, 0, channels=["1 (dna)"], fields=["A/1/0", "A/1/1"])
    assert Narrator().lines(of_plate) == ["5 tasks; 2 fields A/1/0, A/1/1; channel 1 (dna)"]


def test_words():
    assert [duration(s) for s in (5, 89, 200, 7300)] == ["5 s", "89 s", "3 min", "2 h 2 min"]
    assert [size_text(n) for n in (12, 1234, 5.5e9, 2e12)] == ["12 B", "1.23 kB", "5.5 GB", "2 TB"]


def test_the_command_that_installs_an_extra_names_packages_that_an_index_has():
    assert install_command("jobqueue") == "pip install 'dask-jobqueue>=0.9'"
    assert install_command("demo").count(">=") > 1
    assert "megaseg-dask" not in install_command("view")


SCRIPT = """
from megaseg_dask.cli.console import reporter
from megaseg_dask.events import Failure, Progress
with reporter({json}, {quiet}) as emit:
    for n in range(4):
        emit(Progress("segment", n, 4, 2.0, 3e6, 1.0, 1 if n else 0, "blocks", 2.0))
    emit(Failure("segment", 3, "the image", "0:1", "[red]not markup[/red]"))
"""


INTERRUPTED = """
import os, signal
from megaseg_dask.cli import app
from megaseg_dask.cli.console import reporter
from megaseg_dask.events import Progress, Step
app._catch_signals()
try:
    with reporter({json}, {quiet}) as emit:
        emit(Step("reading the image"))
        emit(Progress("segment", 1, 4, 2.0, 3e6, 1.0, 0, "blocks", 2.0))
        os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
"""


def shown(
    *,
    terminal: bool,
    json: bool = False,
    quiet: bool = False,
    script: str = SCRIPT,
    **environment: str,
) -> tuple[str, str]:
    """What a process writes to stdout, and to stderr: a pipe or a real terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "160", "TERM": "xterm-256color", **environment}
    with subprocess.Popen(
        [sys.executable, "-c", script.format(json=json, quiet=quiet)],
        stdout=subprocess.PIPE,
        stderr=slave if terminal else subprocess.PIPE,
        env=environment,
        # Tests in the background may have been started with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        os.close(slave)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0
        if terminal:
            err = read_all(master)
    os.close(master)
    return out.decode(), (err or b"").decode()


def read_all(master: int) -> bytes:
    """What a terminal got.

    One that nobody writes to any more is at its end, which Linux calls an error.
    """
    found = b""
    with contextlib.suppress(OSError):
        while part := os.read(master, 2**16):
            found += part
    return found


def test_a_terminal_gets_bars():
    out, err = shown(terminal=True)
    assert out == ""
    assert "━" in err
    assert "2 blocks/s · 3 Mvoxel/s" in err
    assert "1 failed" in err
    assert "[red]not markup[/red]" in err
    assert "\x1b[3" in err


STEP = """
from megaseg_dask.cli.console import reporter
from megaseg_dask.events import Step
with reporter({json}, {quiet}) as emit:
    emit(Step("reading the image"))
    import time
    time.sleep(0.3)
"""


def test_a_step_is_a_spinner_on_a_terminal_and_nothing_elsewhere():
    _, err = shown(terminal=True, script=STEP)
    assert "reading the image" in err
    last_line = err.replace("\r", "\n").splitlines()[-1]
    assert "reading" not in last_line, "it is removed at the end"
    for other in ({"terminal": False}, {"terminal": True, "json": True}):
        assert shown(script=STEP, **other) == ("", "")


def test_an_interrupt_never_prints_into_a_live_bar():
    _, err = shown(terminal=True, script=INTERRUPTED)
    before, told, after = err.partition("megaseg: stopping; press Ctrl-C again to quit now")
    assert told
    assert re.sub(r"\x1b\[\S*?[a-zA-Z]", "", before).endswith("\n")
    assert "predicting" not in after


def test_a_narrow_terminal_keeps_the_numbers():
    _, err = shown(terminal=True, COLUMNS="60")
    assert "4/4" in err or "3/4" in err
    assert "1 failed" in err
    assert "Mvoxel" not in err


def test_no_color_is_bars_without_colours():
    _, err = shown(terminal=True, NO_COLOR="1")
    assert "━" in err
    assert "\x1b[3" not in err


@pytest.mark.parametrize("asked", [{"terminal": False}, {"terminal": True, "TERM": "dumb"}])
def test_elsewhere_lines_without_any_escape(asked):
    _, err = shown(**asked)
    assert "\x1b" not in err
    assert "FAILED predicting blocks, the image, box 0:1: [red]not markup[/red]" in err
    assert "predicting blocks: 3/4 tasks" in err


def test_for_scripts_and_in_silence():
    out, err = shown(terminal=True, json=True)
    assert err == ""
    assert out.count('"event": "progress"') == 4
    assert shown(terminal=True, quiet=True) == ("", "")
