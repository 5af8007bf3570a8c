"""A channel is found by its name, its index, or its name in other letters if only one matches."""

import re

import pytest

from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.image import Axis, Image, Level, read_image
from megaseg_dask.plan.choice import choose_channels
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

WHERE = Location("/cells.zarr")
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


def channels_of(names, wanted):
    axes = tuple(map(Axis, "czyx"))
    level = Level("0", (len(names), 16, 32, 32), (1.0,) * 4, ())
    image = Image("0.5", "", axes, (level,), "uint16", channel_names=tuple(names))
    return choose_channels(image, wanted, WHERE)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("DNA", [0]),
        (" DNA ", [0]),
        ("DNA, Actin", [0, 1]),
        (" 1 , 0 ", [1, 0]),
        ("index:1", [1]),
        ("index: 1", [1]),
        ("padded", [2]),
        (" padded ", [2]),
        ("a, b", [3]),
    ],
)
def test_spaces_around_a_name_mean_nothing(wanted, expected):
    assert channels_of(["DNA", "Actin", " padded ", "a, b"], wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("DNA,", "a name is missing before or after a comma; .* has 0 .DNA., 1 .Actin."),
        (",", "a name is missing"),
        (" ", "a name is missing"),
        ("index:x", "expected index:N, with N from 0 to 1"),
        ("index:", "expected index:N, with N from 0 to 1"),
        ("index:2", "expected index:N, with N from 0 to 1"),
        ("ACTNI", "did you mean Actin"),
        ("2", "0 .DNA., 1 .Actin.$"),
        ("DNA,index:0", "is given twice"),
    ],
)
def test_what_means_no_channel_is_told_with_the_choices(wanted, reason):
    with pytest.raises(SettingsError, match=reason):
        channels_of(["DNA", "Actin"], wanted)
