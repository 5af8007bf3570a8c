"""``megaseg train``: a recipe, images and labels in, a bundle out."""

import json
from typing import Annotated

import typer

from megaseg_dask.cli.console import print_training, reporter
from megaseg_dask.cli.exit_codes import Json, exit_codes
from megaseg_dask.errors import SettingsError
from megaseg_dask.plan.parsing import parse_three

_ACCELERATORS = ("auto", "cpu", "gpu", "mps")


def train(
    manifest: Annotated[
        str | None,
        typer.Argument(
            metavar="MANIFEST",
            help="CSV with columns raw, seg and split, or an OME-Zarr with labels.",
        ),
    ] = None,
    *,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder for the bundle.")] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="MegaSeg_v1 or MegaSeg_light.")
    ] = "MegaSeg_v1",
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="MODEL", help="Begin from this model's weights, with its network."
        ),
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|INDEX", help="Channel of the images; needed if there are several."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which of an OME-Zarr's label images. (default: the only one)"
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            metavar="F", help="Part of the images that validates, where MANIFEST does not say."
        ),
    ] = 0.2,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="Z,Y,X", help="Patch to train on. (default: the recipe's, 64,128,128)"
        ),
    ] = None,
    patches_per_image: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Patches of each image in an epoch, one batch. (default: 1)"
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="F", help="At the beginning. (default: the recipe's, 0.0001)"),
    ] = None,
    max_epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Epochs at most. (default: the recipe's, 1000)"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Stop after so many epochs without a better validation loss. "
            "(default: the recipe's, 100)",
        ),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="[DD:]HH:MM:SS", help="Stop after this time of training, all runs together."
        ),
    ] = None,
    accelerator: Annotated[
        str, typer.Option(metavar="|".join(_ACCELERATORS), help="Where to train.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew over another training.")
    ] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Install cyto-dl in an environment of its own.")
    ] = False,
    json_: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Errors and the final lines only.")
    ] = False,
) -> None:
    """Train MegaSeg's network on labelled images by its published recipe, through cyto-dl.

    Once before: megaseg train --install. Interrupt it with Ctrl-C: the same command goes on from the last epoch.

    \b
    Examples:
      megaseg train --install
      megaseg train images.csv --recipe MegaSeg_light --out light
      megaseg train plate.zarr --label nuclei --channel DNA --from MegaSeg_v1 --out mine --max-time 08:00:00
    """
    with exit_codes(json_):
        from megaseg_dask.tools import training

        if install:
            folder = training.install(lambda line: typer.echo(line, err=True))
            if json_:
                typer.echo(
                    json.dumps({"event": "result", "status": "done", "environment": str(folder)})
                )
            else:
                typer.echo(f"cyto-dl is installed in {folder}")
            return
        if manifest is None or out is None:
            raise SettingsError("name a MANIFEST and --out DIR; see megaseg train --help")
        request = training.Request(
            manifest=manifest,
            recipe=recipe,
            out=out,
            start=from_,
            channel=channel,
            label=label,
            validation=_within(validation),
            patch=_patch(patch),
            patches_per_image=patches_per_image,
            learning_rate=_positive(learning_rate),
            max_epochs=max_epochs,
            patience=patience,
            max_time=_time(max_time),
            accelerator=_known(accelerator),
            overwrite=overwrite,
        )
        with reporter(json_, quiet) as emit:
            trained = training.train(request, emit)
        if json_:
            typer.echo(json.dumps(trained.to_json()))
        else:
            print_training(trained)


def _within(fraction: float) -> float:
    if not 0 < fraction < 1:
        raise SettingsError(f"--validation {fraction}: expected a part between 0 and 1")
    return fraction


def _positive(rate: float | None) -> float | None:
    if rate is not None and not 0 < rate < float("inf"):
        raise SettingsError(f"--learning-rate {rate}: expected a positive number")
    return rate


def _patch(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        z, y, x = (int(value) for value in parse_three(text))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"--patch {text}: expected three whole numbers, such as 64,128,128"
        ) from error
    return z, y, x


def _time(text: str | None) -> str | None:
    """Return a time as Lightning takes it, ``DD:HH:MM:SS``."""
    if text is None:
        return None
    parts = text.split(":")
    if not 3 <= len(parts) <= 4 or not all(part.isdecimal() and len(part) <= 3 for part in parts):
        raise SettingsError(f"--max-time {text}: expected [DD:]HH:MM:SS, such as 08:00:00")
    return ":".join(f"{int(part):02d}" for part in (["0"] * (4 - len(parts)) + parts))


def _known(accelerator: str) -> str:
    if accelerator not in _ACCELERATORS:
        raise SettingsError(
            f"--accelerator {accelerator}: expected one of {', '.join(_ACCELERATORS)}"
        )
    return accelerator
