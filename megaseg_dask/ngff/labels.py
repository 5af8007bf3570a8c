"""The label images of an image: a group ``labels`` that lists them.

Readers go by the list. A label image is added to it when it is complete, and
taken off it before it is written again.
"""

from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.group import is_group, lies_below, read_ome, read_written_ome, write_ome
from megaseg_dask.stores import Location


def labels_group(image: Location) -> Location:
    """Return the group that lists the label images of an image."""
    return image / "labels"


def list_labels(image: Location) -> list[str]:
    """Return the names of the label images of an image; empty if it has none.

    Raises:
        SourceError: One of them does not lie in the image.
        StoreError: The store failed.
    """
    group = labels_group(image)
    if not is_group(group):
        return []
    names = [str(name) for name in read_ome(group).get("labels") or ()]
    for name in names:
        if not lies_below(name):
            raise SourceError(f"{group}: label image {name!r} does not lie in the image")
    return names


def add_label(image: Location, version: str, name: str) -> None:
    """List a label image of an image, which is stored in ``version``, as the last one.

    Raises:
        TargetError: The group is of another Zarr format, or damaged.
        StoreError: The store failed.
    """
    _write_list(image, version, [*_others(image, version, name), name])


def remove_label(image: Location, version: str, name: str) -> None:
    """Take a label image off the list of an image, which is stored in ``version``.

    Raises:
        TargetError: The group is of another Zarr format, or damaged.
        StoreError: The store failed.
    """
    _write_list(image, version, _others(image, version, name))


def _others(image: Location, version: str, name: str) -> list[str]:
    names = read_written_ome(labels_group(image), version).get("labels") or ()
    return [other for other in names if other != name]


def _write_list(image: Location, version: str, names: list[str]) -> None:
    write_ome(labels_group(image), version, {"labels": names})
