"""Pictures of a comparison: slices of images and masks, and reliability diagrams."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Columns = Mapping[str, Sequence[float | None]]

_N_SLICES = 5


def draw_slices(file: Path, image: Array, masks: Sequence[Array]) -> None:
    """Write slices along z and one along y: the image, then each mask in a row of its own."""
    import imageio.v3 as iio

    low, high = np.percentile(image, [0.5, 99.7])
    shown = (np.clip((image - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    stacks = [shown, *(mask * np.uint8(255) for mask in masks)]
    slices = np.linspace(0.1, 0.9, _N_SLICES) * len(image)
    rows = []
    for stack in stacks:
        height = stack.shape[1]
        planes = [stack[int(z)] for z in slices]
        rows.append(np.hstack([*planes, _tall(stack[:, height // 2], height)]))
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, np.vstack(rows))


def _tall(section: Array, height: int) -> Array:
    return np.pad(section[:height], ((0, max(0, height - len(section))), (0, 0)))


def draw_reliability(file: Path, title: str, models: Mapping[str, Columns]) -> None:
    """Write how often voxels of a score are structure; on the diagonal a score is a probability.

    Below it is how many voxels have such scores.
    """
    # Not by its state machine: no window is opened, and no setting is changed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 5), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, columns in models.items():
        pairs = zip(columns["mean_score"], columns["fraction_true"], strict=True)
        points = [pair for pair in pairs if pair[0] is not None]
        above.plot(*zip(*points, strict=True), marker="o", label=name)
        below.step(np.linspace(0.05, 0.95, 10), columns["voxels"], where="mid")
    above.set(title=title, ylabel="share that is structure", xlim=(0, 1), ylim=(0, 1))
    above.legend()
    below.set(xlabel="score", ylabel="voxels", yscale="log")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
