"""One training: what was asked for, cyto-dl in its process, and the bundle at the end.

All that cyto-dl needs and writes is in OUT/training. Its last checkpoint lets
the same command go on; the best one becomes the bundle, when training is over.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megaseg_dask.errors import (
    BundleError,
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.events import Trained
from megaseg_dask.models import (
    Bundle,
    NewBundle,
    Preprocessing,
    load_bundle,
    require_patch,
    save_bundle,
)
from megaseg_dask.models.registry import load
from megaseg_dask.run.lease import Leases
from megaseg_dask.stores import Location
from megaseg_dask.tools.training.card import write_card
from megaseg_dask.tools.training.cytodl_process import Emit, run_inside
from megaseg_dask.tools.training.environment import find_python
from megaseg_dask.tools.training.manifest import (
    Example,
    digest_of,
    read_examples,
    split_examples,
    write_examples,
)
from megaseg_dask.tools.training.recipes import RECIPES, Recipe

# Not "checkpoints": a training that is not over is no bundle.
WORK, STATES, RECORD = "training", "states", "request.json"
BUNDLE_FILES = ("train_config.yaml", "metrics.csv", "curves.png")
CARD = "MODEL_CARD.md"
# Image, mask and the mask of what counts, as float32 tensors: what cyto-dl keeps of each voxel on disk.
_CACHED_BYTES = 12


@dataclass(frozen=True, slots=True)
class Request:
    """What to train, on what; ``None`` leaves a value to the recipe."""

    manifest: str
    recipe: str
    out: str
    start: str | None = None
    channel: str | None = None
    label: str | None = None
    validation: float = 0.2
    patch: tuple[int, int, int] | None = None
    patches_per_image: int | None = None
    learning_rate: float | None = None
    max_epochs: int | None = None
    patience: int | None = None
    max_time: str | None = None
    accelerator: str = "auto"
    overwrite: bool = False


def train(request: Request, emit: Emit) -> Trained:
    """Train a recipe, or go on where it stopped, and write the bundle with its card.

    Raises :class:`SettingsError`, :class:`~megaseg_dask.errors.SourceError` and :class:`TargetError` before anything
    is written, and :class:`TaskError` if cyto-dl fails or the training diverges.
    """
    recipe, begin = _recipe(request)
    require_patch(recipe.network, recipe.patch_shape)
    read = read_examples(request.manifest, request.channel, request.label)
    examples = split_examples(read, request.validation, recipe.patch_shape)
    python, out = find_python(), Path(request.out).expanduser().absolute()
    identity = _identity(request, recipe, begin, examples)
    _require_ours(out, identity, overwrite=request.overwrite)
    work = out / WORK
    if not request.overwrite:
        _require_more_epochs(work, recipe)
    with _removed_if_refused(out), _writing(out):
        work.mkdir(parents=True, exist_ok=True)
        with Leases(Location.of(work)).hold():
            if request.overwrite:
                _clear(out)
            record = _read_record(work) or identity
            ends = {"max_epochs": recipe.max_epochs, "max_time": request.max_time}
            done = record.get("done")
            # More epochs or more time do not change what a training that ran out of patience has become.
            is_there = (out / "checkpoints").is_dir()
            if done and is_there and (record["ends"] == ends or done["stopped"] == "patience"):
                return Trained(**done | {"already_done": True})
            _write_record(work, identity)
            counts = write_examples(examples, work / "data")
            changes = _changes(request, recipe, begin, work, counts)
            finished = run_inside(python, changes, work, recipe, emit)
            result = _publish(out, recipe, request, finished, counts)
            fields = asdict(result)
            del fields["already_done"]
            _write_record(work, identity | {"ends": ends, "done": fields})
            for name in ("cache", "data"):
                shutil.rmtree(work / name, ignore_errors=True)
            return result


@contextmanager
def _removed_if_refused(out: Path) -> Iterator[None]:
    """Leave nothing of a training that was refused before it began, where nothing was."""
    was_there, had_work = out.exists(), (out / WORK).exists()
    try:
        yield
    except (SettingsError, SourceError):
        if not had_work:
            shutil.rmtree(out / WORK, ignore_errors=True)
            if not was_there:
                with suppress(OSError):
                    out.rmdir()
        raise


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Name the folder and the next step where it cannot be written."""
    try:
        yield
    except MegasegError:
        raise
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written: {error.strerror or error}; make room, or mend that, and run the "
            "same command again"
        ) from error


def _recipe(request: Request) -> tuple[Recipe, Bundle | None]:
    """Return the recipe with what was asked for in its place, and the bundle to begin from, whose network counts."""
    if request.recipe not in RECIPES:
        raise SettingsError(f"--recipe {request.recipe}: there are {', '.join(RECIPES)}")
    recipe = RECIPES[request.recipe]
    given: dict[str, Any] = {
        "patch_shape": request.patch,
        "patches_per_image": request.patches_per_image,
        "learning_rate": request.learning_rate,
        "max_epochs": request.max_epochs,
        "patience": request.patience,
    }
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if request.start is None:
        return recipe, None
    try:
        _, bundle = load(request.start)
    except BundleError as error:
        raise BundleError(f"--from {str(error).removeprefix('--model ')}") from error
    if (bundle.network.in_channels, bundle.network.out_channels) != (
        1,
        1,
    ) or bundle.preprocessing != Preprocessing():
        raise BundleError(
            f"--from {request.start}: only a network with one channel in and one out, on images that "
            "are normalised by a z-score alone, is trained"
        )
    if not bundle.is_plain:
        raise BundleError(f"--from {request.start}: a head with layers of its own is not trained")
    return replace(recipe, network=bundle.network), bundle


def _identity(
    request: Request, recipe: Recipe, begin: Bundle | None, examples: list[Example]
) -> dict[str, Any]:
    """What may not change between a training and its continuation; when it ends, and where it runs, may."""
    fields = {key: value for key, value in asdict(recipe).items() if key != "max_epochs"}
    start = begin.digest if begin else None
    identity = {"recipe": fields, "from": start, "examples": digest_of(examples)}
    # As JSON has it: what is compared later was read from JSON.
    as_json: dict[str, Any] = json.loads(json.dumps(identity))
    return as_json


def _require_ours(out: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Raise :class:`TargetError` unless OUT is new, empty, or of the same training (of any, to be overwritten)."""
    try:
        there = out.exists() and any(out.iterdir())
    except OSError as error:
        raise TargetError(f"{out} is not a folder to write to: {error.strerror}") from error
    if not there:
        return
    record = _read_record(out / WORK)
    if record is None:
        raise TargetError(
            f"{out} holds something else than a training; choose a new or empty folder"
        )
    differing = [key for key, value in identity.items() if record.get(key) != value]
    if differing and not overwrite:
        changed = (
            "the images"
            if differing == ["examples"]
            else "other options, another recipe or other images"
        )
        raise TargetError(
            f"{out} holds a training with {changed}; choose another folder, or pass --overwrite"
        )


def _require_more_epochs(work: Path, recipe: Recipe) -> None:
    """Raise :class:`SettingsError` if more epochs are trained than are asked for."""
    table = work / "metrics.csv"
    n_trained = len(table.read_text().splitlines()) - 1 if table.exists() else 0
    if recipe.max_epochs < n_trained:
        raise SettingsError(
            f"--max-epochs {recipe.max_epochs}: {n_trained} epochs are trained already; ask for as many or more to go "
            "on, or begin anew with --overwrite"
        )


def _read_record(work: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((work / RECORD).read_text()))
    except (OSError, ValueError):
        return None


def _write_record(work: Path, record: dict[str, Any]) -> None:
    part = work / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1))
    part.replace(work / RECORD)


def _clear(out: Path) -> None:
    """Remove what an earlier training wrote, and nothing else."""
    for path in (out / "checkpoints", *(out / WORK / name for name in (STATES, "cache", "data"))):
        shutil.rmtree(path, ignore_errors=True)
    for path in (
        *map(out.joinpath, (*BUNDLE_FILES, CARD)),
        *map((out / WORK).joinpath, (RECORD, "metrics.csv")),
    ):
        path.unlink(missing_ok=True)


# -- in cyto-dl's words


def _changes(
    request: Request, recipe: Recipe, begin: Bundle | None, work: Path, counts: dict[str, int]
) -> dict[str, Any]:
    """Return the request of ``inside.py``: what is different from cyto-dl's own experiment."""
    last = work / STATES / "last.ckpt"
    start = last if last.exists() else _start(recipe, begin, work) if begin else None
    network = json.loads(json.dumps(asdict(recipe.network)))
    return {
        "folder": str(work),
        "accelerator": request.accelerator,
        # Pictures of every epoch and bars for a terminal; a mask of what counts, which this loss does not take.
        "remove": [
            "callbacks.saving",
            "callbacks.rich_progress_bar",
            "callbacks.model_summary",
            "model.task_heads.seg.mask_key",
        ],
        "set": {
            "test": False,
            "logger": None,
            "experiment_name": recipe.name,
            "run_name": work.parent.name,
            "data.path": str(work / "data"),
            "data.columns": ["raw", "seg1", "base_image"],
            "data.batch_size": 1,
            "data.num_workers": 0 if request.accelerator == "cpu" else min(4, os.cpu_count() or 1),
            "data.cache_dir": _cache(work),
            "data._aux.patch_shape": list(recipe.patch_shape),
            "data._aux.patch_per_image": recipe.patches_per_image,
            **{
                f"model.backbone.{key}": value for key, value in network.items() if key != "filters"
            },
            "model._aux.filters": network["filters"],
            "model._aux.overlap": recipe.overlap,
            "model.task_heads.seg._target_": "cyto_dl.nn.head.BaseHead",
            "model.task_heads.seg.loss": {"_target_": recipe.loss, "sigmoid": True},
            "model.optimizer.generator._target_": recipe.optimizer,
            "model.optimizer.generator.lr": recipe.learning_rate,
            "model.optimizer.generator.weight_decay": recipe.weight_decay,
            "model.lr_scheduler.generator.gamma": recipe.decay,
            "trainer.max_epochs": recipe.max_epochs,
            "trainer.max_time": request.max_time,
            "trainer.enable_progress_bar": False,
            "callbacks.model_checkpoint.dirpath": str(work / STATES),
            # By default within an epoch, which would then be learnt again.
            "callbacks.model_checkpoint.save_on_train_epoch_end": True,
            # What it calls last is the last that was the best; so each epoch is kept by a callback of its own.
            "callbacks.model_checkpoint.save_last": False,
            "callbacks.last": {
                "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                "dirpath": str(work / STATES),
                "filename": "last",
                "save_on_train_epoch_end": True,
                "enable_version_counter": False,
            },
            "callbacks.early_stopping.patience": recipe.patience,
            "checkpoint.ckpt_path": str(start) if start else None,
            "checkpoint.weights_only": bool(start) and start != last,
        },
    }


def _start(recipe: Recipe, begin: Bundle, work: Path) -> Path:
    new = NewBundle(recipe.network, recipe.patch_shape, recipe.overlap, epoch=0)
    return save_bundle(work / "from", new, begin.weights)


def _cache(work: Path) -> str | None:
    """Where cyto-dl may keep its tensors, if they take less than half of the room that is there."""
    from tifffile import TiffFile

    n_voxels = 0
    for path in (work / "data").glob("*_seg.ome.tif"):
        with TiffFile(path) as file:
            n_voxels += int(file.series[0].size)
    room = shutil.disk_usage(work).free / 2
    return str(work / "cache") if n_voxels * _CACHED_BYTES < room else None


# -- the bundle


def _publish(
    out: Path, recipe: Recipe, request: Request, finished: dict[str, Any], counts: dict[str, int]
) -> Trained:
    """Copy the best checkpoint, its configuration and the curves to OUT, and write the card beside them."""
    work, best, part = out / WORK, Path(finished["best"]), out / WORK / "checkpoints.part"
    for name in BUNDLE_FILES:
        shutil.copyfile(work / name, out / name)
    # The checkpoint comes last and at once: a folder without it is no bundle yet.
    for folder in (part, out / "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir()
    shutil.copyfile(best, part / best.name)
    part.replace(out / "checkpoints")
    bundle = load_bundle(out)
    losses = write_card(out, bundle, recipe, request.manifest, counts, finished)
    return Trained(
        bundle=str(out),
        digest=bundle.digest,
        n_epochs=finished["n_epochs"],
        best_epoch=losses.best_epoch,
        best_loss=losses.best_loss,
        stopped=finished["stopped"],
        wall_s=losses.wall_s,
    )
