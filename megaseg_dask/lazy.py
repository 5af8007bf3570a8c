"""Images and scores as lazy xarray objects: to look at, to slice, and to combine with other arrays.

The scores are those of a run, bit for bit. Each block reads the hull of the
volume's patches that touch it, and all blocks share one node of statistics: a
map over padded chunks would move the patches, and with them the scores. The
graph holds every block; for whole plates and terabytes there is `segment`.
"""

import math
import uuid
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray
from dask.base import tokenize
from dask.core import flatten
from dask.graph_manipulation import clone
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import iter_block_shapes
from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.normalization import (
    PARTITION_SHAPE,
    Normalization,
    Statistics,
    measure,
    merge_statistics,
)
from megaseg_dask.errors import BundleError, SourceError
from megaseg_dask.inference.block import Block, Patches, Preparation
from megaseg_dask.inference.engine import EngineSpec, open_engine, resolve_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models.cards import MINIMUM_SHAPE
from megaseg_dask.ngff.group import read_ome
from megaseg_dask.ngff.image import SPATIAL, Image, read_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.planner import open_models, requested_engine
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location, StoreOptions, cached_array, clear_array_cache

Array = NDArray[Any]
Float32 = NDArray[np.float32]

# Of a block's scores, unless the caller chooses its blocks.
_BLOCK_BYTES = 256 * 2**20
# A shard above this size is read chunk by chunk: who looks at one plane should not wait for gigabytes.
_CHUNK_BYTES = 128 * 2**20


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

    Raises :class:`SourceError` for what is no such image. Computing raises
    :class:`DataError` for a corrupt chunk, :class:`StoreError` for a lost one.
    """
    options = None
    if anon or endpoint:
        options = StoreOptions.parse(endpoint or None, anon, (), str(url))
    # What was opened here before may have been replaced by now.
    clear_array_cache()
    location = Location.of(url, options)
    image = read_image(location)
    found = {str(i): _level(location, image, i) for i in range(len(image.levels))}
    if labels:
        for name in _label_names(location):
            label = location / "labels" / name
            levels = read_image(label)
            found |= {
                f"labels/{name}/{i}": _level(label, levels, i) for i in range(len(levels.levels))
            }
    root = xarray.Dataset(
        attrs={"name": image.name, "version": image.version, "axes": list(image.axis_names)}
    )
    return xarray.DataTree.from_dict({"/": root, **found})


def _label_names(location: Location) -> list[str]:
    labels = location / "labels"
    if labels.size("zarr.json") is None and labels.size(".zgroup") is None:
        return []
    return list(map(str, read_ome(labels).get("labels") or ()))


def _level(location: Location, image: Image, number: int) -> xarray.Dataset:
    level = image.levels[number]
    array = cached_array(location / level.path)
    unit = array.shards or array.chunks
    if math.prod(unit) * array.dtype.itemsize > _CHUNK_BYTES:
        unit = array.chunks
    # One volume at a time, as Volume reads them.
    chunks = tuple(
        n if name in SPATIAL else 1 for n, name in zip(unit, image.axis_names, strict=True)
    )
    data = da.map_blocks(
        partial(_read_chunk, location / level.path, image.axis_names),
        chunks=da.core.normalize_chunks(chunks, level.shape),
        # Another name each time: what is stored may have changed since it was last opened.
        name=f"read-{uuid.uuid4().hex}",
        meta=np.empty((0,) * len(level.shape), array.dtype.newbyteorder("=")),
    )
    coordinates = {name: _coordinate(image, number, name) for name in image.axis_names}
    return xarray.Dataset({"image": (image.axis_names, data)}, coordinates, {"path": level.path})


def _coordinate(image: Image, number: int, name: str) -> xarray.Variable:
    """Return the positions of voxel centres in µm, times in their unit, or the names of channels."""
    level, i = image.levels[number], image.axis_names.index(name)
    if name == "c":
        listed = image.channel_names[: level.shape[i]]
        return xarray.Variable(name, [*listed, *map(str, range(len(listed), level.shape[i]))])
    axis = image.axes[i]
    values = (np.arange(level.shape[i]) * level.scale[i] + level.translation[i]) * axis.in_um
    unit = "µm" if axis.is_in_um else axis.unit
    return xarray.Variable(name, values, {"units": unit} if unit else {})


def _read_chunk(location: Location, axis_names: tuple[str, ...], block_info: Any = None) -> Array:
    """Read one chunk in the order of the stored axes; raises the errors of :meth:`Volume.read`."""
    where = dict(zip(axis_names, block_info[None]["array-location"], strict=True))
    box = Box(tuple(where[name][0] for name in SPATIAL), tuple(where[name][1] for name in SPATIAL))
    at = {name: where[name][0] for name in ("t", "c") if name in where}
    values = Volume(location, axis_names, **at).read(box)
    values = values.transpose([SPATIAL.index(name) for name in axis_names if name in SPATIAL])
    return values.reshape([stop - start for start, stop in where.values()])


# -- scores


def predict(
    image: xarray.DataArray,
    model: str | Path | Sequence[str | Path] = "starter",
    *,
    patch: Shape | Literal["auto"] | None = None,
    overlap: float | tuple[float, ...] | None = None,
    block: Shape | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    tta: bool = False,
) -> xarray.DataArray:
    """Return the scores of ``image``, lazily: float32 from 0 to 1, with its dimensions and coordinates.

    The dimensions are z, y, x and perhaps t and c, in any order; each volume
    (z, y, x) is normalised and predicted by itself. Scores are those of
    :func:`megaseg_dask.segment` with the same settings, bit for bit on a CPU, at any
    ``block`` (z, y, x), which is the chunk of the result. Computing a part of
    them predicts only the blocks there, with the statistics of the whole volume.

    Raises :class:`SourceError`, :class:`SettingsError` or :class:`BundleError` for
    what cannot be carried out. Computing raises :class:`DataError` that names a
    voxel that is not finite.
    """
    models = model if isinstance(model, str | Path) else list(model)
    options = parse_settings(
        {
            "model": models,
            "patch": patch,
            "overlap": overlap,
            "block": block,
            "engine": engine,
            "device": device,
            "precision": precision,
            "batch": batch,
            "threads": threads,
            "tta": tta,
        }
    )
    order = _axis_order(image)
    array = _as_dask(image.transpose(*order))
    opened = open_models(options, array.shape[-3:])
    ref = opened.ref
    if (ref.in_channels, len(ref.outputs)) != (1, 1):
        raise BundleError(
            f"{ref.name} takes {ref.in_channels} channels and has {len(ref.outputs)} outputs; predict() "
            "is for one of each, segment() for any"
        )
    spec = resolve_engine(requested_engine(options))
    grid = PatchGrid(array.shape[-3:], opened.patch, opened.overlap)
    patches = Patches(grid, ref.window, options.batch or 1)
    blocks = BlockGrid(grid.volume_shape, options.block or _choose_block(grid))
    # What is read for the statistics would otherwise stay in memory until the last block is predicted.
    measured = clone(array) if image.chunks is not None and len(blocks) > 1 else array
    predict_volume = partial(
        _predict_volume, blocks=blocks, patches=patches, model=ref, engine=spec
    )
    scores = _predict_each(array, measured, predict_volume)
    attributes = {
        "model": ref.name,
        "model_digest": ref.digest,
        "engine": str(spec.record(patches.batch)),
    }
    return xarray.DataArray(scores, image.coords, order, "scores", attributes).transpose(
        *image.dims
    )


def _axis_order(image: xarray.DataArray) -> list[Hashable]:
    """Return the dimensions with (z, y, x) last; raises :class:`SourceError` for an image that cannot be segmented."""
    # BioIO writes them as capitals.
    names = {str(dim).lower(): dim for dim in image.dims}
    if unknown := set(names) - {"t", "c", *SPATIAL}:
        raise SourceError(
            f"the image has dimensions {image.dims}; {sorted(unknown)} cannot be told apart from "
            "t, c, z, y, x: rename or select them"
        )
    if missing := [name for name in SPATIAL if name not in names]:
        raise SourceError(
            f"the image has dimensions {image.dims} and no {' or '.join(missing)}: "
            "the model segments 3D volumes of z, y and x"
        )
    shape = tuple(image.sizes[names[name]] for name in SPATIAL)
    if any(n < least for n, least in zip(shape, MINIMUM_SHAPE, strict=True)):
        raise SourceError(
            f"volumes of (z, y, x) = {shape} voxels are too small; "
            f"the model needs at least {MINIMUM_SHAPE}"
        )
    if image.dtype.kind not in "iufb":
        raise SourceError(f"voxels are {image.dtype}; integers or floats are needed")
    if 0 in image.shape:
        raise SourceError(f"the image is empty: {dict(image.sizes)}")
    return [names[name] for name in ("t", "c", *SPATIAL) if name in names]


def _choose_block(grid: PatchGrid) -> Shape:
    """Return the block that predicts the fewest patches, of those whose scores are not too large."""
    shapes = list(iter_block_shapes(grid.volume_shape))
    small = [b for b in shapes if 4 * math.prod(b) <= _BLOCK_BYTES] or [min(shapes, key=math.prod)]
    return min(small, key=lambda b: (grid.count_predicted(b), -math.prod(b)))


def _as_dask(image: xarray.DataArray) -> Any:
    # In the machine's byte order, in which a run reads, and its normalisation is the same to the last bit.
    native = image.dtype.newbyteorder("=")
    chunked = image if image.chunks is not None else image.chunk()
    return chunked.data.astype(native, copy=False)


def _predict_each(array: Any, measured: Any, predict_volume: Any) -> Any:
    """Predict every (z, y, x) volume of an array by itself."""
    if array.ndim == len(SPATIAL):
        return predict_volume(array, measured)
    parts = zip(array, measured, strict=True)
    return da.stack([_predict_each(part, of, predict_volume) for part, of in parts])


def _predict_volume(
    volume: Any,
    measured: Any,
    blocks: BlockGrid,
    patches: Patches,
    model: ModelRef,
    engine: EngineSpec,
) -> Any:
    """Return the scores of one volume; a graph of one task for each part of the statistics, and for each block."""
    name = f"predict-{tokenize(volume.name, blocks, patches, model.digest, engine)}"
    parts = measured.rechunk(PARTITION_SHAPE)
    grid = patches.grid
    partition = BlockGrid(grid.volume_shape, PARTITION_SHAPE)
    hulls = [volume[grid.read_box(core).slices].rechunk(-1) for core in blocks]
    tasks: dict[Any, Any] = {
        (f"{name}-measure", i): (measure, key, box)
        for i, (key, box) in enumerate(zip(flatten(parts.__dask_keys__()), partition, strict=True))
    }
    # In grid order, on which the last bit of the statistics of floats depends.
    tasks[f"{name}-normalise"] = (_merge, list(tasks))
    predict_core = partial(_predict_core, patches=patches, model=model, engine=engine)
    for i, (core, hull) in enumerate(zip(blocks, hulls, strict=True)):
        tasks[name, *blocks.position(i)] = (
            predict_core,
            (hull.name, 0, 0, 0),
            f"{name}-normalise",
            core,
        )
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[parts, *hulls])
    chunks = da.core.normalize_chunks(blocks.block_shape, grid.volume_shape)
    return da.Array(graph, name, chunks, meta=np.empty((0, 0, 0), np.float32))


def _merge(parts: Sequence[Statistics]) -> Normalization:
    return Normalization.of(merge_statistics(parts))


def _predict_core(
    values: Array,
    normalisation: Normalization,
    core: Box,
    *,
    patches: Patches,
    model: ModelRef,
    engine: EngineSpec,
) -> Float32:
    block = Block(core, values[None], patches, Preparation(model.steps, (normalisation,)))
    with open_engine(model, engine) as network:
        (output,) = network.predict_block(block)
        return output.scores("float32")
