"""Commands on a recorded run: ``task`` runs single tasks of it, ``join`` its end, ``status``."""

import json
from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_result, print_status, print_tasks, reporter
from megaseg_dask.cli.exit_codes import FAILED, PENDING, Json, echo, echo_result, exit_codes
from megaseg_dask.cli.options import open_stores

Recorded = Annotated[
    str, typer.Argument(metavar="TARGET", help="Target of a run that was begun or recorded.")
]
StageName = Annotated[
    str, typer.Argument(metavar="STAGE", help="Stage, as megaseg status lists them.")
]
Indices = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INDEX]…",
        help="Tasks of that stage: 7, or 0-99. (default: all)",
        show_default=False,
    ),
]
Share = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="The I-th of N equal shares of them, from 1/N to N/N."),
]
LabelName = Annotated[str, typer.Option(metavar="NAME", help="Which of the runs on TARGET.")]
OnlyLabelName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only the runs of this name. (default: all)")
]

_RETRY_TASKS = "Run the same megaseg plan … --record, the failed tasks, and the stages after them"


def task(
    target: Recorded,
    stage: StageName,
    indices: Indices = None,
    *,
    share: Share = None,
    label_name: LabelName = "megaseg",
    json_: Json = False,
    **options: Any,
) -> None:
    """Run single tasks of a plan in this process, without a cluster.

    It is for job arrays, and to look at a task that fails. Any number of processes may run tasks
    of one stage at the same time. What is done is not done again.

    \b
    Examples: record the plan, run the stages in their order, then join what they did:
      megaseg plan cells.zarr out.zarr --record
      megaseg task out.zarr segment --share 3/10      # in the third of ten jobs
      megaseg task out.zarr label 0-99
      megaseg join out.zarr
    """
    with exit_codes(json_):
        from megaseg_dask.run.job_array import choose_indices, read_plan, run_tasks

        open_stores(options, None)
        plan = read_plan(target, label_name)
        chosen = choose_indices(plan.stage(stage), indices or (), share)
        with reporter(json_, quiet=False) as emit:
            ran = run_tasks(plan, stage, chosen, emit)
        n_done = ran.n_before + ran.n_done
        is_failed = n_done < len(chosen)
        if json_:
            counts = {"n_done": n_done, "n_before": ran.n_before, "exit_code": int(is_failed)}
            echo_result(counts, "failed" if is_failed else "done")
        else:
            print_tasks(stage, len(chosen), ran)
        raise typer.Exit(int(is_failed))


def join(
    target: Recorded, *, label_name: LabelName = "megaseg", json_: Json = False, **options: Any
) -> None:
    """Finish what megaseg task did: join the blocks, and publish the image.

    It runs what is left of the quick stages (seams, join, table, cutoff) by itself. Exit code 3:
    tasks of other stages are pending. Exit code 1: blocks failed; they are named, and missing in
    the image. Run megaseg plan … --record again to fix them.

    \b
    Example:
      megaseg join out.zarr
    """
    with exit_codes(json_):
        from megaseg_dask.run.job_array import join_run

        open_stores(options, None)
        with reporter(json_, quiet=False) as emit:
            result = join_run(target, label_name, emit)
        if result is None:
            raise typer.Exit(_show_status(target, label_name, json_))
        if not json_:
            print_result(result, (), how_to_retry=_RETRY_TASKS)
        raise typer.Exit(result.exit_code)


def status(
    target: Recorded, *, label_name: OnlyLabelName = None, json_: Json = False, **options: Any
) -> None:
    """Show what is done, pending and failed.

    Exit code 0 if all is done, 1 after failures, 3 if work is pending.

    \b
    Examples:
      megaseg status segmented.zarr
      megaseg status s3://results/plate.zarr --json
    """
    with exit_codes(json_):
        open_stores(options, target)
        raise typer.Exit(_show_status(target, label_name, json_))


def _show_status(target: str, label_name: str | None, as_json: bool) -> int:
    """Print the state of the runs on a target, and return the worst of their exit codes."""
    from megaseg_dask.run.status import status as status_of

    runs = status_of(target, label_name)
    for run in runs:
        if as_json:
            echo(json.dumps(run.to_json()))
        else:
            print_status(run, target)
    from_best_to_worst = [0, PENDING, FAILED]
    worst = max((run.exit_code for run in runs), key=from_best_to_worst.index)
    if as_json:
        states = {0: "done", PENDING: "pending", FAILED: "failed"}
        echo_result({"exit_code": worst}, states[worst])
    return worst
