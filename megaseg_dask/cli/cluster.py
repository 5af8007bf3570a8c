"""The commands about clusters: ``megaseg cluster check``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaseg_dask.cli.console import print_rows, reporter
from megaseg_dask.cli.exit_codes import Json, echo_result, exit_codes
from megaseg_dask.cli.options import given, settings_of
from megaseg_dask.events import Joined
from megaseg_dask.messages import count, size_text

if TYPE_CHECKING:
    from megaseg_dask.tools.doctor.cluster import ClusterReport


def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE.yaml", help="Cluster file, as for --cluster.")
    ],
    *,
    target: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Folder that both the workers and this machine can reach, as for TARGET.",
        ),
    ] = ".",
    json_: Json = False,
    **options: Any,
) -> None:
    """Start one worker from a cluster file, run one block on it, and show what the worker has.

    The block is part of a small simulated image, and is segmented by the starter model. All files
    are removed at the end.

    \b
    Examples:
      megaseg cluster check slurm.yaml
      megaseg cluster check kubernetes.yaml --target s3://results/
    """
    with exit_codes(json_):
        settings_of(options)
        from megaseg_dask.tools.doctor.cluster import check_cluster

        with reporter(json_, quiet=False) as emit:
            checked = check_cluster(file, target, given(options), emit)
        if json_:
            echo_result({"exit_code": 0, **checked.to_json()})
        else:
            _print_check(checked)


def _print_check(checked: "ClusterReport") -> None:
    for worker in checked.workers:
        _print_worker(worker)
    result = checked.result
    block = "none"
    if result:
        block = f"{result.wall_s} s, {count(result.n_objects or 0, 'object')}"
    rows = {
        "block": f"{block}, written to and read from {checked.target}",
        "versions": "compatible",
        "dashboard": checked.dashboard,
    }
    print_rows(rows)


def _print_worker(worker: Joined) -> None:
    memory = size_text(worker.memory_limit) if worker.memory_limit else "no limit"
    rows = {
        "worker": f"{worker.name} on {worker.host} ({worker.address})",
        "it has": f"{worker.cores} cores, memory limit {memory}",
    }
    if worker.uuid:
        rows["GPU"] = f"{worker.device}, {worker.uuid}"
    print_rows(rows)
