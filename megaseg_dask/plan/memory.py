"""The peak memory of one worker in each stage, known before anything starts.

The memory of a stage is the sum of the arrays that live at the same moment, in bytes
per voxel of the block, plus that of an idle worker. The factors of library calls
(convolutions, codecs, component labelling) were measured, and a test measures whole
stages against this projection. :mod:`megaseg_dask.plan.stages` declares which function
belongs to which stage.
"""

from dataclasses import dataclass

from megaseg_dask.algorithms.components import join_bytes
from megaseg_dask.algorithms.regions import MAX_BOX_VOXELS
from megaseg_dask.algorithms.splitting import SPLIT_BYTES
from megaseg_dask.inference.engine import ENGINES, EngineSpec, Forward

# Resident size of a worker with PyTorch, MONAI, Dask and zarr imported, that has converted a
# network, before its first task.
IDLE_BYTES = 820 * 10**6

# Share of a machine's memory that workers may plan with; the rest is the client's and the system's.
BUDGET_SHARE = 0.8
# Client and scheduler of a local run, which are one process.
CLIENT_BYTES = 600 * 10**6

# The join holds fragments, not voxels. Their number depends on the data: this is an estimate, from
# the size of a small nucleus.
_VOXELS_PER_FRAGMENT = 10_000

# Working memory of the mode per finer voxel, if no window has one value alone.
_MODE_BYTES = 16
# Finer voxels from which a coarser level is computed at a time.
_MAX_MODE_VOXELS = 2**24

# zarr decodes this many whole chunks of the source at a time, however little of them is read.
MAX_DECODED_CHUNKS = 10

# Making the table of a block's logits, and the table itself. Measured for Li's method, whose tables
# are the largest.
_TABULATING_BYTES = 160 * 10**6
_TABLE_BYTES = 60 * 10**6
TABLES_READ_AHEAD = 3

# Sums of one part of the fixed partition.
_STATISTICS_BYTES = 64 * 2**20

# Measuring objects: temporaries of a slab, and some 100,000 objects of 2000 bytes.
_MEASURING_BYTES = 300 * 10**6

# Boxes of fragments and objects while they are joined, per fragment.
SPLIT_JOIN_BYTES = 160
# Every plan can split an object of this padded box; larger ones, if there is memory left.
LEAST_SPLIT_VOXELS = 2**20

# Place and part of a voxel of a split object, twice while they are packed.
_PART_BYTES = 16

# Ids of regions, those inside objects, and what is compared of both, per voxel.
_REGION_BYTES = 40

# Ids and mask of the box of a region, and its surface.
_BOX_BYTES = 20

# cc3d's working memory per voxel beside its labels.
_LABELLING_BYTES = 12


# Of a GPU, estimated and not measured yet: a context of CUDA with the kernels of cuDNN, its
# scratch space beside the maps of a pass, and bytes of a value in each precision.
_CONTEXT_BYTES = 600 * 10**6
_SCRATCH_BYTES = 500 * 10**6
PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Voxels of boxes and bytes of voxels, from which the memory of a task follows."""

    volume_voxels: int
    # Of a block: its core, the box that it reads, and the box that a task of ``measure`` reads.
    core_voxels: int
    read_voxels: int
    measured_voxels: int
    # What a block takes beside that where patches lie on a grid of their own.
    resampling_bytes: int
    # Reading and keeping the block's part of a mask.
    mask_bytes: int
    # Chunks of the source that are decoded at a time.
    decoded_bytes: int
    source_bytes: int
    scores_bytes: int
    label_bytes: int
    # A forward pass on the host: what is on its way to a device, and 0 for an engine that keeps its
    # memory.
    forward_bytes: int
    n_inputs: int
    # Channels of which intensities are measured, if any are.
    n_measured: int
    has_regions: bool
    n_outputs: int
    finds_threshold: bool
    fills_holes: bool
    # Of the largest padded box of an object to split; 0 if none is split.
    split_voxels: int

    @property
    def logits_bytes(self) -> int:
        """Blended logits of all outputs of a block."""
        return self.core_voxels * 4 * self.n_outputs


def decoded_bytes(chunk_bytes: int, n_chunks: int) -> int:
    """Return the bytes of the source's chunks that are decoded at a time."""
    return chunk_bytes * min(n_chunks, MAX_DECODED_CHUNKS)


def resampling_bytes(*, there: int, back: int, blended: int) -> int:
    """Return the bytes of a block on a grid of its own, in float32.

    ``there`` and ``back`` are all voxels that live at once while it is resampled, and
    ``blended`` those whose sums, weights and comparisons live in between.
    """
    return 4 * (there + back + 3 * blended)


@dataclass(frozen=True, slots=True)
class EngineBytes:
    """Memory of an engine on the host."""

    # From one task to the next, and in addition during a forward pass.
    kept: int
    forward: int

    @classmethod
    def of(cls, engine: EngineSpec, forward: Forward) -> "EngineBytes":
        """Return the memory of an engine that makes these forward passes."""
        memory = ENGINES[engine.engine].memory
        n_bytes = memory.forward_bytes(forward)
        if memory.is_kept:
            return cls(n_bytes, 0)
        weights = 4 * forward.n_parameters
        if engine.device != "cpu":
            return cls(weights, 0)
        return cls(weights, n_bytes)


def device_bytes(sizes: Sizes, engine: EngineSpec, forward: Forward) -> int:
    """Return the memory of a GPU that predicts a block, in bytes; 0 on a CPU."""
    if engine.device == "cpu":
        return 0
    # Voxels as they are stored, or prepared by the host; sums of logits and of weights; scores and
    # what they are rounded from.
    block = sizes.read_voxels * min(sizes.source_bytes, 4) * sizes.n_inputs
    block += sizes.core_voxels * (4 * sizes.n_outputs + 4 + 8) + sizes.resampling_bytes
    maps = ENGINES[engine.engine].memory.n_maps * forward.n_filters
    maps += forward.n_inputs + forward.n_outputs
    values = forward.patch_voxels * forward.batch * maps + forward.n_parameters
    forward_bytes = values * PRECISION_BYTES[engine.precision] + 4 * forward.n_parameters
    return _CONTEXT_BYTES + _SCRATCH_BYTES + block + forward_bytes


def pinned_bytes(sizes: Sizes) -> int:
    """Return the memory of the host that a block takes on its way to a GPU: powers of two."""
    values = sizes.read_voxels * min(sizes.source_bytes, 4) * sizes.n_inputs
    return 1 << max(values - 1, 0).bit_length()


# -- of each stage


def measure_bytes(sizes: Sizes) -> int:
    """Return the bytes of measuring a block of the source."""
    return sizes.measured_voxels * sizes.source_bytes * 2 + _STATISTICS_BYTES + sizes.decoded_bytes


def segment_bytes(sizes: Sizes) -> int:
    """Return the bytes of predicting a block, or of turning its logits into scores if more."""
    core = sizes.core_voxels
    # Blending holds sums and weights; turning logits into scores holds three more float32 arrays.
    blended = sizes.read_voxels * sizes.source_bytes * 2 * sizes.n_inputs
    blended += sizes.logits_bytes + core * 12 + sizes.decoded_bytes
    blended += sizes.resampling_bytes + sizes.mask_bytes
    if sizes.finds_threshold:
        blended += core * 4
    # Scores and a mask of all outputs, beside the logits.
    written = max(4 + sizes.scores_bytes, sizes.n_outputs * (sizes.scores_bytes + 1))
    return blended + max(sizes.forward_bytes, core * written)


def reread_bytes(sizes: Sizes) -> int:
    """Return the bytes of turning a block's stored scores or logits into a mask."""
    return sizes.core_voxels * (4 + 1 + 4)


def histogram_bytes(sizes: Sizes) -> int:
    """Return the bytes of making the table of a block's logits: all, and the known ones."""
    return sizes.core_voxels * 4 * 2 + _TABULATING_BYTES


def cutoff_bytes(_: Sizes) -> int:
    """Return the bytes of merging the tables of all blocks."""
    return _TABLE_BYTES * (TABLES_READ_AHEAD + 2)


def threshold_bytes(sizes: Sizes) -> int:
    """Return the bytes of turning a block's logits into a mask."""
    return sizes.core_voxels * 6


def holes_bytes(sizes: Sizes) -> int:
    """Return the bytes of labelling the background of a block."""
    return label_bytes(sizes) + sizes.core_voxels


def fill_bytes(sizes: Sizes) -> int:
    """Return the bytes of filling the holes of a block."""
    return sizes.core_voxels * 7


def label_bytes(sizes: Sizes) -> int:
    """Return the bytes of labelling the mask of a block."""
    return sizes.core_voxels * (1 + 2 * 4 + _LABELLING_BYTES)


def seams_bytes(sizes: Sizes) -> int:
    """Return the bytes of pairing the fragments of a block with those of its neighbors."""
    return sizes.core_voxels


def joining_bytes(sizes: Sizes) -> int:
    """Return the bytes of joining the fragments of a volume."""
    n_fragments = sizes.volume_voxels // _VOXELS_PER_FRAGMENT
    boxes = SPLIT_JOIN_BYTES if sizes.split_voxels else 0
    return join_bytes(n_fragments) + n_fragments * boxes


def split_bytes(sizes: Sizes) -> int:
    """Return the bytes of splitting the objects of a block, one after the other.

    Beside them are the ids of the block, and the parts of its voxels that are not written yet: of
    the block at most, and of one object more.
    """
    ids = sizes.core_voxels * (4 + 2 * sizes.label_bytes)
    parts = (sizes.core_voxels + sizes.split_voxels) * _PART_BYTES
    return ids + parts + sizes.split_voxels * SPLIT_BYTES


def rank_bytes(sizes: Sizes) -> int:
    """Return the bytes of numbering the objects and parts of a volume."""
    return joining_bytes(sizes)


def relabel_bytes(sizes: Sizes) -> int:
    """Return the bytes of giving a block its final ids."""
    ids = sizes.core_voxels * (4 + 3 * sizes.label_bytes)
    parts = sizes.core_voxels * _PART_BYTES if sizes.split_voxels else 0
    return ids + parts


def measurements_bytes(sizes: Sizes) -> int:
    """Return the bytes of measuring the objects of a block."""
    read_bytes = sizes.label_bytes + sizes.source_bytes * sizes.n_measured
    voxels = sizes.core_voxels * read_bytes * 2
    if sizes.has_regions:
        voxels += sizes.core_voxels * _REGION_BYTES
    return voxels + sizes.decoded_bytes + _MEASURING_BYTES


def table_bytes(sizes: Sizes) -> int:
    """Return the bytes of adding up the measurements of a volume, and of looking at a region."""
    if not sizes.has_regions:
        return _MEASURING_BYTES
    return _MEASURING_BYTES + min(sizes.volume_voxels, MAX_BOX_VOXELS) * _BOX_BYTES


def downsample_bytes(sizes: Sizes) -> int:
    """Return the bytes of a block of a coarser level: part of its finer voxels, and its own."""
    core = sizes.core_voxels
    finer = min(core, _MAX_MODE_VOXELS) * 2 * (sizes.label_bytes + _MODE_BYTES)
    return finer + core * sizes.label_bytes


def whole_volume_bytes(sizes: Sizes) -> int:
    """Return the bytes of all stages of a volume that is one block, and stays in memory."""
    core = sizes.core_voxels
    n_channels = sizes.n_inputs + 2 * (sizes.n_measured - 1)
    volume = core * (sizes.source_bytes * n_channels + sizes.scores_bytes + 1)
    predicting = segment_bytes(sizes)
    if sizes.finds_threshold:
        predicting += histogram_bytes(sizes)
    if sizes.fills_holes:
        predicting += holes_bytes(sizes)
    labelling = label_bytes(sizes) + relabel_bytes(sizes)
    if sizes.split_voxels:
        labelling += split_bytes(sizes)
    if sizes.n_outputs > 1:
        # Outputs are labelled one after the other, beside the scores, and mask or logits, of all.
        kept = sizes.scores_bytes + (4 if sizes.finds_threshold else 1)
        labelling += core * sizes.n_outputs * max(4, kept)
    measuring = 0
    if sizes.has_regions:
        measuring = core * (sizes.label_bytes + _REGION_BYTES) + table_bytes(sizes)
    return volume + max(predicting, labelling, measuring) + _MEASURING_BYTES
