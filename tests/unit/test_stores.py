"""Locations: addresses, small objects, and errors that name the object and the cause."""

import pickle
from pathlib import Path

import pytest
import zarr

from megaseg_dask.errors import SettingsError, StoreError, TargetError
from megaseg_dask.stores import Location, cached_array

ODD_NAMES = ["plain.zarr", "with space.zarr", "a#b%20ü.zarr", "x?y&z=1", "[q]", "semi;colon", "日本.ome.zarr"]


def unreadable(path: Path) -> Path:
    """Make an object whose reading fails even for root: a link to itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    return path


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_folder_name_keeps_objects_and_arrays(tmp_path, name):
    location = Location.of(tmp_path / name)
    location.put("plan/0.json", b"{}")
    assert (tmp_path / name / "plan/0.json").read_bytes() == b"{}"
    assert location.get("plan/0.json") == b"{}"
    assert location.size("plan/0.json") == 2
    assert location.keys("plan") == ["plan/0.json"]
    location.write_group("0.5", {"answer": 42})
    assert location.open_group().attrs["answer"] == 42


def test_what_is_not_there_reads_as_nothing_and_is_not_made(tmp_path):
    location = Location.of(tmp_path / "absent")
    assert not location.exists()
    assert (location.get("a"), location.size("a"), location.keys("")) == (None, None, [])
    location.remove()
    assert not (tmp_path / "absent").exists()
    here = Location.of(tmp_path)
    assert (here.get("a/b"), here.size("a/b"), here.keys("a")) == (None, None, [])


@pytest.mark.parametrize("address", ["relative.zarr", "./relative.zarr/", "sub/../relative.zarr"])
def test_addresses_become_absolute(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    location = Location.of(address)
    assert location.path.is_absolute()
    assert location.is_same(Location.of(tmp_path / "relative.zarr"))
    assert location.is_inside(Location.of(tmp_path))
    assert not Location.of(tmp_path).is_inside(location)
    assert not Location.of(tmp_path / "relative.zarr.run").is_inside(location)


def test_file_urls_and_links_are_the_folder_itself(tmp_path):
    (tmp_path / "image.zarr").mkdir()
    (tmp_path / "link").symlink_to("image.zarr")
    image = Location.of(f"file://{tmp_path}/image.zarr")
    assert image == Location.of(tmp_path / "image.zarr")
    assert image.is_same(Location.of(tmp_path / "link"))
    assert (image / "labels").is_inside(Location.of(tmp_path / "link"))


@pytest.mark.parametrize(
    ("address", "name"),
    [("a/b.zarr", "b"), ("b.ome.zarr", "b"), ("exp 1.2_A.ome.zarr", "exp 1.2_A"), ("v1.5", "v1.5"), (".zarr", ".zarr")],
)
def test_name_is_without_the_ending(address, name):
    assert Location.of(address).name == name


@pytest.mark.parametrize("address", ["", "s3://bucket/image.zarr", "ftp://x/y"])
def test_addresses_that_cannot_be_opened_are_refused(address):
    with pytest.raises(SettingsError):
        Location.of(address)


def test_location_travels_and_sibling_stands_beside(tmp_path):
    location = Location.of(f"{tmp_path}/a.zarr/")
    assert pickle.loads(pickle.dumps(location)) == location
    assert location.sibling(".run").path == tmp_path / "a.zarr.run"


@pytest.mark.parametrize(
    "access",
    [
        lambda location: location.get("zarr.json"),
        lambda location: location.open_array(),
        lambda location: location.write_group("0.5", {"a": 1}),
    ],
)
def test_errors_name_the_object_and_the_cause_in_one_line(tmp_path, access):
    unreadable(tmp_path / "zarr.json")
    with pytest.raises(StoreError) as caught:
        access(Location.of(tmp_path))
    message = str(caught.value)
    assert f"{tmp_path}" in message
    assert "symbolic link" in message
    assert "\n" not in message


def test_a_file_in_the_way_of_a_write_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for write in (lambda: Location.of(tmp_path).put("file/plan.json", b"1"),
                  lambda: Location.of(tmp_path / "file").put("plan.json", b"1"),
                  lambda: Location.of(tmp_path / "file/group").write_group("0.5", {})):  # fmt: skip
        with pytest.raises(StoreError, match="file"):
            write()


def test_an_absent_array_is_not_a_store_that_failed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Location.of(tmp_path / "absent").open_array()
    assert not isinstance(caught.value, StoreError)


# -- groups


@pytest.mark.parametrize(("version", "zarr_format"), [("0.4", 2), ("0.5", 3)])
def test_group_is_created_once_and_then_kept(tmp_path, version, zarr_format):
    location = Location.of(tmp_path / "image.zarr")
    location.write_group(version, {"kept": 1, "ome": {"a": 1}})
    location.write_group(version, {"ome": {"b": 2}})
    group = zarr.open_group(location.url, mode="r")
    assert group.metadata.zarr_format == zarr_format
    assert group.attrs.asdict() == {"kept": 1, "ome": {"b": 2}}
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in location.path.iterdir()}
    location.write_group(version, {})
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in location.path.iterdir()}


@pytest.mark.parametrize(("there", "wanted"), [("0.4", "0.5"), ("0.5", "0.4")])
def test_a_group_never_gets_two_formats(tmp_path, there, wanted):
    location = Location.of(tmp_path)
    location.write_group(there, {})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TargetError, match=f"OME-Zarr {wanted}"):
        location.write_group(wanted, {})
    assert sorted(tmp_path.iterdir()) == before


def test_stale_consolidated_metadata_are_not_believed(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    group.attrs["multiscales"] = "old"
    zarr.consolidate_metadata(tmp_path, zarr_format=2)
    zarr.open_group(tmp_path, use_consolidated=False).attrs["multiscales"] = "new"
    _, ome = Location.of(tmp_path).ome_attributes()
    assert ome["multiscales"] == "new"


@pytest.mark.parametrize("ome", ["text", 3, None, ["list"]])
def test_foreign_ome_attributes_of_another_type(tmp_path, ome):
    Location.of(tmp_path).write_group("0.5", {"ome": ome})
    assert Location.of(tmp_path).ome_attributes() == ({"ome": ome}, {})


def test_arrays_are_opened_once_per_process(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(4,), dtype="u1")
    cached_array.cache_clear()
    location = Location.of(tmp_path / "a")
    assert cached_array(location) is cached_array(Location.of(f"{tmp_path}/a/"))
    assert cached_array(location) is not cached_array(location, writable=True)


# -- writable or not


def test_probing_leaves_nothing_behind(tmp_path):
    Location.of(tmp_path / "new/deeper/target.zarr").require_writable()
    (tmp_path / "there.zarr").mkdir()
    Location.of(tmp_path / "there.zarr").require_writable()
    assert [p.name for p in tmp_path.rglob("*")] == ["there.zarr"]


def test_unwritable_targets_say_why(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="Not a directory"):
        Location.of(tmp_path / "file/target.zarr").require_writable()
    with pytest.raises(TargetError, match="File name too long"):
        Location.of(tmp_path / ("x" * 250)).require_writable()


@pytest.mark.parametrize("inside", [True, False])
def test_target_and_the_folder_beside_it_are_both_probed(tmp_path, monkeypatch, inside):
    target = tmp_path / "target.zarr"
    target.mkdir()
    refused = target if inside else tmp_path
    touch = Path.touch

    # Tests may run as root, whom no permission stops.
    def guarded(self, *args, **kwargs):
        if self.parent == refused:
            raise PermissionError(13, "Permission denied")
        touch(self, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", guarded)
    with pytest.raises(TargetError, match=f"Permission denied in {refused};"):
        Location.of(target).require_writable()
