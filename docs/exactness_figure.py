"""Draw docs/exactness.png.

The nuclei of the demo, predicted whole, in blocks, and block by block as by a simple loop.

Run ``python docs/exactness_figure.py``; it prints the numbers that docs/exactness.md states.
"""

from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import xarray

import megaseg_dask
from megaseg_dask.tools.demo import read_sample

BLOCK = (60, 128, 128)


def scores(image: np.ndarray, block: tuple[int, ...] | None = None) -> np.ndarray:
    """Predict an image ``(z, y, x)`` with the starter model."""
    array = xarray.DataArray(image, dims=["z", "y", "x"])
    return (
        megaseg_dask.predict(array, "starter", block=block or image.shape, threads=1)
        .compute()
        .values
    )


def main() -> None:
    """Predict in three ways, print how far they are apart, and draw the middle slice."""
    mpl.use("Agg")
    from matplotlib import pyplot

    image, _ = read_sample()
    whole, split, loop = scores(image), scores(image, BLOCK), np.zeros(image.shape, np.float32)
    for corner in product(*(range(0, n, b) for n, b in zip(image.shape, BLOCK, strict=True))):
        part = tuple(slice(a, a + b) for a, b in zip(corner, BLOCK, strict=True))
        # What one would write first: each block is an image of its own, normalised by itself.
        loop[part] = scores(image[part])
    for name, found in (("in blocks", split), ("a simple loop", loop)):
        masks = [values > 0.5 for values in (whole, found)]
        dice = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
        print(
            f"{name}: largest difference {np.abs(found - whole).max():.3g}, "
            f"Dice of the masks {dice:.4f}"
        )
    z = image.shape[0] // 2
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    axes[0].imshow(image[z], cmap="gray")
    axes[0].set_title("image")
    axes[1].imshow(whole[z], cmap="viridis", vmin=0, vmax=1)
    axes[1].set_title("scores, whole")
    for axis, found, title in (
        (axes[2], split, "in blocks − whole"),
        (axes[3], loop, "a simple loop − whole"),
    ):
        shown = axis.imshow(found[z] - whole[z], cmap="PuOr", vmin=-1, vmax=1)
        axis.set_title(
            f"{title}\nlargest difference {np.abs(found - whole).max():.2g}", fontsize=10
        )
    for axis in axes:
        axis.set_axis_off()
    for axis in axes[1:]:
        axis.axhline(BLOCK[1] - 0.5, color="#d55e00", lw=0.8, ls="--")
        axis.axvline(BLOCK[2] - 0.5, color="#d55e00", lw=0.8, ls="--")
    figure.colorbar(shown, ax=axes[2:], shrink=0.8)
    figure.savefig(Path(__file__).with_name("exactness.png"), dpi=100)


if __name__ == "__main__":
    main()
