"""What a person reads: progress on a terminal, plain lines elsewhere, summaries at the end.

Results go to stdout, all else to stderr. Nothing here knows how a run works;
it is told by events.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import typer

from megaseg_dask.events import Event, Fetching
from megaseg_dask.events import Progress as StageProgress
from megaseg_dask.messages import (
    Narrator,
    duration,
    failed_text,
    failure_line,
    left_text,
    rates,
    size_text,
)

_MOST_FAILURES = 10
# Width of a progress bar.
_BAR = 12


@contextlib.contextmanager
def reporter(as_json: bool, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events: JSON lines, progress bars on a terminal, or plain lines."""
    if as_json:
        yield lambda event: typer.echo(json.dumps(event.to_json()))
    elif quiet:
        yield lambda event: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars() as show:
            yield show
    else:
        narrator = Narrator()

        def tell(event: Event) -> None:
            for line in narrator.lines(event):
                typer.echo(line, err=True)

        yield tell


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[Event], None]]:
    """Show a bar for each stage; rich draws without colours where ``NO_COLOR`` asks for it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<13}"),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
    )
    narrator = Narrator()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def draw(name: str, n: float, total: float, *words: str) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total, rate="")
            # What a narrow terminal has no room for is left out, the last words first.
            room = progress.console.width - len(f"{name:<13}{total}/{total}0:00:00") - _BAR - 5
            rate = ""
            for longer in accumulate(
                filter(None, words), lambda before, word: f"{before} · {word}"
            ):
                rate = longer if len(longer) <= room else rate
            progress.update(bars[name], completed=n, total=total, rate=rate)

        def show(event: Event) -> None:
            match event:
                case StageProgress():
                    words = left_text(event), failed_text(event), *rates(event)
                    draw(event.stage, event.n_done, event.n_tasks, *words)
                case Fetching():
                    received = round(event.n_bytes / 1e6, 1)
                    total = round(event.total_bytes / 1e6, 1)
                    draw(event.model, received, total, f"MB, {event.bytes_per_s / 1e6:.3g} MB/s")
                case _:
                    for line in narrator.lines(event):
                        progress.console.print(line, markup=False, highlight=False)

        yield show


def print_result(
    result: Any,
    quiet: bool,
    following: Sequence[tuple[str, str]],
    again: str = "Run the same command again",
) -> None:
    """Say how a run ended: what was written, or what failed and how to go on; and the next commands."""
    if n := len(result.failures):
        typer.echo(
            f"megaseg: {n} {'task' if n == 1 else 'tasks'} failed; what is finished is kept in {result.run}",
            err=True,
        )
        # Otherwise they were shown when they happened.
        for failure in result.failures[: _MOST_FAILURES if quiet else 0]:
            typer.echo(failure_line(failure), err=True)
        typer.echo(f"{again} once the cause is mended: it tries just what failed.", err=True)
    else:
        for warning in result.warnings:
            typer.echo(f"megaseg: warning: {warning}", err=True)
        objects = "" if result.n_objects is None else f"{result.n_objects} objects in "
        how = (
            ": already done, nothing to do"
            if result.already_done
            else f" after {result.wall_s:.1f} s"
        )
        typer.echo(f"{objects}{result.target}{how}")
    if quiet:
        return
    if result.peak_bytes:
        stage, peak = max(result.peak_bytes.items(), key=lambda item: item[1])
        print_rows(
            {"memory": f"at most {peak / 1e9:.2f} GB of a worker, in stage {stage}"}, err=True
        )
    if result.log:
        print_rows({"log": result.log}, err=True)
    for number, (command, why) in enumerate(following):
        print_rows({"" if number else "next": f"{command}    # {why}"}, err=True)


def print_training(trained: Any) -> None:
    """Say how a training ended, and how to use what it made."""
    reasons = {
        "patience": "the validation loss did not improve any more",
        "max_time": "the time was over",
    }
    why = reasons.get(trained.stopped, "all epochs were done")
    print_rows(
        {
            "bundle": trained.bundle + ("  (already done)" if trained.already_done else ""),
            "best": f"epoch {trained.best_epoch}, validation loss {trained.best_loss:.4f}",
            "stopped": f"after {trained.n_epochs} epochs and {duration(trained.wall_s)}: {why}",
            "next": f"megaseg segment SOURCE TARGET --model {trained.bundle}",
        }
    )


def print_tasks(stage: str, n: int, ran: Any) -> None:
    """Say how single tasks ended; what looks like a bug with its traceback."""
    before = f", {ran.n_before} of them before" if ran.n_before else ""
    typer.echo(
        f"{stage}: {ran.n_before + ran.n_done} of {n} {'task' if n == 1 else 'tasks'} done{before}"
    )
    for failure in ran.failures:
        if failure.details:
            typer.echo(failure.details, err=True)


def print_status(run: Any, target: str) -> None:
    """Print how a run on a target stands, one row a stage, then its failures."""
    typer.echo(
        f"{run.label_name}: {'done' if run.done else 'failed' if run.failures else 'not finished'}"
    )
    print_rows(
        {f"  {stage}": f"{n} of {total} tasks" for stage, (n, total) in run.stages.items()}, 16
    )
    for failure in run.failures[:_MOST_FAILURES]:
        typer.echo(failure_line(failure))
    pending = [stage for stage, (n, total) in run.stages.items() if n < total]
    if not run.done and not pending:
        typer.echo(
            "All tasks are done; megaseg join, or the same segment command, publishes what they wrote."
        )
    elif not run.done:
        typer.echo("Run the same segment command again, or its tasks, to go on:")
        named = "" if run.label_name == "megaseg" else f" --label-name {run.label_name}"
        typer.echo(f"  megaseg task {target} {pending[0]}{named}")


def print_plan(summary: dict[str, Any]) -> None:
    """Print a plan's summary, one row a subject."""
    engine, model = summary["engine"], summary["model"]
    peaks = ", ".join(f"{stage} {n / 1e9:.2f}" for stage, n in summary["projected_bytes"].items())
    tasks = " → ".join(f"{stage} {n}" for stage, n in summary["stages"].items())
    cheapest = summary["auto_patch_voxels_per_voxel"]
    saving = f" ({cheapest} with --patch auto, {_shape(summary['auto_patch_shape'])})"
    saving = saving if cheapest < summary["patch_voxels_per_voxel"] else ""
    rows = {
        "source": f"{summary['source']}  ({summary['volumes']} × {_shape(summary['volume_shape'])}"
        f" {summary['dtype']})",
        "target": summary["target"],
        "model": f"{model['name']}  ({model['parameters']:,} parameters, digest {model['digest'][:12]})",
        "engine": f"{engine['engine']} {engine['precision']} on {engine['device']}, {engine['threads']} threads, "
        f"batch {engine['batch']}{', each patch mirrored 8 times' if engine['tta'] else ''}",
        "patches": f"{summary['patches']} of {_shape(summary['patch_shape'])} per volume, overlap "
        f"{_shape(summary['overlap'])}: {summary['patch_voxels_per_voxel']} voxels predicted per voxel"
        + saving,
        "blocks": f"{summary['blocks']} of {_shape(summary['block_shape'])} per volume, redundancy "
        f"{summary['redundancy']}",
        "bytes": f"{size_text(summary['bytes_read'])} read ({summary['read_amplification']} times the volume), "
        f"{size_text(summary['bytes_written'])} written before compression, labels {summary['label_dtype']}"
        + (
            f"; {size_text(summary['bytes_intermediate'])} of intermediate data for each volume"
            if summary["bytes_intermediate"]
            else ""
        ),
        "memory": f"{size_text(summary['memory_bytes'])} per worker; projected GB: {peaks}",
        "time": f"about {duration(summary['projected_s'])} of one worker like this machine, "
        f"{summary['patch_s']:.2g} s a patch"
        if summary["projected_s"] is not None
        else f"cannot be told here: {summary['time_unknown']}",
        "tasks": tasks + (f"  ({summary['tasks_done']} done)" if summary["tasks_done"] else ""),
        "fingerprint": summary["fingerprint"][:16],
    }
    missing = [
        f"{path}: {reason}; the run will go on without it, and end as failed"
        for path, reason in summary["missing"].items()
    ]
    print_rows(rows)
    for number, text in enumerate(missing[:_MOST_FAILURES]):
        print_rows({"" if number else "missing": text})


def print_demo(demo: Any) -> None:
    """Say what the demo made, how good it is, and what to do next."""
    scores, result = demo.evaluation, demo.result
    took = "done before" if result.already_done else f"{result.wall_s:.1f} s"
    rows = {
        "source": demo.source,
        "segmented": f"{demo.target}  ({took})",
        "objects": f"{scores.n_predicted} found, {scores.n_true} in the labels of the sample",
        "Dice": f"{scores.dice:.3f} of the foreground",
        "matched": f"{scores.matchings[0].true_positives} objects at IoU 0.5, panoptic quality "
        f"{scores.panoptic_quality:.3f}",
        "look at": demo.picture,
        "next": f"megaseg view {demo.target}    # in a browser",
        "": f"megaseg report {demo.target}    # quality control",
    }
    print_rows(rows)


def print_evaluation(evaluation: Any, *, csv: bool) -> None:
    """Print the scores, one a line, then one line per IoU threshold; or both as CSV."""
    fields = evaluation.as_dict()
    matchings = fields.pop("matchings")
    if csv:
        typer.echo(",".join(["iou_threshold", *list(matchings[0])[1:], *fields]))
        for matching in matchings:
            typer.echo(
                ",".join(
                    f"{v:.6g}" if isinstance(v, float) else str(v)
                    for v in [*matching.values(), *fields.values()]
                )
            )
        return
    print_rows(
        {
            name.replace("_", " "): f"{v:.4f}" if isinstance(v, float) else v
            for name, v in fields.items()
        },
        24,
    )
    typer.echo(f"\n{'IoU':>6} {'TP':>7} {'FP':>7} {'FN':>7} {'AP':>8}")
    for m in matchings:
        counts = f"{m['true_positives']:>7} {m['false_positives']:>7} {m['false_negatives']:>7}"
        typer.echo(f"{m['threshold']:>6.2f} {counts} {m['average_precision']:>8.4f}")


def print_findings(findings: Iterable[Any], *, as_json: bool) -> bool:
    """Print what doctor found, as it is found, advice below what it is about; tell whether something is fatal."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            # An address has a line of its own.
            if len(finding.name) > 20:
                typer.echo(finding.name)
            print_rows({"" if len(finding.name) > 20 else finding.name: finding.found}, 20)
            if finding.advice:
                print_rows({"": f"→ {finding.advice}"}, 20)
    fatal = any(finding.is_fatal for finding in found)
    if as_json:
        listed = [{"name": f.name, "found": f.found, "advice": f.advice} for f in found]
        typer.echo(
            json.dumps(
                {
                    "event": "result",
                    "status": "failed" if fatal else "done",
                    "findings": listed,
                    "exit_code": int(fatal),
                }
            )
        )
    return fatal


def print_rows(rows: dict[str, Any], width: int = 12, *, err: bool = False) -> None:
    """Print one line a row: a name, and what is found under it."""
    for name, text in rows.items():
        typer.echo(f"{name:<{width}} {text}", err=err)


def _shape(values: Any) -> str:
    return ",".join(map(str, values))
