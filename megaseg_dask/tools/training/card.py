"""The model card of a trained bundle: how it was made, and its losses."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.models import Bundle
from megaseg_dask.tools.training.cytodl_process import Finished
from megaseg_dask.tools.training.recipes import Recipe

_MAX_ROWS = 12

_TEXT = """\
# {name}

Trained with `megaseg train` by the recipe of {recipe}, through cyto-dl. It is not the Allen
Institute's model of that name. Its licence, and whom it may be given to, follow from the images
that it was trained on.

| | |
|---|---|
{facts}

![Losses of each epoch](curves.png)

| epoch | training loss | validation loss |
|---|---|---|
{epochs}

All epochs are in `metrics.csv`. `megaseg evaluate` measures the model on other images.
"""


@dataclass(frozen=True, slots=True)
class Training:
    """A training that is over: its manifest, the examples of each split, and cyto-dl's result.

    ``voxel_size_um`` (z, y, x) is that of all its images, if it is known.
    """

    manifest: str
    n_examples: dict[str, int]
    finished: Finished
    voxel_size_um: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class EpochLosses:
    """One row of the table of epochs."""

    epoch: int
    training: float
    validation: float


@dataclass(frozen=True, slots=True)
class Losses:
    """The epochs that have a validation loss, the best of them, and the time of all."""

    epochs: tuple[EpochLosses, ...]
    best_epoch: int
    best_loss: float
    wall_s: float


def read_losses(table: Path) -> Losses:
    """Return the losses in a ``metrics.csv``."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_loss"]]
    epochs = tuple(
        EpochLosses(int(row["epoch"]), float(row["training_loss"]), float(row["validation_loss"]))
        for row in rows
    )
    best = min(epochs, key=lambda losses: losses.validation)
    return Losses(epochs, best.epoch, best.validation, float(rows[-1]["elapsed_s"]))


def write_card(
    path: Path, bundle: Bundle, recipe: Recipe, training: Training, losses: Losses
) -> None:
    """Write the card beside a bundle."""
    facts = {
        "network": _network_text(bundle),
        "input": _input_text(recipe),
        "voxels": _voxels_text(training),
        "loss": f"`{recipe.loss}`",
        "optimizer": _optimizer_text(recipe),
        "images": _images_text(recipe, training),
        "epochs": _epochs_text(recipe, training, losses),
        "kept": f"epoch {losses.best_epoch}, validation loss {losses.best_loss:.4f}",
        "digest": f"`{bundle.digest}`",
    }
    shown = [f"{e.epoch} | {e.training:.4f} | {e.validation:.4f}" for e in _sample(losses.epochs)]
    text = _TEXT.format(
        name=path.parent.name,
        recipe=recipe.name,
        facts=_rows(f"{name} | {fact}" for name, fact in facts.items()),
        epochs=_rows(shown),
    )
    path.write_text(text)


def _network_text(bundle: Bundle) -> str:
    filters = ", ".join(map(str, bundle.network.filters))
    n_parameters = sum(tensor.numel() for tensor in bundle.weights.values())
    return f"MONAI `DynUNet`, filters {filters}: {n_parameters:,} parameters"


def _input_text(recipe: Recipe) -> str:
    patch = "×".join(map(str, recipe.patch_shape))
    channel = "one channel, z-scored as a whole volume"
    return f"{channel}; patches {patch}, overlap {recipe.overlap}"


def _voxels_text(training: Training) -> str:
    if training.voxel_size_um is None:
        return "of unknown size, or of several: --voxel-size model cannot be used"
    return f"{' × '.join(f'{size:g}' for size in training.voxel_size_um)} µm (z, y, x)"


def _optimizer_text(recipe: Recipe) -> str:
    rate = f"learning rate {recipe.learning_rate:g} × {recipe.decay} each epoch"
    return f"`{recipe.optimizer}`, {rate}, weight decay {recipe.weight_decay:g}"


def _images_text(recipe: Recipe, training: Training) -> str:
    splits = (
        f"{training.n_examples['train']} to learn from, {training.n_examples['val']} to validate"
    )
    patches = f"patches of each in an epoch, cut at random: {recipe.patches_per_image}"
    return f"{training.manifest}: {splits}; {patches}"


def _epochs_text(recipe: Recipe, training: Training, losses: Losses) -> str:
    reasons = {
        "patience": f"the validation loss had not improved for {recipe.patience} epochs",
        "max_epochs": f"all {recipe.max_epochs} epochs were done",
        "max_time": "the time limit was reached",
    }
    finished = training.finished
    return f"{finished.n_epochs}, then {reasons[finished.stopped]}; {losses.wall_s:.0f} s"


def _sample(epochs: tuple[EpochLosses, ...]) -> list[EpochLosses]:
    """Return evenly spaced epochs, with the last one."""
    step = max(1, -(-len(epochs) // _MAX_ROWS))
    return [*epochs[:-1:step], epochs[-1]]


def _rows(rows: Iterable[str]) -> str:
    return "\n".join(f"| {row} |" for row in rows)
