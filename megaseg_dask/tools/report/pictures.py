"""Small pictures as data URLs: objects outlined on the image, and the scores beside them."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from megaseg_dask.algorithms.blending import max_score
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.workspace import Readable, Workspace
from megaseg_dask.tools.report.sampling import UNREADABLE, choose_view, whole_or_middle
from megaseg_dask.tools.report.seams import AXES, Face

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

# Pixels of the longer side of a plane: of the only volume, and of one of many.
_LARGE_WIDTH = 840
_SMALL_WIDTH = 420
# A small image is not enlarged beyond this: there is no more to see.
_MAX_ENLARGEMENT = 4
# Pixels between the plane from above and the plane from the side, and of the scale bar.
_GAP = 6
# Outlines have one pixel of this number along the longer side.
_OUTLINE_SHARE = 420
_BAR_HEIGHT = 5
_BAR_MARGIN = 12
# The bar is the largest round length within this share of the width.
_BAR_SHARE = 0.3
# Contours keep their colors without subsampling; PNG would be four times as large.
_JPEG: dict[str, Any] = {"quality": 88, "subsampling": 0, "optimize": True}
# Voxels that are read for the pictures of one kind of one volume.
_MAX_VOXELS = 2**26
# Voxels on each side of a face, and along it; and pixels of each.
_ACROSS = 48
_ALONG = 96
_ZOOM = 3
_FACE_RED = (255, 64, 64)
_WHITE = (255, 255, 255)
# Percentiles of a sample are exact enough, and those of all voxels take longer than reading.
_MAX_SAMPLE = 10**6

# Samples of matplotlib's viridis, which is clear with and without color vision.
VIRIDIS = (
    "#440154",
    "#472d7b",
    "#3b528b",
    "#2c728e",
    "#21918c",
    "#28ae80",
    "#5ec962",
    "#addc30",
    "#fde725",
)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One picture with its texts; the URL is empty if the data could not be read."""

    url: str
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class _Planes:
    """The plane from above and the plane from the side that show a volume.

    ``z`` and ``y`` are shares of its extent. ``shape`` is in pixels, ``(z, y, x)``, all of one
    size; ``pixel_um`` is that size, 0 if it is unknown.
    """

    z: float
    y: float
    shape: tuple[int, ...]
    pixel_um: float

    def cut(self, values: Array) -> tuple[Array, Array]:
        """Return the plane ``(y, x)`` and the plane ``(z, x)`` of a volume ``(z, y, x)``."""
        z = int(self.z * len(values))
        y = int(self.y * values.shape[1])
        return values[z], values[:, y]

    def draw(self, above: Pixels, beside: Pixels) -> Pixels:
        """Return one picture of both planes, with the scale bar."""
        gap = np.full((_GAP, above.shape[1], 3), 255, np.uint8)
        picture = np.concatenate([above, gap, beside])
        length = _bar_length(self.pixel_um * above.shape[1])
        if length:
            width = round(length / self.pixel_um)
            stop = len(above) - _BAR_MARGIN
            right = above.shape[1] - _BAR_MARGIN
            # A black frame keeps the bar visible on bright objects.
            picture[stop - _BAR_HEIGHT - 1 : stop + 1, right - width - 1 : right + 1] = 0
            picture[stop - _BAR_HEIGHT : stop, right - width : right] = _WHITE
        return picture

    @property
    def scale(self) -> str:
        """What the scale bar says, as the end of a caption."""
        length = _bar_length(self.pixel_um * self.shape[2])
        return f"bar {length:g} µm" if length else "voxel size unknown"


def _bar_length(width_um: float) -> float:
    """Return the largest of 1, 2, 5, 10, … µm that fits; 0 if the width is unknown."""
    if width_um <= 0:
        return 0.0
    most = width_um * _BAR_SHARE
    power = 10 ** math.floor(math.log10(most))
    factor = max(factor for factor in (1, 2, 5) if factor * power <= most)
    return float(factor * power)


def volume_pictures(plan: Plan, output: Output, name: str, *, is_alone: bool) -> list[Thumbnail]:
    """Return pictures of one output: the image with the objects' outlines, and the scores.

    Each shows one plane from above and one from the side, through as many voxels of objects as
    possible.
    """
    window = whole_or_middle(plan, _MAX_VOXELS)
    width = _LARGE_WIDTH if is_alone else _SMALL_WIDTH
    found: dict[str, Array | None] = {}
    for kind in _kinds(plan):
        view = choose_view(plan, window, _MAX_VOXELS, width=width, is_source=kind == "image")
        try:
            found[kind] = view.read(plan, kind, output)
        except UNREADABLE:
            found[kind] = None
    labels = found.get("labels")
    planes = _choose_planes(plan, window, labels, width)
    draw = partial(_draw, planes, name)
    pictures = [draw("image", found["image"], labels)]
    if "scores" in found:
        pictures.append(draw("scores", found["scores"], None))
    return pictures


def _choose_planes(plan: Plan, window: Box, labels: Array | None, width: int) -> _Planes:
    spacing = plan.source_image.spacing_um
    extents = [n * size for n, size in zip(window.shape, spacing, strict=True)]
    wide = max(extents[1:])
    n_voxels = max(window.shape[1:])
    pixel = wide / min(width, n_voxels * _MAX_ENLARGEMENT)
    shape = tuple(max(round(extent / pixel), 1) for extent in extents)
    z = y = 0.5
    if labels is not None and labels.any():
        z = _fullest(labels, 0)
        y = _fullest(labels, 1)
    is_known = plan.source_image.unknown_size is None
    return _Planes(z, y, shape, pixel if is_known else 0.0)


def _fullest(labels: Array, axis: int) -> float:
    """Return where along an axis most voxels are in objects, as a share of its extent."""
    others = tuple(n for n in range(3) if n != axis)
    counts = np.count_nonzero(labels, axis=others)
    return (float(counts.argmax()) + 0.5) / len(counts)


def _draw(
    planes: _Planes, name: str, kind: str, values: Array | None, labels: Array | None
) -> Thumbnail:
    is_outlined = labels is not None
    what = "image, objects outlined" if is_outlined else kind
    if values is None:
        return Thumbnail("", "", what)
    painter = _Painter(kind, _limits(kind, values))
    n_z, n_y, n_x = planes.shape
    drawn = []
    for plane, shape in zip(planes.cut(values), ((n_y, n_x), (n_z, n_x)), strict=True):
        drawn.append(_resized(painter.paint(plane), shape, Picture.Resampling.BICUBIC))
    if labels is not None:
        for picture, plane in zip(drawn, planes.cut(labels), strict=True):
            _outline(picture, plane)
    z = int(planes.z * len(values))
    caption = f"{what}; {planes.scale}"
    alt = f"{what} of {name}, plane {z} of {len(values)}"
    return Thumbnail(_data_url(planes.draw(drawn[0], drawn[1]), "JPEG", **_JPEG), alt, caption)


def _outline(picture: Pixels, labels: Array) -> None:
    """Draw the borders of objects onto a picture, each in the color of its id."""
    rows = np.arange(picture.shape[0]) * labels.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * labels.shape[1] // picture.shape[1]
    ids = labels[rows][:, columns]
    n = max(round(max(ids.shape) / _OUTLINE_SHARE), 1)
    is_border = np.zeros(ids.shape, bool)
    differs = ids[n:] != ids[:-n]
    is_border[n:] |= differs
    is_border[:-n] |= differs
    differs = ids[:, n:] != ids[:, :-n]
    is_border[:, n:] |= differs
    is_border[:, :-n] |= differs
    is_border &= ids > 0
    picture[is_border] = label_colors(ids[is_border])


def _resized(pixels: Pixels, shape: tuple[int, int], resample: Picture.Resampling) -> Pixels:
    picture = Picture.fromarray(pixels).resize((shape[1], shape[0]), resample)
    return np.array(picture)


def _kinds(plan: Plan) -> list[str]:
    return ["image", *(kind for kind in ("scores", "labels") if kind in plan.arrays)]


def seam_pictures(face: Face) -> list[Thumbnail]:
    """Return image, scores and labels across a face, which is a dashed line in the middle."""
    pictures = []
    box = _box_across(face)
    for kind, volume, offset in _volumes_of(face):
        try:
            values = volume.read(box.shifted(offset))
        except UNREADABLE:
            continue
        pixels = _paint_face(kind, values, face, face.at - box.start[face.axis])
        caption = f"{kind} across a face along {AXES[face.axis]}"
        url = _data_url(pixels, "PNG", optimize=True)
        pictures.append(Thumbnail(url, f"{caption}, which is the dashed line", caption))
    return pictures


def _volumes_of(face: Face) -> Iterator[tuple[str, Readable, tuple[int, ...]]]:
    """Yield kind, volume, and the position in it of the segmented region's first voxel."""
    plan = face.plan
    for kind in _kinds(plan):
        if kind == "image":
            yield kind, Workspace(plan).sources(face.output.volume)[0], plan.region.start
        else:
            yield kind, Target(plan).array(kind, face.output), (0, 0, 0)


def _axis_along(face: Face) -> int:
    """Return the axis that a picture shows beside that of the face."""
    return 2 if face.axis != 2 else 1


def _box_across(face: Face) -> Box:
    """Return one plane of voxels on both sides of a face, through the middle of its window."""
    start = [(a + b) // 2 for a, b in zip(face.box.start, face.box.stop, strict=True)]
    stop = [middle + 1 for middle in start]
    along = _axis_along(face)
    start[along] -= _ALONG // 2
    stop[along] = start[along] + _ALONG
    start[face.axis] = face.at - _ACROSS
    stop[face.axis] = face.at + _ACROSS
    return Box(tuple(start), tuple(stop)) & Box.of(face.plan.volume_shape)


def _paint_face(kind: str, values: Array, face: Face, at: int) -> Pixels:
    """Paint a plane with the axis of the face from left to right, and a line at voxel ``at``."""
    along = _axis_along(face)
    plane = values.take(0, axis=3 - face.axis - along)
    if face.axis < along:
        plane = plane.T
    painted = _Painter(kind, _limits(kind, plane)).paint(plane)
    pixels: Pixels = np.kron(painted, np.ones((_ZOOM, _ZOOM, 1), np.uint8))
    # Dashes leave visible what is below them.
    is_dash = np.arange(len(pixels)) % 12 < 6
    pixels[is_dash, _ZOOM * at - 1 : _ZOOM * at + 1] = _FACE_RED
    return pixels


def _limits(kind: str, values: Array) -> tuple[float, float]:
    """Return the values that become black and white."""
    if kind == "scores":
        return 0.0, max_score(values.dtype)
    return gray_limits(values) if kind == "image" else (0.0, 1.0)


def gray_limits(values: Array) -> tuple[float, float]:
    """Return the values of an image that become black and white.

    The brightest few voxels are often artifacts.
    """
    sample = values.ravel()[:: max(values.size // _MAX_SAMPLE, 1)]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = np.percentile(sample, (1, 99.8)).tolist()
    return low, high if high > low else low + 1


@dataclass(frozen=True, slots=True)
class _Painter:
    """Turns planes of one kind into pictures; ``limits`` become black and white."""

    kind: str
    limits: tuple[float, float]

    def paint(self, plane: Array) -> Pixels:
        """Return the colors of a plane, ``(rows, columns, 3)``."""
        if self.kind == "labels":
            return label_colors(plane)
        low, high = self.limits
        values = np.nan_to_num(plane.astype(np.float32))
        share = np.clip((values - low) / (high - low), 0, 1)
        levels = (share * 255).astype(np.uint8)
        if self.kind == "scores":
            colors: Pixels = _VIRIDIS_TABLE[levels]
            return colors
        return np.repeat(levels[..., None], 3, axis=2)


def label_colors(labels: Array) -> Pixels:
    """Return a bright color for each id, equal wherever it occurs, and black for background."""
    ids = labels.astype(np.uint64)
    # Multiplicative hashing (Knuth): consecutive ids get different hues.
    hue = (ids * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**32
    turn = (hue[..., None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6
    colors = 70 + 185 * np.clip(np.abs(turn - 3) - 1, 0, 1)
    return np.where(ids[..., None] > 0, colors, 0).astype(np.uint8)


def _interpolate(stops: tuple[str, ...]) -> Pixels:
    """Return 256 colors between the stops, ``(256, 3)``."""
    rgb = np.array([list(bytes.fromhex(stop[1:])) for stop in stops], float)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, range(len(stops)), values) for values in rgb.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


_VIRIDIS_TABLE = _interpolate(VIRIDIS)


def color_of(share: float) -> str:
    """Return the color of a value between 0 and 1, as ``#rrggbb``."""
    color = _VIRIDIS_TABLE[int(min(max(share, 0.0), 1.0) * 255)]
    return f"#{color.tobytes().hex()}"


def _data_url(pixels: Pixels, form: str, **options: Any) -> str:
    """Return a picture as a data URL."""
    data = io.BytesIO()
    Picture.fromarray(pixels).save(data, form, **options)
    text = base64.b64encode(data.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{text}"
