"""Manifests: the examples that a CSV file, an OME-Zarr image or a plate lists."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import MegasegError, SourceError
from megaseg_dask.ngff.image import SPATIAL
from megaseg_dask.ngff.plate import is_plate, read_plate
from megaseg_dask.stores import Location
from megaseg_dask.tools.importing.files import open_file
from megaseg_dask.tools.training.examples import (
    TRAIN,
    VALIDATION,
    Example,
    Reader,
    examples_of,
    open_image,
    open_tiff,
)

# Columns, by the names that cyto-dl's manifests use too; the first is the one that we advise.
IMAGE_COLUMNS = ("raw", "path_raw", "image")
LABEL_COLUMNS = ("seg", "seg1", "path_seg", "label", "labels")
# As cyto-dl names them. Images for tests take no part in training.
_TEST = "test"
_SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": _TEST,
    "testing": _TEST,
}


def read_examples(manifest: str, channel: str | None, label: str | None) -> list[Example]:
    """Return the examples of a manifest, an image or a plate; no voxel is read.

    Raises:
        SourceError: for an image that has no labels, or does not fit its labels.
        SettingsError: if a channel or a label image has to be chosen.
    """
    if manifest.lower().endswith(".csv"):
        return _read_csv(Path(manifest).expanduser(), channel)
    location = Location.of(manifest)
    if not location.exists():
        expected = "expected a CSV manifest or an OME-Zarr with labels"
        raise SourceError(f"{location} does not exist; {expected}")
    if is_plate(location):
        examples = _read_plate(location, channel, label)
    else:
        examples = examples_of(location, location.name, channel, label)
    if not examples:
        advice = "they belong below an image's labels group"
        raise SourceError(f"{location} has no label images to learn from; {advice}")
    return examples


def _read_plate(location: Location, channel: str | None, label: str | None) -> list[Example]:
    """Return the examples of the labelled fields: few of a plate are labelled by hand."""
    plate = read_plate(location)
    if plate.missing:
        path, reason = plate.missing[0]
        raise SourceError(f"{location}: {path} cannot be read: {reason}")
    examples = []
    for field in plate.fields:
        examples += examples_of(location / field.path, field.path, channel, label)
    return examples


# -- CSV


def _read_csv(path: Path, channel: str | None) -> list[Example]:
    rows = _read_rows(path)
    if not rows:
        raise SourceError(f"{path} lists no image")
    image_column = _find_column(path, rows[0], IMAGE_COLUMNS)
    labels_column = _find_column(path, rows[0], LABEL_COLUMNS)
    examples = []
    for number, row in enumerate(rows, 2):
        split = _split_of(path, number, row)
        if split == _TEST:
            continue
        try:
            image, shape, spacing_um = _open_image(_address(path, row[image_column]), channel)
            labels, labels_shape = _open_labels(_address(path, row[labels_column]))
        except MegasegError as error:
            raise SourceError(f"{path} line {number}: {error}") from error
        if shape != labels_shape:
            shapes = f"the image has shape (z, y, x) {shape}, its labels {labels_shape}"
            raise SourceError(f"{path} line {number}: {shapes}")
        example = Example(
            name=f"{path} line {number}",
            group=f"line {number}",
            image=image,
            labels=labels,
            box=Box.of(shape),
            split=split,
            spacing_um=spacing_um,
            is_listed=True,
        )
        examples.append(example)
    return examples


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        columns = f"columns {IMAGE_COLUMNS[0]} and {LABEL_COLUMNS[0]}"
        expected = f"expected {columns}, an image and its labels in each row"
        raise SourceError(
            f"{path} cannot be read as a CSV manifest: {cause}; {expected}"
        ) from error


def _find_column(path: Path, row: Mapping[str, str], names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    columns = ", ".join(map(str, row))
    raise SourceError(f"{path} has columns {columns}; one must be called {' or '.join(names)}")


def _split_of(path: Path, number: int, row: Mapping[str, str]) -> str | None:
    """Return the split that a row states, if it does."""
    split = (row.get("split") or "").strip().lower()
    if not split:
        return None
    if split not in _SPLITS:
        raise SourceError(f"{path} line {number}: split {split!r}; expected train, val or test")
    return _SPLITS[split]


def _address(manifest: Path, value: str | None) -> str:
    """Return a URL as it is, and a path relative to the manifest."""
    text = (value or "").strip()
    if not text:
        raise SourceError("an image or its labels are missing")
    return text if "://" in text else str(manifest.parent / Path(text).expanduser())


def _open_image(
    address: str, channel: str | None
) -> tuple[Reader, Shape, tuple[float, ...] | None]:
    """Return an image, its shape ``(z, y, x)``, and the size of its voxels in µm, if known."""
    if _is_tiff(address):
        reader, shape = open_tiff(address, channel)
        return reader, shape, _tiff_size(address)
    volume, image = open_image(Location.of(address), channel)
    return volume, image.volume_shape(), None if image.unknown_size else image.spacing_um


def _tiff_size(address: str) -> tuple[float, ...] | None:
    """Return the size of voxels in µm ``(z, y, x)``, if a TIFF file states it."""
    try:
        with closing(open_file(Path(address), series="0")) as file:
            known = [size for size in file.contents.spacing_um if size]
    except MegasegError:
        # It does not state its axes.
        return None
    return tuple(known) if len(known) == len(SPATIAL) else None


def _open_labels(address: str) -> tuple[Reader, Shape]:
    if _is_tiff(address):
        return open_tiff(address, None)
    volume, image = open_image(Location.of(address), None, is_label=True)
    return volume, image.volume_shape()


def _is_tiff(address: str) -> bool:
    return address.lower().endswith((".tif", ".tiff"))
