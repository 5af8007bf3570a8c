"""Settings become a plan: what will be computed, by which tasks, at what cost, before anything is written.

A plan is a value: it prints, it is JSON, and two plans with one fingerprint
give the same output. Whatever can change a bit is resolved here, once.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.geometry import BlockGrid, PatchGrid, Shape
from megaseg_dask.inference import EngineSpec, ModelRef, resolve_engine
from megaseg_dask.intensity import PARTITION_SHAPE
from megaseg_dask.labelling import label_dtype
from megaseg_dask.layout import Layout, iter_block_shapes, write_layout
from megaseg_dask.memory import BUDGET_SHARE, Sizes, project
from megaseg_dask.models import load_bundle, require_patch
from megaseg_dask.models.zoo import locate
from megaseg_dask.ngff.images import Image, digest_of, read_image, sample_of
from megaseg_dask.settings import Settings
from megaseg_dask.stores import Location

MINIMUM_SHAPE = (16, 16, 16)
DEFAULT_MEMORY_BYTES = 8 * 10**9


@dataclass(frozen=True, slots=True)
class PlannedVolume:
    """One image, timepoint and channel: the unit of normalisation and labelling."""

    t: int
    c: int
    target_t: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks that may run in any order once the stage before them is done."""

    name: str
    n_tasks: int


class Plan(BaseModel):
    """Everything that the tasks of a run need to know; recorded as JSON in the run folder."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))

    source: str
    target: str
    run: str
    source_image: Image
    target_image: Image
    source_digest: str
    source_sample: str
    source_chunk_bytes: int
    n_source_chunks: int
    volumes: tuple[PlannedVolume, ...]
    model: ModelRef
    engine: EngineSpec
    options: Settings
    memory_bytes: int
    n_parameters: int
    first_filters: int

    # -- geometry

    @property
    def volume_shape(self) -> Shape:
        """Voxels ``(z, y, x)`` of each volume."""
        return self.source_image.volume_shape()

    @property
    def block_shape(self) -> Shape:
        """Voxels of a block's core."""
        assert self.options.block is not None
        return self.options.block

    @cached_property
    def patch_grid(self) -> PatchGrid:
        """The network's patches over a volume."""
        assert self.options.patch is not None
        assert self.options.overlap is not None
        return PatchGrid(self.volume_shape, self.options.patch, self.options.overlap)

    def block_grid(self, level: int = 0) -> BlockGrid:
        """Return the blocks of a level; their cores are whole write units."""
        return BlockGrid(self.target_image.volume_shape(level), self.block_shape)

    @property
    def is_one_task(self) -> bool:
        """Tell whether a volume fits one block, and so runs as one task."""
        return len(self.block_grid()) == 1

    @property
    def measure_grid(self) -> BlockGrid:
        """What each task of ``measure`` reads: about a block, but whole parts of the fixed partition."""
        parts = (max(b // p, 1) * p for b, p in zip(self.block_shape, PARTITION_SHAPE, strict=True))
        return BlockGrid(self.volume_shape, tuple(parts))

    def layout(self, level: int) -> Layout:
        """Return chunk and write unit of a level, ``(z, y, x)``."""
        shape = self.target_image.volume_shape(level)
        return write_layout(shape, self.block_shape, sharded=self.options.ome_zarr == "0.5")

    # -- work

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, with their number of tasks over all volumes."""
        n = len(self.volumes)
        if self.is_one_task:
            return (Stage("volume", n),)
        n_blocks = n * len(self.block_grid())
        stages = [Stage("measure", n * len(self.measure_grid)), Stage("segment", n_blocks)]
        if "labels" in self.options.outputs:
            stages += [
                Stage("label", n_blocks),
                Stage("seams", n_blocks),
                Stage("join", n),
                Stage("relabel", n_blocks),
            ]
        coarser = range(1, len(self.target_image.levels))
        return (*stages, *(Stage(f"downsample-{k}", n * len(self.block_grid(k))) for k in coarser))

    def split_index(self, stage: str, index: int) -> tuple[int, int]:
        """Return the number of a task's volume, and the task's number in that volume."""
        n_tasks = next(s.n_tasks for s in self.stages if s.name == stage)
        return divmod(index, n_tasks // len(self.volumes))

    # -- identity and cost

    @property
    def determinants(self) -> dict[str, object]:
        """All that determines the output, as JSON values: never an address, a time or a worker."""
        return {"source": self.source_digest, "model": self.model.digest, **self.options.result_options()}

    @property
    def fingerprint(self) -> str:
        """Digest of :attr:`determinants`."""
        return hashlib.sha256(json.dumps(self.determinants, sort_keys=True).encode()).hexdigest()

    @cached_property
    def projected_bytes(self) -> dict[str, int]:
        """Peak memory of a worker in each stage."""
        options = self.options
        return project(
            Sizes(
                volume_shape=self.volume_shape,
                block_shape=self.block_shape,
                measure_shape=self.measure_grid.block_shape,
                patch_grid=self.patch_grid,
                first_filters=self.first_filters,
                n_parameters=self.n_parameters,
                batch=self.engine.batch,
                chunk_bytes=self.source_chunk_bytes,
                n_chunks=self.n_source_chunks,
                source_bytes=np.dtype(self.source_image.dtype).itemsize,
                scores_bytes=np.dtype(options.scores_dtype).itemsize,
                label_bytes=label_dtype(self.volume_shape).itemsize,
            )
        )

    def with_block(self, block: Shape) -> "Plan":
        """Return the same plan with other blocks."""
        options = self.options.model_copy(update={"block": block})
        # A constructed copy leaves the cached grids and projections of the old block behind.
        return Plan.model_construct(**{**dict(self), "options": options})

    def summary(self) -> dict[str, object]:
        """Return what ``megaseg plan`` shows, as JSON values."""
        grid = self.patch_grid
        voxels = math.prod(self.volume_shape)
        n_predicted = grid.count_predicted(self.block_shape)
        item = np.dtype(self.source_image.dtype).itemsize
        # Statistics take one more read, except where a volume is read once for all.
        read = grid.count_read(self.block_shape) + (0 if self.is_one_task else voxels)
        sizes = {"labels": label_dtype(self.volume_shape).itemsize, "mask": 1,
                 "scores": np.dtype(self.options.scores_dtype).itemsize}  # fmt: skip
        written = sum(math.prod(v.shape) for v in self.target_image.levels)
        return {
            "source": self.source,
            "target": self.target,
            "fingerprint": self.fingerprint,
            "volumes": len(self.volumes),
            "volume_shape": self.volume_shape,
            "dtype": self.source_image.dtype,
            "model": {"name": self.model.name, "digest": self.model.digest, "parameters": self.n_parameters},
            "engine": asdict(self.engine),
            "patch_shape": self.options.patch,
            "overlap": self.options.overlap,
            "patches": len(grid),
            "patch_voxels_per_voxel": round(len(grid) * math.prod(grid.patch_shape) / voxels, 2),
            "block_shape": self.block_shape,
            "blocks": len(self.block_grid()),
            "redundancy": round(n_predicted / len(grid), 3),
            "bytes_read": read * item * len(self.volumes),
            "read_amplification": round(read / voxels, 2),
            "bytes_written": written * sum(sizes[name] for name in self.options.outputs),
            "label_dtype": str(label_dtype(self.volume_shape)),
            "memory_bytes": self.memory_bytes,
            "projected_bytes": self.projected_bytes,
            "stages": {s.name: s.n_tasks for s in self.stages},
            "options": self.options.result_options(),
        }


# -- making a plan


def make_plan(source: str, target: str, settings: Settings, *, recorded: Plan | None = None) -> Plan:
    """Resolve settings into a plan; reads metadata and the bundle, writes nothing.

    What the settings leave open is taken from ``recorded``, the plan of an
    earlier run on the same target: a run that resumes never re-plans. Raises
    :class:`SourceError`, :class:`SettingsError`, :class:`TargetError` or
    :class:`BundleError`.
    """
    where, to = Location.of(source), Location.of(target)
    whole = read_image(where)
    if settings.level >= len(whole.levels):
        raise SettingsError(f"--level {settings.level}: the source has levels 0 to {len(whole.levels) - 1}")
    image = whole.from_level(settings.level)
    require_segmentable(image, where)
    require_target(settings, where, to)
    if where.is_same(to):
        # One container holds one version.
        settings = settings.model_copy(update={"ome_zarr": whole.version})
    channel = _choose_channel(image, settings.channel, where)
    first, stop = _choose_times(image, settings)
    if recorded is not None:
        settings = settings.filled(recorded.options.result_options())
    array = (where / image.levels[0].path).open_array()
    path = locate(settings.model)
    bundle = load_bundle(path)
    settings = settings.filled({"patch": bundle.patch_shape, "overlap": bundle.overlap})
    assert settings.patch is not None
    require_patch(bundle.network, settings.patch)
    engine = resolve_engine(device=settings.device, batch=settings.batch, threads=settings.threads)
    settings = settings.filled(asdict(engine))
    plan = Plan(
        source=where.url,
        target=to.url,
        run=run_folder(to, settings.label_name).url,
        source_image=image,
        target_image=replace(
            image.without_channels().with_times(first, stop).with_pyramid(complete=not where.is_same(to)),
            version=settings.ome_zarr,
            dtype=settings.scores_dtype,
        ),
        source_digest=digest_of(where, whole),
        source_sample=sample_of(where / image.levels[0].path),
        source_chunk_bytes=math.prod(array.chunks) * array.dtype.itemsize,
        n_source_chunks=math.prod(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)),
        volumes=tuple(PlannedVolume(t, channel, t - first) for t in range(first, stop)),
        model=ModelRef(str(path), bundle.name, bundle.digest, bundle.window),
        engine=engine,
        # By index: a name may be given to another channel later.
        options=settings.model_copy(update={"channel": str(channel), "time": (first, stop)}),
        memory_bytes=settings.memory or default_memory_bytes(settings.workers or 1),
        n_parameters=sum(t.numel() for t in bundle.weights.values()),
        first_filters=bundle.network.filters[0],
    )
    if plan.options.block is None:
        plan = choose_block(plan)
    require_memory(plan)
    return plan


def run_folder(target: Location, label_name: str) -> Location:
    """Return where the plan, the journal and intermediate data of a run live."""
    return runs_folder(target) / label_name


def runs_folder(target: Location) -> Location:
    """Return what holds the run folders of a target, and its lease: all runs write its scores and metadata."""
    return target.sibling(".run")


def default_memory_bytes(n_workers: int) -> int:
    """Return 8 GB, or a worker's share of this machine where that is less."""
    return min(DEFAULT_MEMORY_BYTES, int(psutil.virtual_memory().total * BUDGET_SHARE / n_workers))


def require_segmentable(image: Image, where: Location) -> None:
    """Raise :class:`SourceError` if the network cannot take volumes of this image."""
    shape = image.volume_shape()
    if any(n < least for n, least in zip(shape, MINIMUM_SHAPE, strict=True)):
        raise SourceError(
            f"{where}: volumes of (z, y, x) = {shape} voxels are too small; the model needs at least {MINIMUM_SHAPE}"
        )
    if np.dtype(image.dtype).kind not in "iufb":
        raise SourceError(f"{where}: voxels are {image.dtype}; integers or floats are needed")


def require_target(settings: Settings, source: Location, target: Location) -> None:
    """Raise if the target lies in the source, would replace it, or cannot be written."""
    if target.is_inside(source):
        raise TargetError(f"{target} lies inside the source; choose a folder beside it, or the source itself as target")
    run = run_folder(target, settings.label_name)
    if any(source.is_inside(folder) for folder in (target, run)) or source.is_same(run):
        raise TargetError(f"{target} holds the source; choose a folder of its own")
    if source.is_same(target):
        if "scores" in settings.outputs:
            raise SettingsError("the target is the source, whose image stays as it is: pass --outputs labels")
        if settings.level or settings.time:
            raise SettingsError("--level and --time need a target of their own: labels in the source match all of it")
    target.require_writable()


def _choose_channel(image: Image, channel: str | None, where: Location) -> int:
    n = image.extent("c")
    names = [*image.channel_names[:n], *map(str, range(len(image.channel_names), n))]
    listed = ", ".join(f"{i} ({name})" if name != str(i) else name for i, name in enumerate(names))
    if channel is None and n > 1:
        raise SettingsError(f"{where} has {n} channels; choose one with --channel: {listed}")
    if channel is None:
        return 0
    if channel in names:
        return names.index(channel)
    if channel.isdecimal() and int(channel) < n:
        return int(channel)
    raise SettingsError(f"--channel {channel}: no such channel in {where}; it has {listed}")


def _choose_times(image: Image, settings: Settings) -> tuple[int, int]:
    n = image.extent("t")
    first, stop = settings.time or (0, None)
    stop = n if stop is None else stop
    if not 0 <= first < stop <= n:
        raise SettingsError(f"--time {first}:{stop}: the source has timepoints 0:{n}")
    return first, stop


def choose_block(plan: Plan) -> Plan:
    """Return the plan with the block that predicts the fewest patches within the memory budget.

    The smallest block stands if none fits; :func:`require_memory` then says so.
    """
    shapes = list(iter_block_shapes(plan.volume_shape))
    # Of equal blocks by that measure the largest: fewer seams, fewer tasks.
    for block in sorted(shapes, key=lambda b: (plan.patch_grid.count_predicted(b), -math.prod(b))):
        candidate = plan.with_block(block)
        if max(candidate.projected_bytes.values()) <= plan.memory_bytes:
            return candidate
    return plan.with_block(min(shapes, key=math.prod))


def require_memory(plan: Plan) -> None:
    """Raise :class:`SettingsError` if a stage's projected peak is above the budget."""
    stage, most = max(plan.projected_bytes.items(), key=lambda item: item[1])
    if most > plan.memory_bytes:
        raise SettingsError(
            f"stage {stage} needs {most / 1e9:.2f} GB with block {plan.block_shape} and patch {plan.options.patch}, "
            f"and a worker may use {plan.memory_bytes / 1e9:.2f} GB; raise --memory, or make --block or --patch smaller"
        )
