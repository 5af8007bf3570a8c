"""The numbers that describe a network, and the patches that it can take: pure, without torch.

A spec follows from the shapes of the weights alone. The torch module that belongs to it is made in
:mod:`megaseg_dask.models.build`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, product
from math import prod
from typing import TypeAlias

from megaseg_dask.errors import BundleError, SettingsError

Triple: TypeAlias = tuple[int, int, int]

MAX_LEVELS = 10  # a patch would be a multiple of 2^9 voxels


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Arguments of MONAI's ``DynUNet`` (nnU-Net), the one architecture of MegaSeg.

    The defaults are MegaSeg_v1. Sizes are (z, y, x), one per level from full resolution to the
    bottleneck.

    Raises:
        BundleError: The network's output would not have the shape of its input.

    """

    in_channels: int = 1
    out_channels: int = 1
    filters: tuple[int, ...] = (32, 64, 128, 256, 320)
    strides: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernel_size: tuple[Triple, ...] = ((3, 3, 3),) * 5
    upsample_kernel_size: tuple[Triple, ...] = ((2, 2, 2),) * 4
    res_block: bool = True

    def __post_init__(self) -> None:
        n_levels = len(self.filters)
        has_all = n_levels == len(self.strides) == len(self.kernel_size)
        if not has_all or not 3 <= n_levels <= MAX_LEVELS:
            raise BundleError(
                "filters, strides and kernel_size need an entry for each of 3 or more levels, "
                f"{MAX_LEVELS} at most; found {n_levels}, {len(self.strides)} and "
                f"{len(self.kernel_size)}"
            )
        if self.strides[0] != (1, 1, 1) or self.upsample_kernel_size != self.strides[1:]:
            raise BundleError(
                f"strides {self.strides} must begin with (1, 1, 1) and go on like "
                f"upsample_kernel_size {self.upsample_kernel_size}, or the output has another "
                "shape than the input"
            )
        if any(size % 2 == 0 for size in chain(*self.kernel_size)):
            raise BundleError(
                f"kernel_size {self.kernel_size}: even sizes shift the image; only odd ones are run"
            )
        if min(self.in_channels, self.out_channels, *self.filters, *chain(*self.strides)) < 1:
            raise BundleError(f"channels, filters and strides must be positive: {self}")

    @property
    def patch_multiple(self) -> Triple:
        """Voxels (z, y, x) of the image in one voxel of the bottleneck."""
        z, y, x = map(prod, zip(*self.strides, strict=True))
        return z, y, x

    @classmethod
    def of_weights(cls, shapes: Mapping[str, tuple[int, ...]]) -> "NetworkSpec":
        """Return the only network that has tensors of these names and shapes.

        The kernel of a transposed convolution is its stride, and must be the stride of its level;
        so the shapes determine everything.

        Raises:
            BundleError: The weights are those of something else.

        """
        n_up = sum(fnmatchcase(name, "upsamples.*.transp_conv.conv.weight") for name in shapes)
        if n_up >= MAX_LEVELS:
            raise BundleError(f"the weights are of {n_up + 1} levels; at most {MAX_LEVELS} are run")
        blocks = ["input_block", *(f"downsamples.{i}" for i in range(n_up - 1)), "bottleneck"]
        convolutions = [_conv_shape(shapes, f"{block}.conv1") for block in blocks]
        upsamples = [f"upsamples.{i}.transp_conv" for i in reversed(range(n_up))]
        up_strides = tuple(_conv_shape(shapes, layer)[2:] for layer in upsamples)
        return cls(
            in_channels=convolutions[0][1],
            out_channels=_conv_shape(shapes, "output_block.conv")[0],
            filters=tuple(shape[0] for shape in convolutions),
            strides=((1, 1, 1), *up_strides),
            kernel_size=tuple(shape[2:] for shape in convolutions),
            upsample_kernel_size=up_strides,
            res_block=any(".conv3." in name for name in shapes),
        )


def _conv_shape(
    shapes: Mapping[str, tuple[int, ...]], layer: str
) -> tuple[int, int, int, int, int]:
    key = f"{layer}.conv.weight"
    if key not in shapes:
        raise BundleError(f"the weights are not of a DynUNet, which alone is run: no {key}")
    if len(shapes[key]) != 5:
        raise BundleError(f"the weights are not of a 3D network: {key} has shape {shapes[key]}")
    a, b, z, y, x = shapes[key]
    return a, b, z, y, x


def require_patch(network: NetworkSpec, patch_shape: tuple[int, ...]) -> None:
    """Check that a network can take patches of this shape (z, y, x).

    Every axis must be a multiple of the product of its strides, and two voxels must be left at the
    bottleneck, since instance norm cannot normalize one.

    Raises:
        SettingsError: It cannot; the message has the nearest shape that works.

    """
    multiple = network.patch_multiple
    if not _fits(multiple, patch_shape):
        raise SettingsError(
            f"patch {_join(patch_shape)}: expected z,y,x in multiples of {_join(multiple)}, two "
            "voxels or more at the bottleneck; the nearest that works is "
            f"{_join(_nearest(multiple, patch_shape))}"
        )


def _fits(multiple: Triple, patch_shape: tuple[int, ...]) -> bool:
    if len(patch_shape) != 3 or min(patch_shape) <= 0:
        return False
    is_multiple = all(size % step == 0 for size, step in zip(patch_shape, multiple, strict=True))
    return is_multiple and prod(patch_shape) > prod(multiple)


def _nearest(multiple: Triple, patch_shape: tuple[int, ...]) -> tuple[int, ...]:
    target = (patch_shape + multiple)[:3]  # also for a shape of too few or too many axes
    choices = []
    for size, step in zip(target, multiple, strict=True):
        lower = max(size // step, 1) * step
        choices.append((lower, lower + step))

    def distance(shape: tuple[int, ...]) -> int:
        return sum(abs(a - b) for a, b in zip(shape, target, strict=True))

    return min((shape for shape in product(*choices) if _fits(multiple, shape)), key=distance)


def _join(sizes: Iterable[int]) -> str:
    return ",".join(map(str, sizes))
