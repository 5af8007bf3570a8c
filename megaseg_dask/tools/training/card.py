"""The model card of a trained bundle: how it was made, and how its losses went."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaseg_dask.models import Bundle
from megaseg_dask.tools.training.recipes import Recipe

_MOST_ROWS = 12
_REASONS = {
    "patience": "the validation loss had not improved for {patience} epochs",
    "max_epochs": "all {max_epochs} epochs were done",
    "max_time": "the time was over",
}


@dataclass(frozen=True, slots=True)
class Losses:
    """What the table of epochs says in short."""

    best_epoch: int
    best_loss: float
    wall_s: float


def write_card(
    out: Path,
    bundle: Bundle,
    recipe: Recipe,
    manifest: str,
    counts: dict[str, int],
    finished: dict[str, Any],
) -> Losses:
    """Write ``MODEL_CARD.md`` beside a bundle, its ``metrics.csv`` and its ``curves.png``."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_loss"]]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    losses = Losses(
        int(best["epoch"]), float(best["validation_loss"]), float(rows[-1]["elapsed_s"])
    )
    n = sum(tensor.numel() for tensor in bundle.weights.values())
    reason = _REASONS[finished["stopped"]].format(
        patience=recipe.patience, max_epochs=recipe.max_epochs
    )
    rows_of_table = {
        "network": f"MONAI `DynUNet`, filters {', '.join(map(str, bundle.network.filters))}: {n:,} parameters",
        "input": f"one channel, z-scored as a whole volume; patches {'×'.join(map(str, recipe.patch_shape))}, overlap "
        f"{recipe.overlap}",
        "loss": f"`{recipe.loss}`",
        "optimiser": f"`{recipe.optimizer}`, learning rate {recipe.learning_rate:g} × {recipe.decay} each epoch, "
        f"weight decay {recipe.weight_decay:g}",
        "images": f"{manifest}: {counts['train']} to learn from, {counts['val']} to validate; patches of each in an "
        f"epoch, cut at random: {recipe.patches_per_image}",
        "epochs": f"{finished['n_epochs']}, then {reason}; {losses.wall_s:.0f} s",
        "kept": f"epoch {losses.best_epoch}, validation loss {losses.best_loss:.4f}",
        "digest": f"`{bundle.digest}`",
    }
    table = "\n".join(f"| {name} | {what} |" for name, what in rows_of_table.items())
    text = f"""\
# {out.name}

Trained with `megaseg train` by the recipe of {recipe.name}, through cyto-dl. It is not the Allen Institute's model of
that name. Its licence, and whom it may be given to, follow from the images that it was trained on.

| | |
|---|---|
{table}

![Losses of each epoch](curves.png)

| epoch | training loss | validation loss |
|---|---|---|
"""
    step = max(1, -(-len(rows) // _MOST_ROWS))
    for row in [*rows[:-1:step], rows[-1]]:
        text += f"| {row['epoch']} | {float(row['training_loss']):.4f} | {float(row['validation_loss']):.4f} |\n"
    text += "\nAll epochs are in `metrics.csv`. How good the model is on other images, `megaseg evaluate` tells.\n"
    (out / "MODEL_CARD.md").write_text(text)
    return losses
