"""Images on real web servers.

Read by name, in parts where the server can, and errors that say what is wrong.
"""

import socket
import time

import pytest
import tornado.web
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import SettingsError, SourceError, StoreError, TargetError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.run.request import plan_runs
from megaseg_dask.stores import Location, StoreOptions, clear_array_cache, configure
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import free_port, plain_server, range_server, web_server

SHAPE = (9, 20, 17)
SHARDED = {"chunks": (2, 5, 4), "shards": (4, 10, 12)}
PART = Box((5, 3, 2), (6, 4, 9))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def server(folder):
    with range_server(folder) as url:
        yield url


@pytest.fixture
def plain(folder):
    with plain_server(folder) as url:
        yield url


@pytest.mark.parametrize("name", ["cells.zarr", "deep/with space#1 ü.zarr", "a+b&c=d%.zarr"])
@pytest.mark.parametrize("options", [SHARDED, {"version": "0.4"}], ids=["0.5 sharded", "0.4"])
def test_an_image_reads_as_it_does_from_a_disk(folder, server, name, options):
    data = blobs(SHAPE)
    here = Location.of(write_image(folder / name, data, blobs((5, 10, 9)), **options))
    there = Location.of(server) / name
    assert Location.of(there.url) == there
    assert (there.exists(), there.is_folder(), there.name) == (True, True, here.name)
    image = read_image(there)
    assert image == read_image(here)
    assert digest_of(there, image) == digest_of(here, image)
    assert sample_of(there / "0") == sample_of(here / "0")
    volume = Volume(there / "0", image.axis_names)
    for box in (Box.of(SHAPE), PART):
        assert_array_equal(volume.read(box), data[box.slices])


@pytest.mark.parametrize(
    ("typed", "one"),
    [
        ("HTTPS://Example.ORG:443/a//b/./c.zarr/", "https://example.org/a/b/c.zarr"),
        ("http://example.org:8080/with space", "http://example.org:8080/with%20space"),
        ("http://example.org/with%20space", "http://example.org/with%20space"),
        ("http://[::1]:80/x", "http://[::1]/x"),
        ("https://example.org", "https://example.org"),
    ],
)
def test_one_place_has_one_address(typed, one):
    assert Location.of(typed).url == one


def test_a_server_without_parts_of_files_serves_whole_chunks(folder, plain):
    data = blobs(SHAPE)
    here = Location.of(write_image(folder / "cells.zarr", data, version="0.4", chunks=(4, 7, 5)))
    there = Location.of(plain) / "cells.zarr"
    assert read_image(there) == read_image(here)
    assert sample_of(there / "0") == sample_of(here / "0")
    assert_array_equal(Volume(there / "0", ("z", "y", "x")).read(PART), data[PART.slices])


def test_a_server_without_parts_of_files_cannot_serve_parts_of_shards(folder, plain):
    write_image(folder / "cells.zarr", blobs(SHAPE), **SHARDED)
    location = Location.of(plain) / "cells.zarr"
    volume = Volume(location / "0", read_image(location).axis_names)
    with pytest.raises(StoreError) as caught:
        volume.read(PART)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "the server does not answer requests for a part of an object; sharded arrays need such "
        "requests" in message
    )


def test_nothing_there_is_told(folder, server, plain):
    for url in (server, plain):
        with pytest.raises(SourceError, match=r"absent\.zarr does not exist; check the address"):
            read_image(Location.of(url) / "absent.zarr")


def test_what_is_no_image_is_named(folder, server):
    (folder / "cells.tif").write_bytes(b"II*\0rest")
    (folder / "broken.zarr").mkdir()
    (folder / "broken.zarr/zarr.json").write_text("{")
    write_image(folder / "cells.zarr", blobs(SHAPE))
    for name, found in (
        ("cells.tif", "is a TIFF file"),
        ("broken.zarr", "a Zarr group whose metadata cannot be read"),
        ("cells.zarr/0", "is a single Zarr array .*perhaps http://127.0.0.1:[0-9]+/cells.zarr"),
    ):
        with pytest.raises(SourceError, match=found):
            read_image(Location.of(server) / name)


def test_nothing_is_written_or_listed(folder, server):
    location = Location.of(server) / "cells.zarr"
    for write in (
        lambda: location.put("a", b""),
        lambda: location.create("a", b""),
        lambda: location.delete("a"),
        location.remove,
    ):
        with pytest.raises(StoreError, match="can only be read; write to a folder, s3://"):
            write()
    with pytest.raises(TargetError, match="can only be read"):
        location.require_writable()
    for list_ in (location.children, lambda: location.keys("")):
        with pytest.raises(StoreError, match="does not list its"):
            list_()
    assert list(folder.iterdir()) == []


def test_data_that_vanish_are_no_background(folder, server):
    path = write_image(folder / "cells.zarr", blobs(SHAPE))
    volume = Volume(Location.of(server) / "cells.zarr/0", ("z", "y", "x"))
    assert volume.read(PART).any()
    path.rename(folder / "moved.zarr")
    with pytest.raises(StoreError, match="the array, its bucket or its disk is missing now"):
        volume.read(PART)
    clear_array_cache()
    with pytest.raises(StoreError, match="the array, its bucket or its disk is missing now"):
        volume.read(PART)


class _Refuse(tornado.web.RequestHandler):
    def get(self, *_):
        self.set_status(int(self.request.path.split("/")[1]))

    head = get


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, SourceError, "access denied .*; data behind a web login cannot be read"),
        (403, SourceError, "access denied"),
        (429, StoreError, "too busy"),
        (500, StoreError, "500 Internal Server Error"),
    ],
)
def test_answers_of_a_server_that_does_not_serve(status, kind, words):
    configure(StoreOptions(options=(("max_retries", "1"), ("retry_timeout", "1"))))
    with web_server([(r"/.*", _Refuse)]) as url, pytest.raises(kind, match=words) as caught:
        read_image(Location.of(url) / str(status) / "cells.zarr")
    assert "\n" not in str(caught.value)


def test_nobody_there_and_nobody_answering():
    port = free_port()
    with pytest.raises(
        StoreError, match=f"connection refused .127.0.0.1:{port}.; check that the store is running"
    ):
        read_image(Location.of(f"http://127.0.0.1:{port}/cells.zarr"))
    configure(StoreOptions(options=(("timeout", "1"), ("read_timeout", "1"))))
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        with pytest.raises(StoreError, match="no answer in time"):
            read_image(Location.of(f"http://127.0.0.1:{deaf.getsockname()[1]}/cells.zarr"))
        assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "address",
    [
        "https://user:pass-word@h/cells.zarr",
        "https://h/cells.zarr?sig=pass-word",
        "https://h/a?X-Amz-Signature=pass-word",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(address):
    with pytest.raises(SettingsError, match="do not put credentials in a URL") as caught:
        Location.of(address)
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["https://h/a?b=1", "https://h/a#b", "https://", "http:///a", "https://h/a/../b"]
)
def test_addresses_that_are_no_folder_are_refused(address):
    with pytest.raises(SettingsError):
        Location.of(address)


def test_nothing_is_written_to_a_web_server(server, folder, tmp_path):
    write_image(folder / "cells.zarr", blobs(SHAPE))
    for target in (f"{server}/out.zarr", f"{server}/cells.zarr"):
        with pytest.raises(SettingsError, match="a web server cannot be written to"):
            plan_runs(
                f"{server}/cells.zarr",
                target,
                parse_settings({"model": "starter", "outputs": "labels"}),
            )
