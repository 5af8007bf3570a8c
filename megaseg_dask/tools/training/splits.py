"""The train/validation split of examples.

The choice depends on names alone, so that the same command makes the same split
again, in whatever order the examples are listed.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import SourceError
from megaseg_dask.tools.training.examples import TRAIN, VALIDATION, Example


def split_examples(
    examples: Sequence[Example], fraction: float, patch_shape: Shape
) -> list[Example]:
    """Return the examples, each with its split.

    A manifest states the split of all examples, or of none. If of none, about ``fraction`` of
    the groups validate, chosen by their names. Of a single group, its last timepoints validate;
    of a single volume, its end along the longest axis that can be cut.

    Raises:
        SourceError: if a split is empty, or a volume is smaller than a patch.
    """
    unmarked = [example for example in examples if not example.split]
    if unmarked and len(unmarked) < len(examples):
        raise SourceError(f"{unmarked[0].name} has no split; give a split to each row")
    marked = _choose(examples, fraction, patch_shape) if unmarked else list(examples)
    for split in (TRAIN, VALIDATION):
        if not any(example.split == split for example in marked):
            advice = "mark some in the column split, or leave it out"
            raise SourceError(f"no image is for {split}; {advice}")
    for example in marked:
        _require_patch(example, patch_shape)
    return marked


def _require_patch(example: Example, patch_shape: Shape) -> None:
    shape = example.box.shape
    if any(n < p for n, p in zip(shape, patch_shape, strict=True)):
        size = f"of {shape} voxels (z, y, x), smaller than a patch of {patch_shape}"
        advice = "leave it out, or choose a smaller patch with --patch"
        raise SourceError(f"{example.name} is {size}; {advice}")


def _choose(examples: Sequence[Example], fraction: float, patch_shape: Shape) -> list[Example]:
    groups = sorted({example.group for example in examples}, key=_hash)
    if len(groups) > 1:
        validating = set(groups[: _n_validating(len(groups), fraction)])
        return [_marked(example, example.group in validating) for example in examples]
    if len(examples) > 1:
        n_training = len(examples) - _n_validating(len(examples), fraction)
        return [_marked(example, number >= n_training) for number, example in enumerate(examples)]
    return _cut(examples[0], fraction, patch_shape)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _n_validating(n: int, fraction: float) -> int:
    """Return about ``fraction`` of ``n``, and leave at least one for each split."""
    return min(max(round(n * fraction), 1), n - 1)


def _marked(example: Example, validates: bool) -> Example:
    return replace(example, split=VALIDATION if validates else TRAIN)


def _cut(example: Example, fraction: float, patch_shape: Shape) -> list[Example]:
    """Return a volume as two examples, one for each split, which hold a patch each."""
    shape = example.box.shape
    axis = _axis_to_cut(shape, patch_shape)
    patch = patch_shape[axis]
    if shape[axis] < 2 * patch:
        parts = f"two parts of a patch, {patch_shape}, each"
        advice = "add another image, or choose a smaller --patch"
        size = f"{example.name} of {shape} voxels (z, y, x)"
        raise SourceError(f"{size} cannot be cut into {parts}: {advice}")
    by_fraction = math.ceil(shape[axis] * (1 - fraction))
    position = min(shape[axis] - patch, max(patch, by_fraction))
    stop = list(shape)
    stop[axis] = position
    start = [0, 0, 0]
    start[axis] = position
    before = Box((0, 0, 0), tuple(stop))
    after = Box(tuple(start), shape)
    return [
        replace(example, name=f"{example.name} {before}", box=before, split=TRAIN),
        replace(example, name=f"{example.name} {after}", box=after, split=VALIDATION),
    ]


def _axis_to_cut(shape: Shape, patch_shape: Shape) -> int:
    """Return the longest axis with room for two patches; the longest of all if none has."""

    def preference(axis: int) -> tuple[bool, int]:
        return (shape[axis] >= 2 * patch_shape[axis], shape[axis])

    return max(range(3), key=preference)
