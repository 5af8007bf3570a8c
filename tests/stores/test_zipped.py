"""Images in zip files: what they read as, how often they ask, and what is refused."""

import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tornado.web
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask import open_image
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import DataError, SourceError, TargetError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.stores import Location
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import range_server, web_server

SHAPE = (9, 20, 17)
SHARDED = {"chunks": (2, 5, 4), "shards": (4, 10, 12)}
PART = Box((5, 3, 2), (6, 4, 9))
METHODS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}


def pack(folder: Path, path: Path, *, method: int = zipfile.ZIP_STORED, top: str = "") -> Path:
    """Pack an image as users do, with Python's own module."""
    with zipfile.ZipFile(path, "w", method) as archive:
        if top:
            archive.mkdir(top)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{top}{file.relative_to(folder)}")
    return path


@pytest.fixture
def folder(tmp_path):
    data = blobs(SHAPE)
    return write_image(tmp_path / "cells.ome.zarr", data, data[::2, ::2, ::2], **SHARDED)


@pytest.fixture
def packed(folder, tmp_path):
    return pack(folder, tmp_path / "cells.ozx")


@pytest.mark.parametrize("options", [SHARDED, {"version": "0.4"}], ids=["0.5 sharded", "0.4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top", ["", "cells.ome.zarr/"])
@pytest.mark.parametrize("place", ["disk", "web"])
def test_a_zip_reads_as_its_folder(options, method, top, place, tmp_path):
    data = blobs(SHAPE)
    here = write_image(tmp_path / "cells.ome.zarr", data, data[::2, ::2, ::2], **options)
    path = pack(here, tmp_path / "cells.ome.zarr.zip", method=METHODS[method], top=top)
    expected = read_image(Location.of(here))
    with range_server(tmp_path) as url:
        there = Location.of(path) if place == "disk" else Location.of(url) / path.name
        image = read_image(there)
        assert image == expected
        assert digest_of(there, image) == digest_of(Location.of(here), expected)
        volume = Volume(there / "0", image.axis_names, needs_chunks=True)
        for box in (Box.of(SHAPE), PART):
            assert_array_equal(volume.read(box), data[box.slices])
        assert (there / "0").keys("") == (Location.of(here) / "0").keys("")
        assert there.children() == Location.of(here).children()
        assert there.name == "cells"
        assert_array_equal(open_image(there.url)["0"].ds["image"].to_numpy(), data)


def test_a_zip_that_zarr_wrote(tmp_path):
    # Changed metadata are appended under their name: the last counts.
    data = blobs(SHAPE)
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0] * 3}]
    entry = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    with warnings.catch_warnings(), zarr.storage.ZipStore(tmp_path / "a.ozx", mode="w") as store:
        warnings.simplefilter("ignore", UserWarning)
        group = zarr.open_group(store, mode="w")
        group.create_array("0", data=data, chunks=(4, 8, 8))
        group.attrs["ome"] = {"version": "0.5", "multiscales": []}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [entry]}
    with zipfile.ZipFile(tmp_path / "a.ozx") as archive:
        assert archive.namelist().count("zarr.json") > 1
    location = Location.of(tmp_path / "a.ozx")
    image = read_image(location)
    assert_array_equal(Volume.of(location, image).read(Box.of(SHAPE)), data)


@pytest.fixture
def requests():
    return []


@pytest.fixture
def counting(requests, tmp_path):
    """A server that notes what it is asked."""

    class Counted(tornado.web.StaticFileHandler):
        def prepare(self):
            requests.append((self.request.method, self.request.headers.get("Range")))

    with web_server([(r"/(.*)", Counted, {"path": str(tmp_path)})]) as url:
        yield Location.of(url)


def test_the_directory_is_read_once_and_each_chunk_by_one_request(requests, counting, tmp_path):
    data = blobs((24, 64, 64))
    folder = write_image(tmp_path / "cells.zarr", data, chunks=(8, 32, 32))
    location = counting / pack(folder, tmp_path / "cells.ozx").name
    image = read_image(location)
    # Whether the file is there, its directory, the group and its array.
    assert len(requests) == 4
    volume = Volume.of(location, image)
    assert_array_equal(volume.read(Box.of(data.shape)), data)
    # The array as zarr opens it, and 3 × 2 × 2 chunks.
    assert len(requests) == 4 + 1 + 12
    assert_array_equal(volume.read(Box.of(data.shape)), data)
    assert len(requests) == 4 + 1 + 2 * 12
    assert [method for method, _ in requests if method != "GET"] == ["HEAD"]


def test_a_part_of_a_shard_costs_one_request_more_than_of_a_folder(
    requests, counting, folder, packed
):
    numbers = []
    for location in (counting / folder.name, counting / packed.name):
        volume = Volume.of(location, read_image(location))
        volume.read(Box((8, 0, 0), (9, 1, 1)))
        requests.clear()
        volume.read(PART)
        numbers.append(len(requests))
    # PART lies in one shard: where in the file it begins is asked once.
    assert numbers == [4, 5]


@pytest.mark.parametrize("top", ["", "cells.ome.zarr/"])
def test_a_run_writes_what_it_writes_of_the_folder(top, tmp_path, tiny_bundle, cheap_engine):
    folder = write_image(tmp_path / "image.zarr", blobs((24, 64, 96)))
    packed = pack(folder, tmp_path / "cells.ozx", method=zipfile.ZIP_DEFLATED, top=top)
    options = {"model": str(tiny_bundle), "threads": 1, "block": "24,32,48", "where": "data"}
    settings = parse_settings(options)
    targets = [tmp_path / "of-folder.zarr", tmp_path / "of-zip.zarr"]
    for source, target in zip((folder, packed), targets, strict=True):
        assert segment_here(str(source), str(target), settings).status == "done"
    assert contents(targets[0] / "0") == contents(targets[1] / "0")
    assert contents(targets[0] / "labels/megaseg/0") == contents(targets[1] / "labels/megaseg/0")
    assert segment_here(str(packed), str(targets[1]), settings).already_done


def test_a_zip_that_changed_is_another_source(folder, packed, tmp_path):
    location = Location.of(packed)
    volume = Volume.of(location, read_image(location))
    before = sample_of(location / "0")
    volume.read(PART)
    # One voxel, anywhere.
    zarr.open_array(folder / "0", mode="r+")[8, 19, 16] += 1
    pack(folder, packed)
    with pytest.raises(DataError, match="changed while it was read"):
        volume.read(PART)
    read_image(location)
    assert sample_of(location / "0") != before
    assert_array_equal(volume.read(PART), blobs(SHAPE)[PART.slices])


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, 0.999])
def test_a_truncated_zip_is_one_line(kept, packed):
    data = packed.read_bytes()
    packed.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(SourceError, match=r"is not a whole zip file .*; copy or pack it again$"):
        read_image(Location.of(packed))


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_entry_is_named(method, folder, tmp_path):
    path = pack(folder, tmp_path / "cells.ozx", method=METHODS[method])
    location = Location.of(path)
    image = read_image(location)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("0/c/0/0/0")
    with path.open("r+b") as file:
        file.seek(entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2)
        file.write(b"damage!!")
    read_image(location)
    with pytest.raises(DataError, match="0/c/0/0/0"):
        Volume.of(location, image).read(Box.of(SHAPE))


def _with_link(archive):
    link = zipfile.ZipInfo("0/c/9")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "/etc/passwd")


UNSAFE = {
    "points outside its folder": lambda archive: archive.writestr("../evil", b"x"),
    "points outside": lambda archive: archive.writestr("/evil", b"x"),
    "neither a file nor a folder": _with_link,
    "is there twice, in capitals and not": lambda archive: archive.writestr("ZARR.json", b"x"),
    "compressed by method 12": lambda archive: archive.writestr("0/a", b"x", zipfile.ZIP_BZIP2),
    "grows from": lambda archive: archive.writestr("0/b", bytes(101 * 2**20), zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("problem", UNSAFE)
def test_an_unsafe_zip_is_refused(problem, packed):
    with zipfile.ZipFile(packed, "a") as archive:
        UNSAFE[problem](archive)
    with pytest.raises(SourceError, match=f"{problem}.*, so it was not read"):
        read_image(Location.of(packed))


def test_an_encrypted_zip_is_refused(packed):
    data = bytearray(packed.read_bytes())
    start = data.index(b"PK\1\2")
    data[start + 8] |= 1
    packed.write_bytes(data)
    with pytest.raises(SourceError, match="is encrypted"):
        read_image(Location.of(packed))


def test_a_zip_is_never_written(packed, tmp_path, tiny_bundle):
    settings = parse_settings({"model": str(tiny_bundle)})
    before = packed.read_bytes()
    for target in (packed, packed / "out"):
        with pytest.raises(TargetError, match=r"which is only read; choose a folder as TARGET"):
            segment_here(str(packed), str(target), settings)
    assert packed.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.ome.zarr", "cells.ozx"]


def test_a_folder_may_have_the_name_of_a_zip(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cells.zarr.zip")
    assert read_image(Location.of(tmp_path / "cells.zarr.zip")).levels[0].shape == SHAPE


def test_a_zip_without_an_image_says_what_it_has(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ozx", "w") as archive:
        archive.writestr("notes.txt", "mine")
    with pytest.raises(SourceError, match=r"is a folder with notes.txt, not an OME-Zarr image"):
        read_image(Location.of(tmp_path / "a.ozx"))


def test_entries_of_many_bytes_before_the_directory(tmp_path):
    # The directory is longer than what is read of a file's end at first.
    data = np.arange(24**3, dtype="uint16").reshape(24, 24, 24)
    folder = write_image(tmp_path / "a.zarr", data, chunks=(2, 2, 2))
    path = pack(folder, tmp_path / "a.ozx", top=f"{'a' * 200}/")
    location = Location.of(path)
    assert_array_equal(Volume.of(location, read_image(location)).read(Box.of(data.shape)), data)


def test_a_zip_in_a_bucket(s3, bucket_folder, packed):
    assert Location.of(bucket_folder).create("cells.ozx", packed.read_bytes())
    location = Location.of(bucket_folder) / "cells.ozx"
    image = read_image(location)
    assert image == read_image(Location.of(packed))
    assert sample_of(location / "0") == sample_of(Location.of(packed) / "0")
    data = blobs(SHAPE)
    for box in (Box.of(SHAPE), PART):
        assert_array_equal(Volume.of(location, image).read(box), data[box.slices])
    with pytest.raises(SourceError, match=r"does not exist; check the address"):
        read_image(Location.of(bucket_folder) / "gone.ozx")
