"""Output for people: progress on a terminal, plain lines elsewhere, summaries at the end.

Results go to stdout, all else to stderr. Nothing here knows how a run works;
it is told by events.
"""

import contextlib
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megaseg_dask.cli.exit_codes import echo, echo_result, warn
from megaseg_dask.events import (
    Event,
    Fetching,
    Following,
    PatchProgress,
    Progress,
    Result,
    RunStatus,
    Step,
    Trained,
)
from megaseg_dask.messages import (
    Narrator,
    count,
    doubt_line,
    duration,
    failed_text,
    failure_line,
    first_few,
    following_line,
    left_text,
    patches_text,
    rates,
    size_text,
    stage_phrase,
    subject_text,
)

if TYPE_CHECKING:
    import rich.live
    import rich.progress

    from megaseg_dask.run.job_array import Ran
    from megaseg_dask.tools.demo import Demo
    from megaseg_dask.tools.doctor.address import Finding
    from megaseg_dask.tools.tracking import Tracking

_MAX_FAILURES = 10
_BAR_WIDTH = 8
_NAME_WIDTH = 29
_RUN_AGAIN = "Fix the cause and run the same command again"
RETRY_TASKS = "run the same megaseg plan … --record, the failed tasks, and the stages after them"

# The display on the terminal, if there is one.
_LIVE: "list[rich.live.Live]" = []

# -- events


@contextlib.contextmanager
def reporter(as_json: bool, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events: JSON lines, bars on a terminal, or plain lines."""
    if as_json:
        yield _print_json
    elif quiet:
        yield lambda event: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _progress_display() as bars:

            def show(event: Event) -> None:
                # A terminal that is gone stops no run.
                with contextlib.suppress(OSError):
                    bars.show(event)

            yield show
    else:
        narrator = Narrator()

        def print_lines(event: Event) -> None:
            for line in narrator.lines(event):
                echo(line, err=True)

        yield print_lines


def _print_json(event: Event) -> None:
    if isinstance(event, Step):
        return
    import json

    echo(json.dumps(event.to_json()))


@contextlib.contextmanager
def _progress_display() -> Iterator["_Bars"]:
    """Yield bars on the terminal, which have no colors where ``NO_COLOR`` is set."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Display

    columns = (
        TextColumn(f"{{task.description:<{_NAME_WIDTH}}}"),
        BarColumn(_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
    )
    console = Console(stderr=True)
    display = Display(*columns, console=console)
    steps = Display(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    live = Live(Group(steps, display), console=console)
    bars = _Bars(steps, display)
    live.start()
    _LIVE.append(live)
    try:
        yield bars
    finally:
        _LIVE.remove(live)
        with contextlib.suppress(OSError):
            bars.end_step()
            live.stop()


def stop_display() -> None:
    """Leave the bars as they are, so that a line can follow them; for handlers of signals."""
    for live in _LIVE:
        live.stop()


class _Bars:
    """A bar for each stage and each download; other events as lines above them.

    Before the first task there is a spinner with the current step.
    """

    def __init__(self, steps: "rich.progress.Progress", display: "rich.progress.Progress") -> None:
        self._steps = steps
        self._step = steps.add_task("", total=None, visible=False)
        self._display = display
        self._narrator = Narrator()
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._stages: dict[str, Progress] = {}

    def show(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Step():
                self._steps.update(self._step, description=event.text, visible=True)
            case Progress():
                self.end_step()
                words = [left_text(event), failed_text(event), *rates(event)]
                self._draw(stage_phrase(event.stage), event.n_done, event.n_tasks, words)
                self._stages[event.stage] = event
            case PatchProgress():
                # A task counts as far as its patches are predicted.
                stage = self._stages[event.stage]
                share = event.n_predicted / event.n_patches * event.n_blocks
                words = [patches_text(event), left_text(event)]
                self._draw(stage_phrase(event.stage), stage.n_done + share, stage.n_tasks, words)
            case Following():
                self._steps.update(self._step, description=following_line(event), visible=True)
            case Fetching():
                received = round(event.n_bytes / 1e6, 1)
                total = round(event.total_bytes / 1e6, 1)
                words = [f"MB, {event.bytes_per_s / 1e6:.3g} MB/s"]
                self._draw(event.model, received, total, words)
            case _:
                for line in self._narrator.lines(event):
                    self._display.console.print(line, markup=False, highlight=False)

    def end_step(self) -> None:
        """Hide the spinner."""
        self._steps.update(self._step, visible=False)

    def _draw(self, name: str, n_done: float, total: float, words: Sequence[str]) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._display.add_task(name, total=total, rate="")
        before_words = f"{name:<{_NAME_WIDTH}}{total}/{total}0:00:00"
        room = self._display.console.width - len(before_words) - _BAR_WIDTH - 5
        rate = _fitting(words, room)
        self._display.update(self._tasks[name], completed=n_done, total=total, rate=rate)


def _fitting(words: Sequence[str], room: int) -> str:
    """Return the words that a narrow terminal has room for."""
    text = ""
    for word in filter(None, words):
        longer = f"{text} · {word}" if text else word
        if len(longer) > room:
            continue
        text = longer
    return text


# -- the end of a command


def print_result(
    result: Result,
    following: Sequence[tuple[str, str]],
    *,
    quiet: bool = False,
    failures_were_shown: bool = True,
    how_to_retry: str = _RUN_AGAIN,
) -> None:
    """Print what was written, or what failed and how to continue; then ``following`` commands.

    Failures are shown when they happen, unless the command is quiet or another process had them.
    """
    for warning in result.warnings:
        warn(warning)
    for doubt in result.doubts:
        echo(f"megaseg: doubt: {doubt_line(doubt)}", err=True)
    if result.failures:
        are_left = quiet or not failures_were_shown
        _print_failures(result, _MAX_FAILURES if are_left else 0, how_to_retry)
    else:
        _print_success(result)
    if quiet:
        return
    if result.peak_bytes:
        stage = max(result.peak_bytes, key=result.peak_bytes.__getitem__)
        peak = size_text(result.peak_bytes[stage])
        if result.device_peak_bytes:
            of_gpu = size_text(max(result.device_peak_bytes.values()))
            print_rows({"GPU memory": f"at most {of_gpu} of one"}, err=True)
        print_rows({"memory": f"peak {peak} in one worker, while {stage_phrase(stage)}"}, err=True)
    if result.log:
        print_rows({"log": result.log}, err=True)
    name = "next"
    for command, purpose in following:
        print_rows({name: f"{command}    # {purpose}"}, err=True)
        name = ""


def print_tracking(result: "Tracking", *, quiet: bool = False) -> None:
    """Print what was tracked and where it is; warnings, and what failed."""
    for warning in result.warnings:
        warn(warning)
    for failure in result.failures:
        echo(f"megaseg: not tracked: {failure}", err=True)
    if quiet or not result.tracked:
        return
    n_tracks = sum(labels.n_tracks for labels in result.tracked)
    n_objects = sum(labels.objects for labels in result.tracked)
    n_splits = sum(labels.splits for labels in result.tracked)
    n_merges = sum(labels.merges for labels in result.tracked)
    merges = f", {count(n_merges, 'merge')}" if n_merges else ""
    of_images = f" of {len(result.tracked)} label images" if len(result.tracked) > 1 else ""
    echo(
        f"{count(n_tracks, 'track')} of {count(n_objects, 'object')}{of_images}, "
        f"{count(n_splits, 'split')}{merges}"
    )
    first = result.tracked[0]
    more = f" and {len(result.tracked) - 1} more" if len(result.tracked) > 1 else ""
    rows = {
        "max distance": f"{first.max_distance:.3g} {first.unit}",
        "table": result.table,
        "tracks": f"{first.tracks}{more}",
    }
    print_rows(rows, err=True)


def _print_failures(result: Result, n_shown: int, how_to_retry: str) -> None:
    n_failures = count(len(result.failures), "task")
    kept = f"finished tasks are kept in {result.run}"
    echo(f"megaseg: {n_failures} failed; {kept}", err=True)
    for failure in result.failures[:n_shown]:
        echo(failure_line(failure), err=True)
    echo(f"{how_to_retry}; only failed tasks are retried.", err=True)


def _print_success(result: Result) -> None:
    objects = "" if result.n_objects is None else f"{count(result.n_objects, 'object')} in "
    took = f" after {result.wall_s:.1f} s"
    if result.already_done:
        took = ": already done, nothing to do"
    echo(f"{objects}{result.target}{took}")


def print_training(trained: Trained) -> None:
    """Print how a training ended, and how to use its bundle."""
    reasons = {
        "patience": "the validation loss stopped improving",
        "max_time": "the time limit was reached",
    }
    reason = reasons.get(trained.stopped, "all epochs are done")
    before = "  (already done)" if trained.already_done else ""
    rows = {
        "bundle": trained.bundle + before,
        "best": f"epoch {trained.best_epoch}, validation loss {trained.best_loss:.4f}",
        "stopped": f"after {trained.n_epochs} epochs and {duration(trained.wall_s)}: {reason}",
        "next": f"megaseg segment SOURCE TARGET --model {trained.bundle}",
    }
    print_rows(rows)


def print_tasks(stage: str, n_tasks: int, ran: "Ran") -> None:
    """Print how single tasks ended; the traceback of a probable bug."""
    before = f", {ran.n_before} of them before" if ran.n_before else ""
    n_done = ran.n_before + ran.n_done
    echo(f"{stage}: {n_done} of {count(n_tasks, 'task')} done{before}")
    for failure in ran.failures:
        if failure.details:
            echo(failure.details, err=True)


def print_status(
    run: RunStatus, target: str, of_costs: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print the state of a run on a target: a row for each stage, then its failures.

    Between them are the rows ``of_costs``, by their names.
    """
    subject = subject_text(run.fields, run.channels)
    echo(f"{run.label_name}: {_state(run)}" + (f"  ({subject})" if subject else ""))
    for stage, (n_done, n_tasks) in run.stages.items():
        print_rows(
            {f"  {stage}": f"{n_done} of {count(n_tasks, 'task')}, {stage_phrase(stage)}"}, 16
        )
    if run.timepoints is not None:
        counts = run.timepoints
        text = f"{counts['there']} of {counts['announced']} are there, {counts['done']} are done"
        print_rows({"  timepoints": text}, 16)
    print_rows({f"  {name}": text for name, text in of_costs.items()}, 16)
    for failure in run.failures[:_MAX_FAILURES]:
        echo(failure_line(failure))
    if run.exit_code == 0:
        return
    same = f"the same {run.command} command"
    if run.lost:
        echo(f"LOST {run.lost}. Run {same} again; only what is lost is computed again.")
        return
    if run.failures:
        echo(f"Fix the cause and run {same} again; only failed tasks are retried.")
        if run.command == "segment":
            echo(f"In a job array: {RETRY_TASKS}.")
        return
    if run.timepoints is not None:
        echo("To continue with the source, run the same segment command again.")
        return
    pending = [stage for stage, (n_done, n_tasks) in run.stages.items() if n_done < n_tasks]
    if not pending:
        echo(f"All tasks are done. Run megaseg join, or {same}, to publish the result.")
        return
    echo(f"To resume, run {same} again, or its tasks:")
    option = "" if run.label_name == "megaseg" else f" --label-name {run.label_name}"
    echo(f"  megaseg task {shlex.quote(target)} {pending[0]}{option}")


def _state(run: RunStatus) -> str:
    if run.done:
        return "done"
    if run.lost:
        return "not complete any more"
    return "failed" if run.failures else "not finished"


def print_plan(
    summary: Mapping[str, Any], of_costs: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print a plan's summary, a row for each subject; ``of_costs`` are rows by their names."""
    rows = {
        "source": _source_text(summary),
        "target": summary["target"],
        "model": _model_text(summary["model"]),
        "engine": _engine_text(summary["engine"]),
        "voxels": _voxels_text(summary),
        **_groups_row(summary),
        "patches": _patches_text(summary),
        "blocks": f"{summary['blocks']} of {_shape(summary['block_shape'])} per volume, "
        f"redundancy {summary['redundancy']}",
        **_where_rows(summary["where"]),
        **_split_row(summary),
        "bytes": _bytes_text(summary),
        "memory": _memory_text(summary),
        "time": _time_text(summary),
        **of_costs,
        "tasks": _tasks_text(summary),
        "fingerprint": summary["fingerprint"][:16],
    }
    print_rows(rows)
    for warning in summary["warnings"]:
        print_rows({"warning": warning})
    name = "missing"
    for path, reason in list(summary["missing"].items())[:_MAX_FAILURES]:
        print_rows({name: f"{path}: {reason}; the run continues without it and ends as failed"})
        name = ""
    n_more = len(summary["missing"]) - _MAX_FAILURES
    if n_more > 0:
        print_rows({"": f"{n_more} more; --json lists all"})


def _groups_row(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the row about groups of one normalization; none if each volume has its own."""
    groups = summary["groups"]
    if not groups:
        return {}
    kind = summary["options"]["normalization"]
    n_groups = f"1 {kind}" if len(groups) == 1 else f"each {kind}, {len(groups)} in all"
    return {"normalized": f"by all voxels of {n_groups}: {first_few(groups)}"}


def _split_row(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the row about the size of objects that can be split; none if none is."""
    n_voxels = summary["split_voxels"]
    if n_voxels is None:
        return {}
    if n_voxels >= math.prod(n + 2 for n in summary["volume_shape"]):
        return {"split": "objects of any size"}
    side = math.floor(n_voxels ** (1 / 3)) - 2
    return {
        "split": f"objects whose box has up to {n_voxels / 1e6:.3g} Mvoxel, such as "
        f"{_shape((side, side, side))}; larger ones stay whole (more --memory splits them)"
    }


def _source_text(summary: Mapping[str, Any]) -> str:
    volumes = f"{summary['volumes']} × {_shape(summary['volume_shape'])} {summary['dtype']}"
    subject = subject_text(summary["field_paths"], summary["channels"])
    return f"{summary['source']}  ({volumes}, {subject})"


def _model_text(model: Mapping[str, Any]) -> str:
    size = f"{model['parameters']:,} parameters, digest {model['digest'][:12]}"
    return f"{model['name']}  ({size})"


def _engine_text(engine: Mapping[str, Any]) -> str:
    text = (
        f"{engine['engine']} {engine['precision']} on {engine['device']}, "
        f"{count(engine['threads'], 'thread')}, batch {engine['batch']}"
    )
    return f"{text}, each patch mirrored 8 times" if engine["tta"] else text


def _voxels_text(summary: Mapping[str, Any]) -> str:
    from megaseg_dask.plan.voxel_size import size_text, times_text

    size = summary["voxel_size_um"]
    text = size_text(size) if size else "of unknown size"
    model = summary["model_voxel_size_um"]
    if model is None:
        text += "; the model does not say on which it was trained"
    elif size:
        text += f", {times_text(summary['times_model_voxel'])} times the model's"
    else:
        text += f"; the model's are {size_text(model)}"
    if summary["is_resampled"]:
        text += f"; resampled to {_shape(summary['grid_shape'])} voxels for the network"
    return text


def _patches_text(summary: Mapping[str, Any]) -> str:
    redundancy = summary["patch_voxels_per_voxel"]
    cheapest = summary["auto_patch_voxels_per_voxel"]
    text = (
        f"{summary['patches']} of {_shape(summary['patch_shape'])} per volume, "
        f"overlap {_shape(summary['overlap'])}: {redundancy} voxels predicted per voxel"
    )
    if cheapest < redundancy:
        text += f" ({cheapest} with --patch auto, {_shape(summary['auto_patch_shape'])})"
    return text


def _where_rows(where: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the row that says what a mask saves, if there is one."""
    if where is None:
        return {}
    everywhere = where["predictions"] + where["predictions_left_out"]
    text = (
        f"{where['voxels']:.1%} of the voxels; predictions: {where['predictions']} of "
        f"{everywhere}; blocks left out: {where['blocks_left_out']} of {where['blocks']}"
    )
    return {"where": text}


def _bytes_text(summary: Mapping[str, Any]) -> str:
    text = (
        f"{size_text(summary['bytes_read'])} read "
        f"({summary['read_amplification']} times the volume), "
        f"{size_text(summary['bytes_written'])} written before compression, "
        f"labels {summary['label_dtype']}"
    )
    if summary["bytes_intermediate"]:
        text += f"; {size_text(summary['bytes_intermediate'])} of intermediate data for each volume"
    return text


def _memory_text(summary: Mapping[str, Any]) -> str:
    peaks = [
        f"{stage_phrase(stage)} {n / 1e9:.2f}" for stage, n in summary["projected_bytes"].items()
    ]
    return f"{size_text(summary['memory_bytes'])} per worker; projected GB: {', '.join(peaks)}"


def _time_text(summary: Mapping[str, Any]) -> str:
    if summary["projected_s"] is None:
        return f"unknown here:  {summary['time_unknown']}"
    projected = duration(summary["projected_s"])
    return (
        f"about {projected} for one worker like this machine,  {summary['patch_s']:.2g} s a patch"
    )


def _tasks_text(summary: Mapping[str, Any]) -> str:
    text = " → ".join(f"{stage} {n_tasks}" for stage, n_tasks in summary["stages"].items())
    if summary["tasks_done"]:
        text += f"  ({summary['tasks_done']} done)"
    return text


def print_demo(demo: "Demo") -> None:
    """Print what the demo made, its scores, and the next commands."""
    scores = demo.evaluation
    matching = scores.matchings[0]
    megaseg = _program()
    took = "done before" if demo.result.already_done else f"{demo.result.wall_s:.1f} s"
    rows = {
        "source": demo.source,
        "segmented": f"{demo.target}  ({took})",
        "objects": f"{scores.n_predicted} found, {scores.n_true} in the labels of the sample",
        "Dice": f"{scores.dice:.3f} of the foreground",
        "matched": f"{count(matching.true_positives, 'object')} at IoU 0.5, "
        f"panoptic quality {scores.panoptic_quality:.3f}",
        "look at": demo.picture,
        "next": f"{megaseg} view {demo.target}    # in a browser",
        "": f"{megaseg} report {demo.target}    # quality control",
    }
    print_rows(rows)


def _program() -> str:
    """Return what to type for megaseg: its path where it is not on the PATH, as after make demo."""
    program = Path(sys.executable).with_name("megaseg")
    if shutil.which("megaseg") or not program.exists():
        return "megaseg"
    return os.path.relpath(program)


def print_evaluation(evaluation: Mapping[str, Any], *, csv: bool) -> None:
    """Print the scores, one a line, then one line per IoU threshold; or both as CSV."""
    scores = dict(evaluation)
    matchings = scores.pop("matchings")
    if csv:
        # The column is called iou_threshold, and threshold in JSON.
        header = ["iou_threshold", *list(matchings[0])[1:], *scores]
        echo(",".join(header))
        for matching in matchings:
            row = [*matching.values(), *scores.values()]
            echo(",".join(_number(value, ".6g") for value in row))
        return
    for name, value in scores.items():
        print_rows({name.replace("_", " "): _number(value, ".4f")}, 24)
    echo(f"\n{'IoU':>6} {'TP':>7} {'FP':>7} {'FN':>7} {'AP':>8}")
    for threshold, hits, wrong, missed, precision in map(dict.values, matchings):
        echo(f"{threshold:>6.2f} {hits:>7} {wrong:>7} {missed:>7} {precision:>8.4f}")


def _number(value: float, float_format: str) -> str:
    return format(value, float_format) if isinstance(value, float) else str(value)


def print_findings(findings: Iterable["Finding"], *, as_json: bool) -> bool:
    """Print doctor's findings as they come, and return whether one of them is fatal."""
    records = []
    is_fatal = False
    for finding in findings:
        records.append(
            {"name": finding.name, "found": finding.text, "advice": finding.advice},
        )
        is_fatal = is_fatal or finding.is_fatal
        if not as_json:
            _print_finding(finding)
    if as_json:
        status = "failed" if is_fatal else "done"
        echo_result({"findings": records, "exit_code": int(is_fatal)}, status)
    return is_fatal


def _print_finding(finding: "Finding") -> None:
    name = finding.name
    if len(name) > 20:
        # An address gets its own line.
        echo(name)
        name = ""
    print_rows({name: finding.text}, 20)
    if finding.advice:
        print_rows({"": f"→ {finding.advice}"}, 20)


def print_rows(rows: Mapping[str, object], width: int = 12, *, err: bool = False) -> None:
    """Print one line a row: a name, padded to ``width``, and its text."""
    for name, text in rows.items():
        echo(f"{name:<{width}} {text}", err=err)


def _shape(values: Iterable[object]) -> str:
    return ",".join(map(str, values))
