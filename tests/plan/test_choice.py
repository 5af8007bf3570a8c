"""A channel is found by its name, its index, or its name in other letters if only one matches."""

import re

import pytest

from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.plan.choice import choose_channels
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

NAMES = ["DNA", "Actin", "actin", "Lamin"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Location:
    folder = tmp_path_factory.mktemp("channels")
    data = blobs((4, 16, 16, 16))
    return Location.of(write_image(folder / "image.zarr", data, axes="czyx", channels=NAMES))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("dna", [0]), ("DNA", [0]), ("lamin,dna", [3, 0]), ("actin", [2]), ("Actin", [1])],
)
def test_capitals_matter_only_where_two_channels_differ_by_them(wanted, found, source):
    assert choose_channels(read_image(source), wanted, source) == found


def test_a_name_that_two_channels_match_is_refused_with_both(source):
    match = re.escape("choose one with --channel index:1 (Actin) or index:2 (actin)")
    with pytest.raises(SettingsError, match=match):
        choose_channels(read_image(source), "ACTIN", source)
