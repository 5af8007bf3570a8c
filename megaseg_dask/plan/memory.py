"""What one worker needs at its peak, per stage, before anything starts.

Each stage is a sum of arrays that live at the same moment, counted in bytes
per voxel of the block, plus what an idle worker holds. The factors of library
calls (convolutions, codecs, component labelling) were measured; a test
measures whole stages against this projection. Which function is of which
stage, the declaration of the stages says (:mod:`megaseg_dask.plan.stages`).
"""

from dataclasses import dataclass

from megaseg_dask.algorithms.components import join_bytes
from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.inference.engine import EngineSpec, ModelRef

# Resident size of a worker with PyTorch, MONAI, Dask and zarr imported, before it has done anything.
IDLE_BYTES = 760 * 10**6

# Share of a machine's memory that workers may plan with; the rest is the client's and the system's.
BUDGET_SHARE = 0.8

# Float32 feature maps of a patch at full resolution that a DynUNet's forward pass holds at its
# peak on CPU: skip connection, concatenation, residual, convolution buffers and what the heap
# loses between them. Measured 9 to 11.
_FEATURE_MAPS = 12
# oneDNN stores channels in blocks of 16, also where there are fewer.
_CHANNEL_BLOCK = 16
# Compiled kernels and scratch space of a forward pass, whatever its size.
_FORWARD_BYTES = 250 * 10**6

# OpenVINO plans its buffers: 4 maps per filter at full resolution, the weights as they were and
# repacked, and kernels. It keeps all of it from one pass to the next. Measured with filters from
# 4 to 32.
_OPENVINO_MAPS = 5
_OPENVINO_WEIGHTS = 3
_OPENVINO_BYTES = 100 * 10**6

# The join holds fragments, not voxels. How many there are only the data know: an estimate, from a
# small nucleus.
_VOXELS_PER_FRAGMENT = 10_000

# Working memory of the mode per finer voxel, where all windows are mixed.
_MODE_BYTES = 16
# Finer voxels that a coarser level is computed from at a time.
_MAX_MODE_VOXELS = 2**24

# zarr decodes this many whole chunks of the source at a time, however little of them is read.
_MAX_DECODED_CHUNKS = 10

# Making the table of a block's logits, and a table: those of Li's method, measured, are the largest.
_TABULATING_BYTES = 160 * 10**6
_TABLE_BYTES = 60 * 10**6
TABLES_READ_AHEAD = 3

# Sums of one part of the fixed partition.
_STATISTICS_BYTES = 64 * 2**20

# Measuring objects: temporaries of a slab, and some 100,000 objects of 450 bytes.
_MEASURING_BYTES = 150 * 10**6

# cc3d's working memory per voxel beside its labels.
_LABELLING_BYTES = 12


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the memory of a task follows from: voxels of boxes, and bytes of voxels."""

    volume_voxels: int
    # Of a block: its core, what it reads of the source, and what a task of ``measure`` reads.
    core_voxels: int
    read_voxels: int
    measured_voxels: int
    # Chunks of the source that are decoded at a time.
    decoded_bytes: int
    source_bytes: int
    scores_bytes: int
    label_bytes: int
    # A forward pass on the host; 0 on a device, and of an engine that keeps its memory.
    forward_bytes: int
    n_inputs: int
    n_outputs: int
    finds_threshold: bool
    fills_holes: bool

    @property
    def logits_bytes(self) -> int:
        """Blended logits of all outputs of a block."""
        return self.core_voxels * 4 * self.n_outputs


def decoded_bytes(chunk_bytes: int, n_chunks: int) -> int:
    """Return the bytes of the source's chunks that are decoded at a time."""
    return chunk_bytes * min(n_chunks, _MAX_DECODED_CHUNKS)


@dataclass(frozen=True, slots=True)
class EngineBytes:
    """Memory of an engine on the host: what stays from one task to the next, and what a pass adds."""

    kept: int
    forward: int

    @classmethod
    def of(
        cls,
        model: ModelRef,
        engine: EngineSpec,
        patch_shape: Shape,
        first_filters: int,
        n_parameters: int,
    ) -> "EngineBytes":
        """Return the memory of a model's networks, of ``n_parameters`` together."""
        if engine.engine == "openvino":
            kept = _openvino_bytes(model, engine, patch_shape, first_filters, n_parameters)
            return cls(kept, 0)
        kept = 4 * n_parameters
        if engine.device != "cpu":
            return cls(kept, 0)
        filters = max(first_filters, len(model.outputs), _CHANNEL_BLOCK)
        maps = _FEATURE_MAPS * filters + _end_maps(model, engine)
        return cls(kept, kept + _map_bytes(engine, patch_shape) * maps + _FORWARD_BYTES)


def _openvino_bytes(
    model: ModelRef,
    engine: EngineSpec,
    patch_shape: Shape,
    first_filters: int,
    n_parameters: int,
) -> int:
    # Heads with layers of their own have as many maps as the backbone has outputs.
    filters = max(first_filters, len(model.outputs))
    ends = model.in_channels + len(model.outputs)
    n_models = len(model.bundles)
    # Each network keeps its own.
    maps = n_models * (_OPENVINO_MAPS * filters + ends) + _averaging_maps(model, engine)
    weights = 4 * n_parameters * _OPENVINO_WEIGHTS
    return _map_bytes(engine, patch_shape) * maps + weights + n_models * _OPENVINO_BYTES


def _map_bytes(engine: EngineSpec, patch_shape: Shape) -> int:
    return 4 * Box.of(patch_shape).size * engine.batch


def _end_maps(model: ModelRef, engine: EngineSpec) -> int:
    return model.in_channels + len(model.outputs) + _averaging_maps(model, engine)


def _averaging_maps(model: ModelRef, engine: EngineSpec) -> int:
    """Mirrored patches, and beside the logits of a pass their sum, the next sum and a mirror image."""
    if not engine.tta and len(model.bundles) == 1:
        return 0
    return model.in_channels + 3 * len(model.outputs)


# -- of each stage


def measure_bytes(sizes: Sizes) -> int:
    """Return what measuring a block of the source takes."""
    return sizes.measured_voxels * sizes.source_bytes * 2 + _STATISTICS_BYTES + sizes.decoded_bytes


def segment_bytes(sizes: Sizes) -> int:
    """Return what predicting a block takes: its passes, or turning logits into scores."""
    core = sizes.core_voxels
    # Blending holds sums and weights; turning logits into scores holds three more float32 arrays.
    blended = sizes.read_voxels * sizes.source_bytes * 2 * sizes.n_inputs
    blended += sizes.logits_bytes + core * 12 + sizes.decoded_bytes
    if sizes.finds_threshold:
        blended += core * 4
    return blended + max(sizes.forward_bytes, core * (4 + sizes.scores_bytes))


def histogram_bytes(sizes: Sizes) -> int:
    """Return what the table of a block's logits takes: the logits, and those that are known."""
    return sizes.core_voxels * 4 * 2 + _TABULATING_BYTES


def cutoff_bytes(_: Sizes) -> int:
    """Return what merging the tables of all blocks takes."""
    return _TABLE_BYTES * (TABLES_READ_AHEAD + 2)


def threshold_bytes(sizes: Sizes) -> int:
    """Return what the mask of a block's logits takes."""
    return sizes.core_voxels * 6


def holes_bytes(sizes: Sizes) -> int:
    """Return what labelling the background of a block takes."""
    return label_bytes(sizes) + sizes.core_voxels


def fill_bytes(sizes: Sizes) -> int:
    """Return what filling the holes of a block takes."""
    return sizes.core_voxels * 7


def label_bytes(sizes: Sizes) -> int:
    """Return what labelling the mask of a block takes."""
    return sizes.core_voxels * (1 + 2 * 4 + _LABELLING_BYTES)


def seams_bytes(sizes: Sizes) -> int:
    """Return what pairing the fragments of a block with its neighbours' takes."""
    return sizes.core_voxels


def joining_bytes(sizes: Sizes) -> int:
    """Return what joining the fragments of a volume takes."""
    return join_bytes(sizes.volume_voxels // _VOXELS_PER_FRAGMENT)


def relabel_bytes(sizes: Sizes) -> int:
    """Return what giving a block its final ids takes."""
    return sizes.core_voxels * (4 + 3 * sizes.label_bytes)


def measurements_bytes(sizes: Sizes) -> int:
    """Return what measuring the objects of a block takes."""
    voxels = sizes.core_voxels * (sizes.label_bytes + sizes.source_bytes) * 2
    return voxels + sizes.decoded_bytes + _MEASURING_BYTES


def table_bytes(_: Sizes) -> int:
    """Return what adding up the measurements of a volume takes."""
    return _MEASURING_BYTES


def downsample_bytes(sizes: Sizes) -> int:
    """Return what a block of a coarser level takes: finer voxels in parts, and the unit that they make up."""
    core = sizes.core_voxels
    finer = min(core, _MAX_MODE_VOXELS) * 2 * (sizes.label_bytes + _MODE_BYTES)
    return finer + core * sizes.label_bytes


def whole_volume_bytes(sizes: Sizes) -> int:
    """Return what all stages of a volume take that is one block, and stays in memory."""
    core = sizes.core_voxels
    volume = core * (sizes.source_bytes * sizes.n_inputs + sizes.scores_bytes + 1)
    predicting = segment_bytes(sizes)
    if sizes.finds_threshold:
        predicting += histogram_bytes(sizes)
    if sizes.fills_holes:
        predicting += holes_bytes(sizes)
    labelling = label_bytes(sizes) + relabel_bytes(sizes)
    if sizes.n_outputs > 1:
        # One output after the other is labelled, beside the logits of all.
        labelling += sizes.logits_bytes
    return volume + max(predicting, labelling) + _MEASURING_BYTES
