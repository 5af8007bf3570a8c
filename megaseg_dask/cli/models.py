"""``megaseg models``: which models there are, and how they come into the cache."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaseg_dask.cli.console import print_rows, reporter
from megaseg_dask.cli.exit_codes import Json, exit_codes
from megaseg_dask.messages import size_text

if TYPE_CHECKING:
    from megaseg_dask.models.cache import Record

models_app = typer.Typer(
    name="models", help="List, fetch, import and show models.", no_args_is_help=True
)

Bucket = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|URL",
        help="Bucket with models. (default: MEGASEG_BUCKET, else the public one)",
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="S3-compatible server of that bucket. (default: AWS_ENDPOINT_URL for your own)",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model that has this name in the cache.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final line only.")]


@models_app.command("list")
def list_models(*, bucket: Bucket = None, endpoint: Endpoint = None, json_: Json = False) -> None:
    """List the models that ship, those in the cache, and those that a bucket offers.

    \b
    Examples:
      megaseg models list
      megaseg models list --bucket our-models --endpoint https://minio.example.org:9000
    """
    with exit_codes(json_):
        from megaseg_dask.errors import MegasegError
        from megaseg_dask.models import cache, registry

        rows, warnings = _local_rows(), []
        try:
            depot = registry.open_depot(bucket, endpoint)
            for name, entry in registry.offered(depot).items():
                row = rows.setdefault(name, {"name": name, "state": "offered"})
                row |= {"offered": entry.url, "offered_bytes": entry.n_bytes}
        except MegasegError as error:
            warnings.append(f"no bucket was listed: {error}")
        if json_:
            record = {
                "event": "result",
                "status": "done",
                "cache": str(cache.home()),
                "models": [*rows.values()],
            }
            typer.echo(json.dumps({**record, "warnings": warnings}))
            return
        for row in rows.values():
            print_rows({row["name"]: _state(row)}, 20)
        typer.echo(f"cache: {cache.home()}", err=True)
        for warning in warnings:
            typer.echo(f"megaseg: warning: {warning}", err=True)


def _local_rows() -> dict[str, dict[str, Any]]:
    from megaseg_dask.errors import BundleError
    from megaseg_dask.models import cache, registry

    rows: dict[str, dict[str, Any]] = {
        "starter": {"name": "starter", "state": "ships with this package"}
    }
    for name in [*registry.PUBLISHED, *cache.cached_names()]:
        try:
            record = cache.read_record(name)
        except BundleError as error:
            rows[name] = {"name": name, "state": "damaged", "error": str(error)}
            continue
        if record:
            rows[name] = {"name": name, "state": "cached", **_fields(record)}
        elif name in registry.PUBLISHED:
            rows[name] = {"name": name, "state": "published"}
    return rows


def _fields(record: "Record") -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(record), "path": str(record.path)}


def _state(row: dict[str, Any]) -> str:
    offered = f"{row['offered']}, {size_text(row['offered_bytes'])}" if "offered" in row else ""
    if row["state"] == "cached":
        what = f"{size_text(row['n_bytes'])}, digest {row['digest'][:12]}"
        return f"cached, {what}, from {row['source']} {row['date'][:10]}"
    if row["state"] == "damaged":
        return f"damaged: {row['error']}"
    if offered:
        return f"not in the cache; megaseg models fetch {row['name']}  ({offered})"
    if row["state"] == "published":
        return f"published, not in the cache; megaseg models fetch {row['name']}"
    return str(row["state"])


@models_app.command()
def fetch(
    model: Annotated[
        str, typer.Argument(metavar="NAME|URL", help="A model's name, or the URL of its zip.")
    ],
    *,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name in the cache. (default: the same)")
    ] = None,
    object_: Annotated[
        str | None,
        typer.Option("--object", metavar="KEY", help="The bucket's object that has this model."),
    ] = None,
    bucket: Bucket = None,
    endpoint: Endpoint = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any other content.")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model into the cache; an interrupted download goes on where it stopped.

    A model that is in the cache is checked, not fetched again.

    \b
    Examples:
      megaseg models fetch MegaSeg_v1
      megaseg models fetch https://example.org/models/nuclei.zip --name nuclei
    """
    with exit_codes(json_):
        from pathlib import PurePosixPath

        from megaseg_dask.models import registry

        url = model if "://" in model else None
        wanted = name or (PurePosixPath(model).stem if url else model)
        key = object_ or (
            None if url or wanted == model else registry.PUBLISHED.get(model) or f"{model}.zip"
        )
        with reporter(json_, quiet) as emit, registry.reporting(emit):
            record = registry.fetch(
                wanted,
                url=url,
                key=key,
                bucket=bucket,
                endpoint=endpoint,
                sha256=sha256,
                overwrite=overwrite,
            )
        _print_record(record, json_)


@models_app.command("import")
def import_model(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A bundle's folder, its zip, or a .ckpt.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What --model will call it.")],
    *,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Which of several checkpoints.")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Copy a bundle on this machine into the cache, under a name.

    \b
    Examples:
      megaseg models import megaSeg.zip MegaSeg_v1
      megaseg models import experiment nuclei --checkpoint epoch_120.ckpt
    """
    with exit_codes(json_):
        from megaseg_dask.models.cache import import_bundle

        _print_record(
            import_bundle(
                Path(path).expanduser(), name, checkpoint=checkpoint, overwrite=overwrite
            ),
            json_,
        )


def _print_record(record: "Record", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "result", "status": "done", **_fields(record)}))
    else:
        typer.echo(
            f"{record.name}: {record.path}  ({size_text(record.n_bytes)}, digest {record.digest[:12]})"
        )


@models_app.command()
def show(
    model: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="A model in the cache, or a bundle.")
    ],
    *,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Which of several checkpoints.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show the card of a model: what is published, what its bundle says, and where each setting came from.

    \b
    Example:
      megaseg models show starter
    """
    with exit_codes(json_):
        from megaseg_dask.errors import BundleError
        from megaseg_dask.models import cache, read_bundle, registry
        from megaseg_dask.models.cards import PUBLISHED_CARDS, card_of

        path = registry.find(model)
        record = cache.read_record(model) if cache.is_name(model) else None
        card: dict[str, Any]
        if path is not None:
            bundle = (
                cache.load_cached(record, checkpoint) if record else read_bundle(path, checkpoint)
            )
            card = card_of(model if record or model == "starter" else bundle.name, path, bundle)
            card |= {"record": _fields(record)} if record else {}
        elif model in PUBLISHED_CARDS:
            card = {"name": model, "path": None, "published": dict(PUBLISHED_CARDS[model])}
        else:
            raise BundleError(
                f"{model}: not in the cache, and no path that exists; see `megaseg models list`"
            )
        if json_:
            typer.echo(json.dumps({"event": "result", "status": "done", **card}))
        else:
            _print_card(card)


def _print_card(card: dict[str, Any]) -> None:
    missing = f"not in the cache; megaseg models fetch {card['name']}"
    rows = {"name": card["name"], "path": card["path"] or missing}
    if record := card.get("record"):
        rows |= {"from": f"{record['source']}  ({record['date']})", "SHA-256": record["sha256"]}
    if card["path"]:
        rows |= {
            "digest": card["digest"],
            "size": f"{size_text(card['n_bytes'])}, {card['n_parameters']:,} parameters",
            "minimum input": f"an image of {','.join(map(str, card['minimum_input']))} (z, y, x), padded to a patch",
            "licence": card["licence"],
        }
    print_rows(rows, 18)
    if card["published"]:
        typer.echo("\nPublished")
        print_rows({f"  {key}": value for key, value in card["published"].items()}, 18)
    if card["path"]:
        typer.echo("\nSettings, and where each comes from")
        for key, stated in card["settings"].items():
            value = "" if stated["value"] is None else json.dumps(stated["value"])
            print_rows(
                {f"  {key}": f"{value}  ← {stated['origin']}" if stated["origin"] else value}, 28
            )
