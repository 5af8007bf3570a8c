"""A training in cyto-dl's words: what differs from its own experiment for segmentation."""

import os
import shutil
from dataclasses import asdict

from megaseg_dask.models import Bundle, NewBundle, save_bundle
from megaseg_dask.tools.training.dataset import COLUMNS
from megaseg_dask.tools.training.folder import TrainingFolder
from megaseg_dask.tools.training.recipes import Recipe
from megaseg_dask.tools.training.request import Request

# cyto-dl caches image, mask and a mask of what counts, as float32 tensors.
_CACHED_BYTES_PER_VOXEL = 12
_MAX_LOADERS = 4

# Pictures of every epoch, and bars for a terminal; a mask of what counts, which this loss ignores.
_REMOVED = (
    "callbacks.saving",
    "callbacks.rich_progress_bar",
    "callbacks.model_summary",
    "model.task_heads.seg.mask_key",
)


def describe_experiment(
    request: Request, recipe: Recipe, bundle: Bundle | None, folder: TrainingFolder
) -> dict[str, object]:
    """Return the request of ``cytodl_main.py``, as JSON values.

    Writes the weights to start from beside the training, if there are any.
    """
    return {
        "folder": str(folder.work),
        "accelerator": request.accelerator,
        "remove": list(_REMOVED),
        "set": {
            "test": False,
            "logger": None,
            "experiment_name": recipe.name,
            "run_name": folder.out.name,
            **_data_settings(request, recipe, folder),
            **_model_settings(recipe),
            "trainer.max_epochs": recipe.max_epochs,
            "trainer.max_time": request.max_time,
            "trainer.enable_progress_bar": False,
            **_callback_settings(recipe, folder),
            **_start_settings(recipe, bundle, folder),
        },
    }


def _data_settings(request: Request, recipe: Recipe, folder: TrainingFolder) -> dict[str, object]:
    n_loaders = min(_MAX_LOADERS, os.cpu_count() or 1)
    return {
        "data.path": str(folder.data),
        "data.columns": list(COLUMNS),
        "data.batch_size": 1,
        "data.num_workers": 0 if request.accelerator == "cpu" else n_loaders,
        "data.cache_dir": str(folder.cache) if _has_room_for_cache(folder) else None,
        "data._aux.patch_shape": list(recipe.patch_shape),
        "data._aux.patch_per_image": recipe.patches_per_image,
    }


def _model_settings(recipe: Recipe) -> dict[str, object]:
    network = asdict(recipe.network)
    filters = network.pop("filters")
    backbone = {f"model.backbone.{name}": value for name, value in network.items()}
    return {
        **backbone,
        "model._aux.filters": filters,
        "model._aux.overlap": recipe.overlap,
        "model.task_heads.seg._target_": "cyto_dl.nn.head.BaseHead",
        "model.task_heads.seg.loss": {"_target_": recipe.loss, "sigmoid": True},
        "model.optimizer.generator._target_": recipe.optimizer,
        "model.optimizer.generator.lr": recipe.learning_rate,
        "model.optimizer.generator.weight_decay": recipe.weight_decay,
        "model.lr_scheduler.generator.gamma": recipe.decay,
    }


def _callback_settings(recipe: Recipe, folder: TrainingFolder) -> dict[str, object]:
    last = {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
        "dirpath": str(folder.states),
        "filename": folder.last_state.stem,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    return {
        "callbacks.model_checkpoint.dirpath": str(folder.states),
        # By default within an epoch, which would then be trained again.
        "callbacks.model_checkpoint.save_on_train_epoch_end": True,
        # Its own "last" is the last that was the best: another callback keeps each epoch.
        "callbacks.model_checkpoint.save_last": False,
        "callbacks.last": last,
        "callbacks.early_stopping.patience": recipe.patience,
    }


def _start_settings(
    recipe: Recipe, bundle: Bundle | None, folder: TrainingFolder
) -> dict[str, object]:
    """Return the checkpoint to continue from: the last epoch's, else the weights of a bundle."""
    start = None
    is_continued = folder.last_state.exists()
    if is_continued:
        start = str(folder.last_state)
    elif bundle:
        new = NewBundle(recipe.network, recipe.patch_shape, recipe.overlap, epoch=0)
        start = str(save_bundle(folder.work / "from", new, bundle.weights))
    return {
        "checkpoint.ckpt_path": start,
        "checkpoint.weights_only": bool(start) and not is_continued,
    }


def _has_room_for_cache(folder: TrainingFolder) -> bool:
    """Return whether cyto-dl's tensors would fill less than half of the free disk."""
    from tifffile import TiffFile

    n_voxels = 0
    for path in folder.data.glob("*_seg.ome.tif"):
        with TiffFile(path) as file:
            n_voxels += int(file.series[0].size)
    return n_voxels * _CACHED_BYTES_PER_VOXEL < shutil.disk_usage(folder.work).free / 2
