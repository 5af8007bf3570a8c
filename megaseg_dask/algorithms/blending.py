"""Overlapping patches become one block: a weighted sum in grid order, divided once.

Each voxel sums the same operands in the same order in every block that owns
it, so the logits are equal bit for bit at any block shape. All arithmetic is
float32, as in MONAI's ``sliding_window_inference``.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megaseg_dask.algorithms.array_library import ArrayLibrary
from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import EngineError

Float32 = NDArray[np.float32]
A = TypeVar("A")

# The score 1 in an array of uint8.
MAX_UINT8_SCORE = 255

# Voxels that fit the cache of a core.
_SLAB = 2**17

# MONAI's defaults: sigma is an eighth of the patch, weights never fall below a thousandth.
_SIGMA_SCALE = 0.125
_MIN_WEIGHT = 1e-3


class NotFiniteError(EngineError):
    """The network gave a logit that is no number; in a wider precision it may give one."""


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
    min_weight = max(float(weights.min()), _MIN_WEIGHT)
    return np.maximum(weights, min_weight, dtype=np.float32)


def blend(
    predictions: Iterable[tuple[Box, A]],
    core: Box,
    weights: A,
    library: ArrayLibrary[A],
    needed: A | None = None,
) -> A:
    """Blend patch logits ``(channels, *patch)`` into the core's logits ``(channels, *core)``.

    ``predictions`` come in grid order. They and ``weights``, ``(z, y, x)``, are
    float32 arrays of ``library``, all on one device. ``needed`` marks the voxels of the core
    of which all patches come; the others get 0.

    Raises:
        EngineError: A voxel of the core got no weight; it would pass for background.
        NotFiniteError: A logit is not finite; so would it.
    """
    total: Any = None
    weight_sum: Any = library.zeros(core.shape)
    window: Any = weights
    # Grid order, not arrival order: float addition does not commute to the last bit.
    for patch, prediction in predictions:
        logits: Any = prediction
        if total is None:
            total = library.zeros((len(logits), *core.shape))
        shared = patch & core
        inside_patch = shared.within(patch).slices
        inside_core = shared.within(core).slices
        weight_sum[inside_core] += window[inside_patch]
        total[:, *inside_core] += logits[:, *inside_patch] * window[inside_patch]
    if needed is not None and total is not None:
        others: Any = ~needed  # type: ignore[operator]
        total[:, others] = 0
        weight_sum[others] = 1
    if total is None or not weight_sum.all():
        raise EngineError(f"block {core} has voxels that no patch covers")
    total /= weight_sum
    finite: Any = library.isfinite(total)
    if not finite.all():
        raise NotFiniteError(
            f"the network returned NaN or infinity in block {core}; extreme values of the image "
            "may be the cause"
        )
    blended: A = total
    return blended


def max_score(dtype: DTypeLike) -> float:
    """Return the stored value of score 1: uint8 arrays hold multiples of 1/255."""
    return MAX_UINT8_SCORE if np.dtype(dtype) == np.uint8 else 1.0


def limit_of(threshold: float, dtype: DTypeLike) -> float:
    """Return the stored value above which, strictly, a score counts as above a threshold.

    Of multiples of 1/255 in uint8 it is a whole number.
    """
    if np.dtype(dtype).kind == "f":
        return float(np.float32(threshold))
    return math.floor(MAX_UINT8_SCORE * threshold)


def mask_of_scores(scores: NDArray[Any], threshold: float) -> NDArray[np.uint8]:
    """Return 1 where a stored score is above a threshold, strictly, else 0."""
    limit = scores.dtype.type(limit_of(threshold, scores.dtype))
    mask: NDArray[np.uint8] = (scores > limit).view(np.uint8)
    return mask


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

    Intermediate arrays stay in the cache: each is a slab, not the size of the volume.
    """
    result = np.empty(values.shape, dtype)
    flat_values = values.reshape(-1)
    flat_result = result.reshape(-1)
    for start in range(0, flat_values.size, _SLAB):
        slab = slice(start, start + _SLAB)
        flat_result[slab] = function(flat_values[slab])
    return result
