"""Give the logits of a bundle another scale and shift, so that scores mean what they say.

    python -m starter.calibrate BUNDLE [--n 3]

On simulations of any kind and difficulty, and some noise, with seeds that neither training nor
the comparison uses. The scale `a` and the shift `b` of `a · logit + b` are those of maximum
likelihood (logistic regression), where each image counts the same. The shift is then chosen
again: with it, 0.5 is the threshold of the best mean Dice. Prints both. `export.py --calibrate`
folds scale and shift into the last convolution, so that the bundle stays an ordinary one.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from benchmarks.prediction import Predictor, opened
from starter.simulation import KINDS, simulate
from starter.thresholds import dice_above

Array = NDArray[Any]

FIRST_SEED = 3 * 10**9
SHAPE = (64, 128, 128)
# Of each kind, and of noise.
N_IMAGES = 3
N_VOXELS = 20_000
# The last layer of MONAI's DynUNet, a convolution of one voxel.
_LAST = "output_block.conv.conv"
_CUTS = np.arange(-12, 12.01, 0.05).astype(np.float32)
# Mean Dice is flat near its best: thresholds this close to it are as good.
_AS_GOOD = 0.001


@dataclass(frozen=True)
class Calibration:
    """A logit becomes ``scale * logit + shift``.

    ``likely_shift`` is the shift of maximum likelihood; with ``shift``, 0.5 is the threshold of
    the best mean Dice.
    """

    scale: float
    shift: float
    likely_shift: float
    n_images: int

    def __str__(self) -> str:
        """Return both shifts, and the threshold that each stands for."""
        before = expit(-self.shift / self.scale)
        return (
            f"{self.n_images} images: scale {self.scale:.3f}; shift {self.shift:+.3f} by Dice "
            f"(0.5 was {before:.3f}), {self.likely_shift:+.3f} by likelihood"
        )


def calibrate(pairs: Sequence[tuple[Array, Array]]) -> Calibration:
    """Return the calibration of images, each given as its logits (float32) and truth (bool).

    Raises:
        ValueError: No image holds structure, or logits do not rise with it.
    """
    with_structure = [(logits, truth) for logits, truth in pairs if truth.any()]
    if not with_structure:
        raise ValueError("no image holds structure; expected one at least")
    scale, likely_shift = fit_likelihood(pairs)
    if scale <= 0:
        raise ValueError(f"scale {scale:.3f}: logits are not higher where structure is")
    shift = -scale * best_cut(with_structure)
    return Calibration(scale, shift, likely_shift, len(pairs))


def fit_likelihood(pairs: Sequence[tuple[Array, Array]]) -> tuple[float, float]:
    """Return scale and shift of maximum likelihood, on some voxels of each image."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, logits.size, N_VOXELS) for logits, _ in pairs]
    values = np.stack(
        [logits.ravel()[part] for (logits, _), part in zip(pairs, parts, strict=True)]
    ).astype(np.float64)
    is_true = np.stack([truth.ravel()[part] for (_, truth), part in zip(pairs, parts, strict=True)])

    def loss(parameters: Array) -> tuple[float, Array]:
        scaled = parameters[0] * values + parameters[1]
        error = expit(scaled) - is_true
        gradient = np.array([(error * values).mean(), error.mean()])
        return float((np.logaddexp(0, scaled) - is_true * scaled).mean()), gradient

    scale, shift = minimize(loss, [1.0, 0.0], jac=True, method="BFGS").x
    return float(scale), float(shift)


def best_cut(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Return the logit above which the mean Dice is best: the highest of all that are as good.

    Images without structure have no Dice, and the highest marks the least noise.
    """
    mean = np.mean([dice_above(logits, truth, _CUTS) for logits, truth in pairs], axis=0)
    return float(_CUTS[mean >= mean.max() - _AS_GOOD][-1])


def fold(weights: Mapping[str, torch.Tensor], scale: float, shift: float) -> dict[str, Any]:
    """Return weights of a network whose logits are ``scale * logit + shift`` of these.

    Raises:
        KeyError: The network has another last layer than DynUNet.
    """
    kernel = weights[f"{_LAST}.weight"].float()
    bias = weights[f"{_LAST}.bias"].float()
    return {
        **weights,
        f"{_LAST}.weight": kernel * scale,
        f"{_LAST}.bias": bias * scale + shift,
    }


def iter_pairs(
    predictor: Predictor, n: int, shape: tuple[int, int, int] = SHAPE
) -> Iterator[tuple[Array, Array]]:
    """Yield logits and truth of n simulations of each kind, and of noise."""
    rng = np.random.default_rng(FIRST_SEED)
    kinds = (*KINDS, "noise") * n
    for number, kind in enumerate(kinds):
        made = simulate(FIRST_SEED + number, shape, kind, rng.uniform(0, 1))
        print(f"calibration {number + 1}/{len(kinds)}: {kind}", flush=True)
        yield predictor.logits(made.image), made.mask


def calibrate_bundle(bundle: str, n: int = N_IMAGES) -> Calibration:
    """Return the calibration of a bundle, on n images of each kind."""
    with opened(bundle) as predictor:
        return calibrate(list(iter_pairs(predictor, n)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--n", type=int, default=N_IMAGES, help="images of each kind")
    args = parser.parse_args()
    print(calibrate_bundle(args.bundle, args.n))
