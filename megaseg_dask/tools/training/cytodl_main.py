"""What runs inside cyto-dl's own environment: a program that trains as its request says.

    python inside.py REQUEST.json

It imports nothing of megaseg_dask, which is not installed there. Events go to
stdout, one JSON object a line; whatever cyto-dl and Lightning print goes to a
log. Its stdin is held by who started it: once that is gone, so is this.
"""

import csv
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.accelerators.mps import MPSAccelerator
from lightning.pytorch.callbacks import Timer
from omegaconf import OmegaConf, open_dict

COLUMNS = ("epoch", "training_loss", "validation_loss", "learning_rate", "elapsed_s")
_EVERY_S = 1.0

_events: Any = None


def tell(event: str, **fields: Any) -> None:
    """Write one event."""
    _events.write(json.dumps({"event": event, **fields}) + "\n")
    _events.flush()


class Telling(Callback):  # type: ignore[misc]
    """Tells of every epoch, keeps the table of them, and of batches at most once a second."""

    def __init__(self, table: str) -> None:
        self.table = Path(table)
        self.before_s = self.begun = self.told = 0.0
        self.finished: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was learnt until the checkpoint that training goes on from; the rest is learnt again."""
        kept = [row for row in read_table(self.table) if int(row["epoch"]) < trainer.current_epoch]
        with self.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.before_s = float(kept[-1]["elapsed_s"]) if kept else 0.0
        self.begun = time.monotonic()
        losses = {
            row["epoch"]: float(row["validation_loss"]) for row in kept if row["validation_loss"]
        }
        best = min(losses, key=lambda epoch: losses[epoch], default=None)
        tell(
            "started",
            epoch=trainer.current_epoch,
            n_batches=int(trainer.num_training_batches),
            device=str(pl_module.device),
            best=None if best is None else [int(best), losses[best]],
        )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Tell how far the training is."""
        now = time.monotonic()
        if now - self.told > _EVERY_S:
            self.told = now
            timers = [one for one in trainer.callbacks if isinstance(one, Timer)]
            left_s = max(timers[0].time_remaining(), 0.0) if timers else None
            tell(
                "batch", n_done=int(trainer.global_step), elapsed_s=now - self.begun, left_s=left_s
            )

    def on_train_epoch_start(self, *_: Any) -> None:
        """Tell of the epoch before: by now its checkpoint is saved."""
        if self.finished:
            tell("epoch", **self.finished)
            self.finished = {}

    on_train_end = on_train_epoch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row to the table."""
        metrics = trainer.callback_metrics
        values = (
            trainer.current_epoch,
            _number(metrics.get("train/loss_epoch", metrics.get("train/loss"))),
            _number(metrics.get("val/loss")),
            trainer.optimizers[0].param_groups[0]["lr"],
            round(self.before_s + time.monotonic() - self.begun, 2),
        )
        row = dict(zip(COLUMNS, values, strict=True))
        with self.table.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        self.finished = row


def _number(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def read_table(table: Path) -> list[dict[str, str]]:
    """Return the rows of a table of epochs."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def configure(request: dict[str, Any]) -> Any:
    """Return cyto-dl's experiment with the request's changes, ready to train."""
    from cyto_dl.api.model import CytoDLModel

    model = CytoDLModel()
    model.load_default_experiment(
        "segmentation_plugin", output_dir=request["folder"], overrides=["spatial_dims=3"]
    )
    with open_dict(model.cfg):
        for key in request["remove"]:
            section, _, name = key.rpartition(".")
            OmegaConf.select(model.cfg, section).pop(name)
        accelerator, precision = hardware(request["accelerator"])
        changes = request["set"] | {
            "trainer.accelerator": accelerator,
            "trainer.precision": precision,
        }
        for key, value in changes.items():
            OmegaConf.update(model.cfg, key, value, merge=False, force_add=True)
        for stage in ("train", "valid", "test"):
            for transform in model.cfg.data.transforms[stage].transforms:
                # It casts to half precision, which only mixed precision can take.
                if transform["_target_"].endswith("ToTensord") and precision == 32:
                    transform["dtype"] = "float32"
    model.save_config(Path(request["folder"], "train_config.yaml"))
    with open_dict(model.cfg):
        telling = {
            "_target_": "__main__.Telling",
            "table": str(Path(request["folder"], "metrics.csv")),
        }
        OmegaConf.update(model.cfg, "callbacks.telling", telling, force_add=True)
    return model


def hardware(wanted: str) -> tuple[str, int]:
    """Return accelerator and precision: cyto-dl's 16 bits on CUDA; elsewhere they are slow, or not there."""
    cuda, mps = CUDAAccelerator.is_available(), MPSAccelerator.is_available()
    if wanted == "auto":
        wanted = "gpu" if cuda else "mps" if mps else "cpu"
    if (wanted == "gpu" and not cuda) or (wanted == "mps" and not mps):
        raise SystemExit(
            f"--accelerator {wanted}: cyto-dl's environment sees none; pass cpu or auto"
        )
    return wanted, 16 if wanted == "gpu" else 32


def draw(table: Path, picture: Path) -> None:
    """Draw the losses of all epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_table(table)
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for column in ("training_loss", "validation_loss"):
        axes.plot(
            epochs, [float(row[column] or "nan") for row in rows], label=column.replace("_", " ")
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(picture, dpi=100)


def why_stopped(trainer: Trainer, last: dict[str, str]) -> str:
    """Say why a training is over."""
    if not (last["training_loss"] and last["validation_loss"]):
        return "diverged"
    if any(getattr(callback, "stopped_epoch", 0) for callback in trainer.callbacks):
        return "patience"
    return "max_epochs" if trainer.current_epoch >= trainer.max_epochs else "max_time"


def main() -> None:
    """Train, then tell where the best checkpoint is."""
    global _events
    _events = os.fdopen(os.dup(1), "w")
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    log = (folder / "log.txt").open("a")
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        _, objects = configure(request).train()
    except SystemExit as error:
        tell("refused", error=str(error))
        raise
    except BaseException as error:
        tell("failed", error=f"{type(error).__name__}: {error}")
        raise
    trainer = objects["trainer"]
    rows = read_table(folder / "metrics.csv")
    draw(folder / "metrics.csv", folder / "curves.png")
    best = trainer.checkpoint_callback.best_model_path
    tell(
        "finished",
        best=best,
        n_epochs=trainer.current_epoch,
        stopped=why_stopped(trainer, rows[-1]),
    )


def _leave_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock Python wants when it ends
        pass
    os._exit(130)


if __name__ == "__main__":
    main()
