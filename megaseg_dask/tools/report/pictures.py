"""Small pictures of volumes as data URLs: image, scores and labels, the middle slice and the maximum of all slices."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run.workspace import product, sources
from megaseg_dask.tools.report.sampling import UNREADABLE, choose_view, whole_or_middle
from megaseg_dask.tools.report.seams import AXES, Face

Array = NDArray[Any]

_PLANES = ("middle slice", "maximum")
# Pixels of the longer side.
_WIDTH = 200
# Voxels that are read for the pictures of one volume, of each kind.
_BUDGET = 2**26
# A seam with so many voxels on both sides, and along it.
_ACROSS, _ALONG = 48, 96

# Samples of matplotlib's viridis, which reads alike with and without colour vision.
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
    """One picture with the words that stand for it."""

    url: str
    alt: str
    caption: str


def thumbnails(plan: Plan, output: Output, name: str) -> list[Thumbnail]:
    """Return the pictures of one output of a volume, middle slices first; one that cannot be read has no URL."""
    window = whole_or_middle(plan, _BUDGET)
    rows: tuple[list[Thumbnail], list[Thumbnail]] = ([], [])
    for kind in ("image", "scores", "labels"):
        if kind != "image" and kind not in plan.arrays:
            continue
        view = choose_view(plan, window, _BUDGET, width=_WIDTH, is_source=kind == "image")
        try:
            values = view.read(plan, kind, output)
        except UNREADABLE:
            for row, what in zip(rows, _PLANES, strict=True):
                row.append(Thumbnail("", "", f"{kind}, {what}"))
            continue
        limits = _limits(kind, values)
        # A mean of two labels' colours is the colour of a third.
        resample = Picture.Resampling.NEAREST if kind == "labels" else Picture.Resampling.BOX
        planes = values[len(values) // 2], values.max(axis=0)
        for row, what, plane in zip(rows, _PLANES, planes, strict=True):
            url = _encode(_paint(kind, plane, limits), _WIDTH, resample)
            row.append(Thumbnail(url, f"{what} of the {kind} of {name}", f"{kind}, {what}"))
    return [*rows[0], *rows[1]]


def seam_pictures(face: Face) -> list[Thumbnail]:
    """Return image, scores and labels across a face, which is the line in the middle of each."""
    plan, axis, other = face.plan, face.axis, 2 if face.axis != 2 else 1
    middle = [(a + b) // 2 for a, b in zip(face.box.start, face.box.stop, strict=True)]
    start, stop = list(middle), [m + 1 for m in middle]
    start[axis], stop[axis] = face.at - _ACROSS, face.at + _ACROSS
    start[other], stop[other] = middle[other] - _ALONG // 2, middle[other] + _ALONG // 2
    box = Box(tuple(max(a, 0) for a in start), tuple(stop)) & Box.of(plan.volume_shape)
    volumes = {"image": sources(plan, face.output.volume)[0]}
    volumes |= {
        kind: product(plan, kind, face.output)
        for kind in ("scores", "labels")
        if kind in plan.arrays
    }
    found = []
    for kind, volume in volumes.items():
        try:
            values = volume.read(box.shifted(plan.region.start) if kind == "image" else box)
        except UNREADABLE:
            continue
        # The axis of the seam runs from left to right.
        across = 3 - axis - other
        plane = np.moveaxis(values.take(0, axis=across), 0 if axis < other else 1, 1)
        painted = np.kron(_paint(kind, plane, _limits(kind, plane)), np.ones((3, 3, 1), np.uint8))
        at = 3 * (face.at - box.start[axis])
        # Dashes, so that what they cover can be guessed.
        painted[np.arange(len(painted)) % 12 < 6, at - 1 : at + 1] = (255, 64, 64)
        caption = f"{kind} across a face along {AXES[axis]}"
        found.append(
            Thumbnail(
                _encode(painted, max(painted.shape)),
                f"{caption}, which is the dashed line",
                caption,
            )
        )
    return found


def _limits(kind: str, values: Array) -> tuple[float, float]:
    """Return what becomes black and white."""
    if kind == "scores":
        return 0.0, 255.0 if values.dtype == np.uint8 else 1.0
    if kind == "labels":
        return 0.0, 1.0
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    # A sample: percentiles of all would take longer than reading.
    low, high = (
        np.percentile(finite[:: max(finite.size // 10**6, 1)], (1, 99.8))
        if finite.size
        else (0.0, 1.0)
    )
    return float(low), float(max(high, low + 1e-9))


def _paint(kind: str, plane: Array, limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Return a plane in colours, uint8 ``(rows, columns, 3)``."""
    if kind == "labels":
        return label_colours(plane)
    share = np.clip(
        (np.nan_to_num(plane.astype(np.float32)) - limits[0]) / (limits[1] - limits[0]), 0, 1
    )
    if kind == "scores":
        painted: NDArray[np.uint8] = _VIRIDIS[(share * 255).astype(np.uint8)]
        return painted
    return np.repeat((share * 255).astype(np.uint8)[..., None], 3, axis=2)


def label_colours(labels: Array) -> NDArray[np.uint8]:
    """Return a bright colour for each id, the same wherever it occurs, and black for the background."""
    ids = labels.astype(np.uint64)
    # Multiplicative hashing (Knuth): ids that follow each other get unlike hues.
    hue = (ids * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**32
    turn = (hue[..., None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6
    colours = 70 + 185 * np.clip(np.abs(turn - 3) - 1, 0, 1)
    return np.where(ids[..., None] > 0, colours, 0).astype(np.uint8)


def _table_of(stops: tuple[str, ...]) -> NDArray[np.uint8]:
    rgb = np.array([[int(s[i : i + 2], 16) for i in (1, 3, 5)] for s in stops], float)
    at = np.linspace(0, len(stops) - 1, 256)
    return (
        np.stack([np.interp(at, range(len(stops)), rgb[:, i]) for i in range(3)], axis=1)
        .round()
        .astype(np.uint8)
    )


_VIRIDIS = _table_of(VIRIDIS)


def colour_of(share: float) -> str:
    """Return the colour of a value between 0 and 1, as ``#rrggbb``."""
    r, g, b = _VIRIDIS[int(min(max(share, 0.0), 1.0) * 255)]
    return f"#{r:02x}{g:02x}{b:02x}"


def _encode(
    pixels: NDArray[np.uint8],
    width: int = _WIDTH,
    resample: Picture.Resampling = Picture.Resampling.NEAREST,
) -> str:
    """Return a PNG as a data URL, its longer side at most ``width`` pixels."""
    picture = Picture.fromarray(pixels)
    scale = width / max(picture.size)
    if scale < 1:
        size = tuple(max(round(n * scale), 1) for n in picture.size)
        picture = picture.resize((size[0], size[1]), resample)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
