"""Images that a training is made of: files, manifest, and parts of a real stack."""

import csv

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from tifffile import imread, imwrite

from starter import real
from starter.images import write_images
from starter.real import draw_part, read_stack


@pytest.fixture
def stack(tmp_path):
    """The folder of a stack of two bright balls, as idr0062 is stored."""
    shape = (40, 48, 56)
    labels = np.zeros(shape, int)
    for number, center in enumerate([(20, 15, 15), (20, 30, 40)], 1):
        squared = sum(
            (axis - at) ** 2 for axis, at in zip(np.ogrid[:40, :48, :56], center, strict=True)
        )
        labels[squared < 9**2] = number
    gray = np.random.default_rng(0).poisson(20 + 200 * (labels > 0))
    imwrite(tmp_path / real.IMAGE, gray.astype(np.uint16))
    imwrite(tmp_path / real.LABELS, labels.astype(np.uint16))
    return tmp_path


def test_a_part_of_a_stack_is_bright_where_its_mask_is(stack):
    image, mask = read_stack(stack)
    assert (image.min(), image.max()) == (0, 1)
    for seed in range(8):
        values, inside = draw_part(image, mask, (16, 40, 44), np.random.default_rng(seed))
        assert values.shape == inside.shape == (16, 40, 44)
        assert (values.dtype, inside.dtype) == (np.uint16, bool)
        assert inside.any()
        assert not inside.all()
        assert values[inside].mean() > values[~inside].mean()


def test_a_seed_gives_one_part(stack):
    image, mask = read_stack(stack)
    one, again, other = (
        draw_part(image, mask, (16, 40, 44), np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert_array_equal(one[0], again[0])
    assert_array_equal(one[1], again[1])
    assert (one[0] != other[0]).any()


def test_the_manifest_names_simulations_and_parts_of_the_stack(stack, tmp_path):
    folder = tmp_path / "images"
    with write_images(folder, 8, 1, stack).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 7 + ["val"] + ["train"] * 3
    assert [row["raw"].startswith("real") for row in rows] == [False] * 8 + [True] * 3
    for row in rows:
        image = imread(folder / row["raw"])
        mask = imread(folder / row["seg"])
        assert image.shape == mask.shape
        assert set(np.unique(mask)) <= {0, 1}
