"""What ``megaseg plan`` shows: the work of a plan, and what it reads, writes and takes."""

import math

import numpy as np

from megaseg_dask.algorithms.components import label_dtype
from megaseg_dask.algorithms.geometry import PatchGrid
from megaseg_dask.plan.plan import Plan


def summarize(plan: Plan) -> dict[str, object]:
    """Return what a plan is about and costs, as JSON values."""
    images = {volume.image for volume in plan.volumes}
    return {
        "source": plan.source.url,
        "target": plan.target.url,
        "fingerprint": plan.fingerprint,
        "volumes": len(plan.volumes),
        "volume_shape": plan.volume_shape,
        "fields": len(images) if plan.plate else None,
        "field_paths": plan.field_paths,
        # Fields that a plate lists and lacks, and why; such a run will end as failed.
        "missing": dict(plan.plate.missing) if plan.plate else {},
        "dtype": plan.source_image.dtype,
        "channels": plan.channel_texts,
        "model": {
            "name": plan.model.name,
            "digest": plan.model.digest,
            "parameters": plan.n_parameters,
            "outputs": plan.model.outputs,
        },
        "engine": plan.engine.record(plan.batch),
        **_voxels(plan),
        "groups": list(plan.groups),
        **_patches(plan),
        "block_shape": plan.block_shape,
        "blocks": len(plan.block_grid()),
        "redundancy": _redundancy(plan),
        "where": _where(plan),
        # Voxels of the largest box of an object that is split, with one voxel around it.
        "split_voxels": plan.split_voxels if plan.resolved.splits_objects() else None,
        **_traffic(plan, len(images)),
        "label_dtype": str(label_dtype(plan.volume_shape)),
        "memory_bytes": plan.memory_bytes,
        "projected_bytes": plan.projected_bytes,
        "device_bytes": plan.device_bytes,
        "stages": {stage.name: stage.n_tasks for stage in plan.stages},
        "options": plan.resolved.options(),
        "warnings": plan.warnings,
    }


def _voxels(plan: Plan) -> dict[str, object]:
    """Return the sizes of the voxels of the source and of the model, ``None`` if unknown."""
    form = plan.source_form
    return {
        "voxel_size_um": None if form.unknown_size else form.spacing_um,
        "model_voxel_size_um": plan.model_voxel_size_um,
        "times_model_voxel": form.times(plan.model_voxel_size_um),
        # The voxels that the network sees, of a whole volume.
        "grid_shape": plan.patch_grid.volume_shape,
        "is_resampled": not plan.patch_grid.resampling.is_identity,
    }


def _patches(plan: Plan) -> dict[str, object]:
    grid = plan.patch_grid
    auto = PatchGrid(grid.volume_shape, plan.auto_patch, grid.overlap)
    voxels = math.prod(plan.volume_shape)
    n_patches = grid.count_touching(plan.region)
    return {
        "patch_shape": grid.patch_shape,
        "overlap": grid.overlap,
        "patches": n_patches,
        "patch_voxels_per_voxel": round(n_patches * math.prod(grid.patch_shape) / voxels, 2),
        "auto_patch_shape": plan.auto_patch,
        "auto_patch_voxels_per_voxel": round(len(auto) * math.prod(auto.patch_shape) / voxels, 2),
    }


def _redundancy(plan: Plan) -> float:
    """Return how often a patch is predicted, on average."""
    n_patches = plan.patch_grid.count_touching(plan.region) * len(plan.volumes)
    if plan.surveys:
        n_patches = sum(each.n_patches for each in plan.surveys)
    return round(plan.n_predicted / n_patches, 3)


def _where(plan: Plan) -> dict[str, object] | None:
    """Return what a mask saves, of all volumes together; ``None`` if there is none."""
    if not plan.surveys:
        return None
    n_volumes = len(plan.volumes)
    n_blocks = n_volumes * len(plan.block_grid())
    n_left_out = sum(each.n_blocks_left_out for each in plan.surveys)
    everywhere = plan.patch_grid.count_predicted(plan.block_shape, plan.region) * n_volumes
    n_voxels = sum(each.n_voxels for each in plan.surveys)
    return {
        "voxels": round(n_voxels / (math.prod(plan.volume_shape) * n_volumes), 4),
        "blocks": n_blocks,
        "blocks_left_out": n_left_out,
        "predictions": plan.n_predicted,
        "predictions_left_out": everywhere - plan.n_predicted,
    }


def _traffic(plan: Plan, n_images: int) -> dict[str, object]:
    voxels = math.prod(plan.volume_shape)
    n_read = _count_read(plan)
    source_bytes = np.dtype(plan.source_image.dtype).itemsize
    item_bytes = {
        "labels": label_dtype(plan.volume_shape).itemsize,
        "mask": 1,
        "scores": np.dtype(plan.resolved.scores_dtype).itemsize,
    }
    n_written = n_images * sum(math.prod(level.shape) for level in plan.target_image.levels)
    intermediate = sum(np.dtype(dtype).itemsize for dtype in plan.intermediates.values())
    return {
        "bytes_read": n_read * source_bytes,
        "read_amplification": round(
            n_read / voxels / len(plan.volumes) / plan.model.in_channels, 2
        ),
        "bytes_written": n_written * sum(item_bytes[kind] for kind in plan.arrays),
        # Of one volume: they are removed when it is finished.
        "bytes_intermediate": voxels * len(plan.model.outputs) * intermediate,
    }


def _count_read(plan: Plan) -> int:
    """Return the voxels of the source that are read for all volumes."""
    n_volumes = len(plan.volumes)
    predicted = plan.patch_grid.count_read(plan.block_shape, plan.region) * n_volumes
    if plan.surveys and not plan.is_one_task:
        of_blocks = plan.patch_grid.voxels_read(plan.block_shape, plan.region)
        is_predicted = [each.patches_of_blocks > 0 for each in plan.surveys]
        predicted = sum(int(of_blocks[blocks].sum()) for blocks in is_predicted)
    # Statistics take one more read, except where a volume is read once for all.
    is_measured = plan.measure_level is not None and not plan.is_one_task
    measured = math.prod(plan.measure_grid.volume_shape) * n_volumes if is_measured else 0
    n_read = (predicted + measured) * plan.model.in_channels
    if plan.resolved.measures_objects() and not plan.is_one_task:
        n_read += math.prod(plan.volume_shape) * n_volumes
    return n_read
