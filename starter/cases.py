"""The images that bundles are compared on: simulations that no training sees, and noise.

Rows are judged as one: a few images of one kind and one difficulty. Rows of a group make one
mean over kinds, and one reliability diagram. All images are (z, y, x), and functions of seeds
that neither training nor its validation (`images.py`) nor calibration (from 3·10^9,
`calibrate.py`) uses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from starter.simulation import KINDS, THIN, Simulated, simulate

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Shape = tuple[int, int, int]

FIRST_SEED = 2 * 10**9
SNRS = (1.5, 3.0, 10.0)
# Light of other planes where the structure is, in units of the structure's mean.
STRONG_HAZE = 2.0
HAZE_SNRS = (2.0, 5.0)
# An image whose field holds next to nothing says nothing about a method.
_MIN_STRUCTURE = 0.002
_MAX_TRIES = 40


@dataclass(frozen=True)
class Sample:
    """An image, and where the structure is."""

    image: Array
    truth: Mask


@dataclass(frozen=True)
class Row:
    """Images that are judged as one; they are made when they are asked for."""

    name: str
    group: str
    make: Callable[[], Iterator[Sample]]


def snr_rows(shape: Shape, n: int) -> list[Row]:
    """Return each kind at each signal-to-noise ratio: the same structures, with other noise."""
    return [
        Row(f"{kind}, SNR {snr:g}", f"SNR {snr:g}", _samples(kind, 1, shape, n, 1.0, snr=snr))
        for snr in SNRS
        for kind in KINDS
    ]


def hard_rows(shape: Shape, n: int) -> list[Row]:
    """Return each kind at ratios of 1.5 to 3, with uneven background and mixed contrast."""
    return [Row(f"hard {kind}", "hard", _samples(kind, 2, shape, n, 1.0)) for kind in KINDS]


def mixed_rows(shape: Shape, n: int) -> list[Row]:
    """Return each kind at difficulties from 0 to 1, as a training draws them."""
    return [Row(f"mixed {kind}", "mixed", _samples(kind, 3, shape, n, None)) for kind in KINDS]


def haze_rows(shape: Shape, n: int) -> list[Row]:
    """Return thin structures over strong light of other planes."""
    return [
        Row(
            f"{kind} on haze, SNR {snr:g}",
            f"thin on haze, SNR {snr:g}",
            _samples(kind, 4, shape, n, 0.5, snr=snr, haze=STRONG_HAZE),
        )
        for snr in HAZE_SNRS
        for kind in KINDS
        if kind in THIN
    ]


def depth_rows(shape: Shape, n: int) -> list[Row]:
    """Return each kind in 8 bits and saturated: a third as many images, of a good ratio."""
    n = max(n // 3, 1)
    rows = []
    for name, distort in (("8 bits", in_8_bits), ("saturated", saturated)):
        for kind in KINDS:
            make = _samples(kind, 5, shape, n, 0.5, snr=6.0)
            rows.append(Row(f"{kind}, {name}", name, _distorted(make, distort)))
    return rows


def in_8_bits(sample: Sample) -> Sample:
    """Return an image as one of 60 gray values, which is what many 8-bit files hold."""
    low, high = np.percentile(sample.image, [0, 99.9])
    values = (sample.image.astype(np.float32) - low) / max(high - low, 1) * 60 + 8
    return Sample(np.clip(values, 0, 255).astype(np.uint8), sample.truth)


def saturated(sample: Sample) -> Sample:
    """Return an image whose brighter half of the structure has the largest gray value."""
    return Sample(np.minimum(sample.image, np.median(sample.image[sample.truth])), sample.truth)


def draw_structure(
    seed: int, shape: Shape, kind: str, difficulty: float, **options: Any
) -> Simulated:
    """Return the first simulation from a seed on whose field holds some structure."""
    for seed_now in range(seed, seed + _MAX_TRIES):
        made = simulate(seed_now, shape, kind, difficulty, **options)
        if made.mask.mean() > _MIN_STRUCTURE:
            break
    return made


def _samples(
    kind: str, part: int, shape: Shape, n: int, difficulty: float | None, **options: float
) -> Callable[[], Iterator[Sample]]:
    first_seed = FIRST_SEED + 10**6 * part + 10**4 * KINDS.index(kind)

    def make() -> Iterator[Sample]:
        for number in range(n):
            how_hard = (number + 0.5) / n if difficulty is None else difficulty
            seed = first_seed + _MAX_TRIES * number
            made = draw_structure(seed, shape, kind, how_hard, **options)
            yield Sample(made.image, made.mask)

    return make


def _distorted(
    make: Callable[[], Iterator[Sample]], distort: Callable[[Sample], Sample]
) -> Callable[[], Iterator[Sample]]:
    return lambda: map(distort, make())


# -- noise


def iter_noise(shape: Shape, n_seeds: int) -> Iterator[tuple[str, Array]]:
    """Yield images that hold nothing, with the name of their kind."""
    kinds: dict[str, Callable[[np.random.Generator], Array]] = {
        "Poisson": lambda rng: _gray(rng.poisson(100, shape)),
        "few photons": lambda rng: _gray(rng.poisson(0.3, shape)),
        "Gaussian": lambda rng: _gray(rng.normal(1000, 50, shape)),
        "read noise on a slope": lambda rng: _gray(rng.normal(0, 8, shape) + _slope(shape, rng)),
        "blurred": lambda rng: _gray(1000 + 800 * _blurred(rng.normal(0, 1, shape), rng)),
        "8 bits": lambda rng: _gray(rng.normal(20, 3, shape)).astype(np.uint8),
        "simulated": lambda rng: _simulated_noise(shape, rng),
    }
    for number, (name, make) in enumerate(kinds.items()):
        for seed in range(n_seeds):
            yield name, make(np.random.default_rng([FIRST_SEED, number, seed]))


def _gray(values: Array) -> Array:
    return np.clip(np.rint(values), 0, 65535).astype(np.uint16)


def _slope(shape: Shape, rng: np.random.Generator) -> Array:
    """Return an offset, and a ramp along a direction in the plane."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.indices(shape[1:]) / np.array(shape[1:])[:, None, None]
    return 400 + 100 * (np.sin(angle) * y + np.cos(angle) * x)


def _blurred(noise: Array, rng: np.random.Generator) -> Array:
    """Return noise that a denoising or a resampling has made smooth."""
    return gaussian_filter(noise.astype(np.float32), rng.uniform(0.5, 1.5))


def _simulated_noise(shape: Shape, rng: np.random.Generator) -> Array:
    return simulate(int(rng.integers(FIRST_SEED, 2**31)), shape, "noise", rng.uniform(0, 1)).image
