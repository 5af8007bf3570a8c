"""Planning: settings, a source and models become a plan, and nothing is written.

Everything that can change a bit of the output is decided here, once, and recorded with
the plan. A run that resumes keeps its decisions.
"""

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Literal

from megaseg_dask.algorithms.chunking import cheapest_block, iter_block_shapes
from megaseg_dask.algorithms.geometry import Shape, cheapest_patch
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import BundleError, SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, ignore
from megaseg_dask.inference.calibration import DEFAULT_GPU_BATCH, quickest_batch
from megaseg_dask.inference.engine import EngineSpec, resolve_engine
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.inference.gpu import installed_devices, visible_devices
from megaseg_dask.inference.machine import memory_bytes
from megaseg_dask.messages import size_text, stage_phrase
from megaseg_dask.models import BundleFacts, require_patch
from megaseg_dask.models.registry import describe
from megaseg_dask.ngff.group import find_owner
from megaseg_dask.ngff.image import Image, require_valid
from megaseg_dask.ngff.plate import require_valid_listing
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.plan.choice import Choice
from megaseg_dask.plan.cluster_spec import Cluster, cluster_of
from megaseg_dask.plan.groups import require_whole_groups
from megaseg_dask.plan.memory import (
    BUDGET_SHARE,
    CLIENT_BYTES,
    LEAST_SPLIT_VOXELS,
    MAX_DECODED_CHUNKS,
)
from megaseg_dask.plan.plan import (
    Plan,
    PlannedImage,
    PlannedVolume,
    is_runs_folder,
    run_folder,
)
from megaseg_dask.plan.plate_parts import Part, Readable, first_refusal
from megaseg_dask.plan.resolved import (
    Resolved,
    normalization_of,
    split_depth_of,
    threshold_of,
    where_of,
)
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.plan.stored import Stored
from megaseg_dask.plan.voxel_size import (
    Size,
    VolumeForm,
    choose_size_um,
    model_range_um,
    model_size_um,
)
from megaseg_dask.plan.where import MaskSurvey, list_chunks, survey
from megaseg_dask.stores import Location, open_array

DEFAULT_MEMORY_BYTES = 8 * 10**9
# How all parts of a plate are predicted; the block follows from each one's shape.
_ALIKE = ("patch", "overlap", "engine", "device", "precision", "batch", "threads")
# What a run that resumes keeps where the command leaves it open. All else is as given: masks,
# regions and channels were read for this request, and what differs from the record is named.
_KEPT = (*_ALIKE, "normalization", "split_depth", "block")


def make_plans(
    source: str, target: str, settings: Settings, parts: Sequence[Part], emit: Emit = ignore
) -> list[tuple[Plan, Part]]:
    """Return the plan of each part of a request.

    Fields of a plate that cannot be planned are named by the last plan, beside those that cannot
    be read; the others go on.

    Raises:
        MegasegError: No part can be planned; as :func:`make_plan`.
    """
    plans: list[tuple[Plan, Part]] = []
    refused: dict[str, SettingsError | SourceError] = {}
    missing: list[tuple[str, str]] = []
    parts, lacking = require_whole_groups(parts, settings)
    refused |= lacking
    for part in parts:
        try:
            plans.append((make_plan(source, target, settings, part, emit), part))
        except (SettingsError, SourceError) as error:
            refused |= dict.fromkeys(part.fields, error)
        if part.plate is not None:
            missing += part.plate.missing
    if not plans:
        raise first_refusal(refused.values())
    if refused:
        missing += [(path, str(error)) for path, error in refused.items()]
        last, part = plans[-1]
        assert last.plate is not None
        plate = replace(last.plate, missing=tuple(missing))
        plans[-1] = (last.model_copy(update={"plate": plate}), part)
    return plans


def make_plan(
    source: str, target: str, settings: Settings, part: Part, emit: Emit = ignore
) -> Plan:
    """Resolve settings into a plan; reads metadata and the bundle, writes nothing.

    How to predict, split and cut into blocks, where the settings leave it open, is taken from
    the plan of an earlier run of the same part. What follows from the machine is also taken
    from the plan of another part of the plate. ``emit`` gets the progress of models that are
    fetched.

    Raises:
        SourceError: The source cannot be segmented.
        SettingsError: The settings do not fit the source, the target or the models.
        TargetError: The target cannot be written, or would replace the source.
        BundleError: The models cannot be used.
    """
    request = _Request(Location.of(source), Location.of(target), settings, part)
    request.require_target()
    choice = part.first.choice
    image = request.first_image
    cluster = cluster_of(settings)
    filled = request.filled().filled(cluster.defaults())
    chunks = _Chunks.of(request.first_field / image.levels[0].path)
    models = open_models(filled, VolumeForm.of(image), emit)
    inputs = _group_channels(choice, models.ref.in_channels, settings.channel, request.source)
    engine = resolve_engine(
        filled.engine, filled.device, filled.precision, filled.threads, filled.tta
    )
    resolved = Resolved(
        channels=choice.channels,
        times=choice.times,
        level=filled.level,
        roi=choice.roi,
        voxel_size_um=models.voxel_size_um,
        where=where_of(settings),
        nan_to_background=filled.nan_to_background,
        missing_chunks=filled.missing_chunks,
        normalization=normalization_of(filled),
        patch=models.patch,
        overlap=models.overlap,
        engine=engine,
        batch=filled.batch or choose_batch(models, engine, cluster),
        outputs=filled.outputs,
        measure_channels=choice.measured,
        regions=settings.regions,
        table=filled.table,
        threshold=threshold_of(filled),
        connectivity=filled.connectivity,
        min_size=filled.min_size,
        fill_holes=filled.fill_holes,
        split_depth=split_depth_of(filled),
        scores_dtype=filled.scores_dtype,
        keep_logits=filled.keep_logits,
        label_name=filled.label_name,
        ome_zarr=filled.ome_zarr,
        block=filled.block or image.volume_shape(),
    )
    names = _target_names(choice, inputs, models.ref.outputs)
    targets = request.plan_images(resolved, names)
    request.require_publishable(next(iter(targets.values())))
    request.require_splittable(next(iter(targets.values())))
    plan = Plan(
        source=request.source,
        target=request.target,
        run=part.run,
        source_image=image,
        target_image=next(iter(targets.values())),
        source_digest=_digest_of(request, targets),
        source_sample=sample_of(chunks.array),
        source_chunk_bytes=chunks.n_bytes,
        stored=Stored.of(chunks.array),
        # Those that a source will have when it is finished give the block now.
        n_source_chunks=max(chunks.n_chunks, MAX_DECODED_CHUNKS if settings.follow else 0),
        volumes=_list_volumes(list(part.fields), choice.times, inputs, len(models.ref.outputs)),
        images={
            path: _planned_image(part.fields[path], target) for path, target in targets.items()
        },
        suffixes=tuple(map(_suffix, names)),
        measured_names=_column_names(choice),
        plate=part.plate,
        model=models.ref,
        resolved=resolved,
        settings=settings.recorded(),
        memory_bytes=memory_of(settings, cluster, engine.device),
        n_parameters=sum(bundle.n_parameters for bundle in models.bundles),
        first_filters=max(bundle.network.filters[0] for bundle in models.bundles),
        auto_patch=_auto_patch(models.bundles[0], models.overlap, models.grid_shape),
        model_voxel_size_um=model_size_um(models.bundles),
        model_voxel_range_um=model_range_um(models.bundles),
        proof_patch=models.patch,
    )
    plan.require_kept()
    plan = plan.model_copy(update={"proof_patch": choose_proof_patch(plan, models.patch_multiple)})
    if resolved.splits_objects():
        plan = plan.with_split(min(LEAST_SPLIT_VOXELS, padded_voxels(plan)))
    if filled.block is None:
        device = _device_memory_bytes(engine, cluster)
        plan = plan.with_block(choose_block(plan, device))
    if resolved.splits_objects():
        plan = plan.with_split(choose_split(plan, part.recorded))
    require_memory(plan)
    return plan if resolved.where is None else _with_surveys(plan)


def _planned_image(field: Readable, target: Image) -> PlannedImage:
    names = field.choice.channel_names
    return PlannedImage(target.placement, names, field.regions, field.mask)


def _with_surveys(plan: Plan) -> Plan:
    """Return the plan with what its masks mean for the blocks of its volumes.

    Raises:
        SettingsError: No mask has a voxel in what is segmented.
    """
    listings: dict[str, frozenset[str] | None] = {}
    if plan.resolved.where and plan.resolved.where.is_data:
        listings = {
            path: list_chunks(plan.source / path, plan.source_image) for path in plan.images
        }

    def survey_volume(volume: PlannedVolume) -> MaskSurvey:
        reader = plan.mask_reader(volume, listings.get(volume.image))
        assert reader is not None
        return survey(reader, plan.block_grid(), plan.region, plan.patch_grid)

    surveys = tuple(map_threaded(survey_volume, plan.volumes))
    if not any(each.n_voxels for each in surveys):
        raise SettingsError(
            f"--where {plan.settings.where}: the mask is empty in the part that is segmented, so "
            "nothing would be predicted; choose another mask, timepoint or region"
        )
    return plan.model_copy(update={"surveys": surveys})


# -- the request


@dataclass(frozen=True, slots=True)
class _Request:
    """Settings, and the images that they are about."""

    source: Location
    target: Location
    settings: Settings
    part: Part

    @property
    def is_in_place(self) -> bool:
        return self.source.is_same(self.target)

    @property
    def first_field(self) -> Location:
        return self.source / next(iter(self.part.fields))

    @property
    def first_image(self) -> Image:
        """The metadata of the first image, from the level that is segmented."""
        return self.part.first.image.from_level(self.settings.level)

    def plan_images(self, resolved: Resolved, names: Sequence[Sequence[str]]) -> dict[str, Image]:
        """Return the metadata of the scores of all images, by their paths."""
        images = {}
        for path, field in self.part.fields.items():
            image = field.image.from_level(resolved.level)
            images[path] = _target_image(image, resolved, names, is_in_place=self.is_in_place)
        return images

    def require_publishable(self, image: Image) -> None:
        """Raise :class:`SourceError` if the outputs, one of which is ``image``, cannot be valid."""
        require_valid(image, self.first_field)
        source = self.first_image
        if self.is_in_place and source.is_reduced:
            raise SourceError(
                f"{self.first_field} is OME-Zarr 0.6, which megaseg reads but does not write; "
                "choose a TARGET that is not the source"
            )
        if self.is_in_place and VERSIONS[source.version].zarr_format != source.zarr_format:
            raise SourceError(
                f"{self.first_field} has OME-Zarr {source.version} metadata in Zarr "
                f"v{source.zarr_format}, which no version of OME-Zarr allows: no program would "
                "find labels in it; choose a TARGET that is not the source"
            )
        plate = self.part.plate
        if plate is not None and not self.is_in_place:
            require_valid_listing(plate, image.version)

    def require_splittable(self, image: Image) -> None:
        """Raise :class:`SettingsError` if the size of voxels is needed and unknown."""
        settings = self.settings
        if settings.split_depth is not None and settings.split == "none":
            raise SettingsError(
                "--split-depth needs --split distance; add --split distance, or omit --split-depth"
            )
        if settings.split != "none" and image.unknown_size is not None:
            raise SettingsError(
                f"--split {settings.split} measures in µm, and the voxel size of {self.source} is "
                f"unknown ({image.unknown_size}); write the voxel size into its metadata, or omit "
                "--split"
            )

    def require_target(self) -> None:
        """Raise if the target lies in the source, would replace it, or cannot be written."""
        source = self.source
        target = self.target
        if is_runs_folder(target):
            raise TargetError(
                f"{target}: names that end in .run are reserved for run folders, which hold the "
                "record of a run; choose another name for TARGET"
            )
        if target.is_inside(source):
            raise TargetError(
                f"{target} lies inside the source; choose a folder beside it, or the source itself "
                "as target"
            )
        run = run_folder(target, self.settings.label_name)
        if source.is_inside(target) or source.is_inside(run) or source.is_same(run):
            raise TargetError(f"{target} contains the source; choose another folder")
        if self.is_in_place:
            self._require_labels_alone()
        elif owner := find_owner(target):
            raise TargetError(
                f"{target} lies inside {owner}, which is an image, a plate or an array; its "
                "metadata would not list the target, so choose a folder outside it"
            )
        target.require_writable()
        if self.part.plate and "scores" not in self.settings.outputs and not self.is_in_place:
            raise SettingsError(
                "a plate needs an image in each field: add scores to --outputs, or pass SOURCE as "
                "TARGET to add the labels to the source"
            )

    def _require_labels_alone(self) -> None:
        settings = self.settings
        if "scores" in settings.outputs:
            raise SettingsError(
                "the target is the source, and scores would replace its image: pass --outputs "
                "labels"
            )
        if settings.keep_logits:
            raise SettingsError(
                "--keep-logits needs another target than the source, because megaseg relabel "
                "writes no labels into a source"
            )
        if settings.level or settings.time or settings.roi:
            raise SettingsError(
                "--level, --time and --roi need another target than the source, because labels in "
                "the source must match the whole image"
            )

    def filled(self) -> Settings:
        """Return the settings, with open ones as in the plans of earlier runs."""
        settings = self.settings
        if self.is_in_place:
            # One container holds one version.
            settings = settings.model_copy(update={"ome_zarr": self.first_image.version})
        return settings.filled(self._earlier_options())

    def _earlier_options(self) -> Mapping[str, object]:
        if self.part.recorded is not None:
            return _options_of(self.part.recorded, _KEPT)
        if self.part.others:
            return _options_of(self.part.others[0], _ALIKE)
        return {}


def _options_of(plan: Plan, names: Sequence[str]) -> dict[str, object]:
    options = plan.resolved.options()
    return {name: options[name] for name in names}


# -- the source


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How an array is stored: bytes of a chunk, and number of chunks."""

    array: Location
    n_bytes: int
    n_chunks: int

    @classmethod
    def of(cls, location: Location) -> "_Chunks":
        array = open_array(location)
        n_bytes = math.prod(array.chunks) * array.dtype.itemsize
        per_axis = (-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))
        return cls(location, n_bytes, math.prod(per_axis))


def _digest_of(request: _Request, targets: Mapping[str, Image]) -> str:
    digest = digest_of(request.first_field, request.part.first.image)
    if request.part.plate is None:
        return digest
    # Fields of one form differ by name and place alone.
    placements = {path: asdict(target.placement) for path, target in targets.items()}
    return hashlib.sha256(json.dumps([digest, placements]).encode()).hexdigest()


# -- the target


def _group_channels(
    choice: Choice, n_inputs: int, wanted: str | None, where: Location
) -> list[tuple[int, ...]]:
    """Return the channels of each prediction: one, or all of them if the network takes several."""
    channels = choice.channels
    if n_inputs == 1:
        return [(channel,) for channel in channels]
    if len(channels) != n_inputs:
        raise SettingsError(
            f"--channel {wanted or channels[0]}: the model needs {n_inputs} channels of {where}; "
            "give them in the order of the model, separated by commas"
        )
    return [channels]


def _list_volumes(
    fields: Sequence[str],
    times: tuple[int, int],
    inputs: Sequence[tuple[int, ...]],
    n_outputs: int,
) -> tuple[PlannedVolume, ...]:
    first, stop = times
    volumes = []
    for field, t, (number, channels) in product(fields, range(first, stop), enumerate(inputs)):
        volumes.append(PlannedVolume(t, channels, t - first, number * n_outputs, field))
    return tuple(volumes)


def _target_image(
    image: Image, resolved: Resolved, names: Sequence[Sequence[str]], *, is_in_place: bool
) -> Image:
    """Return the metadata of the scores."""
    cropped = image.cropped(resolved.roi) if resolved.roi else image
    outlined = (
        cropped.with_channels([" ".join(parts) for parts in names])
        .with_times(*resolved.times)
        .with_pyramid(complete=not is_in_place)
    )
    return replace(outlined, version=resolved.ome_zarr, dtype=resolved.scores_dtype)


def _target_names(
    choice: Choice, inputs: list[tuple[int, ...]], outputs: tuple[str, ...]
) -> list[list[str]]:
    """Return the parts of each target channel's name, which become parts of folders' names.

    One part is the source's channel, if there are several; another is the network's output,
    if there are several.
    """
    of_channels: list[list[str]] = [[]]
    if len(inputs) > 1:
        of_channels = [[name] for name in _folder_names(choice.channel_names, choice.channels)]
    of_outputs: list[list[str]] = [[]]
    if len(outputs) > 1:
        of_outputs = [[name] for name in _folder_names(outputs, range(len(outputs)))]
    return [channel + output for channel, output in product(of_channels, of_outputs)]


def _column_names(choice: Choice) -> tuple[str, ...]:
    """Return the endings of the columns of measured channels: names, or indices of like names."""
    names = choice.measured_names
    return tuple(
        name if names.count(name) == 1 else str(channel)
        for name, channel in zip(names, choice.measured, strict=True)
    )


def _suffix(parts: Sequence[str]) -> str:
    """Return the end of the name of a label image: an underscore before each part."""
    return "".join(f"_{part}" for part in parts)


def _folder_names(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return each name where it can be part of a folder's name, else its number."""
    safe = [re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower() for name in names]
    return [
        str(number) if safe.count(name) > 1 or name in ("", "mask") or name.isdecimal() else name
        for number, name in zip(numbers, safe, strict=True)
    ]


# -- the models


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a run, the patches that they take, and the grid on which these lie.

    ``voxel_size_um`` (z, y, x) is that of the grid; ``None`` is the source's own.
    """

    ref: ModelRef
    bundles: tuple[BundleFacts, ...]
    patch: Shape
    overlap: tuple[float, ...]
    voxel_size_um: Size | None
    grid_shape: Shape

    @property
    def patch_multiple(self) -> Shape:
        """What the extents of a patch of all models are multiples of."""
        multiples = [bundle.network.patch_multiple for bundle in self.bundles]
        return tuple(math.lcm(*along_axis) for along_axis in zip(*multiples, strict=True))


def open_models(settings: Settings, form: VolumeForm, emit: Emit = ignore) -> Models:
    """Read the bundles of the models that settings name, for volumes of one form.

    Patch and overlap are those of the bundles if the settings leave them open.

    Raises:
        BundleError: The models cannot be averaged.
        SettingsError: The models do not take these settings.
    """
    if settings.checkpoint and len(settings.model) > 1:
        raise SettingsError(
            "--checkpoint works with one --model; for several models, give the path of each .ckpt "
            "as --model"
        )
    described = [describe(name, settings.checkpoint, emit) for name in settings.model]
    bundles = {str(path): bundle for path, bundle in described}
    if len({bundle.digest for bundle in bundles.values()}) < len(described):
        raise SettingsError(f"--model {', '.join(settings.model)}: the same model is given twice")
    ref = ModelRef.of(bundles, settings.checkpoint)
    first, *_ = bundles.values()
    if settings.patch is None:
        _require_alike("patch", "patch_shape", bundles)
    if settings.overlap is None:
        _require_alike("overlap", "overlap", bundles)
    overlap = settings.overlap or first.overlap
    voxel_size_um = choose_size_um(settings, form, list(bundles.values()))
    grid_shape = form.on_grid(voxel_size_um)
    patch = _choose_patch(settings.patch, overlap, first, grid_shape)
    for bundle in bundles.values():
        require_patch(bundle.network, patch)
    if settings.normalization and not first.preprocessing.has_zscore:
        raise SettingsError(
            f"--normalization: {ref.name} does not use a z-score; it prepares images by "
            f"{first.preprocessing}, so omit the option"
        )
    return Models(ref, tuple(bundles.values()), patch, overlap, voxel_size_um, grid_shape)


def _require_alike(
    option: str, name: Literal["patch_shape", "overlap"], bundles: Mapping[str, BundleFacts]
) -> None:
    """Raise :class:`BundleError` if bundles differ in a value that an option leaves open."""
    first, *_ = bundles
    expected = getattr(bundles[first], name)
    for path, bundle in bundles.items():
        value = getattr(bundle, name)
        if value != expected:
            raise BundleError(
                f"{path} has {name} {value}, {first} has {expected}; choose one value for both "
                f"with --{option}"
            )


def _choose_patch(
    wanted: Shape | Literal["auto"] | None,
    overlap: tuple[float, ...],
    bundle: BundleFacts,
    grid_shape: Shape,
) -> Shape:
    """Return the patch: as wanted, the bundle's, or the cheapest near that."""
    if wanted == "auto":
        return _auto_patch(bundle, overlap, grid_shape)
    return wanted or bundle.patch_shape


def _auto_patch(bundle: BundleFacts, overlap: tuple[float, ...], grid_shape: Shape) -> Shape:
    multiple = bundle.network.patch_multiple
    return cheapest_patch(grid_shape, bundle.patch_shape, overlap, multiple)


def choose_batch(models: Models, engine: EngineSpec, cluster: Cluster) -> int:
    """Return the patches per forward pass if nobody chooses them: of a GPU the quickest."""
    if engine.device != "cuda":
        return 1
    if not cluster.is_local:
        # What is quickest on a GPU of this machine says nothing about others.
        return DEFAULT_GPU_BATCH
    return quickest_batch(models.ref, engine, models.patch)


# -- memory and blocks


def default_memory_bytes(n_workers: int) -> int:
    """Return 8 GB, or a worker's share of this machine or its container where that is less."""
    total = memory_bytes()
    # A small container is full with less than the usual rest.
    for_workers = min(total * BUDGET_SHARE, total - CLIENT_BYTES)
    return min(DEFAULT_MEMORY_BYTES, max(int(for_workers / n_workers), 0))


def memory_of(settings: Settings, cluster: Cluster, device: str = "cpu") -> int:
    """Return the bytes that a worker may plan with: asked for, of a job, or of this machine.

    Raises:
        SettingsError: A job has less than is asked for.
    """
    limit = cluster.memory_bytes()
    if settings.memory and limit and settings.memory > limit:
        raise SettingsError(
            f"--memory {settings.memory / 1e9:.1f} GB: a worker of {settings.cluster} may plan "
            f"with {limit / 1e9:.1f} GB; raise options.memory there"
        )
    return settings.memory or limit or default_memory_bytes(_n_workers(cluster, settings, device))


def _n_workers(cluster: Cluster, settings: Settings, device: str) -> int:
    """Return how many workers share the memory of this machine, at most."""
    if settings.workers == 0:
        return 1
    if cluster.workers:
        return cluster.workers
    if cluster.adaptive:
        return cluster.adaptive.maximum
    if cluster.is_local and device == "cuda":
        return max(len(visible_devices()), 1)
    return 1


def require_machine(plan: Plan) -> None:
    """Raise :class:`SettingsError` if local workers need more memory than this machine has.

    A plan may have been recorded elsewhere.
    """
    cluster = cluster_of(plan.settings)
    if not cluster.is_local:
        return
    n_workers = _n_workers(cluster, plan.settings, plan.engine.device)
    each = max(plan.projected_bytes.values())
    needed = each
    words = f"the run needs {each / 1e9:.2f} GB"
    if plan.settings.workers != 0:
        needed = n_workers * each + CLIENT_BYTES
        words = (
            f"the run needs {needed / 1e9:.2f} GB ({each / 1e9:.2f} GB for each of {n_workers} "
            "workers, the rest for the client)"
        )
    total = memory_bytes()
    if needed > total:
        raise SettingsError(
            f"{words}, and this machine, or its container, has {total / 1e9:.2f} GB: use fewer "
            "--workers, or a smaller --memory (if the plan is recorded, with --overwrite)"
        )


def _device_memory_bytes(engine: EngineSpec, cluster: Cluster) -> int | None:
    """Return what is free on the GPUs of local workers; ``None`` where nobody can tell."""
    if engine.device == "cpu" or not cluster.is_local:
        return None
    return min((device.free_bytes for device in installed_devices()), default=None)


def choose_block(plan: Plan, device_memory_bytes: int | None = None) -> Shape:
    """Return the block that predicts the fewest patches within the memory of host and GPU.

    It is the smallest block if none fits; :func:`require_memory` then says so.
    """

    def fits(block: Shape) -> bool:
        if device_memory_bytes and plan.project_device(block, plan.batch) > device_memory_bytes:
            return False
        return max(plan.project(block).values()) <= plan.memory_bytes

    return cheapest_block(plan.volume_shape, plan.patch_grid, fits)


def choose_split(plan: Plan, recorded: Plan | None) -> int:
    """Return the voxels of the largest padded box of an object that can be split.

    A run that resumes keeps them: another memory must not change its result.
    """
    if recorded is not None:
        # A run that follows its source has more timepoints by now.
        as_now = replace(recorded.resolved, times=plan.resolved.times)
        if as_now == plan.resolved:
            return recorded.split_voxels

    def needed(voxels: int) -> int:
        return max(plan.with_split(voxels).projected_bytes.values())

    candidates = range(plan.split_voxels, padded_voxels(plan) + 1)
    n_fitting = bisect_right(candidates, plan.memory_bytes, key=needed)
    return candidates[max(n_fitting - 1, 0)]


def padded_voxels(plan: Plan) -> int:
    """Return the voxels of the box of an object as large as the volume, with its padding."""
    return math.prod(n + 2 for n in plan.volume_shape)


def choose_proof_patch(plan: Plan, multiple: Shape) -> Shape:
    """Return the patch that engines prove themselves on against float32 PyTorch.

    It is the plan's, halved along its longest axes while PyTorch needs more memory than a worker
    has. The smallest is twice the multiple that the network takes.
    """
    patch = plan.resolved.patch
    while plan.reference_bytes(patch) > plan.memory_bytes:
        lengths = []
        for n, step in zip(patch, multiple, strict=True):
            lengths.append(n if n >= 4 * step else 0)
        if not any(lengths):
            break
        axis = lengths.index(max(lengths))
        half = patch[axis] // 2 // multiple[axis] * multiple[axis]
        patch = (*patch[:axis], half, *patch[axis + 1 :])
    return patch


def require_memory(plan: Plan) -> None:
    """Raise :class:`SettingsError` if a stage's projected peak is above the budget."""
    stage, needed = max(plan.projected_bytes.items(), key=lambda item: item[1])
    if needed <= plan.memory_bytes:
        return
    shapes = iter_block_shapes(plan.volume_shape)
    least = min(max(plan.project(block).values()) for block in shapes)
    has = f"a worker may use only {size_text(plan.memory_bytes)}"
    patch = ",".join(map(str, plan.resolved.patch))
    if least > plan.memory_bytes:
        least_text = f"{math.ceil(least / 1e7) / 100:.2f} GB"
        if least == plan.projected_bytes.get("join"):
            # No block and no patch makes it smaller.
            raise SettingsError(
                f"{has}, and {stage_phrase('join')} needs {least_text}; raise --memory, or segment "
                "parts of the volume with --roi"
            )
        raise SettingsError(
            f"{has}, and the smallest possible block needs {least_text} with patches of {patch}; "
            "raise --memory, or use a smaller --patch"
        )
    block = ",".join(map(str, plan.block_shape))
    raise SettingsError(
        f"{has}, and {stage_phrase(stage)} needs {size_text(needed)} with blocks of {block} and "
        f"patches of {patch}; remove --block to get one that fits"
    )
