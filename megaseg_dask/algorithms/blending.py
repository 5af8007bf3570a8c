"""Overlapping patches become one block: a weighted sum in grid order, divided once.

Each voxel sums the same operands in the same order in every block that owns
it, so the logits are equal bit for bit at any block shape. All arithmetic is
float32 on contiguous arrays, as in MONAI's ``sliding_window_inference``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import EngineError

Float32 = NDArray[np.float32]

# Voxels that fit the cache of a core.
_SLAB = 2**17

# MONAI's defaults: sigma is an eighth of the patch, weights never fall below a thousandth.
_SIGMA_SCALE = 0.125
_LEAST_WEIGHT = 1e-3


def window(patch_shape: Shape, mode: str = "gaussian") -> Float32:
    """Return the weight of each voxel of a patch, float32 ``(z, y, x)``.

    ``gaussian`` follows MONAI's ``compute_importance_map``; ``constant`` is one.
    """
    if mode == "constant":
        return np.ones(patch_shape, np.float32)
    weights = np.ones((), np.float32)
    for extent in patch_shape:
        offset = np.arange(extent, dtype=np.float32) - np.float32((extent - 1) / 2)
        sigma = extent * _SIGMA_SCALE
        weights = weights[..., None] * np.exp(offset**2 / np.float32(-2 * sigma**2))
    return np.maximum(weights, max(float(weights.min()), _LEAST_WEIGHT), dtype=np.float32)


def blend(predictions: Iterable[tuple[Box, Float32]], core: Box, weights: Float32) -> Float32:
    """Blend patch logits ``(channels, *patch)`` into the core's logits ``(channels, *core)``.

    ``predictions`` must come in grid order. Raises :class:`EngineError` if a
    voxel of the core got no weight, or no number: it would pass for background.
    """
    total: Float32 | None = None
    weight_sum = np.zeros(core.shape, np.float32)
    # Grid order, not arrival order: float addition does not commute to the last bit.
    for patch, logits in predictions:
        if total is None:
            total = np.zeros((len(logits), *core.shape), np.float32)
        shared = patch & core
        inside_patch, inside_core = shared.within(patch).slices, shared.within(core).slices
        weight_sum[inside_core] += weights[inside_patch]
        for channel, logit in zip(total, logits, strict=True):
            channel[inside_core] += logit[inside_patch] * weights[inside_patch]
    if total is None or not weight_sum.all():
        raise EngineError(
            f"block {core} has voxels that no patch covers; the patch grid skips voxels"
        )
    total /= weight_sum
    if not np.isfinite(total).all():
        raise EngineError(
            f"the network gave NaN or infinity in block {core}; the image's extremes may overflow it"
        )
    return total


def sigmoid(logits: Float32) -> Float32:
    """Return ``1 / (1 + exp(-logits))`` in float32."""
    # exp of a large number is inf, and 1 / inf the right answer.
    with np.errstate(over="ignore"):
        return in_slabs(
            lambda part: np.float32(1) / (np.float32(1) + np.exp(-part)),
            logits,
            np.dtype(np.float32),
        )


def in_slabs(
    function: Callable[[NDArray[Any]], NDArray[Any]], values: NDArray[Any], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return ``function`` of each voxel, as ``dtype``.

    What is in between stays in the cache, rather than in fresh memory of the size of the volume.
    """
    result = np.empty(values.shape, dtype)
    flat, found = values.reshape(-1), result.reshape(-1)
    for start in range(0, flat.size, _SLAB):
        slab = slice(start, start + _SLAB)
        found[slab] = function(flat[slab])
    return result
