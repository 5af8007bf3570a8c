"""The commands about clusters: ``megaseg cluster check``."""

import json
from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_rows, reporter
from megaseg_dask.cli.exit_codes import Json, exit_codes
from megaseg_dask.cli.options import STORE, settings_of, with_settings
from megaseg_dask.messages import size_text

cluster_app = typer.Typer(
    name="cluster", help="Try where workers run, before a night depends on it."
)


# Of several commands, also while there is one.
@cluster_app.callback()
def _cluster() -> None:
    pass


@cluster_app.command()
@with_settings(*STORE, "engine", "device")
def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE.yaml", help="Cluster file, as --cluster takes it.")
    ],
    *,
    target: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Folder that workers and this machine reach, as that of a TARGET."
        ),
    ] = ".",
    json_: Json = False,
    **options: Any,
) -> None:
    """Start one worker as a cluster file says, run one real block there, and say what it saw.

    The block is of a small simulated volume, by the starter model. Nothing is left behind.

    \b
    Examples:
      megaseg cluster check slurm.yaml
      megaseg cluster check kubernetes.yaml --target s3://results/
    """
    with exit_codes(json_):
        settings_of(options)
        from megaseg_dask.tools.doctor.cluster import check_cluster

        with reporter(json_, quiet=False) as emit:
            seen = check_cluster(
                file, target, {k: v for k, v in options.items() if v not in (None, False)}, emit
            )
        if json_:
            typer.echo(
                json.dumps({"event": "result", "status": "done", "exit_code": 0, **seen.as_dict()})
            )
            return
        for worker in seen.workers:
            memory = size_text(worker.memory_limit) if worker.memory_limit else "no limit"
            gpu = {"GPU": f"{worker.device}, {worker.uuid}"} if worker.uuid else {}
            print_rows(
                {
                    "worker": f"{worker.name} on {worker.host} ({worker.address})",
                    "it has": f"{worker.cores} cores, memory limit {memory}",
                    **gpu,
                }
            )
        fields = seen.as_dict()
        print_rows(
            {
                "block": f"{fields['block_s']} s, {fields['n_objects']} objects, written to and read from {target}",
                "versions": "agree where it matters",
                "dashboard": fields["dashboard"],
            }
        )
