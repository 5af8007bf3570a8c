"""A label image that goes with an image: of the image itself, or at another address.

It covers the same voxels. It is found when a run is planned, and its digest is
recorded: a run does not go on with another one.
"""

import hashlib
from dataclasses import dataclass

from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.labels import (
    labels_group,
    list_labels,
    read_label_image,
    require_complete,
    require_marked,
)
from megaseg_dask.ngff.plate import is_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.stores import Location
from megaseg_dask.stores.failures import is_denied


@dataclass(frozen=True, slots=True)
class Companion:
    """The level of a label image that has the voxels of an image.

    ``label`` is its name below the image if it ``is_own``, else its address; ``level`` the path of
    the level in it.
    """

    label: str
    level: str
    is_own: bool
    axes: tuple[str, ...]
    has_times: bool
    digest: str
    is_whole: bool = False

    def location(self, image: Location) -> Location:
        """Return where it is; ``image`` is that to which it belongs."""
        return labels_group(image) / self.label if self.is_own else Location.of(self.label)

    def volume(self, image: Location, t: int) -> Volume:
        """Return its ids at a timepoint of the image."""
        t_of_labels = t if self.has_times else 0
        return Volume(
            self.location(image) / self.level, self.axes, t_of_labels, is_whole=self.is_whole
        )


def find_companion(
    location: Location,
    image: Image,
    text: str,
    option: str,
    field: str = "",
    *,
    is_only: bool = True,
    is_unmarked: bool = False,
) -> Companion:
    """Return the label image that ``option`` names by ``text``, for an image.

    ``text`` is the name of a label image of the image, or an address: of a label image, of an
    image that has only one, or of a plate as for :func:`find_label`. ``image`` begins at the level
    that is segmented, and ``field`` is its path in its plate, of which it ``is_only`` if no other
    field is chosen. With ``is_unmarked``, as for :func:`read_companion`.

    Raises:
        SettingsError: There is none, its voxels are no ids, or it has other voxels.
        StoreError: The store failed.
    """
    own = list_labels(location)
    is_own = text in own
    try:
        label = labels_group(location) / text
        if not is_own:
            label = find_label(text, field, is_only=is_only)
        labels = read_companion(label, location, f"{option} {text}", is_unmarked=is_unmarked)
    except SourceError as error:
        listed = f"label images {', '.join(own)}" if own else "no label image"
        raise SettingsError(f"{option} {text}: {error} ({location} has {listed})") from error
    level = _level_of(labels, image, f"{option} {text}")
    for axis, n_needed in (("t", image.extent("t")), ("c", 1)):
        if labels.extent(axis) not in (1, n_needed):
            raise SettingsError(
                f"{option} {text}: it has extent {labels.extent(axis)} along {axis}; expected 1"
                + (f" or {n_needed}" if n_needed > 1 else "")
            )
    path = labels.levels[level].path
    identity = f"{digest_of(label, labels)} {sample_of(label / path)}"
    return Companion(
        label=text if is_own else label.url,
        level=path,
        is_own=is_own,
        axes=labels.axis_names,
        has_times=labels.extent("t") > 1,
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        is_whole=labels.is_whole,
    )


def find_label(text: str, field: str, *, is_only: bool) -> Location:
    """Return the label image at an address, for an image or for a field of a plate.

    The address is that of a label image or of an image that has only one. For a field it is also
    that of a plate, whose field of the same path is taken, or ``PLATE/NAME``: the label image of a
    name in that field. One image is for a field only if no other one is chosen: it ``is_only``.

    Raises:
        SourceError: There is none, there are several, or it is one image for several fields.
        StoreError: The store failed.
    """
    location = Location.of(text)
    if field and is_plate(location):
        return _only_label(location / field, location)
    if field and is_readable_plate(location.parent):
        image = location.parent / field
        names = list_labels(image)
        if location.basename in names:
            return labels_group(image) / location.basename
        if not location.exists():
            listed = ", ".join(names) or "none"
            raise SourceError(f"{image} has no label image {location.basename}; it has {listed}")
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    if not is_only:
        read_image(location)
        raise one_image(location)
    return _only_label(location, labels_group(location))


def read_companion(
    label: Location, image: Location, option: str, *, is_unmarked: bool = False
) -> Image:
    """Return the metadata of labels for an image: its own intensities would pass for ids.

    With ``is_unmarked`` their metadata need not say that they are labels.

    Raises:
        SettingsError: They are the image itself.
        SourceError: They cannot be read, are no labels, or lack parts.
        StoreError: The store failed.
    """
    if label == image:
        raise SettingsError(
            f"{option}: this is the image that is segmented; give a label image of the same "
            "voxels, such as IMAGE/labels/NAME"
        )
    labels = read_label_image(label)
    if not is_unmarked:
        require_marked(label, labels)
    require_complete(label, labels)
    return labels


def is_readable_plate(location: Location) -> bool:
    """Return whether a location is a plate; it is none if it may not be read."""
    try:
        return is_plate(location)
    except StoreError as error:
        # Who may read an image may not always read what is above it.
        if not is_denied(error):
            raise
        return False


def _only_label(image: Location, parent: Location) -> Location:
    """Return an image that is a label image, or its only one; ``parent`` is where a name leads."""
    if read_image(image).kind == "label image":
        return image
    names = list_labels(image)
    if len(names) > 1:
        raise SourceError(
            f"{image} has label images {', '.join(names)}; give the path of one, "
            f"{parent}/{names[0]} for instance"
        )
    return labels_group(image) / names[0] if names else image


def one_image(location: Location) -> SourceError:
    """Return the error of one image that is given for several fields of a plate."""
    return SourceError(
        f"{location} is one image; a plate needs a plate of label images, or the name of a label "
        "image in each field"
    )


def _level_of(labels: Image, image: Image, subject: str) -> int:
    """Return the level that has the voxels of an image.

    Raises:
        SettingsError: There is none.
    """
    shapes = [labels.volume_shape(level) for level in range(len(labels.levels))]
    if image.volume_shape() not in shapes:
        raise SettingsError(
            f"{subject}: it has {shapes[0]} voxels (z, y, x), and the image has "
            f"{image.volume_shape()}; give labels with the same voxels"
        )
    return shapes.index(image.volume_shape())
