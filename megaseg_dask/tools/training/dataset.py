"""Examples as cyto-dl reads them: two OME-TIFF files each, and one table a split.

The files hold one channel and one timepoint, so that neither cyto-dl's choice of
axes nor its choice of a reader matters.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import SourceError
from megaseg_dask.tools.training.checks import both_splits, require_image, require_labels
from megaseg_dask.tools.training.examples import TRAIN, VALIDATION, Example

COLUMNS = ("raw", "seg1", "base_image")


def digest_of(examples: Sequence[Example]) -> str:
    """Return a digest of the voxels to train on: addresses, boxes and splits, not their content."""
    parts = []
    for example in examples:
        part = [repr(example.image), repr(example.labels), str(example.box), example.split]
        parts.append(str(part))
    return _sha256(repr(sorted(parts)))


def write_dataset(examples: Sequence[Example], folder: Path) -> dict[str, int]:
    """Write the examples as OME-TIFF with one table a split; return the examples of each split.

    Files that exist are kept. A volume without any label is left out where it was found, for
    nobody labelled it, and teaches that nothing is there where it was listed.

    Raises:
        SourceError: if the labels of a whole split are empty, an image or its labels are not what
            they are listed as, or the same image is in both splits under two names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str, str]]] = {TRAIN: [], VALIDATION: []}
    by_content: dict[str, Example] = {}
    with_objects = set()
    for example in examples:
        files = _write_example(example, folder)
        if files is None:
            continue
        image, mask = files
        if not _empty_file(image).exists():
            with_objects.add(example.split)
        rows[str(example.split)].append((str(image), str(mask), COLUMNS[1]))
        first = by_content.setdefault(_content_file(image).read_text(), example)
        if first.split != example.split:
            raise both_splits(first.name, example.name)
    for split, of_split in rows.items():
        if split not in with_objects:
            problem = f"the labels of every image for {split} are empty"
            raise SourceError(f"{problem}; the model cannot learn from them")
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *of_split])
    return {split: len(of_split) for split, of_split in rows.items()}


def _write_example(example: Example, folder: Path) -> tuple[Path, Path] | None:
    """Write image and mask, and return their files; ``None`` if nobody labelled it."""
    name = _sha256(f"{example.image!r} {example.labels!r} {example.box}")[:16]
    image = folder / f"{name}_raw.ome.tif"
    mask = folder / f"{name}_seg.ome.tif"
    empty = _empty_file(image)
    if empty.exists() and not example.is_listed:
        return None
    # The mask is written last: with it the example is complete.
    if not mask.exists():
        labels = example.labels.read(example.box)
        is_object = labels > 0
        is_empty = not is_object.any()
        if is_empty:
            empty.touch()
            if not example.is_listed:
                return None
        require_labels(example.name, labels)
        values = example.image.read(example.box)
        if not is_empty:
            require_image(example.name, values, is_object)
        _content_file(image).write_text(hashlib.sha256(values.tobytes()).hexdigest())
        _write_tiff(image, values)
        _write_tiff(mask, is_object.astype(np.uint8))
    return image, mask


def _empty_file(image: Path) -> Path:
    """Return the file that says that the labels of an image are empty."""
    return image.with_suffix(".empty")


def _content_file(image: Path) -> Path:
    """Return the file with the digest of an image's voxels."""
    return image.with_suffix(".sha256")


def _write_tiff(path: Path, values: NDArray[Any]) -> None:
    from tifffile import imwrite

    dtype = values.dtype
    if dtype.kind == "b" or dtype.itemsize > 4 or dtype == np.float16:
        values = values.astype(np.float32)
    part = path.with_suffix(".part")
    imwrite(part, values, ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    part.replace(path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
