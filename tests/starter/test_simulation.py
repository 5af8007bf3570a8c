import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from starter.simulation import KINDS, simulate

SHAPE = (24, 64, 72)


@pytest.mark.parametrize("kind", KINDS)
def test_a_structure_is_brighter_than_what_lies_around_it(kind):
    made = [simulate(seed, (32, 96, 96), kind, difficulty=0.0) for seed in range(4)]
    ratios = []
    for one in made:
        around = ndimage.binary_dilation(one.mask, iterations=6) & ~ndimage.binary_dilation(
            one.mask, iterations=2
        )
        if one.mask.any() and around.any():
            ratios.append(one.image[one.mask].mean() / one.image[around].mean())
    assert np.median(ratios) > 1.1
    assert all(one.mask.mean() < 0.6 for one in made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_image(kind):
    one, again, other = (simulate(seed, SHAPE, kind) for seed in (7, 7, 8))
    assert_array_equal(one.image, again.image)
    assert_array_equal(one.mask, again.mask)
    assert (one.kind, one.seed) == (kind, 7)
    assert (one.image != other.image).any()
    assert (one.image.dtype, one.mask.dtype) == (np.uint16, np.bool_)
    assert one.image.shape == one.mask.shape == SHAPE


def test_every_kind_comes_up_when_none_is_asked_for():
    assert {simulate(seed, (16, 32, 32)).kind for seed in range(80)} == set(KINDS)


@pytest.mark.parametrize("shape", [(1, 40, 50), (8, 16, 16), (40, 17, 23)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_will_do(kind, shape):
    assert simulate(3, shape, kind, difficulty=1).image.shape == shape


def test_hard_means_a_signal_to_noise_ratio_of_three_at_most():
    assert all(1.5 <= simulate(seed, (8, 32, 32), difficulty=1).snr <= 3 for seed in range(20))
    assert all(simulate(seed, (8, 32, 32), difficulty=0).snr >= 12 for seed in range(20))


def test_the_noise_is_what_the_ratio_says():
    """Over flat ground next voxels differ only by noise.

    Also the signal stands `snr` times above it.
    """
    made = simulate(11, (24, 160, 160), "nuclei", difficulty=1)
    core = ndimage.binary_erosion(made.mask, iterations=5)
    away = ~ndimage.binary_dilation(made.mask, iterations=12)
    image = made.image.astype(float)
    noise = np.std(np.diff(image, axis=2)[core[:, :, 1:]]) / np.sqrt(2)
    ratio = (image[core].mean() - image[away].mean()) / noise
    assert made.snr / 2 < ratio < made.snr * 2


def test_structures_outside_the_field_leave_an_image_without_truth():
    made = [simulate(seed, (6, 12, 12), "nuclei") for seed in range(30)]
    assert any(not one.mask.any() for one in made)
    assert all(one.image.std() > 0 for one in made)


def test_refuses_a_kind_that_it_cannot_draw():
    with pytest.raises(ValueError, match="'ribbons' is none of filaments, bundles"):
        simulate(0, SHAPE, "ribbons")
