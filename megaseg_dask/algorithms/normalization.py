"""One normalization per volume, from statistics that add across boxes.

The statistics belong to the volume, so they must not depend on how it was
split. Integers are summed exactly, in any order. Floats are summed in float64
over a fixed partition of the volume (``PARTITION_SHAPE``) and merged in its
grid order, so the last bit does not depend on blocks, chunks or workers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import DataError

Float32 = NDArray[np.float32]

# Part of the result for float images: another partition may change the last bit of mean and std.
PARTITION_SHAPE = (64, 256, 256)

# 16-bit limbs in float64: products stay below 2^32, so a slab of 2^20 voxels sums below 2^53,
# exactly.
_SLAB = 2**20
_LIMB_BITS = 16

_MAX_EXACT_FLOAT = 2**53


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of float values.

    Merging follows Chan et al. 1979.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> "Moments":
        """Return the moments of finite values."""
        if not values.size:
            return cls()
        # Contiguous, and no BLAS: strides and thread counts change the order of a sum, and so its
        # last bit.
        values = np.ascontiguousarray(values)
        mean = float(values.mean(dtype=np.float64))
        # An infinite sum is refused later, by a message that names the volume.
        with np.errstate(over="ignore"):
            squares = float(np.square(values - np.float64(mean)).sum())
        return cls(values.size, mean, squares, float(values.min()), float(values.max()))

    def __add__(self, other: "Moments") -> "Moments":
        n = self.n + other.n
        if not n:
            return self
        delta = other.mean - self.mean
        return Moments(
            n,
            self.mean + delta * other.n / n,
            self.squares + other.squares + delta * delta * self.n * other.n / n,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def std(self) -> float:
        """Population standard deviation."""
        if not self.n:
            return 0.0
        return math.sqrt(self.squares / self.n)


@dataclass(frozen=True, slots=True)
class Counts:
    """Exact count, sum and sum of squares of integer values: adds in any order and any tree."""

    n: int = 0
    total: int = 0
    total_squares: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, values: NDArray[np.integer]) -> "Counts":
        """Return the exact sums of an integer array of any width and sign."""
        if not values.size:
            return cls()
        total = 0
        total_squares = 0
        for slab in np.array_split(values.ravel(), -(-values.size // _SLAB)):
            slab_total, slab_squares = _exact_sums(slab)
            total += slab_total
            total_squares += slab_squares
        return cls(values.size, total, total_squares, int(values.min()), int(values.max()))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.n + other.n,
            self.total + other.total,
            self.total_squares + other.total_squares,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def mean(self) -> float:
        """Mean, rounded once to float64."""
        if not self.n:
            return 0.0
        return self.total / self.n

    @property
    def std(self) -> float:
        """Population standard deviation.

        The variance is an exact fraction until it is rounded once.
        """
        if not self.n:
            return 0.0
        return math.sqrt((self.n * self.total_squares - self.total**2) / self.n**2)


Statistics = Moments | Counts


def _exact_sums(values: NDArray[np.integer]) -> tuple[int, int]:
    """Return sum and sum of squares of at most ``_SLAB`` integers."""
    if values.dtype.itemsize <= 2:
        # Squares of 16 bits, added up over a slab, stay below 2^53: float64 is exact.
        exact = values.astype(np.float64)
        return int(exact.sum()), int(exact @ exact)
    low = int(values.min())
    # Differences modulo 2^64 are exact, also across the sign.
    above_low = values.astype(np.uint64) - np.uint64(low % 2**64)
    n_bits = int(above_low.max()).bit_length()
    limbs = {
        shift: ((above_low >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float64)
        for shift in range(0, n_bits, _LIMB_BITS)
    }
    total = sum(int(limb.sum()) << shift for shift, limb in limbs.items())
    squares = 0
    for shift, limb in limbs.items():
        for other_shift, other in limbs.items():
            squares += int(limb @ other) << (shift + other_shift)
    n = values.size
    return total + n * low, squares + 2 * low * total + n * low * low


def measure(values: NDArray[Any], at: Box, *, nan_to_background: bool = False) -> Statistics:
    """Return the statistics of one part of the volume, ``values`` of box ``at``.

    Raises:
        DataError: A voxel is NaN or infinite; it names the first one.
            ``nan_to_background`` leaves such voxels out instead.
    """
    if values.dtype.kind in "iu":
        return Counts.of(values)
    if values.dtype.kind == "b":
        return Counts.of(values.view(np.uint8))
    if nan_to_background:
        return Moments.of(values[np.isfinite(values)])
    require_finite(values, at)
    return Moments.of(values)


def require_finite(values: NDArray[np.floating], at: Box) -> None:
    """Require that all voxels of box ``at`` are finite.

    Raises:
        DataError: A voxel is NaN or infinite; it names the first one.
    """
    finite = np.isfinite(values)
    if finite.all():
        return
    first = np.unravel_index(int(np.argmin(finite)), values.shape)
    voxel = tuple(int(f) + s for f, s in zip(first, at.start, strict=True))
    n_others = int((~finite).sum()) - 1
    raise DataError(
        f"voxel (z, y, x) = {voxel} is {values[first]}, and {n_others} more voxels in box {at} are "
        "not finite; correct the image, or treat them as background: start again with "
        "--nan-to-background --overwrite"
    )


def merge_statistics(parts: Iterable[Statistics]) -> Statistics:
    """Add the statistics of at least one part.

    For floats the order given must be the partition's grid order.
    """
    # All parts of a volume are of one kind.
    return reduce(add, parts)


@dataclass(frozen=True, slots=True)
class Normalization:
    """The z-score of one volume: MONAI's ``NormalizeIntensity(channel_wise=True)``."""

    mean: float
    std: float

    @classmethod
    def of(cls, statistics: Statistics) -> "Normalization":
        """Return the normalization that follows from the statistics of the whole volume.

        Raises:
            DataError: Voxels are too large for float64.
        """
        largest = max(abs(statistics.minimum), abs(statistics.maximum))
        if isinstance(statistics, Counts) and largest > _MAX_EXACT_FLOAT:
            raise DataError(
                f"voxels reach {statistics.maximum}, and numbers beyond 2^53 have no exact "
                "float64; subtract the offset of the image first"
            )
        if not math.isfinite(statistics.std):
            raise DataError(
                f"voxels reach {statistics.maximum}: their variance is too large to compute; "
                "rescale the image first"
            )
        if statistics.minimum == statistics.maximum:
            # A sum of floats is rounded, so their std is not zero.
            return cls(float(statistics.minimum), 0.0)
        return cls(statistics.mean, statistics.std)

    def __call__(self, values: NDArray[Any]) -> Float32:
        """Return ``(values - mean) / std`` in float32.

        A constant volume gives zeros; a voxel that is not finite gives zero, the mean.
        """
        # Wide numbers hold offsets that float32 would round away before they are subtracted.
        is_wide = values.dtype.itemsize > 2 and values.dtype != np.float32
        dtype = np.float64 if is_wide else np.float32
        centered = np.subtract(values, dtype(self.mean), dtype=dtype)
        # A std of zero divides by one, as in MONAI.
        centered /= dtype(self.std) or dtype(1)
        normalized: Float32 = centered.astype(np.float32, copy=False)
        if values.dtype.kind == "f":
            np.nan_to_num(normalized, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return normalized
