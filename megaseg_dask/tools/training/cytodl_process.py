"""cyto-dl's process: started with what is asked of it, listened to, ended with us."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megaseg_dask.errors import SettingsError, TaskError
from megaseg_dask.events import Epoch, Event, Progress
from megaseg_dask.run.cluster.workers import WORKER_ENVIRONMENT
from megaseg_dask.tools.training.recipes import Recipe

INSIDE = Path(__file__).with_name("cytodl_main.py")

Emit = Callable[[Event], None]


def run_inside(
    python: Path, changes: dict[str, Any], work: Path, recipe: Recipe, emit: Emit
) -> dict[str, Any]:
    """Let cyto-dl train with these changes of its experiment; returns its last event.

    Raises :class:`SettingsError` if it was refused, and :class:`TaskError` if it failed or diverged.
    """
    asked = work / "inside.json"
    asked.write_text(json.dumps(changes, indent=1))
    teller = _Teller(recipe, changes["set"]["trainer.max_epochs"], emit)
    last: dict[str, Any] = {}
    with _process([str(python), "-I", str(INSIDE), str(asked)]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            teller.tell(last)
    log = work / "log.txt"
    if last.get("event") == "refused":
        raise SettingsError(last["error"])
    if last.get("event") != "finished":
        cause = last.get("error") or f"it ended with code {process.returncode}"
        raise TaskError(f"cyto-dl failed: {cause}; its log is {log}, and the same command goes on")
    if last["stopped"] == "diverged" or not last["best"]:
        raise TaskError(
            f"the training diverged, its loss is no number any more (see {log}); try a smaller "
            "--learning-rate with --overwrite, or --accelerator cpu: that has 32 bits"
        )
    return last


@contextmanager
def _process(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run a program that ends when its stdin does, and so with us, whatever ends us."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**WORKER_ENVIRONMENT, **quiet, **os.environ},
        start_new_session=True,  # Ctrl-C is for us, who then close its stdin
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


class _Teller:
    """Turns what cyto-dl's process tells into events."""

    def __init__(self, recipe: Recipe, max_epochs: int, emit: Emit) -> None:
        self.max_epochs, self.emit = max_epochs, emit
        self.patch_voxels = recipe.patch_shape[0] * recipe.patch_shape[1] * recipe.patch_shape[2]
        self.patches = recipe.patches_per_image
        self.n_batches, self.first, self.best, self.best_epoch = 1, 0, float("inf"), 0

    def tell(self, told: dict[str, Any]) -> None:
        match told["event"]:
            case "started":
                self.n_batches, self.first = told["n_batches"], told["epoch"] * told["n_batches"]
                if told["best"]:
                    self.best_epoch, self.best = told["best"]
            case "batch":
                n_done, total, elapsed = (
                    told["n_done"],
                    self.max_epochs * self.n_batches,
                    told["elapsed_s"],
                )
                rate = max(n_done - self.first, 1) / max(elapsed, 1e-3)
                voxels = rate * self.patch_voxels * self.patches
                left_s = (total - n_done) / rate
                left_s = left_s if told["left_s"] is None else min(left_s, told["left_s"])
                self.emit(Progress("training", n_done, total, elapsed, round(voxels), left_s))
            case "epoch":
                loss = told["validation_loss"]
                if loss is not None and loss < self.best:
                    self.best, self.best_epoch = loss, told["epoch"]
                fields = {
                    key: told[key]
                    for key in ("epoch", "training_loss", "validation_loss", "elapsed_s")
                }
                self.emit(Epoch(**fields, max_epochs=self.max_epochs, best_epoch=self.best_epoch))
