"""What to train on: images with labels, from a CSV manifest or an OME-Zarr, as cyto-dl reads them.

Every example becomes two OME-TIFF files, image and mask, of one channel and one
timepoint: so neither cyto-dl's choice of axes nor its choice of a reader matters.
"""

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import MegasegError, SettingsError, SourceError
from megaseg_dask.ngff.group import read_ome
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.plate import is_plate, read_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.planner import choose_channels
from megaseg_dask.stores import Location

TRAIN, VALIDATION = "train", "val"
RAW, LABELS = ("raw", "path_raw", "image"), ("seg", "seg1", "path_seg", "label", "labels")
# As cyto-dl names them; what is for tests is left out of training.
_SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": None,
    "testing": None,
}


class Reader(Protocol):
    """Where the voxels of a volume come from."""

    def read(self, box: Box) -> NDArray[Any]:
        """Read a box as ``(z, y, x)``."""


@dataclass(frozen=True, slots=True)
class Tiff:
    """A TIFF file with one timepoint, of which one channel is read."""

    path: str
    axes: str
    channel: int = 0

    def read(self, box: Box) -> NDArray[Any]:
        """Read a box as ``(z, y, x)``."""
        from tifffile import imread

        values = imread(self.path, series=0, level=0)
        index: dict[str, Any] = {
            "Z": slice(None),
            "Y": slice(None),
            "X": slice(None),
            "C": self.channel,
        }
        values = values[tuple(index.get(axis, 0) for axis in self.axes)]
        kept = [axis for axis in self.axes if axis in "ZYX"]
        return np.ascontiguousarray(
            values.transpose([kept.index(axis) for axis in "ZYX"])[box.slices]
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A box of an image and of its labels; ``group`` is what is never in both splits, such as a field."""

    name: str
    group: str
    image: Reader
    labels: Reader
    box: Box
    split: str | None = None


def read_examples(manifest: str, channel: str | None, label: str | None) -> list[Example]:
    """Return the examples of a manifest, an image or a plate; no voxel is read.

    Raises :class:`SourceError` for what has no labels or does not fit together, :class:`SettingsError` where a
    channel or a label image has to be chosen.
    """
    if manifest.lower().endswith(".csv"):
        return _read_csv(Path(manifest).expanduser(), channel)
    location = Location.of(manifest)
    if not location.exists():
        raise SourceError(
            f"{location} does not exist; expected a CSV manifest or an OME-Zarr with labels"
        )
    if not is_plate(location):
        found = _of_image(location, location.name, channel, label)
    else:
        plate = read_plate(location)
        if plate.missing:
            path, reason = plate.missing[0]
            raise SourceError(f"{location}: {path} cannot be read: {reason}")
        # Few fields of a plate are labelled by hand.
        fields = [field.path for field in plate.fields if _label_names(location / field.path)]
        found = [one for path in fields for one in _of_image(location / path, path, channel, label)]
    if not found:
        raise SourceError(
            f"{location} has no label images to learn from; they belong below an image's labels group"
        )
    return found


def _label_names(image: Location) -> list[str]:
    labels = image / "labels"
    return list(read_ome(labels).get("labels") or []) if labels.exists() else []


def _of_image(
    location: Location, name: str, channel: str | None, label: str | None
) -> list[Example]:
    """Return an example for each timepoint of an image."""
    image, names = read_image(location), _label_names(location)
    if not names:
        return []
    if label is None and len(names) > 1:
        raise SettingsError(
            f"{location} has label images {', '.join(names)}; choose one with --label"
        )
    if label is not None and label not in names:
        raise SettingsError(f"--label {label}: {location} has {', '.join(names)}")
    where = location / "labels" / (label or names[0])
    labels, c = read_image(where), _one_channel(image, channel, location)
    _require_labels(labels, where)
    shapes = [(one.extent("t"), *one.volume_shape()) for one in (image, labels)]
    if shapes[0] != shapes[1]:
        raise SourceError(
            f"shapes (t, z, y, x) differ: {location} has {shapes[0]}, {where} has {shapes[1]}"
        )
    of_labels = c if labels.extent("c") == image.extent("c") else 0
    return [
        Example(
            name=f"{name}/{t}" if shapes[0][0] > 1 else name,
            group=name,
            image=_volume(location, image, t, c),
            labels=_volume(where, labels, t, of_labels),
            box=Box.of(image.volume_shape()),
        )
        for t in range(shapes[0][0])
    ]


def _one_channel(image: Image, channel: str | None, where: Location) -> int:
    chosen = choose_channels(image, channel, where)
    if len(chosen) > 1:
        raise SettingsError(f"--channel {channel}: a recipe is trained on one channel")
    return chosen[0]


def _require_labels(labels: Image, where: Location) -> None:
    if np.dtype(labels.dtype).kind not in "iub":
        raise SourceError(f"{where} holds {labels.dtype}; labels are integers")


def _volume(location: Location, image: Image, t: int, c: int) -> Volume:
    return Volume(location / image.levels[0].path, image.axis_names, t=t, c=c)


# -- CSV


def _read_csv(path: Path, channel: str | None) -> list[Example]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{path} cannot be read as a CSV manifest: {cause}; expected columns {RAW[0]} and "
            f"{LABELS[0]}, an image and its labels in each row"
        ) from error
    if not rows:
        raise SourceError(f"{path} lists no image")
    raw, seg = (_column(path, rows[0], names) for names in (RAW, LABELS))
    return [
        one
        for number, row in enumerate(rows, 2)
        if (one := _of_row(path, number, row, raw, seg, channel))
    ]


def _column(path: Path, row: dict[str, str], names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    raise SourceError(
        f"{path} has columns {', '.join(map(str, row))}; one must be called {' or '.join(names)}"
    )


def _of_row(
    path: Path, number: int, row: dict[str, str], raw: str, seg: str, channel: str | None
) -> Example | None:
    """Return the example of one row, unless it is for tests."""
    split = (row.get("split") or "").strip().lower()
    if split and split not in _SPLITS:
        raise SourceError(f"{path} line {number}: split {split!r}; expected train, val or test")
    if split and _SPLITS[split] is None:
        return None
    try:
        image, shape = _open(_place(path, row[raw]), channel)
        labels, of_labels = _open(_place(path, row[seg]), None, is_labels=True)
    except MegasegError as error:
        raise SourceError(f"{path} line {number}: {error}") from error
    if shape != of_labels:
        raise SourceError(
            f"{path} line {number}: the image has shape (z, y, x) {shape}, its labels {of_labels}"
        )
    return Example(
        f"{path} line {number}", f"line {number}", image, labels, Box.of(shape), _SPLITS.get(split)
    )


def _place(path: Path, given: str | None) -> str:
    if not (given or "").strip():
        raise SourceError("an image or its labels are missing")
    text = str(given).strip()
    return text if "://" in text else str(path.parent / Path(text).expanduser())


def _open(place: str, channel: str | None, *, is_labels: bool = False) -> tuple[Reader, Shape]:
    if place.lower().endswith((".tif", ".tiff")):
        return _open_tiff(place, channel)
    location = Location.of(place)
    image = read_image(location)
    if is_labels:
        _require_labels(image, location)
    if image.extent("t") > 1:
        raise SourceError(
            f"{location} has {image.extent('t')} timepoints; name it instead of a CSV, or one file each"
        )
    return _volume(location, image, 0, _one_channel(image, channel, location)), image.volume_shape()


def _open_tiff(place: str, channel: str | None) -> tuple[Tiff, Shape]:
    from tifffile import TiffFile, TiffFileError

    try:
        with TiffFile(place) as file:
            series = file.series[0]
            axes, extents = series.axes, series.shape
    except (OSError, TiffFileError, IndexError) as error:
        raise SourceError(f"{place} cannot be read as TIFF: {error}") from error
    if len(extents) == 3 and axes.endswith("YX"):
        axes = "ZYX"  # whatever a writer without axes called the first one
    sizes = dict(zip(axes, extents, strict=True))
    others = {axis: n for axis, n in sizes.items() if axis not in "CZYX" and n > 1}
    if others or not set("ZYX") <= set(sizes):
        raise SourceError(
            f"{place} has axes {axes} of {extents}; expected z, y and x, and at most channels"
        )
    n_channels = sizes.get("C", 1)
    if channel is None and n_channels > 1:
        raise SourceError(
            f"{place} has {n_channels} channels; choose one with --channel 0 to {n_channels - 1}"
        )
    if channel is not None and not (channel.isdecimal() and int(channel) < n_channels):
        raise SourceError(f"--channel {channel}: {place} has channels 0 to {n_channels - 1}")
    return Tiff(place, axes, int(channel or 0)), tuple(sizes[axis] for axis in "ZYX")


# -- which ones teach, and which ones judge


def split_examples(
    examples: Sequence[Example], fraction: float, patch_shape: Shape
) -> list[Example]:
    """Return the examples, each with its split.

    A manifest says so itself, or not at all. Else about ``fraction`` of the groups validate,
    chosen by their names; of a single group its last timepoints; of a single volume its end
    along the longest axis that can be cut. Raises :class:`SourceError` if that leaves a split
    empty, or a volume smaller than a patch.
    """
    stated = [one for one in examples if one.split]
    if stated and len(stated) < len(examples):
        raise SourceError(
            f"{next(one.name for one in examples if not one.split)} has no split; give all rows one"
        )
    if not stated:
        examples = _choose(examples, fraction, patch_shape)
    for split in (TRAIN, VALIDATION):
        if not any(one.split == split for one in examples):
            raise SourceError(
                f"no image is for {split}; mark some in the column split, or leave it out"
            )
    for one in examples:
        if any(n < p for n, p in zip(one.box.shape, patch_shape, strict=True)):
            raise SourceError(
                f"{one.name} is of {one.box.shape} voxels (z, y, x), smaller than a patch of "
                f"{patch_shape}; leave it out, or choose a smaller patch with --patch"
            )
    return list(examples)


def _choose(examples: Sequence[Example], fraction: float, patch_shape: Shape) -> list[Example]:
    groups = sorted(
        {one.group for one in examples}, key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    if len(groups) > 1:
        chosen = set(groups[: _share(len(groups), fraction)])
        return [
            replace(one, split=VALIDATION if one.group in chosen else TRAIN) for one in examples
        ]
    if len(examples) > 1:
        first = len(examples) - _share(len(examples), fraction)
        return [
            replace(one, split=TRAIN if i < first else VALIDATION) for i, one in enumerate(examples)
        ]
    return [part for one in examples for part in _cut(one, fraction, patch_shape)]


def _share(n: int, fraction: float) -> int:
    return min(max(round(n * fraction), 1), n - 1)


def _cut(example: Example, fraction: float, patch_shape: Shape) -> list[Example]:
    shape = example.box.shape
    room = [n / p for n, p in zip(shape, patch_shape, strict=True)]
    axis = max(range(3), key=lambda i: (room[i] >= 2, shape[i]))
    if room[axis] < 2:
        raise SourceError(
            f"{example.name} of {shape} voxels (z, y, x) cannot be cut into two parts of a patch, "
            f"{patch_shape}, each: add another image, or choose a smaller --patch"
        )
    at = min(
        shape[axis] - patch_shape[axis],
        max(patch_shape[axis], math.ceil(shape[axis] * (1 - fraction))),
    )
    before = Box((0, 0, 0), tuple(at if i == axis else n for i, n in enumerate(shape)))
    after = Box(tuple(at if i == axis else 0 for i in range(3)), shape)
    parts = ((before, TRAIN), (after, VALIDATION))
    return [
        replace(example, name=f"{example.name} {box}", box=box, split=split) for box, split in parts
    ]


# -- as cyto-dl reads them


def digest_of(examples: Sequence[Example]) -> str:
    """Return a digest of which voxels teach and judge: addresses, boxes and splits, not what is in them."""
    listed = [[repr(one.image), repr(one.labels), str(one.box), one.split] for one in examples]
    return hashlib.sha256(repr(sorted(map(str, listed))).encode()).hexdigest()


def write_examples(examples: Sequence[Example], folder: Path) -> dict[str, int]:
    """Write the examples as OME-TIFF with one table a split; returns how many there are of each.

    Files that are there are taken as they are. Volumes without any label are left out: nobody
    labelled them. Raises :class:`SourceError` if that leaves a split empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, ...]]] = {TRAIN: [], VALIDATION: []}
    for one in examples:
        name = hashlib.sha256(f"{one.image!r} {one.labels!r} {one.box}".encode()).hexdigest()[:16]
        image, mask = folder / f"{name}_raw.ome.tif", folder / f"{name}_seg.ome.tif"
        empty = folder / f"{name}.empty"
        if not (mask.exists() or empty.exists()):
            inside = (one.labels.read(one.box) > 0).astype(np.uint8)
            if inside.any():
                _write_tiff(image, one.image.read(one.box))
                _write_tiff(mask, inside)
            else:
                empty.touch()
        if not empty.exists():
            rows[str(one.split)].append((str(image), str(mask), "seg1"))
    for split, listed in rows.items():
        if not listed:
            raise SourceError(
                f"the labels of every image for {split} are empty; nothing can be learnt from them"
            )
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("raw", "seg1", "base_image"), *listed])
    return {split: len(listed) for split, listed in rows.items()}


def _write_tiff(path: Path, values: NDArray[Any]) -> None:
    from tifffile import imwrite

    if values.dtype.kind == "b" or values.dtype.itemsize > 4 or values.dtype == np.float16:
        values = values.astype(np.float32)
    part = path.with_suffix(".part")
    imwrite(part, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    part.replace(path)
