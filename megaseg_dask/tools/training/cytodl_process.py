"""cyto-dl's process: it gets its experiment as a file, and reports events on its stdout."""

import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaseg_dask.errors import SettingsError, TaskError
from megaseg_dask.events import Emit, Epoch, Progress
from megaseg_dask.run.cluster.dask_config import WORKER_ENVIRONMENT
from megaseg_dask.tools.training.folder import TrainingFolder
from megaseg_dask.tools.training.recipes import Recipe

MAIN = Path(__file__).with_name("cytodl_main.py")
_END_S = 30


@dataclass(frozen=True, slots=True)
class Finished:
    """cyto-dl's last event: its best checkpoint, and why it ended."""

    checkpoint: Path
    n_epochs: int
    stopped: str


def run_cytodl(
    python: Path,
    experiment: Mapping[str, object],
    folder: TrainingFolder,
    recipe: Recipe,
    emit: Emit,
) -> Finished:
    """Let cyto-dl train an experiment in its own Python.

    Raises:
        SettingsError: if cyto-dl refused it.
        TaskError: if cyto-dl failed, or the training diverged.
    """
    file = folder.work / "experiment.json"
    file.write_text(json.dumps(experiment, indent=1))
    reporter = _Reporter(recipe, emit)
    last: dict[str, Any] = {}
    with _process([str(python), "-I", str(MAIN), str(file)]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            reporter.report(last)
    if last.get("event") == "refused":
        raise SettingsError(last["error"])
    if last.get("event") != "finished":
        cause = last.get("error") or f"it ended with code {process.returncode}"
        log = f"its log is {folder.log}; run the same command again to resume"
        raise TaskError(f"cyto-dl failed: {cause}; {log}")
    if last["stopped"] == "diverged" or not last["best"]:
        raise TaskError(
            f"the training diverged, and its loss is not a number (see {folder.log}); try a "
            "smaller --learning-rate with --overwrite, or --accelerator cpu, which uses 32 bits"
        )
    return Finished(Path(last["best"]), last["n_epochs"], last["stopped"])


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
        # Ctrl-C reaches us alone; we then close its stdin.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Reporter:
    """Turn the records of cyto-dl's process into events."""

    def __init__(self, recipe: Recipe, emit: Emit) -> None:
        self._emit = emit
        self._max_epochs = recipe.max_epochs
        self._voxels_per_batch = math.prod(recipe.patch_shape) * recipe.patches_per_image
        self._batches_per_epoch = 1
        self._first_batch = 0
        self._best_epoch = 0
        self._best_loss = math.inf

    def report(self, record: dict[str, Any]) -> None:
        match record["event"]:
            case "started":
                self._batches_per_epoch = record["n_batches"]
                self._first_batch = record["epoch"] * record["n_batches"]
                if record["best"]:
                    self._best_epoch, self._best_loss = record["best"]
            case "batch":
                self._emit(self._progress(**record))
            case "epoch":
                self._emit(self._epoch(record))

    def _progress(
        self, *, n_done: int, elapsed_s: float, left_s: float | None, event: str
    ) -> Progress:
        n_batches = self._max_epochs * self._batches_per_epoch
        batches_per_s = max(n_done - self._first_batch, 1) / max(elapsed_s, 1e-3)
        # The time limit may come before the last finished epoch.
        ends_in_s = (n_batches - n_done) / batches_per_s
        return Progress(
            stage="training",
            n_done=n_done,
            n_tasks=n_batches,
            elapsed_s=elapsed_s,
            voxels_per_s=round(batches_per_s * self._voxels_per_batch),
            left_s=ends_in_s if left_s is None else min(ends_in_s, left_s),
        )

    def _epoch(self, record: dict[str, Any]) -> Epoch:
        loss = record["validation_loss"]
        if loss is not None and loss < self._best_loss:
            self._best_loss = loss
            self._best_epoch = record["epoch"]
        return Epoch(
            epoch=record["epoch"],
            max_epochs=self._max_epochs,
            training_loss=record["training_loss"],
            validation_loss=loss,
            best_epoch=self._best_epoch,
            elapsed_s=record["elapsed_s"],
        )
