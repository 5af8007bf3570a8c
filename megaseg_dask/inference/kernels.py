"""Instance norm, leaky ReLU and residual in one pass over channels-last tensors, in Triton.

A norm reads its input twice and writes it once. Means and squared deviations are those of chunks
of voxels, merged in float32 and in a fixed order: no atomics, so the bits of a sample depend on
nothing but the sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Values of a tile, which one program holds in registers.
_TILE_VALUES = 4096
# Chunks of a sample: enough to fill a GPU, few enough to be merged by one program.
_MAX_CHUNKS = 512
_NONE, _PLAIN, _NORMALIZED = range(3)


@triton.jit
def _measure(
    values,
    moments,
    n_voxels,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write mean and squared deviations of each channel over one chunk of one sample."""
    chunk = tl.program_id(0)
    sample = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < C
    begin = values + sample.to(tl.int64) * n_voxels * C
    mean = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    n_seen = 0.0
    for first in range(0, CHUNK, TILE):
        voxel = chunk * CHUNK + first + tl.arange(0, TILE)
        is_inside = (voxel < n_voxels)[:, None] & is_channel[None, :]
        place = voxel[:, None].to(tl.int64) * C + channel[None, :]
        tile = tl.load(begin + place, mask=is_inside, other=0.0).to(tl.float32)
        n_left = tl.maximum(n_voxels - chunk * CHUNK - first, 0)
        n_new = tl.minimum(n_left, TILE).to(tl.float32)
        new_mean = tl.sum(tile, 0) / tl.maximum(n_new, 1.0)
        centered = tl.where(is_inside, tile - new_mean[None, :], 0.0)
        n_all = n_seen + n_new
        share = n_new / tl.maximum(n_all, 1.0)
        step = new_mean - mean
        squares += tl.sum(centered * centered, 0) + step * step * n_seen * share
        mean += step * share
        n_seen = n_all
    out = moments + (sample * tl.num_programs(0) + chunk) * 2 * C + channel
    tl.store(out, mean, mask=is_channel)
    tl.store(out + C, squares, mask=is_channel)


@triton.jit
def _merge(
    moments,
    weight,
    bias,
    affine,
    n_voxels,
    n_chunks,
    epsilon,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write factor and summand of each channel of one sample, from the moments of its chunks."""
    sample = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < C
    begin = moments + sample * n_chunks * 2 * C
    mean = tl.zeros([WIDTH], tl.float32)
    for first in range(0, n_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        is_inside = (chunk < n_chunks)[:, None] & is_channel[None, :]
        place = begin + chunk[:, None] * 2 * C + channel[None, :]
        n_new = tl.maximum(tl.minimum(n_voxels - chunk * CHUNK, CHUNK), 0).to(tl.float32)
        share = n_new / n_voxels
        mean += tl.sum(tl.load(place, mask=is_inside, other=0.0) * share[:, None], 0)
    squares = tl.zeros([WIDTH], tl.float32)
    for first in range(0, n_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        is_inside = (chunk < n_chunks)[:, None] & is_channel[None, :]
        place = begin + chunk[:, None] * 2 * C + channel[None, :]
        n_new = tl.maximum(tl.minimum(n_voxels - chunk * CHUNK, CHUNK), 0).to(tl.float32)
        step = tl.load(place, mask=is_inside, other=0.0) - mean[None, :]
        within = tl.load(place + C, mask=is_inside, other=0.0)
        squares += tl.sum(within + step * step * n_new[:, None], 0)
    gain = tl.rsqrt(squares / n_voxels + epsilon)
    gain *= tl.load(weight + channel, mask=is_channel, other=0.0)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0) - mean * gain
    out = affine + sample * 2 * C + channel
    tl.store(out, gain, mask=is_channel)
    tl.store(out + C, shift, mask=is_channel)


@triton.jit
def _apply(
    values,
    affine,
    residual,
    residual_affine,
    first_out,
    second_out,
    n_voxels,
    second_stride,
    slope,
    C: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TWICE: tl.constexpr,
):
    """Write the activation of one tile of one sample, to one place or two.

    Rows of the second place may be longer: it is a part of a concatenation.
    """
    sample = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < C
    voxel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_inside = (voxel < n_voxels)[:, None] & is_channel[None, :]
    row = sample.to(tl.int64) * n_voxels + voxel.to(tl.int64)
    place = row[:, None] * C + channel[None, :]
    row_affine = affine + sample * 2 * C + channel
    gain = tl.load(row_affine, mask=is_channel)
    shift = tl.load(row_affine + C, mask=is_channel)
    tile = tl.load(values + place, mask=is_inside).to(tl.float32)
    tile = tile * gain[None, :] + shift[None, :]
    if RESIDUAL:
        other = tl.load(residual + place, mask=is_inside).to(tl.float32)
        if RESIDUAL == 2:
            row_affine = residual_affine + sample * 2 * C + channel
            gain = tl.load(row_affine, mask=is_channel)
            shift = tl.load(row_affine + C, mask=is_channel)
            other = other * gain[None, :] + shift[None, :]
        tile += other
    tile = tl.where(tile > 0, tile, tile * slope)
    tl.store(first_out + place, tile.to(first_out.dtype.element_ty), mask=is_inside)
    if TWICE:
        place = row[:, None] * second_stride + channel[None, :]
        tl.store(second_out + place, tile.to(second_out.dtype.element_ty), mask=is_inside)


def norm_act(
    values: torch.Tensor,
    norm: torch.nn.InstanceNorm3d,
    slope: float,
    residual: torch.Tensor | None = None,
    residual_norm: torch.nn.InstanceNorm3d | None = None,
    copy_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the leaky ReLU of a norm, plus a residual, ``(n, c, z, y, x)`` channels last.

    The residual is normalized too if it has a norm. ``copy_to`` gets the same values: some
    channels of a tensor that is channels last.
    """
    affine = _affine(values, norm)
    residual_affine = affine
    kind = _NONE
    if residual is not None:
        kind = _PLAIN
        if residual_norm is not None:
            kind = _NORMALIZED
            residual_affine = _affine(residual, residual_norm)
    n_samples, n_channels = values.shape[:2]
    n_voxels = values[0, 0].numel()
    width = triton.next_power_of_2(n_channels)
    tile = _tile(width)
    activation = torch.empty_like(values)
    second = activation if copy_to is None else copy_to
    _apply[(triton.cdiv(n_voxels, tile), n_samples)](
        values,
        affine,
        values if residual is None else residual,
        residual_affine,
        activation,
        second,
        n_voxels,
        second.stride(4),
        slope,
        C=n_channels,
        TILE=tile,
        WIDTH=width,
        RESIDUAL=kind,
        TWICE=copy_to is not None,
        num_warps=8,
    )
    return activation


def _affine(values: torch.Tensor, norm: torch.nn.InstanceNorm3d) -> torch.Tensor:
    """Return factor and summand of each channel, float32 ``(n, 2, c)``."""
    n_samples, n_channels = values.shape[:2]
    n_voxels = values[0, 0].numel()
    width = triton.next_power_of_2(n_channels)
    tile = _tile(width)
    chunk = max(tile, triton.next_power_of_2(triton.cdiv(n_voxels, _MAX_CHUNKS)))
    n_chunks = triton.cdiv(n_voxels, chunk)
    options: dict[str, Any] = {"dtype": torch.float32, "device": values.device}
    moments = torch.empty((n_samples, n_chunks, 2, n_channels), **options)
    affine = torch.empty((n_samples, 2, n_channels), **options)
    sizes = {"C": n_channels, "CHUNK": chunk, "WIDTH": width}
    _measure[(n_chunks, n_samples)](values, moments, n_voxels, TILE=tile, num_warps=8, **sizes)
    _merge[(n_samples,)](
        moments,
        norm.weight,
        norm.bias,
        affine,
        n_voxels,
        n_chunks,
        norm.eps,
        ROWS=tile,
        num_warps=8,
        **sizes,
    )
    return affine


def _tile(width: int) -> int:
    """Return the voxels of a tile."""
    return max(16, _TILE_VALUES // width)
