"""Images and scores as lazy xarray objects: to look at, to slice, and to combine with other arrays.

The scores are those of a run, bit for bit. Each block reads the hull of the
volume's patches that touch it, and all blocks share one node of statistics: a
map over padded chunks would move the patches, and with them the scores. The
graph holds every block; for whole plates and terabytes there is `segment`.
"""

import math
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray
from dask.base import tokenize
from dask.core import flatten
from dask.graph_manipulation import clone
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import cheapest_block
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Normalization,
    Statistics,
    measure,
    merge_statistics,
)
from megaseg_dask.errors import BundleError, SettingsError, SourceError
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.certificate import Claim
from megaseg_dask.inference.engine import EngineSpec, open_engine, resolve_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.ngff.image import SPATIAL, Image, read_image, require_axes
from megaseg_dask.ngff.labels import labels_group, list_labels
from megaseg_dask.ngff.units import micrometers
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.choice import require_segmentable
from megaseg_dask.plan.cluster_spec import cluster_of
from megaseg_dask.plan.planner import choose_batch, open_models
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.signature import with_settings
from megaseg_dask.plan.voxel_size import VolumeForm
from megaseg_dask.stores import Location, StoreOptions, cached_array, clear_array_cache

Array = NDArray[Any]
Float32 = NDArray[np.float32]

# Of the float32 scores of a block, unless the caller chooses the blocks.
_MAX_BLOCK_BYTES = 256 * 2**20
# A shard above this size is read chunk by chunk: looking at one plane should not read gigabytes.
_CHUNK_BYTES = 128 * 2**20

# Settings of a run that `predict` takes too.
_SETTINGS = (
    "patch",
    "overlap",
    "voxel_size",
    "block",
    "engine",
    "device",
    "precision",
    "batch",
    "threads",
    "tta",
)


# -- images


def open_image(
    url: str | Path, *, labels: bool = True, anon: bool = False, endpoint: str = ""
) -> xarray.DataTree:
    """Open the OME-Zarr image at ``url``, a path or address: no voxel is read before it is needed.

    Levels are the children ``0`` (the finest), ``1``, …, each with a Dask-backed
    array ``image`` in the stored order of axes; those of a label image are below
    ``labels/<name>``. Coordinates z, y, x are in µm (or as stored where the unit is
    unknown), t in its unit, c has the names of the channels. ``anon`` and
    ``endpoint`` hold for this image; credentials come from the environment.

    Computing raises `DataError` for a corrupt chunk and `StoreError` for a lost one.

    Raises:
        SourceError: There is no such image.
    """
    options = None
    if anon or endpoint:
        options = StoreOptions.parse(endpoint or None, anon, (), str(url))
    # What was opened here before may have been replaced by now.
    clear_array_cache()
    location = Location.of(url, options)
    image = read_image(location)
    datasets = _levels(location, image, "")
    if labels:
        for name in list_labels(location):
            label = labels_group(location) / name
            datasets |= _levels(label, read_image(label), f"labels/{name}/")
    attributes = {"name": image.name, "version": image.version, "axes": list(image.axis_names)}
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attributes), **datasets})


def _levels(location: Location, image: Image, prefix: str) -> dict[str, xarray.Dataset]:
    return {
        f"{prefix}{number}": _level(location, image, number) for number in range(len(image.levels))
    }


def _level(location: Location, image: Image, number: int) -> xarray.Dataset:
    level = image.levels[number]
    array = cached_array(location / level.path)
    unit = array.shards or array.chunks
    if math.prod(unit) * array.dtype.itemsize > _CHUNK_BYTES:
        unit = array.chunks
    # One volume at a time, as Volume reads them.
    axes = zip(unit, image.axis_names, strict=True)
    chunks = tuple(extent if name in SPATIAL else 1 for extent, name in axes)
    data = da.map_blocks(
        partial(_read_chunk, Volume.of(location, image, level=number)),
        chunks=da.core.normalize_chunks(chunks, level.shape),
        # Another name each time: what is stored may have changed since it was last opened.
        name=f"read-{uuid.uuid4().hex}",
        meta=np.empty((0,) * len(level.shape), array.dtype.newbyteorder("=")),
    )
    coordinates = {name: _coordinate(image, number, name) for name in image.axis_names}
    return xarray.Dataset({"image": (image.axis_names, data)}, coordinates, {"path": level.path})


def _coordinate(image: Image, number: int, name: str) -> xarray.Variable:
    """Return the positions of voxel centers in µm, times in their unit, or names of channels."""
    axis_number = image.axis_names.index(name)
    extent = image.levels[number].shape[axis_number]
    if name == "c":
        return xarray.Variable(name, image.channels)
    axis = image.axes[axis_number]
    scale, translation = image.transform(number)
    positions = np.arange(extent) * scale[axis_number] + translation[axis_number]
    unit = "µm" if axis.is_in_um else axis.unit
    return xarray.Variable(name, positions * axis.in_um, {"units": unit} if unit else {})


def _read_chunk(volume: Volume, block_info: Any = None) -> Array:
    """Read one chunk in the order of the stored axes; raises the errors of :meth:`Volume.read`."""
    axis_names = volume.axis_names
    ranges = dict(zip(axis_names, block_info[None]["array-location"], strict=True))
    start = tuple(ranges[name][0] for name in SPATIAL)
    stop = tuple(ranges[name][1] for name in SPATIAL)
    place = {name: ranges[name][0] for name in ("t", "c") if name in ranges}
    values = replace(volume, **place).read(Box(start, stop))
    values = values.transpose([SPATIAL.index(name) for name in axis_names if name in SPATIAL])
    return values.reshape([last - first for first, last in ranges.values()])


# -- scores


def predict(
    image: xarray.DataArray | Array,
    model: str | Path | Sequence[str | Path] = "starter",
    *,
    spacing_um: Sequence[float] | None = None,
    **settings: object,
) -> xarray.DataArray:
    """Return the scores of ``image``, lazily: float32 from 0 to 1.

    They have its dimensions and coordinates. The dimensions are z, y, x and perhaps t and c,
    in any order. Each volume (z, y, x) is normalized and predicted by itself. An array of NumPy
    or Dask is one volume (z, y, x); ``spacing_um`` is then the size of its voxels (z, y, x) in µm.

    The settings are ``patch``, ``overlap``, ``voxel_size``, ``block``, ``engine``, ``device``,
    ``precision``, ``batch``, ``threads`` and ``tta``, as for :func:`megaseg_dask.segment`, whose
    scores these are, bit for bit on a CPU, at any ``block`` (z, y, x), which is the chunk of the
    result. A ``precision`` of auto is fp32 on a CPU here. Computing a part of them predicts only
    the blocks there, with the statistics of the whole volume. A ``voxel_size`` needs coordinates
    z, y and x that are evenly spaced, and have a length in their attribute ``units``. PyTorch's own
    settings are changed only during a forward pass.

    Computing raises `DataError` that names a voxel that is not finite.

    Raises:
        SourceError: The image cannot be segmented.
        SettingsError: A setting is unknown here, or cannot be carried out.
        BundleError: The model cannot be run, or has several channels or outputs.
    """
    if unknown := set(settings) - set(_SETTINGS):
        raise SettingsError(
            f"predict() does not take {', '.join(sorted(unknown))}; it takes {', '.join(_SETTINGS)}"
        )
    image = _with_axes(image, spacing_um)
    names = model if isinstance(model, str | Path) else list(model)
    options = parse_settings({"model": names, **settings})
    order = _axis_order(image)
    array = _as_dask(image.transpose(*order))
    volume_shape = array.shape[-3:]
    models = open_models(options, _form_of(image, order[-3:]))
    ref = models.ref
    if (ref.in_channels, len(ref.outputs)) != (1, 1):
        raise BundleError(
            f"{ref.name} takes {ref.in_channels} channels and has {len(ref.outputs)} outputs; "
            "predict() works only with one of each; use segment()"
        )
    grid = PatchGrid(models.grid_shape, models.patch, models.overlap, volume_shape)
    engine = resolve_engine(
        options.engine, options.device, options.precision, options.threads, options.tta
    )
    block_shape = options.block or cheapest_block(volume_shape, grid, _is_small)
    batch = options.batch or choose_batch(models, engine, cluster_of(options))
    predictor = _Predictor(
        BlockGrid(volume_shape, block_shape),
        Patches(grid, ref.window, batch),
        ref,
        engine,
    )
    measured = array
    if image.chunks is not None and len(predictor.blocks) > 1:
        # What is read for the statistics would otherwise stay in memory until the last block is
        # predicted.
        measured = clone(array)
    attributes = {
        "model": ref.name,
        "model_digest": ref.digest,
        "engine": str(engine.record(predictor.patches.batch)),
    }
    scores = predictor.predict(array, measured)
    return xarray.DataArray(scores, image.coords, order, "scores", attributes).transpose(
        *image.dims
    )


with_settings(predict, _SETTINGS)


def _with_axes(image: Any, spacing_um: Sequence[float] | None) -> xarray.DataArray:
    """Return an image with named axes.

    Raises:
        SourceError: It is an array of other than three dimensions, or no array.
        SettingsError: The size of its voxels is no three positive numbers, or is stated twice.
    """
    if isinstance(image, xarray.DataArray):
        if spacing_um is not None:
            raise SettingsError(
                "spacing_um: a DataArray has coordinates instead; set those of z, y and x in µm"
            )
        return image
    n_dims = getattr(image, "ndim", None)
    if isinstance(image, xarray.DataTree | xarray.Dataset):
        kind = type(image).__name__
        name = "0/image" if isinstance(image, xarray.DataTree) else "image"
        raise SourceError(
            f"the image is a {kind}, which holds several arrays; pass one of them, such as "
            f"image[{name!r}]"
        )
    if n_dims is None:
        raise SourceError(
            f"the image is a {type(image).__name__}; expected a DataArray or an array (z, y, x)"
        )
    if n_dims != len(SPATIAL):
        raise SourceError(
            f"the array has {n_dims} dimensions; expected (z, y, x), or a xarray.DataArray that "
            "names its dimensions"
        )
    named = xarray.DataArray(image, dims=SPATIAL)
    if spacing_um is None:
        return named
    sizes = np.asarray(spacing_um, float)
    if sizes.shape != (len(SPATIAL),) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise SettingsError(
            f"spacing_um {spacing_um}: expected three positive numbers (z, y, x) in µm"
        )
    return named.assign_coords(
        {
            name: (name, np.arange(named.sizes[name]) * size, {"units": "µm"})
            for name, size in zip(SPATIAL, sizes, strict=True)
        }
    )


def _axis_order(image: xarray.DataArray) -> list[Hashable]:
    """Return the dimensions with (z, y, x) last.

    Raises:
        SourceError: The image cannot be segmented.
    """
    # BioIO writes them as capitals.
    dims = {str(dim).lower(): dim for dim in image.dims}
    require_axes("the image", list(dims))
    shape = tuple(image.sizes[dims[name]] for name in SPATIAL)
    require_segmentable("the image", shape, image.dtype)
    if 0 in image.shape:
        raise SourceError(f"the image is empty: {dict(image.sizes)}")
    return [dims[name] for name in ("t", "c", *SPATIAL) if name in dims]


def _form_of(image: xarray.DataArray, dims: Sequence[Hashable]) -> VolumeForm:
    """Return shape and voxel size of volumes with these dimensions, z, y and x."""
    shape = tuple(image.sizes[dim] for dim in dims)
    spacing_um = []
    for dim in dims:
        coordinate = image.coords.get(dim)
        unit = None if coordinate is None else coordinate.attrs.get("units")
        in_um = micrometers(unit)
        if coordinate is None or in_um is None:
            reason = f"{dim} has the unit {unit!r}" if unit else f"{dim} has no unit"
            return VolumeForm(shape, (1.0,) * len(dims), reason)
        steps = np.abs(np.diff(coordinate.values.astype(np.float64)))
        if not np.allclose(steps, steps[0]) or steps[0] == 0:
            return VolumeForm(shape, (1.0,) * len(dims), f"{dim} is not evenly spaced")
        spacing_um.append(float(steps.mean()) * in_um)
    return VolumeForm(shape, tuple(spacing_um))


def _is_small(block_shape: Shape) -> bool:
    return math.prod(block_shape) * np.dtype(np.float32).itemsize <= _MAX_BLOCK_BYTES


def _as_dask(image: xarray.DataArray) -> Any:
    # In the machine's byte order, in which a run reads: the last bit of statistics depends on it.
    native = image.dtype.newbyteorder("=")
    chunked = image if image.chunks is not None else image.chunk()
    return chunked.data.astype(native, copy=False)


@dataclass(frozen=True, slots=True)
class _Predictor:
    """How volumes of one shape are predicted."""

    blocks: BlockGrid
    patches: Patches
    model: ModelRef
    engine: EngineSpec

    def predict(self, array: Any, measured: Any) -> Any:
        """Return the scores of every (z, y, x) volume of a Dask array.

        ``measured`` are the same voxels, for the statistics.
        """
        if array.ndim == len(SPATIAL):
            return self._predict_volume(array, measured)
        parts = zip(array, measured, strict=True)
        return da.stack([self.predict(part, of) for part, of in parts])

    def _predict_volume(self, volume: Any, measured: Any) -> Any:
        """Return the scores of one volume, as a graph.

        It has one task for each part of the statistics, and one for each block.
        """
        grid = self.patches.grid
        token = tokenize(volume.name, self.blocks, self.patches, self.model.digest, self.engine)
        name = f"predict-{token}"
        parts = measured.rechunk(PARTITION_SHAPE)
        partition = BlockGrid(self.blocks.volume_shape, PARTITION_SHAPE)
        hulls = [volume[grid.read_box(core).slices].rechunk(-1) for core in self.blocks]
        tasks: dict[Any, Any] = {}
        for key, box in zip(flatten(parts.__dask_keys__()), partition, strict=True):
            tasks[f"{name}-measure", len(tasks)] = (measure, key, box)
        # In grid order, on which the last bit of the statistics of floats depends.
        tasks[f"{name}-normalize"] = (_merge, list(tasks))
        for i, hull in enumerate(hulls):
            inputs = ((hull.name, 0, 0, 0), f"{name}-normalize", self.blocks[i])
            tasks[name, *self.blocks.position(i)] = (self._predict_core, *inputs)
        graph = HighLevelGraph.from_collections(name, tasks, dependencies=[parts, *hulls])
        chunks = da.core.normalize_chunks(self.blocks.block_shape, self.blocks.volume_shape)
        return da.Array(graph, name, chunks, meta=np.empty((0, 0, 0), np.float32))

    def _predict_core(self, values: Array, normalization: Normalization, core: Box) -> Float32:
        prepare = Preparation(self.model.steps, (normalization,))
        block = Block(core, values[None], self.patches, prepare)
        self._require_proof(values[None], prepare)
        with open_engine(self.model, self.engine) as engine:
            (output,) = engine.predict_block(block)
            return output.scores("float32")

    def _require_proof(self, values: Array, prepare: Preparation) -> None:
        """Let the engine of this process prove itself, once, on the first voxels that come."""
        shape = self.patches.grid.patch_shape
        claim = Claim(self.model, self.engine, self.patches.batch, shape)

        def read_patch() -> Float32:
            patch = np.zeros((len(values), *shape), np.float32)
            inside = tuple(map(slice, map(min, values.shape[1:], shape)))
            patch[:, *inside] = prepare(values[:, *inside])
            return patch

        if claim not in _proven:
            certificate = claim.prove(read_patch)
            if certificate is not None:
                certificate.require()
            _proven.add(claim)


# Of this process.
_proven: set[Claim] = set()


def _merge(parts: Sequence[Statistics]) -> Normalization:
    return Normalization.of(merge_statistics(parts))
