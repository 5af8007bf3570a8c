import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from starter.microscope import visible
from starter.simulation import KINDS, NOISE, VOXEL_YX_UM, VOXEL_Z_UM, simulate
from starter.space import Space
from starter.structures import Drawing

SHAPE = (24, 64, 72)
VOXEL = (0.29, 0.108, 0.108)


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
    assert one.image.dtype in (np.uint8, np.uint16)
    assert one.mask.dtype == np.bool_
    assert one.image.shape == one.mask.shape == SHAPE


def test_every_kind_comes_up_when_none_is_asked_for():
    assert {simulate(seed, (16, 32, 32)).kind for seed in range(80)} == set(KINDS)


@pytest.mark.parametrize("shape", [(1, 40, 50), (8, 16, 16), (40, 17, 23)])
@pytest.mark.parametrize("kind", [*KINDS, NOISE])
def test_any_shape_will_do(kind, shape):
    assert simulate(3, shape, kind, difficulty=1).image.shape == shape


def test_hard_means_a_signal_to_noise_ratio_of_three_at_most():
    assert all(1.5 <= simulate(seed, (8, 32, 32), difficulty=1).snr <= 3 for seed in range(20))
    assert all(simulate(seed, (8, 32, 32), difficulty=0).snr >= 12 for seed in range(20))


def test_the_noise_is_what_the_ratio_says():
    """Over flat ground next voxels differ only by noise.

    Also the signal stands `snr` times above it.
    """
    made = simulate(13, (24, 160, 160), "nuclei", snr=3, voxel_size_um=(0.3, 0.3, 0.3))
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


def space(sigma=1.2, anisotropy=1.0, elongation=2.5):
    return Space(np.random.default_rng(0), (40, 60, 60), anisotropy, sigma, elongation)


def line(dye, value=1.0):
    dye[20, 30, :] = value
    return dye


def test_a_line_is_as_wide_as_its_profile_at_half_of_its_maximum():
    """Of a Gaussian that is 2.355 standard deviations, so 2.8 voxels across."""
    dye = line(np.zeros((40, 60, 60), dtype=np.float32))
    mask = visible(space(), Drawing(dye, thickness=1))
    across = mask[20, :, 30]
    along_z = mask[:, 30, 30]
    assert across.sum() == 3
    assert along_z.sum() == 7
    assert mask.sum() == pytest.approx(mask[:, :, 30].sum() * 60, rel=0.1)


def test_a_ball_is_seen_where_its_dye_is():
    z, y, x = np.indices((40, 60, 60)) - np.array([20, 30, 30])[:, None, None, None]
    ball = z**2 + y**2 + x**2 <= 12**2
    mask = visible(space(sigma=1.0), Drawing(ball.astype(np.float32)))
    both = (mask & ball).sum()
    assert 2 * both / (mask.sum() + ball.sum()) > 0.97


def test_thin_chromatin_makes_no_hole():
    ball = np.zeros((40, 60, 60), dtype=np.float32)
    ball[8:32, 10:50, 10:50] = 1
    holed = ball.copy()
    holed[18:22, 25:35, 25:35] = 0.1
    assert_array_equal(visible(space(), Drawing(holed)), visible(space(), Drawing(ball)))


def test_the_gap_between_near_lines_stays_a_gap_although_it_is_bright():
    dye = np.zeros((40, 60, 60), dtype=np.float32)
    dye[:, 28, :] = 1
    dye[:, 32, :] = 1
    mask = visible(space(sigma=1.5), Drawing(dye, thickness=1))
    assert mask[20, 28, 30]
    assert mask[20, 32, 30]
    assert not mask[20, 30, 30]


def test_what_is_far_dimmer_than_the_rest_is_not_structure():
    dye = line(np.zeros((40, 60, 60), dtype=np.float32))
    dye[20, 50, :] = 0.05
    mask = visible(space(), Drawing(dye, thickness=1))
    assert mask[20, 30].all()
    assert not mask[:, 45:].any()


def test_haze_and_ratio_are_those_that_are_asked_for():
    plain = simulate(5, SHAPE, "tubes", snr=10, haze=0.0, voxel_size_um=VOXEL)
    hazy = simulate(5, SHAPE, "tubes", snr=10, haze=5.0, voxel_size_um=VOXEL)
    assert plain.snr == hazy.snr == 10
    assert_array_equal(plain.mask, hazy.mask)

    def contrast(one):
        away = ~ndimage.binary_dilation(one.mask, iterations=2)
        values = one.image.astype(float)
        return (values[one.mask].mean() - values[away].mean()) / values[away].std()

    assert contrast(hazy) < contrast(plain) / 2


def test_noise_holds_no_structure():
    made = [simulate(seed, SHAPE, NOISE) for seed in range(10)]
    assert not any(one.mask.any() for one in made)
    assert all(one.image.std() > 0 for one in made)


def test_a_sparse_image_holds_structure_in_a_small_part_alone():
    made = [simulate(seed, (8, 160, 176), "network", sparse=True) for seed in range(6)]
    masks = [one.mask for one in made if one.mask.any()]
    assert len(masks) >= 4
    for mask in masks:
        for axis in (1, 2):
            other = tuple({0, 1, 2} - {axis})
            along = np.flatnonzero(mask.any(axis=other))
            # A ball of at most 30 voxels, and its blur.
            assert np.ptp(along) <= 2 * 30 + 8


def test_voxels_have_the_sizes_that_the_card_names():
    sizes = np.array([simulate(seed, (4, 16, 16), NOISE).voxel_size_um for seed in range(60)])
    lateral = sizes[:, 1]
    assert (lateral >= VOXEL_YX_UM[0]).all()
    assert (lateral <= VOXEL_YX_UM[1]).all()
    assert lateral.max() / lateral.min() > 3
    assert (sizes[:, 0] <= VOXEL_Z_UM[1]).all()


def test_files_have_8_or_16_bits_and_some_are_saturated():
    made = [simulate(seed, (16, 32, 32), "nuclei") for seed in range(60)]
    n_8_bits = sum(one.image.dtype == np.uint8 for one in made)
    n_saturated = sum((one.image == one.image.max()).mean() > 1e-3 for one in made)
    assert 2 <= n_8_bits <= 25
    assert 2 <= n_saturated <= 40
