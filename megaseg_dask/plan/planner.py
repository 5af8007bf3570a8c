"""Settings become a plan: sources and bundles are looked at, what is left open is decided, nothing is written.

Whatever can change a bit is resolved here, once, and recorded with the plan:
a run that resumes never plans anew.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import psutil

from megaseg_dask.algorithms.chunking import iter_block_shapes
from megaseg_dask.algorithms.geometry import Box, Shape, cheapest_patch
from megaseg_dask.errors import BundleError, SettingsError, SourceError, TargetError
from megaseg_dask.inference.calibration import quickest_batch
from megaseg_dask.inference.engine import EngineRequest, resolve_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models import BundleFacts, require_patch
from megaseg_dask.models.cards import MINIMUM_SHAPE
from megaseg_dask.models.registry import describe
from megaseg_dask.ngff.image import Image, digest_of, sample_of
from megaseg_dask.ngff.plate import Plate
from megaseg_dask.plan.cluster_spec import Cluster, cluster_of
from megaseg_dask.plan.memory import BUDGET_SHARE
from megaseg_dask.plan.plan import Plan, PlannedVolume, run_folder
from megaseg_dask.plan.plate_parts import Part
from megaseg_dask.plan.settings import Settings
from megaseg_dask.stores import Location, open_array

DEFAULT_MEMORY_BYTES = 8 * 10**9
# How all parts of a plate are predicted; the block follows from each one's shape.
_ALIKE = ("patch", "overlap", "engine", "device", "precision", "batch", "threads")


def make_plan(source: str, target: str, settings: Settings, part: Part) -> Plan:
    """Resolve settings into a plan; reads metadata and the bundle, writes nothing.

    What the settings leave open is taken from the plan of an earlier run of the
    same part: a run that resumes never re-plans. What may change a bit on
    another machine is also taken from that of another part of the plate. Raises
    :class:`SourceError`, :class:`SettingsError`, :class:`TargetError` or
    :class:`BundleError`.
    """
    where, to = Location.of(source), Location.of(target)
    plate, whole, recorded = part.plate, part.image, part.recorded
    if settings.level >= len(whole.levels):
        raise SettingsError(
            f"--level {settings.level}: the source has levels 0 to {len(whole.levels) - 1}"
        )
    require_measurable(settings, len(whole.levels))
    image = whole.from_level(settings.level)
    paths = [field.path for field in plate.fields] if plate else [""]
    require_segmentable(image, where / paths[0])
    require_target(settings, where, to)
    if plate and "scores" not in settings.outputs and not where.is_same(to):
        raise SettingsError(
            "a plate of labels alone would list fields without an image, which no reader takes: add scores to "
            "--outputs, or pass SOURCE as TARGET too, which adds labels to its fields"
        )
    if where.is_same(to):
        # One container holds one version.
        settings = settings.model_copy(update={"ome_zarr": whole.version})
    channels = choose_channels(image, settings.channel, where)
    first, stop = _choose_times(image, settings)
    if recorded is not None:
        settings = settings.filled(recorded.options.result_options())
    elif part.others:
        earlier = part.others[0].options.result_options()
        settings = settings.filled({name: earlier[name] for name in _ALIKE})
    cluster = cluster_of(settings)
    settings = settings.filled(cluster.defaults())
    level = where / paths[0] / image.levels[0].path
    array = open_array(level)
    settings, model, bundles = open_models(settings, image.volume_shape())
    inputs = _choose_inputs(channels, model.in_channels, settings.channel, where)
    names = _target_names(image, inputs, model.outputs)
    engine = resolve_engine(requested_engine(settings))
    batch = settings.batch or 1
    if engine.device == "cuda" and settings.batch is None:
        assert isinstance(settings.patch, tuple)
        batch = quickest_batch(model, engine, settings.patch)
    settings = settings.filled(engine.record(batch))
    assert settings.overlap is not None
    plan = Plan(
        source=where,
        target=to,
        run=part.run,
        source_image=image,
        target_image=replace(
            _cropped(image, settings, where)
            .with_channels([" ".join(parts) for parts in names])
            .with_times(first, stop)
            .with_pyramid(complete=not where.is_same(to)),
            version=settings.ome_zarr,
            dtype=settings.scores_dtype,
        ),
        source_digest=_digest_of(where, whole, plate),
        source_sample=sample_of(level),
        source_chunk_bytes=math.prod(array.chunks) * array.dtype.itemsize,
        n_source_chunks=math.prod(
            -(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)
        ),
        volumes=tuple(
            PlannedVolume(t, together, t - first, place * len(model.outputs), field)
            for field in paths
            for t in range(first, stop)
            for place, together in enumerate(inputs)
        ),
        suffixes=tuple("".join(f"_{part}" for part in parts) for parts in names),
        plate=plate,
        model=model,
        engine=engine,
        batch=batch,
        # By index: a name may be given to another channel later.
        options=settings.recorded().model_copy(
            update={"channel": ",".join(map(str, channels)), "time": (first, stop)}
        ),
        memory_bytes=memory_of(settings, cluster),
        n_parameters=sum(bundle.n_parameters for bundle in bundles),
        first_filters=max(bundle.network.filters[0] for bundle in bundles),
        auto_patch=choose_patch("auto", settings.overlap, bundles[0], image.volume_shape()),
    )
    if plan.options.block is None:
        plan = choose_block(plan)
    require_memory(plan)
    return plan


def requested_engine(settings: Settings) -> EngineRequest:
    """Return what settings ask of the engine."""
    return EngineRequest(
        engine=settings.engine,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        tta=settings.tta,
    )


def open_models(
    settings: Settings, volume_shape: Shape
) -> tuple[Settings, ModelRef, list[BundleFacts]]:
    """Read what the models that settings name say; patch and overlap, where they are left open, are those of the bundles.

    Raises :class:`BundleError` for models that cannot be averaged, and :class:`SettingsError` for other settings
    than they take.
    """
    if settings.checkpoint and len(settings.model) > 1:
        raise SettingsError(
            "--checkpoint is of one --model; of several, give the path of each .ckpt as --model"
        )
    found = [describe(name, settings.checkpoint) for name in settings.model]
    bundles = {str(path): bundle for path, bundle in found}
    if len({bundle.digest for bundle in bundles.values()}) < len(found):
        raise SettingsError(
            f"--model {', '.join(settings.model)}: the same model twice; its mean is itself"
        )
    model, first = ModelRef.of(bundles, settings.checkpoint), found[0][1]
    for path, bundle in found:
        for name in ("patch_shape", "overlap"):
            mine, theirs = getattr(first, name), getattr(bundle, name)
            if getattr(settings, name.removesuffix("_shape")) is None and mine != theirs:
                raise BundleError(
                    f"{path} has {name} {theirs}, {found[0][0]} has {mine}; choose one for both with "
                    f"--{name.removesuffix('_shape')}"
                )
    overlap = settings.overlap or first.overlap
    patch = choose_patch(settings.patch, overlap, first, volume_shape)
    for bundle in bundles.values():
        require_patch(bundle.network, patch)
    if settings.normalization and not first.preprocessing.has_zscore:
        raise SettingsError(
            f"--normalization: {model.name} takes images without a z-score, by: {first.preprocessing}"
        )
    return settings.filled({"patch": patch, "overlap": overlap}), model, list(bundles.values())


def _digest_of(where: Location, image: Image, plate: Plate | None) -> str:
    if plate is None:
        return digest_of(where, image)
    # Fields of one form differ by name alone.
    identity = [
        digest_of(where / plate.fields[0].path, image),
        [field.path for field in plate.fields],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _cropped(image: Image, settings: Settings, where: Location) -> Image:
    if settings.roi is None:
        return image
    start, stop = zip(*settings.roi, strict=True)
    box, whole = Box(start, stop), Box.of(image.volume_shape())
    if box not in whole:
        raise SettingsError(
            f"--roi {box}: reaches beyond the volumes of {where}, which are {whole}"
        )
    return image.cropped(box)


def _target_names(
    image: Image, inputs: list[tuple[int, ...]], outputs: tuple[str, ...]
) -> list[list[str]]:
    """Return the parts of each target channel's name: of several source channels its own, of several outputs its own.

    They become parts of folders' names.
    """
    channels = (
        [[part] for part in _safe(_channel_names(image))]
        if len(inputs) > 1
        else [[]] * image.extent("c")
    )
    of_outputs = [[part] for part in _safe(outputs)] if len(outputs) > 1 else [[]]
    return [channels[together[0]] + output for together in inputs for output in of_outputs]


def _safe(names: Sequence[str]) -> list[str]:
    """Return each name where it can be part of a folder's name, else its number."""
    safe = [re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower() for name in names]
    taken = {"", "mask", *map(str, range(len(names)))}
    return [
        name if safe.count(name) == 1 and name not in taken else str(i)
        for i, name in enumerate(safe)
    ]


def _channel_names(image: Image) -> list[str]:
    """Return the name of each channel, or its number where it has none."""
    n = image.extent("c")
    return [*image.channel_names[:n], *map(str, range(len(image.channel_names), n))]


def choose_patch(
    wanted: Shape | Literal["auto"] | None,
    overlap: tuple[float, ...],
    bundle: BundleFacts,
    volume_shape: Shape,
) -> Shape:
    """Return the patch: as wanted, the bundle's, or the cheapest near that; raises :class:`SettingsError`."""
    if wanted == "auto":
        return cheapest_patch(
            volume_shape, bundle.patch_shape, overlap, bundle.network.patch_multiple
        )
    patch: Shape = wanted or bundle.patch_shape
    require_patch(bundle.network, patch)
    return patch


def default_memory_bytes(n_workers: int) -> int:
    """Return 8 GB, or a worker's share of this machine where that is less."""
    return min(DEFAULT_MEMORY_BYTES, int(psutil.virtual_memory().total * BUDGET_SHARE / n_workers))


def memory_of(settings: Settings, cluster: Cluster) -> int:
    """Return the bytes that a worker may plan with: as asked for, a job's, or a share of this machine.

    Raises :class:`SettingsError` for more than a job has.
    """
    most = cluster.memory_bytes()
    if settings.memory and most and settings.memory > most:
        raise SettingsError(
            f"--memory {settings.memory / 1e9:.1f} GB: a worker of {settings.cluster} may plan with "
            f"{most / 1e9:.1f} GB; raise options.memory there"
        )
    return settings.memory or most or default_memory_bytes(cluster.workers or 1)


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
        raise TargetError(
            f"{target} lies inside the source; choose a folder beside it, or the source itself as target"
        )
    run = run_folder(target, settings.label_name)
    if any(source.is_inside(folder) for folder in (target, run)) or source.is_same(run):
        raise TargetError(f"{target} holds the source; choose a folder of its own")
    if source.is_same(target):
        if "scores" in settings.outputs:
            raise SettingsError(
                "the target is the source, whose image stays as it is: pass --outputs labels"
            )
        if settings.level or settings.time or settings.roi:
            raise SettingsError(
                "--level, --time and --roi need a target of their own: labels in the source match all of it"
            )
    target.require_writable()


def choose_channels(image: Image, wanted: str | None, where: Location) -> list[int]:
    """Return the indices of the channels to segment, in the order in which they were asked for."""
    n, names = image.extent("c"), _channel_names(image)
    listed = ", ".join(f"{i} ({name})" if name != str(i) else name for i, name in enumerate(names))
    if wanted is None and n > 1:
        raise SettingsError(f"{where} has {n} channels; choose one with --channel: {listed}")
    if wanted is None:
        return [0]
    found = []
    # A name may hold a comma.
    for channel in [wanted] if wanted in names else wanted.split(","):
        if channel in names:
            found.append(names.index(channel))
        elif channel.strip().isdecimal() and int(channel) < n:
            found.append(int(channel))
        else:
            raise SettingsError(
                f"--channel {channel}: no such channel in {where}; there are {listed}"
            )
    if len(set(found)) < len(found):
        raise SettingsError(f"--channel {wanted}: names a channel twice")
    return found


def _choose_inputs(
    channels: list[int], n_inputs: int, wanted: str | None, where: Location
) -> list[tuple[int, ...]]:
    """Return the channels that are predicted together: each by itself, or all as the inputs of a network of several."""
    if n_inputs == 1:
        return [(c,) for c in channels]
    if len(channels) != n_inputs:
        raise SettingsError(
            f"--channel {wanted or channels[0]}: the model takes {n_inputs} channels of {where} together; "
            "name them in its order, separated by commas"
        )
    return [tuple(channels)]


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
        blocks = map(plan.with_block, iter_block_shapes(plan.volume_shape))
        least = min(max(block.projected_bytes.values()) for block in blocks)
        advice = (
            "leave out --block, and one is chosen that fits"
            if least <= plan.memory_bytes
            else f"no block needs less than {math.ceil(least / 1e7) / 100:.2f} GB: raise --memory, or make --patch smaller"
        )
        raise SettingsError(
            f"stage {stage} needs {most / 1e9:.2f} GB with block {plan.block_shape} and patch {plan.options.patch}, "
            f"and a worker may use {plan.memory_bytes / 1e9:.2f} GB; {advice}"
        )
