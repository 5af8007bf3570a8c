"""The label images of an image: a group ``labels`` that lists them.

Readers go by the list. A label image is added to it when it is complete, and
taken off it before it is written again.
"""

import re
from collections.abc import Collection, Mapping

from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.messages import count
from megaseg_dask.ngff.group import (
    find_attributes,
    lies_below,
    ome_of,
    read_written_ome,
    write_ome,
)
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.stores import Location
from megaseg_dask.stores.failures import is_denied


def labels_group(image: Location) -> Location:
    """Return the group that lists the label images of an image."""
    return image / "labels"


def list_labels(image: Location) -> list[str]:
    """Return the names of the label images of an image; empty if it has none.

    Raises:
        SourceError: One of them does not lie in the image.
        TargetError: The metadata of the list are damaged.
        StoreError: The store failed.
    """
    group = labels_group(image)
    names = _names_in(ome_of(find_attributes(group) or {}))
    for name in names:
        if not lies_below(name):
            raise SourceError(f"{group}: label image {name!r} is outside the image")
    return names


def choose_label(image: Location, name: str | None) -> Location | None:
    """Return the label image of a name, or the only one; ``None`` if the image has none.

    Raises:
        SettingsError: There is none of this name, or one of several has to be chosen.
        MegasegError: As :func:`list_labels`.
    """
    names = list_labels(image)
    if not names:
        return None
    listed = ", ".join(names)
    if name is None and len(names) > 1:
        raise SettingsError(f"{image} has label images {listed}; choose one with --label")
    if name is not None and name not in names:
        raise SettingsError(f"{image} has no label image {name}; it has {listed}")
    return labels_group(image) / (name or names[0])


def is_marked(location: Location, image: Image) -> bool:
    """Return whether the voxels of an image are ids of objects, and no intensities.

    Its metadata say so, or the image that it lies in lists it. An image of true and false is a
    mask. Nothing is concluded from other voxels: intensities may be few, and have areas too.

    Raises:
        MegasegError: As :func:`list_labels`.
    """
    return image.kind == "label image" or image.dtype == "bool" or _is_listed(location)


def _is_listed(location: Location) -> bool:
    image = location.parent.parent
    if labels_group(image) != location.parent:
        return False
    try:
        return location.basename in list_labels(image)
    except StoreError as error:
        # Who may read an image may not always read what is above it.
        if not is_denied(error):
            raise
        return False


def require_marked(location: Location, image: Image) -> None:
    """Require that something says that the voxels of an image are ids: see :func:`is_marked`.

    A person may say it instead, with the option ``--unmarked``.

    Raises:
        SourceError: Nothing does.
        MegasegError: As :func:`list_labels`.
    """
    if not is_marked(location, image):
        raise SourceError(
            f"{location} is not marked as a label image; name one (such as IMAGE/labels/NAME), or "
            "pass --unmarked if its voxels are ids of objects"
        )


def read_label_image(location: Location) -> Image:
    """Read and check the metadata of an image whose voxels are to be ids of objects.

    Raises:
        SourceError: There is no image that can be read, or its voxels are no ids.
        StoreError: The store failed.
    """
    image = read_image(location)
    values = "scores" if image.kind == "scores" else image.dtype
    if values == "scores" or not re.fullmatch(r"u?int\d+|bool", image.dtype):
        raise SourceError(f"{location} holds {values}; labels are integers: give a label image")
    return image


def require_complete(location: Location, labels: Image) -> None:
    """Check that no task failed of the run that made a label image, if one of ours did.

    Raises:
        SourceError: Some did: their voxels would count as background.
    """
    if labels.n_missing:
        raise SourceError(
            f"{location} lacks {count(labels.n_missing, 'part')} because tasks failed "
            "(missing_boxes); run its megaseg segment command again first"
        )


def add_label(image: Location, version: str, name: str) -> None:
    """List a label image of an image, which is stored in ``version``, as the last one.

    Raises:
        TargetError: The group is of another Zarr format, or damaged.
        StoreError: The store failed.
    """
    others = [other for other in _listed(image, version) if other != name]
    _write_list(image, version, [*others, name])


def remove_labels(image: Location, version: str, names: Collection[str]) -> None:
    """Take label images off the list of an image, which is stored in ``version``.

    Raises:
        TargetError: The group is of another Zarr format, or damaged.
        StoreError: The store failed.
    """
    listed = _listed(image, version)
    if not set(names).isdisjoint(listed):
        _write_list(image, version, [name for name in listed if name not in names])


def _listed(image: Location, version: str) -> list[str]:
    return _names_in(read_written_ome(labels_group(image), version))


def _names_in(ome: Mapping[str, object]) -> list[str]:
    names = ome.get("labels")
    listed = names if isinstance(names, list) else []
    return list(dict.fromkeys(name for name in listed if isinstance(name, str)))


def _write_list(image: Location, version: str, names: list[str]) -> None:
    write_ome(labels_group(image), version, {"labels": names})
