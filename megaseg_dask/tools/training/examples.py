"""Examples to train on: a box of an image together with its labels.

An example names where its voxels are; opening one reads metadata only, so that a
whole manifest is checked before anything is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.algorithms.resampling import are_same_size
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.labels import choose_label, read_label_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.choice import choose_channels
from megaseg_dask.stores import Location

TRAIN = "train"
VALIDATION = "val"


class Reader(Protocol):
    """Where the voxels of a volume come from."""

    def read(self, box: Box) -> NDArray[Any]:
        """Read a box as ``(z, y, x)``."""


@dataclass(frozen=True, slots=True)
class Tiff:
    """A TIFF file with one timepoint, of which one channel is read.

    A file of another size or time is another file: a training does not continue with it.
    """

    path: str
    axes: str
    channel: int
    n_bytes: int
    modified_ns: int

    def read(self, box: Box) -> NDArray[Any]:
        """Read a box as ``(z, y, x)``."""
        from tifffile import imread

        values = imread(self.path, series=0, level=0)
        chosen: dict[str, int | slice] = dict.fromkeys("ZYX", slice(None))
        chosen["C"] = self.channel
        values = values[tuple(chosen.get(axis, 0) for axis in self.axes)]
        kept_axes = [axis for axis in self.axes if axis in "ZYX"]
        order = [kept_axes.index(axis) for axis in "ZYX"]
        return np.ascontiguousarray(values.transpose(order)[box.slices])


@dataclass(frozen=True, slots=True)
class Example:
    """A box of an image and its labels; a ``group``, such as a field, is never in both splits.

    ``spacing_um`` (z, y, x) is the size of its voxels, if that is known. Where somebody listed
    the image with its labels, empty labels say that nothing is there; else that nobody labelled it.
    """

    name: str
    group: str
    image: Reader
    labels: Reader
    box: Box
    split: str | None = None
    spacing_um: tuple[float, ...] | None = None
    is_listed: bool = False


# -- TIFF


def open_tiff(path: str, channel: str | None) -> tuple[Tiff, Shape]:
    """Return a TIFF file and its shape ``(z, y, x)``.

    Raises:
        SourceError: for a file that is no TIFF, or has other axes than z, y, x and channels.
        SettingsError: if the channel has to be chosen, or does not exist.
    """
    from tifffile import TiffFile, TiffFileError

    try:
        with TiffFile(path) as file:
            series = file.series[0]
            axes = series.axes
            extents = series.shape
    except (OSError, TiffFileError, IndexError) as error:
        raise SourceError(f"{path} cannot be read as TIFF: {error}") from error
    if len(extents) == 3 and axes.endswith("YX"):
        # A writer that states no axes gives the first one any name.
        axes = "ZYX"
    sizes = dict(zip(axes, extents, strict=True))
    has_other_axes = any(n > 1 for axis, n in sizes.items() if axis not in "CZYX")
    if has_other_axes or not set("ZYX") <= set(sizes):
        expected = "expected z, y and x, and at most channels"
        raise SourceError(f"{path} has axes {axes} of {extents}; {expected}")
    shape = tuple(sizes[axis] for axis in "ZYX")
    chosen = _tiff_channel(path, channel, sizes.get("C", 1))
    about = Path(path).stat()
    return Tiff(path, axes, chosen, about.st_size, about.st_mtime_ns), shape


def _tiff_channel(path: str, channel: str | None, n_channels: int) -> int:
    last = n_channels - 1
    if channel is None:
        if n_channels > 1:
            choices = f"choose one with --channel 0 to {last}"
            raise SourceError(f"{path} has {n_channels} channels; {choices}")
        return 0
    if not channel.isdecimal() or int(channel) > last:
        raise SourceError(f"--channel {channel}: {path} has channels 0 to {last}")
    return int(channel)


# -- OME-Zarr


def open_image(
    location: Location, channel: str | None, *, is_label: bool = False
) -> tuple[Volume, Image]:
    """Return a volume of an OME-Zarr image with one timepoint, and its metadata.

    Raises:
        SourceError: for several timepoints, what is no image, or labels that are no integers.
        SettingsError: if the channel has to be chosen, or does not exist.
    """
    image = read_label_image(location) if is_label else read_image(location)
    n_times = image.extent("t")
    if n_times > 1:
        advice = "name it instead of a CSV, or one file each"
        raise SourceError(f"{location} has {n_times} timepoints; {advice}")
    c = _choose_channel(location, image, channel)
    return Volume.of(location, image, c=c), image


def examples_of(
    location: Location, name: str, channel: str | None, label: str | None
) -> list[Example]:
    """Return an example for each timepoint of an OME-Zarr image; none if it has no label image.

    Raises:
        SourceError: for labels of another shape, or that are no integers.
        SettingsError: if the channel or the label image has to be chosen, or does not exist.
    """
    place = choose_label(location, label)
    if place is None:
        return []
    image = read_image(location)
    labels = read_label_image(place)
    c = _choose_channel(location, image, channel)
    shape = (image.extent("t"), *image.volume_shape())
    labels_shape = (labels.extent("t"), *labels.volume_shape())
    if shape != labels_shape:
        shapes = f"{location} has {shape}, {place} has {labels_shape}"
        raise SourceError(f"shapes (t, z, y, x) differ: {shapes}")
    labels_c = c if labels.extent("c") == image.extent("c") else 0
    examples = []
    for t in range(shape[0]):
        example = Example(
            name=f"{name}/{t}" if shape[0] > 1 else name,
            group=name,
            image=Volume.of(location, image, t=t, c=c),
            labels=Volume.of(place, labels, t=t, c=labels_c),
            box=Box.of(image.volume_shape()),
            spacing_um=None if image.unknown_size else image.spacing_um,
        )
        examples.append(example)
    return examples


def common_size_um(examples: Sequence[Example]) -> tuple[float, float, float] | None:
    """Return the voxel size of all examples; ``None`` if one is not known, or they differ."""
    sizes = [example.spacing_um for example in examples if example.spacing_um is not None]
    first = sizes[0] if len(sizes) == len(examples) else None
    if first is None or not all(are_same_size(first, size) for size in sizes):
        return None
    z, y, x = first
    return z, y, x


def _choose_channel(location: Location, image: Image, channel: str | None) -> int:
    channels = choose_channels(image, channel, location)
    if len(channels) > 1:
        raise SettingsError(f"--channel {channel}: a recipe is trained on one channel")
    return channels[0]
