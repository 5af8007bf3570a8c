"""A source is known by its data, wherever it is."""

from megaseg_dask.ngff.image import read_image
from megaseg_dask.plan.source_identity import digest_of
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image


def digest_at(path) -> str:
    location = Location.of(path)
    return digest_of(location, read_image(location))


def test_digest_is_of_the_data_not_of_the_address(tmp_path):
    image = write_image(tmp_path / "a", blobs((9, 20, 17)))
    same = write_image(tmp_path / "b", blobs((9, 20, 17)))
    longer = write_image(tmp_path / "c", blobs((9, 20, 18)))
    assert digest_at(same) == digest_at(image) != digest_at(longer)


def test_a_digest_is_also_of_the_metadata(tmp_path):
    image = write_image(tmp_path / "a", blobs((9, 20, 17)), scale={"z": 0.5})
    other = write_image(tmp_path / "b", blobs((9, 20, 17)), scale={"z": 0.6})
    assert digest_at(image) != digest_at(other)
