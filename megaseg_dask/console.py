"""What a person reads: progress on a terminal, plain lines elsewhere, summaries at the end.

Results go to stdout, all else to stderr. Nothing here knows how a run works;
it is told by events.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer

from megaseg_dask.events import Event

_MOST_FAILURES = 10


@contextlib.contextmanager
def reporter(as_json: bool, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events: JSON lines, a progress bar on a terminal, or plain lines."""
    if as_json:
        yield lambda event: typer.echo(json.dumps(event.as_dict()))
    elif quiet:
        yield lambda event: None
    elif sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def show(event: Event) -> None:
            fields: dict[str, Any] = event.as_dict()
            match event.kind:
                case "started":
                    progress.console.print(_started_line(fields))
                case "progress":
                    stage = str(fields["stage"])
                    if stage not in bars:
                        bars[stage] = progress.add_task(stage, total=fields["n_tasks"], rate="")
                    done = {"completed": fields["n_done"], "total": fields["n_tasks"]}
                    progress.update(bars[stage], **done, rate=_rate(fields))
                case "notice":
                    progress.console.print(fields["text"], markup=False, highlight=False)
                case "fetching":
                    model = str(fields["model"])
                    if model not in bars:
                        bars[model] = progress.add_task(model, total=round(fields["total_bytes"] / 1e6, 1), rate="")
                    progress.update(bars[model], completed=round(fields["n_bytes"] / 1e6, 1), rate=_speed(fields))
                case "epoch":
                    progress.console.print(_epoch_line(fields))
                case "failure":
                    progress.console.print(_failure_line(fields), markup=False, highlight=False)

        yield show


def _lines(every_s: float = 5.0) -> Callable[[Event], None]:
    """Return a printer of plain lines, one per stage and every few seconds."""
    last: dict[str, float] = {}

    def show(event: Event) -> None:
        fields: dict[str, Any] = event.as_dict()
        match event.kind:
            case "started":
                typer.echo(_started_line(fields), err=True)
            case "notice":
                typer.echo(fields["text"], err=True)
            case "epoch":
                typer.echo(_epoch_line(fields), err=True)
            case "failure":
                typer.echo(_failure_line(fields), err=True)
            case "fetching":
                model, now = str(fields["model"]), time.monotonic()
                complete = fields["n_bytes"] == fields["total_bytes"]
                if model not in last or complete or now - last[model] > every_s:
                    last[model] = now
                    received = f"{size_text(fields['n_bytes'])} of {size_text(fields['total_bytes'])}"
                    typer.echo(f"fetching {model} from {fields['source']}: {received}", err=True)
            case "progress":
                stage, now = str(fields["stage"]), time.monotonic()
                complete = fields["n_done"] == fields["n_tasks"]
                if complete or now - last.setdefault(stage, now) > every_s:
                    last[stage] = now
                    left = "" if complete else f", about {fields['left_s']:.0f} s left"
                    line = f"{stage}: {fields['n_done']}/{fields['n_tasks']} tasks, {fields['elapsed_s']:.1f} s"
                    typer.echo(f"{line}, {_rate(fields)}{left}", err=True)

    return show


def _rate(fields: dict[str, Any]) -> str:
    rate = float(fields["voxels_per_s"])
    return f"{rate / 1e6:.3g} Mvoxel/s" if rate else ""


def _speed(fields: dict[str, Any]) -> str:
    return f"MB, {float(fields['bytes_per_s']) / 1e6:.3g} MB/s"


def _started_line(fields: dict[str, Any]) -> str:
    resumed = f", {fields['n_done']} of them done before" if fields["n_done"] else ""
    n = fields["n_tasks"]
    return f"{n} {'task' if n == 1 else 'tasks'}{resumed}; dashboard {fields['dashboard']}"


def _epoch_line(fields: dict[str, Any]) -> str:
    training, validation = (
        "not a number" if fields[key] is None else f"{fields[key]:.4f}" for key in ("training_loss", "validation_loss")
    )
    best = "the best so far" if fields["best_epoch"] == fields["epoch"] else f"best was epoch {fields['best_epoch']}"
    epoch = f"epoch {fields['epoch']} ({fields['epoch'] + 1} of {fields['max_epochs']})"
    return f"{epoch}: loss {training}, validation {validation}, {best}"


def _failure_line(fields: dict[str, Any]) -> str:
    return f"FAILED {fields['stage']} {fields['volume']} box {fields['box']}: {fields['error']}"


def print_result(result: Any, quiet: bool) -> None:
    """Say how a run ended: what was written, or what failed and what to do."""
    if n := len(result.failures):
        typer.echo(f"megaseg: {n} {'task' if n == 1 else 'tasks'} failed; what is finished is kept in {result.run}",
                   err=True)  # fmt: skip
        # Otherwise they were shown when they happened.
        for failure in result.failures[: _MOST_FAILURES if quiet else 0]:
            typer.echo(_failure_line(failure), err=True)
        typer.echo(f"Run the same command again once the cause is mended; megaseg status {result.target} lists what "
                   "failed.", err=True)  # fmt: skip
        return
    for warning in result.warnings:
        typer.echo(f"megaseg: warning: {warning}", err=True)
    objects = "" if result.n_objects is None else f"{result.n_objects} objects in "
    if result.already_done:
        typer.echo(f"{objects}{result.target}: already done, nothing to do")
        return
    typer.echo(f"{objects}{result.target} after {result.wall_s:.1f} s")
    if not quiet and result.peak_bytes:
        stage, peak = max(result.peak_bytes.items(), key=lambda item: item[1])
        typer.echo(f"most memory of a worker: {peak / 1e9:.2f} GB in stage {stage}", err=True)


def print_training(trained: Any) -> None:
    """Say how a training ended, and how to use what it made."""
    reasons = {"patience": "the validation loss did not improve any more", "max_time": "the time was over"}
    why = reasons.get(trained.stopped, "all epochs were done")
    print_rows({
        "bundle": trained.bundle + ("  (already done)" if trained.already_done else ""),
        "best": f"epoch {trained.best_epoch}, validation loss {trained.best_loss:.4f}",
        "stopped": f"after {trained.n_epochs} epochs and {_duration(trained.wall_s)}: {why}",
        "next": f"megaseg segment SOURCE TARGET --model {trained.bundle}",
    })  # fmt: skip


def print_tasks(stage: str, n: int, failures: list[Any]) -> None:
    """Say how single tasks ended; what looks like a bug with its traceback."""
    typer.echo(f"{stage}: {n - len(failures)} of {n} {'task' if n == 1 else 'tasks'} done")
    for failure in failures:
        if failure.details:
            typer.echo(failure.details, err=True)


def print_status(run: Any) -> None:
    """Print how a run stands, one row a stage, then its failures."""
    typer.echo(f"{run.label_name}: {'done' if run.done else 'failed' if run.failures else 'not finished'}")
    print_rows({f"  {stage}": f"{n} of {total} tasks" for stage, (n, total) in run.stages.items()}, 16)
    for failure in run.failures[:_MOST_FAILURES]:
        typer.echo(_failure_line(failure))
    if not run.done and all(n == total for n, total in run.stages.values()):
        typer.echo("All tasks are done; the same segment command publishes what they wrote.")
    elif not run.done:
        typer.echo("Run the same segment command again to go on.")


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
                 + (f"; {size_text(summary['bytes_intermediate'])} of intermediate data for each volume"
                    if summary["bytes_intermediate"] else ""),
        "memory": f"{size_text(summary['memory_bytes'])} per worker; projected GB: {peaks}",
        "time": f"about {_duration(summary['projected_s'])} of one worker like this machine, "
                f"{summary['patch_s']:.2g} s a patch" if summary["projected_s"] is not None else "cannot be told here: "
                f"{summary['time_unknown']}",
        "tasks": tasks + (f"  ({summary['tasks_done']} done)" if summary["tasks_done"] else ""),
        "fingerprint": summary["fingerprint"][:16],
    }  # fmt: skip
    print_rows(rows)


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
        "next": f"megaseg evaluate {demo.target} {demo.source}",
    }  # fmt: skip
    print_rows(rows)


def print_evaluation(evaluation: Any, *, csv: bool) -> None:
    """Print the scores, one a line, then one line per IoU threshold; or both as CSV."""
    fields = evaluation.as_dict()
    matchings = fields.pop("matchings")
    if csv:
        typer.echo(",".join(["iou_threshold", *list(matchings[0])[1:], *fields]))
        for matching in matchings:
            typer.echo(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in
                                [*matching.values(), *fields.values()]))  # fmt: skip
        return
    print_rows({name.replace("_", " "): f"{v:.4f}" if isinstance(v, float) else v for name, v in fields.items()}, 24)
    typer.echo(f"\n{'IoU':>6} {'TP':>7} {'FP':>7} {'FN':>7} {'AP':>8}")
    for m in matchings:
        counts = f"{m['true_positives']:>7} {m['false_positives']:>7} {m['false_negatives']:>7}"
        typer.echo(f"{m['threshold']:>6.2f} {counts} {m['average_precision']:>8.4f}")


def print_findings(findings: list[Any], *, as_json: bool) -> None:
    """Print what doctor found; advice stands below what it is about."""
    if as_json:
        listed = [{"name": f.name, "found": f.found, "advice": f.advice} for f in findings]
        typer.echo(json.dumps({"event": "result", "status": "done", "findings": listed}))
        return
    for finding in findings:
        print_rows({finding.name: finding.found}, 20)
        if finding.advice:
            print_rows({"": f"→ {finding.advice}"}, 20)


def print_rows(rows: dict[str, Any], width: int = 12) -> None:
    """Print one line a row: a name, and what is found under it."""
    for name, text in rows.items():
        typer.echo(f"{name:<{width}} {text}")


def _shape(values: Any) -> str:
    return ",".join(map(str, values))


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds > 90 else f"{seconds:.0f} s"


def size_text(n: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
