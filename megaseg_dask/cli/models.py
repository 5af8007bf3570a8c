"""``megaseg models``: which models there are, and how they come into the cache."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaseg_dask.cli.console import print_rows, reporter
from megaseg_dask.cli.exit_codes import (
    Json,
    Quiet,
    echo,
    echo_result,
    exit_codes,
    help_without_command,
    warn,
)
from megaseg_dask.messages import size_text

if TYPE_CHECKING:
    from megaseg_dask.models.cache import Record

models_app = typer.Typer(name="models", help="List, fetch, import and show models.")
models_app.callback(invoke_without_command=True)(help_without_command)

Bucket = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|URL",
        help="Bucket with models. (default: MEGASEG_BUCKET, else the public bucket)",
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="S3-compatible server of the bucket. (default with --bucket: AWS_ENDPOINT_URL)",
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="Checkpoint to use, if there are several.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model that has this name in the cache.")
]

# -- list


@models_app.command("list")
def list_models(*, bucket: Bucket = None, endpoint: Endpoint = None, json_: Json = False) -> None:
    """List all models: in this package, in the cache, and in a bucket.

    \b
    Examples:
      megaseg models list
      megaseg models list --bucket our-models --endpoint https://minio.example.org:9000
    """
    with exit_codes(json_):
        from megaseg_dask.errors import MegasegError
        from megaseg_dask.models import registry
        from megaseg_dask.models.home import home

        rows = _local_models()
        warnings = []
        try:
            opened = registry.open_bucket(bucket, endpoint)
            for name, entry in registry.offered(opened).items():
                row = rows.setdefault(name, {"name": name, "state": "offered"})
                row |= {"offered": entry.url, "offered_bytes": entry.n_bytes}
        except MegasegError as error:
            warnings.append(f"the bucket was not listed: {error}")
        if json_:
            echo_result({"cache": str(home()), "models": list(rows.values()), "warnings": warnings})
            return
        for row in rows.values():
            print_rows({row["name"]: _state_text(row)}, 20)
        echo(f"cache: {home()}", err=True)
        for warning in warnings:
            warn(warning)


def _local_models() -> dict[str, dict[str, Any]]:
    """Return a row for each model that ships, is published, or is in the cache."""
    from megaseg_dask.errors import BundleError
    from megaseg_dask.models import cache, registry

    rows: dict[str, dict[str, Any]] = {
        "starter": {"name": "starter", "state": "comes with this package"}
    }
    for name in [*registry.PUBLISHED, *cache.cached_names()]:
        try:
            record = cache.read_record(name)
        except BundleError as error:
            rows[name] = {"name": name, "state": "damaged", "error": str(error)}
            continue
        if record:
            rows[name] = {"name": name, "state": "cached", **_record_json(record)}
        elif name in registry.PUBLISHED:
            rows[name] = {"name": name, "state": "published"}
    return rows


def _state_text(row: Mapping[str, Any]) -> str:
    state = str(row["state"])
    if state == "cached":
        content = f"{size_text(row['n_bytes'])}, digest {row['digest'][:12]}"
        return f"cached, {content}, from {row['source']} {row['date'][:10]}"
    if state == "damaged":
        return f"damaged: {row['error']}"
    fetch_it = f"megaseg models fetch {row['name']}"
    if "offered" in row:
        offer = f"{row['offered']}, {size_text(row['offered_bytes'])}"
        return f"not in the cache; {fetch_it}  ({offer})"
    if state == "published":
        return f"published, not in the cache; {fetch_it}"
    return state


# -- fetch and import


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
        typer.Option(
            "--object", metavar="KEY", help="Object of the bucket that contains the model."
        ),
    ] = None,
    bucket: Bucket = None,
    endpoint: Endpoint = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse a file with another SHA-256.")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a model into the cache. Run the command again to resume an interrupted download.

    A model that is already in the cache is checked, not downloaded again.

    \b
    Examples:
      megaseg models fetch MegaSeg_v1
      megaseg models fetch https://example.org/models/nuclei.zip --name nuclei
    """
    with exit_codes(json_):
        from megaseg_dask.models import registry

        url = model if "://" in model else None
        default_name = registry.file_of(url).stem if url else model
        key = object_
        is_renamed = name is not None and name != model
        if key is None and url is None and is_renamed:
            # Otherwise the registry finds the object by the model's name.
            key = registry.PUBLISHED.get(model) or f"{model}.zip"
        origin = registry.Origin(url, key, bucket, endpoint, sha256)
        with reporter(json_, quiet) as emit:
            record = registry.fetch(name or default_name, origin, overwrite=overwrite, emit=emit)
        _print_record(record, json_)


@models_app.command("import")
def import_model(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A bundle's folder, its zip, or a .ckpt.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name for --model.")],
    *,
    checkpoint: Checkpoint = None,
    voxel_size: Annotated[
        str | None,
        typer.Option(
            "--voxel-size",
            metavar="Z,Y,X",
            help="Voxel size of the training images in µm, for --voxel-size model.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Copy a bundle from this machine into the cache, under a name.

    \b
    Examples:
      megaseg models import megaSeg.zip MegaSeg_v1
      megaseg models import experiment nuclei --checkpoint epoch_120.ckpt
      megaseg models import nuclei.zip nuclei --voxel-size 0.29,0.26,0.26
    """
    with exit_codes(json_):
        from megaseg_dask.models.cache import import_bundle

        bundle = Path(path).expanduser()
        record = import_bundle(
            bundle,
            name,
            checkpoint=checkpoint,
            voxel_size_um=_sizes_of(voxel_size) if voxel_size else None,
            overwrite=overwrite,
        )
        _print_record(record, json_)


def _sizes_of(text: str) -> tuple[float, float, float]:
    from megaseg_dask.errors import SettingsError
    from megaseg_dask.plan.settings import parse_settings

    size = parse_settings({"voxel_size": text}).voxel_size
    if isinstance(size, str):
        raise SettingsError(f"--voxel-size {text}: expected three numbers z,y,x, in µm")
    return size


def _print_record(record: "Record", as_json: bool) -> None:
    if as_json:
        echo_result(_record_json(record))
    else:
        content = f"{size_text(record.n_bytes)}, digest {record.digest[:12]}"
        echo(f"{record.name}: {record.path}  ({content})")


def _record_json(record: "Record") -> dict[str, Any]:
    return {**asdict(record), "path": str(record.path)}


# -- show


@models_app.command()
def show(
    model: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="A model in the cache, or a bundle.")
    ],
    *,
    checkpoint: Checkpoint = None,
    json_: Json = False,
) -> None:
    """Show the card of a model: its published facts, and the origin of each setting of its bundle.

    \b
    Example:
      megaseg models show starter
    """
    with exit_codes(json_):
        card = _read_card(model, checkpoint)
        if json_:
            echo_result(card)
        else:
            _print_card(card)


def _read_card(model: str, checkpoint: str | None) -> dict[str, Any]:
    """Return the card of a model that is here, or of a published one.

    Raises:
        BundleError: for a model that is neither.
    """
    from megaseg_dask.errors import BundleError
    from megaseg_dask.models import cache, read_bundle, registry
    from megaseg_dask.models.cards import PUBLISHED_CARDS, card_of

    path = registry.find(model)
    if path is None:
        if model not in PUBLISHED_CARDS:
            problem = "not in the cache, and not an existing path"
            raise BundleError(f"{model}: {problem}; see `megaseg models list`")
        return {"name": model, "path": None, "published": dict(PUBLISHED_CARDS[model])}
    record = cache.read_record(model) if cache.is_name(model) else None
    if record:
        card = card_of(model, path, cache.load_cached(record, checkpoint))
        return {**card, "record": _record_json(record)}
    bundle = read_bundle(path, checkpoint)
    return card_of(model if model == "starter" else bundle.name, path, bundle)


def _print_card(card: Mapping[str, Any]) -> None:
    missing = f"not in the cache; megaseg models fetch {card['name']}"
    print_rows({"name": card["name"], "path": card["path"] or missing}, 18)
    record = card.get("record")
    if record:
        origin = f"{record['source']}  ({record['date']})"
        print_rows({"from": origin, "SHA-256": record["sha256"]}, 18)
    if card["path"]:
        minimum = ",".join(map(str, card["minimum_input"]))
        rows = {
            "digest": card["digest"],
            "size": f"{size_text(card['n_bytes'])}, {card['n_parameters']:,} parameters",
            "minimum input": f"an image of {minimum} voxels (z, y, x), padded to a patch",
            "licence": card["licence"],
        }
        print_rows(rows, 18)
    if card["published"]:
        echo("\nPublished")
        for key, value in card["published"].items():
            print_rows({f"  {key}": value}, 18)
    if card["path"]:
        echo("\nSettings and their origins")
        for key, setting in card["settings"].items():
            print_rows({f"  {key}": _setting_text(setting)}, 28)


def _setting_text(setting: Mapping[str, Any]) -> str:
    value = "" if setting["value"] is None else json.dumps(setting["value"])
    return f"{value}  ← {setting['origin']}" if setting["origin"] else value
