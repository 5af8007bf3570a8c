"""The program that trains inside cyto-dl's own environment.

    python cytodl_main.py EXPERIMENT.json

It imports nothing of megaseg_dask, which is not installed there. Events go to
stdout, one JSON object a line; the output of cyto-dl and Lightning goes to a log.
Its parent holds its stdin: once that closes, this program ends.
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

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.accelerators.mps import MPSAccelerator
from lightning.pytorch.callbacks import Timer
from omegaconf import OmegaConf, open_dict

COLUMNS = ("epoch", "training_loss", "validation_loss", "learning_rate", "elapsed_s")
_BATCH_EVENT_S = 1.0
# Float32 weights; layers that gain by it compute in bfloat16.
_BFLOAT16 = "bf16-mixed"

# The real stdout, once descriptor 1 is the log.
_events: Any = None


def report(event: str, **fields: Any) -> None:
    """Write one event."""
    _events.write(json.dumps({"event": event, **fields}) + "\n")
    _events.flush()


# -- while it trains


class Reporter(Callback):  # type: ignore[misc]
    """Report epochs, and batches at most once a second; keep the table of epochs."""

    def __init__(self, table: str) -> None:
        self._table = Path(table)
        self._earlier_s = 0.0
        self._began = 0.0
        self._last_batch_event = 0.0
        self._finished_epoch: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epochs before the checkpoint; the later ones are trained again."""
        first = trainer.current_epoch
        rows = [row for row in read_table(self._table) if int(row["epoch"]) < first]
        with self._table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._earlier_s = float(rows[-1]["elapsed_s"]) if rows else 0.0
        self._began = time.monotonic()
        report(
            "started",
            epoch=trainer.current_epoch,
            n_batches=int(trainer.num_training_batches),
            device=str(pl_module.device),
            best=_best_of(rows),
        )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Report the batches so far."""
        now = time.monotonic()
        if now - self._last_batch_event <= _BATCH_EVENT_S:
            return
        self._last_batch_event = now
        left_s = None
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):
                left_s = max(callback.time_remaining(), 0.0)
        n_done = int(trainer.global_step)
        report("batch", n_done=n_done, elapsed_s=now - self._began, left_s=left_s)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Report the epoch before: by now its checkpoint is saved."""
        if self._finished_epoch:
            report("epoch", **self._finished_epoch)
            self._finished_epoch = {}

    on_train_end = on_train_epoch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row to the table."""
        metrics = trainer.callback_metrics
        elapsed_s = self._earlier_s + time.monotonic() - self._began
        row = {
            "epoch": trainer.current_epoch,
            "training_loss": _number(metrics.get("train/loss_epoch", metrics.get("train/loss"))),
            "validation_loss": _number(metrics.get("val/loss")),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "elapsed_s": round(elapsed_s, 2),
        }
        with self._table.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        self._finished_epoch = row


def _best_of(rows: list[dict[str, str]]) -> tuple[int, float] | None:
    """Return epoch and loss of the lowest validation loss."""
    losses = {int(row["epoch"]): float(row["validation_loss"] or "inf") for row in rows}
    if not losses:
        return None
    epoch = min(losses, key=losses.__getitem__)
    return (epoch, losses[epoch]) if math.isfinite(losses[epoch]) else None


def _number(value: Any) -> float | None:
    """Return a metric as a number; JSON and CSV have no NaN."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def read_table(table: Path) -> list[dict[str, str]]:
    """Return the rows of a table of epochs."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


# -- before and after


def configure(request: dict[str, Any]) -> Any:
    """Return cyto-dl's experiment with the changes of a request, ready to train."""
    from cyto_dl.api.model import CytoDLModel

    folder = Path(request["folder"])
    accelerator, precision = choose_hardware(request["accelerator"])
    model = CytoDLModel()
    model.load_default_experiment(
        "segmentation_plugin", output_dir=str(folder), overrides=["spatial_dims=3"]
    )
    changes = {
        **request["set"],
        "trainer.accelerator": accelerator,
        "trainer.precision": precision,
    }
    with open_dict(model.cfg):
        for key in request["remove"]:
            section, _, name = key.rpartition(".")
            OmegaConf.select(model.cfg, section).pop(name)
        for key, value in changes.items():
            OmegaConf.update(model.cfg, key, value, merge=False, force_add=True)
        if precision != 16:
            _cast_to_float32(model.cfg)
    model.save_config(folder / "train_config.yaml")
    reporter = {"_target_": "__main__.Reporter", "table": str(folder / "metrics.csv")}
    with open_dict(model.cfg):
        OmegaConf.update(model.cfg, "callbacks.reporter", reporter, force_add=True)
    return model


def _cast_to_float32(config: Any) -> None:
    """Replace the cast to half precision, which only mixed precision of a GPU can take."""
    for stage in ("train", "valid", "test"):
        for transform in config.data.transforms[stage].transforms:
            if transform["_target_"].endswith("ToTensord"):
                transform["dtype"] = "float32"


def choose_hardware(accelerator: str) -> tuple[str, int | str]:
    """Return accelerator and precision: 16 bits on CUDA, as cyto-dl has it.

    A CPU with matrix units (Intel AMX) computes in bfloat16, which is several times as quick
    there. Elsewhere 16 bits are slow or missing.

    Raises:
        SystemExit: if the accelerator is not there.
    """
    available = ["cpu"]
    if MPSAccelerator.is_available():
        available.insert(0, "mps")
    if CUDAAccelerator.is_available():
        available.insert(0, "gpu")
    if accelerator == "auto":
        accelerator = available[0]
    if accelerator not in available:
        problem = "the environment of cyto-dl finds none"
        raise SystemExit(f"--accelerator {accelerator}: {problem}; pass cpu or auto")
    if accelerator == "gpu":
        return accelerator, 16
    has_matrix_units = accelerator == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return accelerator, _BFLOAT16 if has_matrix_units else 32


def draw(rows: list[dict[str, str]], picture: Path) -> None:
    """Draw the losses of all epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for column in ("training_loss", "validation_loss"):
        losses = [float(row[column] or "nan") for row in rows]
        axes.plot(epochs, losses, label=column.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(picture, dpi=100)


def why_stopped(trainer: Trainer, last: dict[str, str]) -> str:
    """Return why a training is over: diverged, patience, max_epochs or max_time."""
    if not (last["training_loss"] and last["validation_loss"]):
        return "diverged"
    if any(getattr(callback, "stopped_epoch", 0) for callback in trainer.callbacks):
        return "patience"
    return "max_epochs" if trainer.current_epoch >= trainer.max_epochs else "max_time"


def main() -> None:
    """Train, then report the best checkpoint."""
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
        report("refused", error=str(error))
        raise
    except BaseException as error:
        report("failed", error=f"{type(error).__name__}: {error}")
        raise
    trainer = objects["trainer"]
    rows = read_table(folder / "metrics.csv")
    draw(rows, folder / "curves.png")
    report(
        "finished",
        best=trainer.checkpoint_callback.best_model_path,
        n_epochs=trainer.current_epoch,
        stopped=why_stopped(trainer, rows[-1]),
    )


def _leave_with_parent() -> None:
    # os.read, since Python wants the lock of sys.stdin when it ends.
    while os.read(0, 1):
        pass
    os._exit(130)


if __name__ == "__main__":
    main()
