"""What other voxels cost a model, and what ``--voxel-size model`` gives back.

    python -m benchmarks.voxel_size

A labelled stack is scaled, as if it had been imaged with other voxels, and segmented
by ``starter`` as it is and at the model's size. Dice is of the foreground, on the voxels
of the scaled stack.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy.ndimage import zoom

from benchmarks.machine import keep
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.demo import read_sample
from megaseg_dask.tools.sample import SPACING_UM, write_sample

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
SHAPE = (60, 160, 160)

Array = NDArray[Any]


def measure(shape: tuple[int, ...] = SHAPE, scales: tuple[float, ...] = SCALES) -> dict[str, Any]:
    """Return Dice with and without the model's voxel size, by how often the stack was scaled."""
    part = tuple(map(slice, shape))
    image, truth = (values[part] for values in read_sample())
    rows: dict[str, Any] = {}
    for scale in scales:
        values, labels, spacing_um = scaled(image, truth, SPACING_UM, scale)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "image.zarr")
            write_sample(Location.of(source), values, labels, spacing_um)
            dice = {
                f"dice_{size}": evaluate(_predict(source, size), labels > 0).dice
                for size in ("source", "model")
            }
        rows[str(scale)] = {"shape": values.shape, "spacing_um": spacing_um, **dice}
    return {"shape": image.shape, "scales": rows}


def scaled(
    image: Array, truth: Array, spacing_um: Sequence[float], scale: float
) -> tuple[Array, Array, tuple[float, ...]]:
    """Return an image, its labels and its voxel size as if it had other voxels."""
    values = zoom(image, scale, order=1, mode="nearest", grid_mode=True)
    labels = zoom(truth, scale, order=0, mode="nearest", grid_mode=True)
    axes = zip(spacing_um, image.shape, values.shape, strict=True)
    return values, labels, tuple(size * n / m for size, n, m in axes)


def _predict(source: Path, size: str) -> Any:
    target = source.with_name(f"{size}.zarr")
    settings = parse_settings({"model": "starter", "voxel_size": size, "workers": 0})
    result = segment(str(source), str(target), settings)
    assert not result.failures
    return np.asarray(zarr.open_array(target / "labels/megaseg/0", mode="r")) > 0


if __name__ == "__main__":
    keep("voxel_size", measure())
