"""Examples that teach the wrong thing are named before a training begins.

Nothing here changes an example. Each check states a property that every image and its labels
have, and an error names the example that lacks it.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import SourceError
from megaseg_dask.tools.training.examples import Example

# A label image has large areas of one value. Two images of nuclei with expert labels have 0.99
# equal neighbors in their labels, and 0.01 and 0.12 in their intensities.
_MIN_EQUAL_NEIGHBORS = 0.5
# A mask has few values, and its objects may be single voxels.
_MAX_MASK_VALUES = 16


def require_apart(examples: Sequence[Example]) -> None:
    """Require that no voxel of an image is both trained on and validated with.

    Raises:
        SourceError: if an image is listed for both, or is its own labels.
    """
    by_image: dict[str, list[Example]] = {}
    for example in examples:
        if repr(example.image) == repr(example.labels):
            raise SourceError(f"{example.name}: the image and its labels are the same file")
        by_image.setdefault(repr(example.image), []).append(example)
    for of_one_image in by_image.values():
        for first, other in combinations(of_one_image, 2):
            if first.split != other.split and (first.box & other.box).size:
                raise both_splits(first.name, other.name)


def both_splits(name: str, other: str) -> SourceError:
    """Return the error about one image that is in both splits."""
    return SourceError(
        f"{name} and {other} are the same image, and one is for training, the other for "
        "validation; the validation loss would mean nothing: list it once"
    )


def require_labels(name: str, labels: NDArray[Any]) -> None:
    """Require that an array ``(z, y, x)`` is a mask or a label image, with 0 for background.

    Raises:
        SourceError: if it is an image of intensities or probabilities, or has no background.
    """
    expected = "expected a mask or a label image, with 0 for background"
    if labels.dtype.kind == "f":
        is_whole = labels == np.floor(labels)
        if not is_whole.all():
            value = labels[~is_whole].flat[0]
            raise SourceError(
                f"{name}: its labels hold {value:.4g}, as probabilities or intensities do; "
                f"{expected}. Apply a threshold first"
            )
    smallest = labels.min()
    if smallest < 0:
        raise SourceError(
            f"{name}: its labels hold {smallest:g}; {expected}. Voxels that are not annotated "
            "cannot be left out: crop the image, or label them"
        )
    if smallest > 0:
        raise SourceError(
            f"{name}: its labels have no background, the smallest value is {smallest:g}; {expected}"
        )
    if not has_areas(labels):
        raise SourceError(
            f"{name}: its labels look like intensities, neighboring voxels differ; {expected}. "
            "Are the columns of the image and its labels swapped?"
        )


def has_areas(labels: NDArray[Any]) -> bool:
    """Return whether most neighbors have one value, as in a mask or a label image."""
    here = labels[..., :-1]
    beside = labels[..., 1:]
    are_inside = (here > 0) & (beside > 0)
    n_pairs = np.count_nonzero(are_inside)
    n_equal = np.count_nonzero((here == beside) & are_inside)
    if n_equal >= _MIN_EQUAL_NEIGHBORS * n_pairs:
        return True
    return len(np.unique(labels)) <= _MAX_MASK_VALUES


def require_image(name: str, image: NDArray[Any], is_object: NDArray[np.bool_]) -> None:
    """Require that an image ``(z, y, x)`` is not the mask that is to be learnt.

    Raises:
        SourceError: if it has one value outside the objects and one inside.
    """
    inside = image[is_object]
    outside = image[~is_object]
    if inside.min() == inside.max() and outside.min() == outside.max():
        raise SourceError(
            f"{name}: the image has one value in its objects, {inside[0]}, and one outside, "
            f"{outside[0]}; expected intensities. Is it a mask?"
        )
