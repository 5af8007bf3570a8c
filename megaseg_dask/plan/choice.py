"""What settings choose in one image: a level, channels, timepoints and a region.

It is resolved for each field of a plate by itself: fields may list their
channels in another order, and have other levels, timepoints and extents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from operator import lt

import numpy as np

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.messages import closest, one_line
from megaseg_dask.models.cards import MINIMUM_SHAPE
from megaseg_dask.ngff.image import Image
from megaseg_dask.plan.resolved import OfLevel, normalization_of
from megaseg_dask.plan.settings import ALL_CHANNELS, Settings
from megaseg_dask.stores import Location

_INDEX = "index:"
# Their values are no brightness, and would be segmented as such.
_NO_SOURCES = {
    "label image": "is a label image; give the image that it belongs to",
    "scores": "holds scores that megaseg wrote; give the image that they were computed from",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Channels of one image with their names, half-open timepoints, and a region of its volumes."""

    channels: tuple[int, ...]
    channel_names: tuple[str, ...]
    times: tuple[int, int]
    roi: Box | None
    # Channels that are measured by themselves, and their names.
    measured: tuple[int, ...] = ()
    measured_names: tuple[str, ...] = ()


def choose(image: Image, settings: Settings, where: Location) -> Choice:
    """Return what the settings choose in the image at ``where``.

    Raises:
        SettingsError: The image lacks a level, channel, timepoint or region that is chosen.
        SourceError: The network cannot take its volumes.
    """
    if image.kind != "image":
        raise SourceError(f"{where} {_NO_SOURCES[image.kind]}")
    if 0 in image.levels[0].shape:
        extents = dict(zip(image.axis_names, image.levels[0].shape, strict=True))
        raise SourceError(f"{where} has no voxels: its extents are {extents}")
    _require_levels(image, settings)
    segmented = image.from_level(settings.level)
    require_segmentable(where, segmented.volume_shape(), segmented.dtype)
    channels = choose_channels(segmented, settings.channel, where)
    names = segmented.channels
    measured = _choose_measured(segmented, settings.measure_channels, where)
    return Choice(
        channels=tuple(channels),
        channel_names=tuple(names[channel] for channel in channels),
        times=_choose_times(segmented, settings),
        roi=_choose_roi(segmented, settings, where),
        measured=tuple(measured),
        measured_names=tuple(names[channel] for channel in measured),
    )


def require_segmentable(subject: object, shape: Shape, dtype: object) -> None:
    """Check that the network can take volumes of this form, those of ``subject``.

    Raises:
        SourceError: It cannot.
    """
    if any(map(lt, shape, MINIMUM_SHAPE)):
        raise SourceError(
            f"{subject}: volumes of (z, y, x) = {shape} voxels are too small; the model needs at "
            f"least {MINIMUM_SHAPE}"
        )
    try:
        kind = np.dtype(str(dtype)).kind
    except TypeError:
        # Text, or several values in one.
        kind = "V"
    if kind not in "iufb":
        raise SourceError(f"{subject}: voxels have dtype {dtype}; expected integers or floats")


def _require_levels(image: Image, settings: Settings) -> None:
    """Raise :class:`SettingsError` if an image lacks a level that the settings name."""
    n_levels = len(image.levels)
    segmented = settings.level
    if segmented >= n_levels:
        raise SettingsError(f"--level {segmented}: the source has levels 0 to {n_levels - 1}")
    match normalization_of(settings):
        case OfLevel(level) if not segmented <= level < n_levels:
            raise SettingsError(
                f"--normalization level:{level}: choose a level from {segmented} to "
                f"{n_levels - 1} of the source"
            )


def _choose_times(image: Image, settings: Settings) -> tuple[int, int]:
    n = image.extent("t")
    first, stop = settings.time or (0, None)
    stop = n if stop is None else stop
    if settings.follow:
        stop = min(stop, n)
        if stop <= first:
            raise SourceError(f"the source has {n} timepoints so far, and --time begins at {first}")
    if not 0 <= first < stop <= n:
        raise SettingsError(f"--time {first}:{stop}: the source has timepoints 0:{n}")
    return first, stop


def _choose_roi(image: Image, settings: Settings, where: Location) -> Box | None:
    if settings.roi is None:
        return None
    start, stop = zip(*settings.roi, strict=True)
    box = Box(start, stop)
    whole = Box.of(image.volume_shape())
    if box not in whole:
        raise SettingsError(
            f"--roi {box}: lies partly outside the volumes of {where}, which are {whole}"
        )
    return box


# -- channels


def choose_channels(image: Image, wanted: str | None, where: Location) -> list[int]:
    """Return the indices of the channels to segment, in the order of ``wanted``.

    A channel is chosen by its name, its index, or ``index:N``, which is never taken for a name.

    Raises:
        SettingsError: A channel is not there, is named twice, or has to be chosen.
    """
    names = image.channels
    if wanted is None:
        if len(names) > 1:
            raise SettingsError(
                f"{where} has {len(names)} channels; choose one with --channel: {_listed(names)}"
            )
        return [0]
    return _find_channels(wanted, image, where, "--channel")


def _choose_measured(image: Image, wanted: str | None, where: Location) -> list[int]:
    """Return the indices of the channels to measure by themselves."""
    if wanted is None:
        return []
    if wanted == ALL_CHANNELS:
        return list(range(len(image.channels)))
    return _find_channels(wanted, image, where, "--measure-channels")


def _find_channels(wanted: str, image: Image, where: Location, option: str) -> list[int]:
    """Return the indices of the channels that a list of names and indices means."""
    names = image.channels
    # A name may hold a comma.
    texts = [wanted] if wanted in names else [text.strip() for text in wanted.split(",")]
    if "" in texts and "" not in names:
        raise SettingsError(
            f"{option} {wanted!r}: a name is missing before or after a comma; {where} has "
            f"{_listed(names)}"
        )
    channels = [_find_channel(text, names, where, option) for text in texts]
    if len(set(channels)) < len(channels):
        raise SettingsError(f"{option} {wanted}: the same channel of {where} is given twice")
    return channels


def _find_channel(text: str, names: Sequence[str], where: Location, option: str) -> int:
    """Return the index of the channel that a name or an index means."""
    number = text.removeprefix(_INDEX).strip()
    meant: set[int] = set()
    if not text.startswith(_INDEX):
        meant = {index for index, name in enumerate(names) if name.strip() == text.strip()}
        if not meant:
            letters = text.strip().casefold()
            alike = [i for i, name in enumerate(names) if name.strip().casefold() == letters]
            meant.update(alike)
    if number.isdecimal() and int(number) < len(names):
        meant.add(int(number))
    if len(meant) > 1:
        choices = [f"{_INDEX}{index} ({names[index]})" for index in sorted(meant)]
        raise SettingsError(
            f"{option} {text}: {len(meant)} channels of {where} match; choose one with "
            f"{option} {' or '.join(choices)}"
        )
    if not meant:
        raise SettingsError(
            f"{option} {text}: {where} has no such channel; it has {_listed(names)}"
            f"{_advice_for(text, names)}"
        )
    return meant.pop()


def _advice_for(text: str, names: Sequence[str]) -> str:
    """Return the end of a line about a channel that is not there."""
    if text.startswith(_INDEX):
        return f"; expected {_INDEX}N, with N from 0 to {len(names) - 1}"
    meant = closest(text, names)
    return f"; did you mean {one_line(meant)}?" if meant else ""


def channel_text(index: int, name: str) -> str:
    """Return the index of a channel with its name, if it has one."""
    return name if name == str(index) else f"{index} ({one_line(name)})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(channel_text, count(), names))
