"""Where to predict: the mask of each image, found when a run is planned and read by its tasks.

A mask is a label image, of the source or of another store, or the chunks that the source
has. What a task sees of it follows from the volume alone, and has to be what was seen
when the run was planned.
"""

import functools
import math
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box, PatchGrid, Shape
from megaseg_dask.algorithms.masks import (
    DISTANCE_BYTES,
    ROUNDING,
    Mask,
    near,
    nearest_voxels,
    reach,
)
from megaseg_dask.algorithms.normalization import PARTITION_SHAPE
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.messages import count
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.ngff.labels import labels_group, list_labels, read_label_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.companion import (
    find_label,
    is_readable_plate,
    one_image,
    read_companion,
)
from megaseg_dask.plan.resolved import Where
from megaseg_dask.stores import Location
from megaseg_dask.stores.failures import is_denied

# Planes of a block whose mask is read at a time, and the part whose distances are computed at once.
_N_PLANES = 64
_TILE = 128


@dataclass(frozen=True, slots=True)
class PlannedMask:
    """The mask of one image.

    ``array`` is the address of a level of a label image, below the image itself if it
    ``is_own``; it is empty where the mask is the chunks of the source. The center of voxel
    ``i`` of the image lies at ``offset + i * step`` voxels of the mask, per axis ``(z, y, x)``.
    ``digests`` are those of the mask at each chosen timepoint, or of its only one.
    """

    array: str = ""
    is_own: bool = True
    axes: tuple[str, ...] = ()
    shape: Shape = ()
    step: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    has_times: bool = False
    digests: tuple[str, ...] = ()
    is_whole: bool = False

    @property
    def is_data(self) -> bool:
        """Whether the mask is the chunks that the source has."""
        return not self.array

    def digest_at(self, number: int) -> str:
        """Return the digest at a chosen timepoint, by its number among them."""
        return self.digests[number if len(self.digests) > 1 else 0]

    def location(self, image: Location) -> Location:
        """Return where the array is; ``image`` is that to which the mask belongs."""
        return image / self.array if self.is_own else Location.of(self.array)

    def volume(self, image: Location, t: int) -> Volume:
        """Return the mask's voxels at a timepoint of the image."""
        t_of_mask = t if self.has_times else 0
        return Volume(
            self.location(image),
            self.axes,
            t_of_mask,
            is_whole=self.is_whole,
            expected_shape=self.shape,
        )


# -- finding it


def find_mask(
    location: Location,
    image: Image,
    where: Where | None,
    times: tuple[int, int],
    channels: Sequence[int],
    field: str = "",
    *,
    is_only: bool = True,
    is_unmarked: bool = False,
) -> PlannedMask | None:
    """Return the mask of an image, for chosen timepoints and channels; it is read once.

    ``image`` begins at the level that is segmented. ``field`` is its path in its plate, if it
    is in one, of which it ``is_only`` if no other field is chosen. With ``is_unmarked`` the
    metadata of the mask need not say that it is one.

    Raises:
        SettingsError: There is no such mask, or it does not cover the image.
        SourceError: It is no label image, or lacks parts.
        DataError: The mask cannot be read.
        StoreError: The store failed.
    """
    if where is None:
        return None
    if where.margin_um and image.unknown_size:
        raise SettingsError(
            f"--where-margin: the size of the voxels of {location} is unknown "
            f"({image.unknown_size}); write it into its metadata, in µm, or leave the margin out"
        )
    if where.is_data:
        return PlannedMask(digests=_digests_of_chunks(location, image, times, channels))
    label, level_name, is_own = _find_label(location, where.text, field, is_only=is_only)
    labels = read_companion(label, location, f"--where {where.text}", is_unmarked=is_unmarked)
    _require_scales(image, labels, where.text)
    level = _choose_level(image, labels, level_name, where.text, is_own=is_own)
    step, offset = _alignment(image, labels, level, where.text, is_own=is_own)
    _require_times(image, labels, where.text)
    path = labels.levels[level].path
    mask = PlannedMask(
        array=f"labels/{label.basename}/{path}" if is_own else (label / path).url,
        is_own=is_own,
        axes=labels.axis_names,
        shape=labels.volume_shape(level),
        step=step,
        offset=offset,
        has_times=labels.extent("t") > 1,
        is_whole=labels.is_whole,
    )
    numbers = range(*times) if mask.has_times else range(1)
    digests = map_threaded(lambda t: _digest(mask.volume(location, t), mask.shape), numbers)
    return replace(mask, digests=tuple(digests))


def _find_label(
    location: Location, text: str, field: str, *, is_only: bool
) -> tuple[Location, str | None, bool]:
    """Return a label image, the name of its level if one is given, and whether it is the image's.

    A name means a label image of the image. All else is the address of another one.
    """
    own = list_labels(location)
    name, _, level_name = text.rpartition("/")
    if text in own:
        return labels_group(location) / text, None, True
    if name in own:
        return labels_group(location) / name, level_name, True
    try:
        return find_label(text, field, is_only=is_only), None, False
    except SourceError as error:
        refusal = _refusal(location, text, own, error)
    level = Location.of(text)
    label = level.parent
    is_of_field = bool(field) and is_readable_plate(label.parent)
    try:
        if is_of_field:
            label = find_label(label.url, field, is_only=is_only)
        labels = read_label_image(label)
    except SourceError as error:
        raise (_refusal(location, text, own, error) if is_of_field else refusal) from None
    if level.basename not in [each.path for each in labels.levels]:
        raise refusal
    if not is_only and not is_of_field:
        raise _refusal(location, text, own, one_image(level))
    return label, level.basename, False


def _refusal(
    location: Location, text: str, own: Sequence[str], error: SourceError
) -> SettingsError:
    listed = f"label images {', '.join(own)}" if own else "no label image"
    refusal = SettingsError(f"--where {text}: {error} ({location} has {listed})")
    refusal.__cause__ = error
    return refusal


def _choose_level(image: Image, labels: Image, name: str | None, text: str, *, is_own: bool) -> int:
    """Return a level by its name, else the coarsest one that is not coarser than the image."""
    names = [level.path for level in labels.levels]
    if name is not None:
        if name not in names:
            raise SettingsError(f"--where {text}: its levels are {', '.join(names)}")
        return names.index(name)
    chosen = 0
    for level in range(len(names)):
        step, _ = _steps(image, labels, level, is_own=is_own)
        if min(step) >= 1 - ROUNDING:
            chosen = level
    return chosen


def _places(image: Image, level: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scale and translation ``(z, y, x)`` of a level, in µm where the unit is known."""
    scale, translation = image.transform(level)
    in_um = np.array([image.axes[image.axis_names.index(name)].in_um for name in SPATIAL])
    return np.array(image.spatial(scale)) * in_um, np.array(image.spatial(translation)) * in_um


def _require_scales(image: Image, labels: Image, text: str) -> None:
    scales = [_places(labels, level)[0] for level in range(len(labels.levels))]
    if not np.all([_places(image, 0)[0], *scales]):
        raise SettingsError(
            f"--where {text}: the scale of the mask or of the image is 0; write the size of their "
            "voxels into the metadata"
        )


def _steps(
    image: Image, labels: Image, level: int, *, is_own: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return step and offset of a :class:`PlannedMask`."""
    shape = labels.volume_shape(level)
    if is_own and shape == image.volume_shape():
        return (1.0,) * len(shape), (0.0,) * len(shape)
    scale, translation = _places(image, 0)
    mask_scale, mask_translation = _places(labels, level)
    step = scale / mask_scale
    offset = (translation - mask_translation) / mask_scale
    if is_own:
        # Labels lie on the voxels of their image: not all programs repeat where that is.
        offset = (step - 1) / 2
    return tuple(step.tolist()), tuple(offset.tolist())


def _alignment(
    image: Image, labels: Image, level: int, text: str, *, is_own: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return step and offset of a mask that covers the image, to half a coarse voxel.

    Raises:
        SettingsError: It does not.
    """
    step, offset = _steps(image, labels, level, is_own=is_own)
    axes = zip(SPATIAL, image.volume_shape(), labels.volume_shape(level), step, offset, strict=True)
    for axis, n, n_mask, factor, begin in axes:
        first = begin - factor / 2
        last = begin + (n - 0.5) * factor
        # In voxels of the mask, which goes from -0.5 to n - 0.5.
        largest_gap = max(abs(first + 0.5), abs(last - n_mask + 0.5))
        if largest_gap > max(abs(factor), 1) / 2 + ROUNDING:
            raise SettingsError(
                f"--where {text}: along {axis} the image goes from voxel {first + 0.5:.6g} to "
                f"{last + 0.5:.6g} of the mask, which has {n_mask}; a mask covers the whole image, "
                "to half a voxel"
            )
    return step, offset


def _require_times(image: Image, labels: Image, text: str) -> None:
    n_times = labels.extent("t")
    if n_times not in (1, image.extent("t")):
        raise SettingsError(
            f"--where {text}: the mask has {count(n_times, 'timepoint')}, and the image has "
            f"{image.extent('t')}; the mask must have the same number, or one"
        )
    if labels.extent("c") > 1:
        raise SettingsError(
            f"--where {text}: the mask has {labels.extent('c')} channels; it must have one"
        )


def _digest(volume: Volume, shape: Shape) -> str:
    """Return a digest of which voxels of a mask are set: not of their ids, nor of their chunks."""
    digest = sha256(repr(shape).encode())
    for box in BlockGrid(shape, PARTITION_SHAPE):
        digest.update(np.packbits(volume.read(box) != 0).tobytes())
    return digest.hexdigest()


def _digests_of_chunks(
    location: Location, image: Image, times: tuple[int, int], channels: Sequence[int]
) -> tuple[str, ...]:
    """Return a digest of which chunks there are, for each timepoint."""
    listed = list_chunks(location, image)
    whole = Box.of(image.volume_shape())
    digests = []
    for t in range(*times):
        digest = sha256()
        for c in channels:
            volume = Volume.of(location, image, t=t, c=c)
            for chunk in volume.iter_stored(whole, listed):
                digest.update(f"{chunk}\n".encode())
        digests.append(digest.hexdigest())
    return tuple(digests)


def list_chunks(location: Location, image: Image) -> frozenset[str] | None:
    """Return the keys of all stored objects of an image; ``None`` if they cannot be listed."""
    if not location.is_listable:
        return None
    try:
        return frozenset((location / image.levels[0].path).keys(""))
    except StoreError as error:
        # Who may read a store may not always list it.
        if not is_denied(error):
            raise
        return None


# -- reading it


@dataclass(frozen=True, slots=True)
class MaskReader:
    """The mask of one volume, with its margin, on the voxels of the source.

    ``channels`` are the volume's, for a mask of stored chunks; ``listed`` are the keys of all
    stored objects, where they were listed.
    """

    mask: PlannedMask
    image: Location
    t: int
    channels: Sequence[Volume]
    volume_shape: Shape
    spacing_um: tuple[float, ...]
    margin_um: float
    listed: frozenset[str] | None = None

    def read(self, region: Box) -> Mask:
        """Return which voxels of a region are wanted.

        Raises:
            DataError: The mask cannot be read.
            StoreError: The store failed.
        """
        wanted = np.empty(region.shape, bool)
        n_planes, *_ = region.shape
        for part in BlockGrid(region.shape, (min(_N_PLANES, n_planes), *region.shape[1:])):
            wanted[part.slices] = self._read_slab(part.shifted(region.start))
        return wanted

    def _read_slab(self, slab: Box) -> Mask:
        if not self.margin_um:
            return self._read_mask(slab)
        halo = reach(self.margin_um, self.spacing_um)
        around = slab.grown(halo) & Box.of(self.volume_shape)
        mask = self._read_mask(around)
        wanted = np.empty(slab.shape, bool)
        for tile in BlockGrid(slab.shape, (slab.shape[0], _TILE, _TILE)):
            core = tile.shifted(slab.start)
            read = core.grown(halo) & around
            part = mask[read.within(around).slices]
            is_near = near(part, self.margin_um, self.spacing_um)
            wanted[tile.slices] = is_near[core.within(read).slices]
        return wanted

    def _read_mask(self, box: Box) -> Mask:
        if self.mask.is_data:
            stored = (channel.is_stored(box, self.listed) for channel in self.channels)
            return functools.reduce(np.logical_or, stored)
        mask = self.mask
        axes = zip(box.ranges, mask.step, mask.offset, mask.shape, strict=True)
        indices = [nearest_voxels(*limits, step, offset, n) for limits, step, offset, n in axes]
        needed = Box.between((int(axis.min()), int(axis.max()) + 1) for axis in indices)
        values = self.mask.volume(self.image, self.t).read(needed) != 0
        z, y, x = (axis - first for axis, first in zip(indices, needed.start, strict=True))
        on_source: Mask = values[z][:, y][:, :, x]
        return on_source


def reading_bytes(where: Where | None, region: Shape, spacing_um: Sequence[float]) -> int:
    """Return the bytes of reading the mask of a region, and of keeping it."""
    if where is None:
        return 0
    n_planes = min(_N_PLANES, region[0])
    halo = reach(where.margin_um, spacing_um)
    slab = Box.of((n_planes, *region[1:])).grown(halo)
    tile = Box.of((n_planes, _TILE, _TILE)).grown(halo)
    distances = tile.size * DISTANCE_BYTES if where.margin_um else 0
    # Ids of 8 bytes, what is set of them, and those on the voxels of the source.
    return math.prod(region) * 3 + slab.size * 12 + distances


# -- what a mask means for the blocks of a volume


@dataclass(frozen=True, slots=True)
class MaskSurvey:
    """What the mask of one volume means for its blocks, seen when the run was planned.

    ``n_patches`` counts those that touch the mask, each once. ``predicted`` are the patches of
    each block, and ``checksums`` those of its part of the mask, both as text of 4 bytes each.
    """

    n_patches: int
    n_voxels: int
    predicted: str
    checksums: str

    @property
    def patches_of_blocks(self) -> NDArray[np.uint32]:
        """The number of patches that each block predicts."""
        return _numbers(self.predicted)

    @property
    def n_blocks_left_out(self) -> int:
        """The number of blocks of which nothing is predicted."""
        return int((self.patches_of_blocks == 0).sum())

    def checksum(self, block: int) -> int:
        """Return the checksum of a block's part of the mask."""
        return int(_numbers(self.checksums)[block])


def survey(reader: MaskReader, blocks: BlockGrid, region: Box, grid: PatchGrid) -> MaskSurvey:
    """Return what the mask of a volume means for the blocks of its region."""
    touched = np.zeros(tuple(map(len, grid.starts)), bool)
    starts = [np.array(axis) for axis in grid.starts]
    predicted: list[int] = []
    checksums: list[int] = []
    n_voxels = 0
    for block in blocks:
        core = block.shifted(region.start)
        wanted = reader.read(core)
        n_patches = 0
        for patch in _iter_patches(grid, core, wanted):
            axes = zip(starts, patch.start, strict=True)
            touched[tuple(int(np.searchsorted(axis, start)) for axis, start in axes)] = True
            n_patches += 1
        n_voxels += int(wanted.sum())
        predicted.append(n_patches)
        checksums.append(checksum_of(wanted))
    return MaskSurvey(int(touched.sum()), n_voxels, _text(predicted), _text(checksums))


def _iter_patches(grid: PatchGrid, core: Box, wanted: Mask) -> Iterator[Box]:
    return grid.iter_touching(core, wanted) if wanted.any() else iter(())


def checksum_of(wanted: Mask) -> int:
    """Return a checksum of which voxels are wanted."""
    return zlib.crc32(np.packbits(wanted).tobytes())


def _text(numbers: Sequence[int]) -> str:
    return b64encode(np.array(numbers, "<u4").tobytes()).decode()


def _numbers(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(b64decode(text), "<u4").astype(np.uint32)
