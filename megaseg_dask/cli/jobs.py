"""Commands on a recorded run: ``task`` runs single tasks of it, ``join`` its end, ``status``."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaseg_dask.cli.console import (
    RETRY_TASKS,
    print_result,
    print_status,
    print_tasks,
    reporter,
)
from megaseg_dask.cli.exit_codes import FAILED, PENDING, Json, echo, echo_result, exit_codes
from megaseg_dask.cli.options import open_stores
from megaseg_dask.cli.prices import Price, cost_of, cost_rows, prices_of

if TYPE_CHECKING:
    from megaseg_dask.plan.prices import Prices

Recorded = Annotated[
    str, typer.Argument(metavar="TARGET", help="TARGET of a run that was started or recorded.")
]
StageName = Annotated[
    str, typer.Argument(metavar="STAGE", help="Name of a stage, as in megaseg status.")
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
    typer.Option(
        metavar="I/N", help="Run the I-th of N equal shares of these tasks, from 1/N to N/N."
    ),
]
LabelName = Annotated[str, typer.Option(metavar="NAME", help="Label name of the run.")]
OnlyLabelName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Show only the run with this label name. (default: all)"),
]


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

    Use it in job arrays, or to examine a task that fails. Several processes may run tasks of one
    stage at the same time. A task that is done is not repeated.

    \b
    Examples: record the plan, run the stages in their order, then join their results:
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
    """Finish a run of megaseg task: join the blocks and publish the image.

    It also runs the quick stages that are pending (seams, join, table, cutoff). Exit code 3: tasks
    of other stages are pending. Exit code 1: tasks failed; their blocks are named, and are missing
    in the image. To retry them, run megaseg plan … --record again.

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
            how_to_retry = f"Fix the cause and {RETRY_TASKS}"
            print_result(result, (), failures_were_shown=False, how_to_retry=how_to_retry)
        raise typer.Exit(result.exit_code)


def status(
    target: Recorded,
    *,
    label_name: OnlyLabelName = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also compare the files that finished runs wrote with the files that exist now. "
            "This lists all files of TARGET.",
        ),
    ] = False,
    price: Price = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show which tasks are done, pending or failed, and how many requests and bytes the run needed.

    The command reads the record of the run. After TARGET was moved or copied, use --check to find
    lost files.

    Exit codes: 0 all tasks are done, 1 a task failed, 3 tasks are pending or something is lost.

    \b
    Examples:
      megaseg status segmented.zarr
      megaseg status s3://results/plate.zarr --check --json
      megaseg status s3://results/plate.zarr --price gpu=3.2/h,put=5e-6,get=4e-7
    """
    with exit_codes(json_):
        prices = prices_of(price)
        open_stores(options, target)
        raise typer.Exit(_show_status(target, label_name, json_, prices, checks_outputs=check))


def _show_status(
    target: str,
    label_name: str | None,
    as_json: bool,
    prices: "Prices | None" = None,
    *,
    checks_outputs: bool = False,
) -> int:
    """Print the state of the runs on a target, and return the worst of their exit codes."""
    from megaseg_dask.run.status import status as status_of

    counts_kept = prices is not None and prices.pays_for_keeping
    runs = status_of(target, label_name, checks_outputs=checks_outputs, counts_kept=counts_kept)
    for run in runs:
        if as_json:
            cost = cost_of(run.used, prices) if run.used else None
            echo(json.dumps({**run.to_json(), "cost": cost}))
        else:
            rows = cost_rows(run.used, prices) if run.used else {}
            if checks_outputs and run.done:
                rows["checked"] = "all that the run wrote is there"
            print_status(run, target, rows)
    from_best_to_worst = [0, PENDING, FAILED]
    worst = max((run.exit_code for run in runs), key=from_best_to_worst.index)
    if as_json:
        states = {0: "done", PENDING: "pending", FAILED: "failed"}
        echo_result({"exit_code": worst}, states[worst])
    return worst
