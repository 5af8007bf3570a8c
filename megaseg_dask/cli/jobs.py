"""Commands on a run that was begun or recorded: single tasks of it, its end, and how it stands."""

import json
from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_result, print_status, print_tasks, reporter
from megaseg_dask.cli.exit_codes import PENDING, Json, exit_codes
from megaseg_dask.cli.options import STORE, open_stores, with_settings

Begun = Annotated[
    str, typer.Argument(metavar="TARGET", help="Target of a run that was begun or recorded.")
]
Name = Annotated[str, typer.Option(metavar="NAME", help="Which of the runs on TARGET.")]
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


@with_settings(*STORE)
def task(
    target: Begun,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="Stage, as megaseg status lists them.")
    ],
    indices: Indices = None,
    *,
    share: Share = None,
    label_name: Name = "megaseg",
    json_: Json = False,
    **options: Any,
) -> None:
    """Run single tasks of a plan in this process, without a cluster: for job arrays, and to look at what fails.

    Any number of processes may run tasks of one stage at the same time. What is done is not done again.

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
        wanted = choose_indices(plan.stage(stage), indices or (), share)
        with reporter(json_, quiet=False) as emit:
            ran = run_tasks(plan, stage, wanted, emit)
        n_done, code = ran.n_before + ran.n_done, int(ran.n_before + ran.n_done < len(wanted))
        if json_:
            ended = {
                "status": "failed" if code else "done",
                "n_done": n_done,
                "n_before": ran.n_before,
            }
            typer.echo(json.dumps({"event": "result", **ended, "exit_code": code}))
        else:
            print_tasks(stage, len(wanted), ran)
        raise typer.Exit(code)


@with_settings(*STORE)
def join(
    target: Begun, *, label_name: Name = "megaseg", json_: Json = False, **options: Any
) -> None:
    """Finish what megaseg task did: join the blocks, and publish the image; exit code 3 if tasks are pending.

    It runs what is left of the quick stages (seams, join, table, cutoff) by itself. Blocks that failed are missing
    in the image, are named, and make the exit code 1: run megaseg plan … --record again to mend them.

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
            raise typer.Exit(_show(target, label_name, json_))
        if not json_:
            print_result(
                result,
                False,
                (),
                "Run the same megaseg plan … --record, the tasks that failed and what follows,",
            )
        raise typer.Exit(result.exit_code)


@with_settings(*STORE)
def status(
    target: Begun,
    *,
    label_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only the runs of this name. (default: all)")
    ] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show what is done, pending and failed: exit code 0 if all is done, 1 after failures, 3 if work is pending.

    \b
    Examples:
      megaseg status segmented.zarr
      megaseg status s3://results/plate.zarr --json
    """
    with exit_codes(json_):
        open_stores(options, target)
        raise typer.Exit(_show(target, label_name, json_))


def _show(target: str, label_name: str | None, json_: bool) -> int:
    """Print how the runs on a target stand, and return the exit code that says so."""
    from megaseg_dask.run.runner import status as run_status

    found = run_status(target, label_name)
    for run in found:
        if json_:
            typer.echo(json.dumps(run.to_json()))
        else:
            print_status(run, target)
    worst = max((run.exit_code for run in found), key=[0, PENDING, 1].index)
    if json_:
        states = {0: "done", PENDING: "pending", 1: "failed"}
        typer.echo(json.dumps({"event": "result", "status": states[worst], "exit_code": worst}))
    return worst
