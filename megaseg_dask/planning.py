"""Settings become a plan: sources and bundles are looked at, what is left open is decided, nothing is written.

Whatever can change a bit is resolved here, once, and recorded with the plan:
a run that resumes never plans anew.
"""

import math
from dataclasses import asdict, replace

import numpy as np
import psutil

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.inference import ModelRef, resolve_engine
from megaseg_dask.layout import iter_block_shapes
from megaseg_dask.memory import BUDGET_SHARE
from megaseg_dask.models import require_patch
from megaseg_dask.models.cards import MINIMUM_SHAPE
from megaseg_dask.models.zoo import load
from megaseg_dask.ngff.images import Image, digest_of, read_image, sample_of
from megaseg_dask.plan import Plan, PlannedVolume, run_folder
from megaseg_dask.settings import Settings
from megaseg_dask.stores import Location

DEFAULT_MEMORY_BYTES = 8 * 10**9


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
    require_measurable(settings, len(whole.levels))
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
    path, bundle = load(settings.model)
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
        options=settings.recorded().model_copy(update={"channel": str(channel), "time": (first, stop)}),
        memory_bytes=settings.memory or default_memory_bytes(settings.workers or 1),
        n_parameters=sum(t.numel() for t in bundle.weights.values()),
        first_filters=bundle.network.filters[0],
    )
    if plan.options.block is None:
        plan = choose_block(plan)
    require_memory(plan)
    return plan


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


def require_measurable(settings: Settings, n_levels: int) -> None:
    """Raise :class:`SettingsError` if the level to normalise by is not there, or finer than the one segmented."""
    if isinstance(settings.normalization, str):
        level = int(settings.normalization.removeprefix("level:"))
        if not settings.level <= level < n_levels:
            raise SettingsError(
                f"--normalization level:{level}: choose a level from {settings.level} to {n_levels - 1} of the source"
            )


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
