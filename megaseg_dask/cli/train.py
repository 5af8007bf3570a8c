"""``megaseg train``: a recipe, images and labels in, a bundle out."""

import json
import math
from typing import Annotated

import typer

from megaseg_dask.cli.console import print_training, reporter
from megaseg_dask.cli.exit_codes import Json, echo, echo_result, exit_codes
from megaseg_dask.errors import SettingsError

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
            "--from", metavar="MODEL", help="Start from the weights and the network of this model."
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
        typer.Option(metavar="NAME", help="Label image of an OME-Zarr. (default: the only one)"),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            metavar="F",
            help="Fraction of the images for validation, if MANIFEST does not state it.",
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
            metavar="N",
            min=1,
            help="Patches of each image in an epoch. They form one batch. (default: 1)",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="Learning rate at the start. (default: the recipe's, 0.0001)"
        ),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Multiply the learning rate by this after each epoch. "
            "(default: the recipe's, 0.995)",
        ),
    ] = None,
    max_epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Maximum number of epochs. (default: the recipe's, 1000)"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Stop after this many epochs without a better validation loss. "
            "(default: the recipe's, 100)",
        ),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="[DD:]HH:MM:SS", help="Stop after this time of training, summed over all runs."
        ),
    ] = None,
    accelerator: Annotated[
        str, typer.Option(metavar="|".join(_ACCELERATORS), help="Device to train on.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier training in DIR.")
    ] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Install cyto-dl in a separate environment.")
    ] = False,
    json_: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors and the final lines.")
    ] = False,
) -> None:
    """Train MegaSeg's network on labelled images with its published recipe, through cyto-dl.

    First run megaseg train --install once. After Ctrl-C, run the same command again: it resumes
    after the last finished epoch.

    \b
    Examples:
      megaseg train --install
      megaseg train images.csv --recipe MegaSeg_light --out light
      megaseg train plate.zarr --label nuclei --from MegaSeg_v1 --out mine --max-time 08:00:00
    """
    with exit_codes(json_):
        if install:
            _install(json_)
            return
        if manifest is None or out is None:
            raise SettingsError("give a MANIFEST and --out DIR; see megaseg train --help")
        _require_fraction(validation)
        _require_positive(learning_rate)
        _require_decay(decay)
        _require_accelerator(accelerator)
        patch_shape = _parse_patch(patch)
        time_limit = _parse_time(max_time)
        from megaseg_dask.tools.training import Request
        from megaseg_dask.tools.training import train as run_training

        request = Request(
            manifest=manifest,
            recipe=recipe,
            out=out,
            start=from_,
            channel=channel,
            label=label,
            validation=validation,
            patch=patch_shape,
            patches_per_image=patches_per_image,
            learning_rate=learning_rate,
            decay=decay,
            max_epochs=max_epochs,
            patience=patience,
            max_time=time_limit,
            accelerator=accelerator,
            overwrite=overwrite,
        )
        with reporter(json_, quiet) as emit:
            trained = run_training(request, emit)
        if json_:
            echo(json.dumps(trained.to_json()))
        else:
            print_training(trained)


def _install(as_json: bool) -> None:
    from megaseg_dask.tools.training import install

    folder = install(lambda line: echo(line, err=True))
    if as_json:
        echo_result({"environment": str(folder)})
    else:
        echo(f"cyto-dl is installed in {folder}")


def _require_fraction(validation: float) -> None:
    if not 0 < validation < 1:
        raise SettingsError(f"--validation {validation}: expected a number between 0 and 1")


def _require_positive(rate: float | None) -> None:
    if rate is not None and not 0 < rate < math.inf:
        raise SettingsError(f"--learning-rate {rate}: expected a positive number")


def _require_decay(decay: float | None) -> None:
    if decay is not None and not 0 < decay <= 1:
        raise SettingsError(f"--decay {decay}: expected a number above 0 and up to 1")


def _require_accelerator(accelerator: str) -> None:
    if accelerator not in _ACCELERATORS:
        choices = ", ".join(_ACCELERATORS)
        raise SettingsError(f"--accelerator {accelerator}: expected one of {choices}")


def _parse_patch(text: str | None) -> tuple[int, int, int] | None:
    """Return a patch shape; one number stands for all three axes."""
    if text is None:
        return None
    from megaseg_dask.plan.option_types import parse_three

    try:
        z, y, x = map(int, map(str, parse_three(text)))
    except (TypeError, ValueError) as error:
        expected = "three whole numbers, such as 64,128,128"
        raise SettingsError(f"--patch {text}: expected {expected}") from error
    return z, y, x


def _parse_time(text: str | None) -> str | None:
    """Return a time as Lightning takes it, ``DD:HH:MM:SS``."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) == 3:
        parts.insert(0, "0")
    are_numbers = all(part.isdecimal() and len(part) <= 3 for part in parts)
    if len(parts) != 4 or not are_numbers:
        raise SettingsError(f"--max-time {text}: expected [DD:]HH:MM:SS, such as 08:00:00")
    return ":".join(f"{int(part):02d}" for part in parts)
