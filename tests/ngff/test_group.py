"""Metadata of a group that a power cut has torn are told from what others wrote."""

import pytest

from megaseg_dask.ngff.group import is_damaged, write_group
from megaseg_dask.stores import Location


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_group_that_was_written_whole_is_not_damaged(version, tmp_path):
    location = Location.of(tmp_path / "group")
    assert not is_damaged(location, location.children())
    write_group(location, version, {"name": "a"})
    assert not is_damaged(location, location.children())


@pytest.mark.parametrize("key", ["zarr.json", ".zgroup", ".zattrs"])
@pytest.mark.parametrize("left", [b"", b'{"zarr_fo', b"\0" * 40, b"[1]"])
def test_a_group_of_which_a_file_is_torn_is_damaged(key, left, tmp_path):
    location = Location.of(tmp_path / "group")
    write_group(location, "0.5" if key == "zarr.json" else "0.4", {"name": "a"})
    (tmp_path / "group" / key).write_bytes(left)
    assert is_damaged(location, location.children())
