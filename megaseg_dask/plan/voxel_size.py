"""The size of voxels: the source's, the model's, and that of the grid which the network sees.

Patches lie on a grid over the whole volume. Where it is not the source's, the image is
resampled onto it, and predictions come back on the source's voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megaseg_dask.algorithms.geometry import Shape
from megaseg_dask.algorithms.resampling import resampled_shape
from megaseg_dask.errors import SettingsError
from megaseg_dask.models import BundleFacts
from megaseg_dask.models.cards import MINIMUM_SHAPE
from megaseg_dask.ngff.image import Image
from megaseg_dask.plan.settings import Settings

# The image and the model differ by this much on an axis: a person should know.
_FAR = 1.5

T = TypeVar("T")
Size = tuple[float, ...]
Range = tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class VolumeForm:
    """Voxels ``(z, y, x)`` of a volume, and their size in µm.

    ``unknown_size`` says why the size is not known, if it is not.
    """

    shape: Shape
    spacing_um: Size
    unknown_size: str | None = None

    @classmethod
    def of(cls, image: Image) -> "VolumeForm":
        """Return the form of an image's finest level."""
        return cls(image.volume_shape(), image.spacing_um, image.unknown_size)

    def on_grid(self, voxel_size_um: Size | None) -> Shape:
        """Return the shape of the grid of a voxel size; ``None`` is the source's own."""
        if voxel_size_um is None:
            return self.shape
        return resampled_shape(self.shape, self.spacing_um, voxel_size_um)

    def times(self, model_um: Size | None) -> Size | None:
        """Return how many times as large as those of a model its voxels are.

        ``None`` where one of the sizes is not known.
        """
        if self.unknown_size or model_um is None:
            return None
        return tuple(mine / model for mine, model in zip(self.spacing_um, model_um, strict=True))

    def is_within(self, range_um: Range | None) -> bool:
        """Return whether its voxels are of sizes from the smallest to the largest of a range."""
        if self.unknown_size or range_um is None:
            return False
        sizes = zip(self.spacing_um, *range_um, strict=True)
        return all(low <= size <= high for size, low, high in sizes)


def model_size_um(bundles: Sequence[BundleFacts]) -> Size | None:
    """Return the voxel size of the images of a model, or of all its bundles if they agree."""
    return _common([bundle.voxel_size_um for bundle in bundles])


def model_range_um(bundles: Sequence[BundleFacts]) -> Range | None:
    """Return the range of voxel sizes of the images of a model, if its bundles agree on one."""
    return _common([bundle.voxel_range_um for bundle in bundles])


def _common(values: Sequence[T]) -> T | None:
    """Return the value that all have, ``None`` if they differ."""
    first, *others = values
    return first if all(other == first for other in others) else None


def choose_size_um(
    settings: Settings, form: VolumeForm, bundles: Sequence[BundleFacts]
) -> Size | None:
    """Return the size of voxels that the network is to see; ``None`` is the source's own.

    Raises:
        SettingsError: The size of the source's or of the model's voxels is not known, or the
            volume has too few voxels of that size.
    """
    wanted: Size | None = None
    match settings.voxel_size:
        case "source":
            return None
        case "model":
            wanted = model_size_um(bundles)
            option = "--voxel-size model"
        case numbers:
            wanted = tuple(map(float, numbers))
            option = f"--voxel-size {','.join(f'{size:g}' for size in wanted)}"
    if wanted is None:
        names = " + ".join(bundle.name for bundle in bundles)
        raise SettingsError(
            f"--voxel-size model: {names} does not say the voxel size of its training images; give "
            "three numbers, --voxel-size Z,Y,X in µm, or import it with --voxel-size"
        )
    if form.unknown_size:
        raise SettingsError(
            f"{option}: the size of the source's voxels is unknown ({form.unknown_size}); write it "
            "into its metadata, in µm, or leave --voxel-size out"
        )
    grid_shape = form.on_grid(wanted)
    if any(n < least for n, least in zip(grid_shape, MINIMUM_SHAPE, strict=True)):
        raise SettingsError(
            f"{option}: volumes of {form.shape} voxels become {grid_shape}, and the model needs at "
            f"least {MINIMUM_SHAPE}; choose smaller voxels"
        )
    return wanted


def size_text(size_um: Size) -> str:
    """Return a voxel size in words."""
    return f"{' × '.join(f'{size:.3g}' for size in size_um)} µm (z, y, x)"


def times_text(times: Size) -> str:
    """Return how many times as large voxels are, in words."""
    return " × ".join(f"{factor:.2g}" for factor in times)


def is_far(times: Size | None) -> bool:
    """Return whether voxels are so much larger or smaller than a model's that it matters."""
    return times is not None and any(max(factor, 1 / factor) > _FAR for factor in times)
