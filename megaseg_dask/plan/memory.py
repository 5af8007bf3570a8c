"""What one worker will need at its peak, per stage, before anything starts.

Each stage is a sum of arrays that live at the same moment, counted in bytes
per voxel of the block, plus what an idle worker holds. The factors of library
calls (convolutions, codecs, component labelling) were measured; a test
measures whole stages against this projection.
"""

import ctypes
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.algorithms.components import join_bytes
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape

# Resident size of a worker with PyTorch, MONAI, Dask and zarr imported, before it has done anything.
IDLE_BYTES = 760 * 10**6

# Share of a machine's memory that workers may plan with; the rest is the client's and the system's.
BUDGET_SHARE = 0.8

# Float32 feature maps of a patch at full resolution that a DynUNet's forward pass holds at its peak on CPU: skip
# connection, concatenation, residual, convolution buffers and what the heap loses between them. Measured 9 to 11.
_FEATURE_MAPS = 12
# oneDNN stores channels in blocks of 16, also where there are fewer.
_CHANNEL_BLOCK = 16
# Compiled kernels and scratch space of a forward pass, whatever its size.
_FORWARD_BYTES = 250 * 10**6

# OpenVINO plans its buffers: 4 maps per filter at full resolution, the weights as they were and repacked, and kernels.
# It keeps all of it from one pass to the next. Measured with filters from 4 to 32.
_OPENVINO_MAPS, _OPENVINO_WEIGHTS, _OPENVINO_BYTES = 5, 3, 100 * 10**6

# The join holds fragments, not voxels. How many there are only the data know: an estimate, from a small nucleus.
_VOXELS_PER_FRAGMENT = 10_000

# Working memory of the mode per finer voxel, where all windows are mixed.
_MODE_BYTES = 16

# zarr decodes this many whole chunks of the source at a time, however little of them is read.
_CHUNKS_AT_ONCE = 10

# Making the table of a block's logits, and a table: those of Li's method, measured, are the largest.
_TABULATING_BYTES, _TABLE_BYTES = 160 * 10**6, 60 * 10**6
TABLES_READ_AHEAD = 3

# Measuring objects: temporaries of a slab, and some 100,000 objects of 450 bytes.
_MEASURING_BYTES = 150 * 10**6

# cc3d's working memory per voxel beside its labels.
_LABELLING_BYTES = 12


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the projection depends on."""

    volume_shape: Shape
    block_shape: Shape
    measure_shape: Shape
    patch_grid: PatchGrid
    offset: Shape
    first_filters: int
    n_parameters: int
    batch: int
    source_bytes: int
    chunk_bytes: int
    n_chunks: int
    scores_bytes: int
    label_bytes: int
    engine: str = "torch"
    fills_holes: bool = False
    is_automatic: bool = False
    n_inputs: int = 1
    n_outputs: int = 1
    n_models: int = 1
    is_averaged: bool = False
    # Whether forward passes take this memory, or that of a device; and how many tasks a worker has in hand.
    on_host: bool = True
    at_once: int = 1


def _largest_read_box(sizes: Sizes) -> int:
    grid = BlockGrid(sizes.volume_shape, sizes.block_shape)
    # Read boxes grow from the rim inwards: a block in the middle has halos on all sides.
    middle = tuple(n // 2 for n in grid.grid_shape)
    corners = [grid.core(middle), grid[0]]
    return max(sizes.patch_grid.read_box(core.shifted(sizes.offset)).size for core in corners)


def forward_bytes(sizes: Sizes) -> int:
    """Return the memory of one forward pass, weights included."""
    patch = Box.of(sizes.patch_grid.patch_shape).size
    # Heads with layers of their own have as many maps as the backbone has outputs.
    filters, ends = max(sizes.first_filters, sizes.n_outputs), sizes.n_inputs + sizes.n_outputs
    # Mirrored patches, and beside the logits of one pass their sum, the next sum and a mirror image.
    averaged = sizes.n_inputs + 3 * sizes.n_outputs if sizes.is_averaged else 0
    if sizes.engine == "openvino":
        # Each network keeps its own.
        maps = sizes.n_models * (_OPENVINO_MAPS * filters + ends) + averaged
        weights = 4 * sizes.n_parameters * _OPENVINO_WEIGHTS
        return 4 * patch * sizes.batch * maps + weights + sizes.n_models * _OPENVINO_BYTES
    maps = _FEATURE_MAPS * max(filters, _CHANNEL_BLOCK) + ends + averaged
    return 4 * (patch * sizes.batch * maps + sizes.n_parameters) + _FORWARD_BYTES


def project(sizes: Sizes) -> dict[str, int]:
    """Return the projected peak of a worker in each stage, in bytes."""
    core = Box.of(tuple(map(min, sizes.block_shape, sizes.volume_shape))).size
    read = _largest_read_box(sizes)
    measured = Box.of(tuple(map(min, sizes.measure_shape, sizes.volume_shape))).size
    decoded = sizes.chunk_bytes * min(sizes.n_chunks, _CHUNKS_AT_ONCE)
    # The engine stays open from one task to the next: with its weights, or with all that it ever needs.
    kept, running = 4 * sizes.n_parameters, forward_bytes(sizes)
    if sizes.engine == "openvino":
        kept, running = running, 0
    elif not sizes.on_host:
        running = 0
    # Blending holds sums and weights; turning logits into scores holds three more float32 arrays.
    logits = core * 4 * sizes.n_outputs
    segment = read * sizes.source_bytes * 2 * sizes.n_inputs + logits + core * 12 + decoded
    label = core * (1 + 2 * 4 + _LABELLING_BYTES)
    # The logits, and those of them that are known.
    table = core * 4 * 2 + _TABULATING_BYTES
    if sizes.is_automatic:
        segment += core * 4
    relabel = core * (4 + 3 * sizes.label_bytes)
    stages = {
        "measure": measured * sizes.source_bytes * 2 + 2**20 * 64 + decoded,
        "segment": max(
            segment + running,
            segment + core * (4 + sizes.scores_bytes),
        ),
        "histogram": table,
        "cutoff": _TABLE_BYTES * (TABLES_READ_AHEAD + 2),
        "threshold": core * 6,
        "holes": label + core,
        "fill": core * 7,
        "label": label,
        "seams": core,
        "join": join_bytes(Box.of(sizes.volume_shape).size // _VOXELS_PER_FRAGMENT),
        "relabel": relabel,
        "measurements": core * (sizes.label_bytes + sizes.source_bytes) * 2
        + decoded
        + _MEASURING_BYTES,
        "table": _MEASURING_BYTES,
        # Parts of 16.8 million finer voxels, and the unit that they make up.
        "downsample": min(core, 2**24) * 2 * (sizes.label_bytes + _MODE_BYTES)
        + core * sizes.label_bytes,
    }
    if core == Box.of(sizes.volume_shape).size:
        volume = core * (sizes.source_bytes * sizes.n_inputs + sizes.scores_bytes + 1)
        mask = (table if sizes.is_automatic else 0) + (stages["holes"] if sizes.fills_holes else 0)
        # One output after the other is labelled, beside the logits of all.
        others = logits if sizes.n_outputs > 1 else 0
        stages = {
            "volume": volume
            + max(stages["segment"] + mask, label + relabel + others)
            + _MEASURING_BYTES
        }
    else:
        unused = set() if sizes.fills_holes else {"holes", "fill"}
        unused |= set() if sizes.is_automatic else {"histogram", "cutoff", "threshold"}
        stages = {stage: n for stage, n in stages.items() if stage not in unused}
    return {stage: IDLE_BYTES + kept + n * sizes.at_once for stage, n in stages.items()}


# -- measuring it


def release() -> None:
    """Give freed memory back to the system, where the C library can (glibc): stages differ in what they hold."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Start a new measurement of :func:`peak_bytes`, where the kernel allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return this process's largest resident size since :func:`reset_peak`, or ever where there is no reset."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
