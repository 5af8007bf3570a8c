"""Small pictures as data URLs: the middle slice and the maximum of image, scores and labels."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
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

# Pixels of the longer side.
_WIDTH = 200
# Voxels that are read for the pictures of one kind of one volume.
_MAX_VOXELS = 2**26
# Voxels on each side of a face, and along it; and pixels of each.
_ACROSS = 48
_ALONG = 96
_ZOOM = 3
_FACE_RED = (255, 64, 64)
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


def thumbnails(plan: Plan, output: Output, name: str) -> list[Thumbnail]:
    """Return the pictures of one output of a volume, middle slices first."""
    window = whole_or_middle(plan, _MAX_VOXELS)
    slices = []
    maxima = []
    for kind in _kinds(plan):
        view = choose_view(plan, window, _MAX_VOXELS, width=_WIDTH, is_source=kind == "image")
        try:
            values = view.read(plan, kind, output)
        except UNREADABLE:
            slices.append(Thumbnail("", "", f"{kind}, middle slice"))
            maxima.append(Thumbnail("", "", f"{kind}, maximum"))
            continue
        painter = _Painter(kind, _limits(kind, values))
        slices.append(painter.thumbnail(values[len(values) // 2], "middle slice", name))
        maxima.append(painter.thumbnail(values.max(axis=0), "maximum", name))
    return slices + maxima


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
        url = _encode(pixels, max(pixels.shape))
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

    def thumbnail(self, plane: Array, plane_name: str, name: str) -> Thumbnail:
        resample = Picture.Resampling.BOX
        if self.kind == "labels":
            # The mean of the colors of two labels is the color of a third.
            resample = Picture.Resampling.NEAREST
        url = _encode(self.paint(plane), _WIDTH, resample)
        alt = f"{plane_name} of the {self.kind} of {name}"
        return Thumbnail(url, alt, f"{self.kind}, {plane_name}")

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


def _encode(
    pixels: Pixels, width: int, resample: Picture.Resampling = Picture.Resampling.NEAREST
) -> str:
    """Return a PNG as a data URL, its longer side at most ``width`` pixels."""
    picture = Picture.fromarray(pixels)
    scale = width / max(picture.size)
    if scale < 1:
        n_columns, n_rows = (max(round(n * scale), 1) for n in picture.size)
        picture = picture.resize((n_columns, n_rows), resample)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
