"""A label image that goes with an image: of the image itself, or at another address.

It covers the same voxels. It is found when a run is planned, and its digest is
recorded: a run does not go on with another one.
"""

import hashlib
from dataclasses import dataclass

from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.image import Image, read_image
from megaseg_dask.ngff.labels import labels_group, list_labels, read_label_image
from megaseg_dask.ngff.plate import is_plate
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.stores import Location


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

    def volume(self, image: Location, t: int) -> Volume:
        """Return its ids at a timepoint of the image."""
        group = labels_group(image) / self.label if self.is_own else Location.of(self.label)
        return Volume(group / self.level, self.axes, t if self.has_times else 0)


def find_companion(
    location: Location, image: Image, text: str, option: str, field: str = ""
) -> Companion:
    """Return the label image that ``option`` names by ``text``, for an image.

    ``text`` is the name of a label image of the image, or an address: of a label image, of an
    image that has only one, or of a plate of such images. ``image`` begins at the level that is
    segmented, and ``field`` is its path in its plate.

    Raises:
        SettingsError: There is none, its voxels are no ids, or it has other voxels.
        StoreError: The store failed.
    """
    own = list_labels(location)
    is_own = text in own
    try:
        label = labels_group(location) / text
        if not is_own:
            label = find_label(text, field)
        labels = read_label_image(label)
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
    )


def find_label(text: str, field: str) -> Location:
    """Return the label image at an address, or of the only one of an image or a field there.

    Raises:
        SourceError: There is none, or there are several.
        StoreError: The store failed.
    """
    location = Location.of(text)
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    if field and is_plate(location):
        location = location / field
    if read_image(location).kind == "label image":
        return location
    names = list_labels(location)
    if len(names) > 1:
        raise SourceError(
            f"{location} has label images {', '.join(names)}; give the path of one, "
            f"{labels_group(location)}/{names[0]} for instance"
        )
    return labels_group(location) / names[0] if names else location


def _level_of(labels: Image, image: Image, subject: str) -> int:
    """Return the level that has the voxels of an image.

    Raises:
        SettingsError: There is none.
    """
    shapes = [labels.volume_shape(level) for level in range(len(labels.levels))]
    if image.volume_shape() not in shapes:
        raise SettingsError(
            f"{subject}: it has {shapes[0]} voxels (z, y, x), the image {image.volume_shape()}; "
            "labels of the same voxels are needed"
        )
    return shapes.index(image.volume_shape())
