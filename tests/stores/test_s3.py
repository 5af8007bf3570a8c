"""A real S3 server.

Small objects, arrays, who may do what, and a server that dies, hangs or loses a bucket.
"""

import multiprocessing
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

import megaseg_dask
from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.errors import (
    DataError,
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.ngff.group import open_group, read_attributes, require_version, write_group
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.plan.source_identity import digest_of, sample_of
from megaseg_dask.stores import (
    Location,
    StoreOptions,
    cached_array,
    clear_array_cache,
    clear_store_caches,
    configure,
    open_array,
    zarr_store,
)
from megaseg_dask.stores.access import process_options
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import KEY, READER_KEY, READER_SECRET, SECRET, free_port

SHAPE = (9, 20, 17)
ODD_NAMES = [
    "plain.zarr",
    "with space.zarr",
    "a#b%20ü.zarr",
    "x?y&z=1",
    "[q]",
    "semi;colon",
    "日本.ome.zarr",
]
SECRETS = (SECRET, READER_SECRET, "wrong-secret")

# Seconds instead of minutes.
HASTY = (("read_timeout", "1"), ("timeout", "1"), ("max_retries", "0"))


def one_line(caught: pytest.ExceptionInfo[MegasegError], *parts: str) -> str:
    """Check that a message is one line with everything in it that helps.

    Also nothing that must stay secret.
    """
    message = str(caught.value)
    assert "\n" not in message
    assert "Debug" not in message
    assert len(message) < 300
    assert not [secret for secret in SECRETS if secret in message]
    for part in parts:
        assert part in message
    return message


# -- small objects


@pytest.mark.parametrize("name", ODD_NAMES)
def test_objects_by_any_name(s3, folder, name):
    location = Location.of(f"{folder}/{name}")
    assert not location.exists()
    assert location.children() == location.keys("") == []
    location.put("plan/0.json", b"{}")
    location.put("plan.json", b"[1]")
    location.put("empty", b"")
    assert location.exists()
    assert location.is_folder()
    assert (location.get("plan/0.json"), location.size("plan.json"), location.get("absent")) == (
        b"{}",
        3,
        None,
    )
    assert (location.head("plan.json", 2), location.head("plan.json", 99)) == (b"[1", b"[1]")
    assert (location.head("empty", 9), location.head("absent", 9)) == (b"", None)
    assert location.keys("") == ["empty", "plan.json", "plan/0.json"]
    assert location.keys("plan") == ["plan/0.json"]
    assert location.children() == ["empty", "plan", "plan.json"]
    assert not (location / "plan.json").is_folder()
    assert (location / "plan.json").exists()
    key = f"{folder.removeprefix('s3://private/')}/{name}/plan/0.json"
    assert s3.client().get_object(Bucket="private", Key=key)["Body"].read() == b"{}"
    location.put("plan/0.json", b"new")
    assert location.get("plan/0.json") == b"new"
    location.delete("plan.json")
    location.delete("plan.json")
    assert location.keys("") == ["empty", "plan/0.json"]
    location.remove()
    location.remove()
    assert not location.exists()


def test_a_neighbour_with_the_same_beginning_is_another_folder(s3, folder):
    image, run = Location.of(f"{folder}/image"), Location.of(f"{folder}/image.run")
    run.put("plan.json", b"1")
    assert not image.exists()
    image.put("zarr.json", b"{}")
    assert Location.of(folder).children() == ["image", "image.run"]
    image.remove()
    assert run.keys("") == ["plan.json"]


def test_thousands_of_objects_are_listed_and_removed(s3, folder):
    location = Location.of(folder)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: location.put(f"c/{i % 7}/{i}", b"x"), range(2500)))
    assert len(location.keys("")) == 2500
    assert (location / "c").children() == list("0123456")
    location.remove()
    assert location.keys("") == []


def test_an_object_of_many_parts_is_whole(s3, folder):
    location, data = Location.of(folder), np.random.default_rng(0).bytes(17_000_000)
    location.put("big", data)
    assert location.get("big") == data
    assert location.head("big", 9) == data[:9]
    assert location.create("other", data)
    assert not location.create("other", b"")
    assert location.size("other") == len(data)
    one_chunk = {"shape": (len(data),), "chunks": (len(data),), "compressors": None}
    zarr.create_array(zarr_store(location / "0", read_only=False), dtype="u1", **one_chunk)[...] = (
        np.frombuffer(data, "u1")
    )
    assert cached_array(location / "0")[...].tobytes() == data


def test_of_eight_that_create_one_succeeds(s3, folder):
    location, keys, start = (
        Location.of(folder),
        [f"lease-{i}" for i in range(6)],
        threading.Barrier(48),
    )

    def create(number: int) -> tuple[str, bool]:
        start.wait()
        return keys[number % 6], location.create(keys[number % 6], str(number).encode())

    with ThreadPoolExecutor(48) as pool:
        outcomes = list(pool.map(create, range(48)))
    for key in keys:
        won = [number for number, outcome in enumerate(outcomes) if outcome == (key, True)]
        assert len(won) == 1
        assert location.get(key) == str(won[0]).encode()


def test_probing_a_target_leaves_nothing(s3, folder):
    Location.of(f"{folder}/deep/target.zarr").require_writable()
    assert Location.of(folder).keys("") == []
    with pytest.raises(TargetError, match="a whole bucket; give a folder in it"):
        Location.of("s3://private").require_writable()


# -- arrays and images


STORED = {
    "v3": {},
    "v3 sharded": {"chunks": (2, 5, 4), "shards": (4, 10, 12)},
    "v2": {"version": "0.4"},
    "v2 dots": {"version": "0.4", "chunk_key_encoding": {"name": "v2", "separator": "."}},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_an_image_reads_as_it_does_from_a_disk(s3, folder, stored, tmp_path):
    data = blobs(SHAPE)
    path = write_image(
        tmp_path / "image.zarr", data, blobs((5, 10, 9)), **{"chunks": (4, 7, 5), **stored}
    )
    here, there = (
        Location.of(path),
        Location.of(s3.upload(path, "private", folder.removeprefix("s3://private/"))),
    )
    image = read_image(there)
    assert image == read_image(here)
    assert digest_of(there, image) == digest_of(here, image)
    assert sample_of(there / "0") == sample_of(here / "0")
    volume = Volume(there / "0", image.axis_names)
    for box in (Box.of(SHAPE), Box((5, 3, 2), (6, 4, 9))):
        assert_array_equal(volume.read(box), data[box.slices])


@pytest.mark.parametrize(
    ("version", "block"), [("0.4", (4, 8, 8)), ("0.5", (4, 8, 8)), ("0.5", (128, 256, 256))]
)
def test_arrays_are_written_and_read_back(s3, folder, version, block, tmp_path):
    image = read_image(Location.of(write_image(tmp_path / "source", blobs(SHAPE), version=version)))
    location, data = Location.of(f"{folder}/out.zarr"), blobs(SHAPE, dtype="uint32")
    write_group(location, version, {"answer": 42})
    layout = write_layout(SHAPE, block, sharded=version == "0.5")
    for _ in range(2):
        # The second time over what is there.
        create_array(location / "0", image, 0, "uint32", layout)
        clear_store_caches()
        volume = Volume(location / "0", image.axis_names)
        assert not volume.read(Box.of(SHAPE)).any()
        for box in BlockGrid(SHAPE, block):
            volume.write(box, data[box.slices])
        assert_array_equal(volume.read(Box.of(SHAPE)), data)
    assert open_group(location).attrs["answer"] == 42
    assert location.children() == sorted(
        ["0", *([".zattrs", ".zgroup"] if version == "0.4" else ["zarr.json"])]
    )
    write_group(location, version, {"other": 1})
    assert read_attributes(location) == {"answer": 42, "other": 1}
    with pytest.raises(TargetError, match="or the other version"):
        require_version(location, "0.5" if version == "0.4" else "0.4")


def test_a_corrupt_chunk_is_damaged_data_and_no_failing_store(s3, folder, tmp_path):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(4, 10, 12))
    location = Location.of(s3.upload(path, "private", folder.removeprefix("s3://private/")))
    (location / "0").put("c/1/0/1", b"garbage")
    with pytest.raises(DataError, match=f"chunk {location}/0/c/1/0/1 is corrupt"):
        Volume(location / "0", ("z", "y", "x")).read(Box.of(SHAPE))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda location: None, "does not exist; check the address"),
        (lambda location: location.put("notes.txt", b"x"), "is a folder with notes.txt"),
        (lambda location: location.parent.put(location.basename, b"II*\0"), "is a TIFF file"),
        (
            lambda location: location.put("zarr.json", b"{"),
            "a Zarr group whose metadata cannot be read",
        ),
        (lambda location: write_group(location, "0.5", {}), "is a Zarr group without multiscales"),
        (
            lambda location: zarr.create_array(
                zarr_store(location, read_only=False), shape=(4,), dtype="u1"
            ),
            "is a single Zarr array",
        ),
    ],
)
def test_what_is_no_image_is_named(s3, folder, make, found):
    location = Location.of(f"{folder}/cells.zarr")
    make(location)
    with pytest.raises(SourceError, match=found) as caught:
        read_image(location)
    one_line(caught, location.url)


# -- who may do what


def look(location: Location) -> object:
    return read_image(location)


def write(location: Location) -> None:
    location.put("plan.json", b"{}")


def probe(location: Location) -> None:
    location.require_writable()


REFUSED = {
    "wrong key, read": (
        ("nobody", SECRET),
        "private",
        look,
        SourceError,
        "is unknown to the store (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID",
    ),
    "wrong key, write": (
        ("nobody", SECRET),
        "private",
        write,
        StoreError,
        "is unknown to the store",
    ),
    "wrong key, probe": (
        ("nobody", SECRET),
        "private",
        probe,
        TargetError,
        "is unknown to the store",
    ),
    "wrong secret, read": (
        (KEY, "wrong-secret"),
        "private",
        look,
        SourceError,
        "the secret does not match the access key (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID",
    ),
    "wrong secret, write": (
        (KEY, "wrong-secret"),
        "private",
        write,
        StoreError,
        "the secret does not match",
    ),
    "wrong secret, probe": (
        (KEY, "wrong-secret"),
        "private",
        probe,
        TargetError,
        "the secret does not match",
    ),
    "reader, write": (
        (READER_KEY, READER_SECRET),
        "private",
        write,
        StoreError,
        "access denied (AccessDenied); check",
    ),
    "reader, probe": (
        (READER_KEY, READER_SECRET),
        "private",
        probe,
        TargetError,
        "access denied (AccessDenied); "
        "check whether AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may "
        "write it",
    ),
    "missing bucket, read": (
        (KEY, SECRET),
        "no-such-bucket",
        look,
        SourceError,
        "there is no such bucket (NoSuchBucket); check its name and --endpoint",
    ),
    "missing bucket, write": (
        (KEY, SECRET),
        "no-such-bucket",
        write,
        StoreError,
        "there is no such bucket",
    ),
    "missing bucket, probe": (
        (KEY, SECRET),
        "no-such-bucket",
        probe,
        TargetError,
        "there is no such bucket",
    ),
}


@pytest.mark.parametrize(("keys", "bucket", "act", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_who_is_refused_is_told_why_and_what_next(s3, monkeypatch, keys, bucket, act, kind, words):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        act(Location.of(f"s3://{bucket}/some/cells.zarr"))
    one_line(caught, f"s3://{bucket}/some/cells.zarr", words)
    assert time.monotonic() - started < 60


def test_a_reader_reads_and_array_writes_say_why_not(s3, folder, monkeypatch, tmp_path):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    location = Location.of(s3.upload(path, "private", folder.removeprefix("s3://private/")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    volume = Volume(location / "0", read_image(location).axis_names)
    assert volume.read(Box.of(SHAPE)).any()
    with pytest.raises(StoreError) as caught:
        volume.write(Box.of(SHAPE), blobs(SHAPE, seed=1))
    one_line(caught, f"cannot write {location}/0: access denied")
    with pytest.raises(StoreError) as caught:
        location.remove()
    one_line(caught, f"cannot remove {location}: access denied")


def test_a_public_bucket_is_read_without_credentials_and_nothing_else_is(
    s3_server, monkeypatch, tmp_path
):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(2, 5, 4), shards=(4, 10, 12))
    public = Location.of(s3_server.upload(path, "public", "cells.zarr"))
    private = Location.of(s3_server.upload(path, "private", "cells.zarr"))
    with pytest.raises(SettingsError) as caught:
        read_image(public)
    configure(StoreOptions.parse(s3_server.url, anon=True, source=public.url))
    image = read_image(public)
    assert_array_equal(Volume(public / "0", image.axis_names).read(Box.of(SHAPE)), blobs(SHAPE))
    with pytest.raises(SettingsError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        read_image(private)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert read_image(private) == image
    with pytest.raises(TargetError) as caught:
        (public / "out.zarr").require_writable()
    one_line(caught, "access denied", "remove --anon")
    configure(StoreOptions.parse(s3_server.url, anon=True, source=private.url))
    with pytest.raises(SourceError) as caught:
        read_image(private)
    one_line(
        caught,
        "access denied (AccessDenied); the data are not public: "
        "remove --anon, and set AWS_ACCESS_KEY_ID",
    )


def test_an_image_opened_without_credentials_leaves_later_calls_alone(
    s3_server, monkeypatch, tmp_path
):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    public = s3_server.upload(path, "public", "opened.zarr")
    private = s3_server.upload(path, "private", "opened.zarr")
    tree = megaseg_dask.open_image(public, anon=True, endpoint=s3_server.url)
    assert process_options() == StoreOptions()
    # Of this image alone, with the credentials and the endpoint of the process.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert read_image(Location.of(private)).axis_names == ("z", "y", "x")
    Location.of(public).put("written", b"1")
    configure(StoreOptions(endpoint="http://127.0.0.1:9", options=HASTY))
    assert_array_equal(tree["0"]["image"].values, blobs(SHAPE))


# -- options and processes


def _read_elsewhere(
    data: bytes, options: StoreOptions, results: "multiprocessing.Queue[object]"
) -> None:
    configure(options)
    location: Location = pickle.loads(data)
    results.put((location.get("a"), float(open_array(location / "0")[...].sum())))


def test_a_location_travels_and_carries_no_secret(s3, folder, monkeypatch):
    options = StoreOptions.parse(
        s3.url, storage_options=[f"secret_access_key={SECRET}", f"access_key_id={KEY}"]
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    configure(options)
    location = Location.of(folder)
    location.put("a", b"1")
    zarr.create_array(zarr_store(location / "0", read_only=False), shape=(4,), dtype="u1")[...] = 3
    data = pickle.dumps(location)
    assert SECRET.encode() not in data
    assert SECRET not in repr(options)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=_read_elsewhere, args=(data, options, results))
    process.start()
    assert results.get(timeout=200) == (b"1", 12.0)
    process.join(100)


def test_a_store_is_opened_once_per_process(s3, folder):
    location = Location.of(folder)
    zarr.create_array(zarr_store(location / "0", read_only=False), shape=(4,), dtype="u1")
    first = cached_array(location / "0")
    configure(StoreOptions())
    assert cached_array(location / "0") is first
    configure(StoreOptions(s3.url))
    assert cached_array(location / "0") is not first


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("colour=red", "colour"),
        ("read_timeout=soon", "soon"),
        ("max_retries=many", "many"),
        ("s3.colour=red", "colour"),
    ],
)
def test_options_that_no_store_knows_are_named(s3, option, words):
    configure(StoreOptions.parse(storage_options=[option]))
    with pytest.raises(SettingsError, match=words) as caught:
        Location.of("s3://private/a").exists()
    one_line(caught, "--storage-option")


def test_the_endpoint_of_the_command_line_wins(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    configure(StoreOptions.parse(s3.url))
    Location.of("s3://private/endpoint").put("a", b"1")


def test_options_of_another_scheme_are_left_alone(s3):
    configure(
        StoreOptions.parse(
            storage_options=["gs.token=anon", "az.account_name=x", "s3.region=eu-west-1"]
        )
    )
    Location.of("s3://private/schemes").put("a", b"1")


# -- servers that are not there, die or hang


def test_nobody_at_the_endpoint_is_told_at_once(s3, monkeypatch):
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for act in (look, probe):
        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            act(Location.of("s3://private/some/cells.zarr"))
        one_line(
            caught,
            "s3://private/some/cells.zarr",
            f"connection refused (127.0.0.1:{port}); check that the "
            "store is running, and --endpoint (or AWS_ENDPOINT_URL)",
        )
        assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [("http://no.such.host.invalid", "unknown host (no.such.host.invalid)"), ("https://", "https")],
)
def test_wrong_endpoints_are_named(s3, monkeypatch, endpoint, words):
    if endpoint == "https://":
        endpoint = s3.url.replace("http:", "https:")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(MegasegError) as caught:
        look(Location.of("s3://private/cells.zarr"))
    one_line(caught, "--endpoint", words)


@pytest.mark.slow
def test_a_server_that_restarts_is_waited_for(own_s3, tmp_path):
    location = Location.of("s3://private/run")
    image = read_image(Location.of(write_image(tmp_path / "source", blobs(SHAPE))))
    create_array(location / "0", image, 0, "uint16", write_layout(SHAPE, (4, 8, 8), sharded=True))
    volume = Volume(location / "0", image.axis_names)
    volume.write(Box.of(SHAPE), blobs(SHAPE))
    location.put("before", b"1")
    own_s3.kill()
    with ThreadPoolExecutor() as pool:
        read = pool.submit(volume.read, Box.of(SHAPE))
        wrote = pool.submit(volume.write, Box.of(SHAPE), blobs(SHAPE))
        put, got = pool.submit(location.put, "during", b"2"), pool.submit(location.get, "before")
        created, listed = (
            pool.submit(location.create, "lease", b"3"),
            pool.submit(location.keys, ""),
        )
        # Later than a client's own patience, which ends after about two seconds.
        time.sleep(6)
        own_s3.start()
        assert_array_equal(read.result(), blobs(SHAPE))
        assert (wrote.result(), put.result(), got.result(), created.result()) == (
            None,
            None,
            b"1",
            True,
        )
        assert "before" in listed.result()
    assert location.get("during") == b"2"


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up(own_s3):
    location = Location.of("s3://private/run")
    location.put("a", b"1")
    configure(StoreOptions(options=HASTY))
    actions = {
        "read": lambda: location.get("a"),
        "write": lambda: location.put("b", b"1"),
        "list": lambda: location.keys(""),
        # Of something else: what was asked of a frozen server, it may do when it goes on.
        "remove": lambda: location.delete("c"),
    }
    with own_s3.frozen():
        for verb, act in actions.items():
            started = time.monotonic()
            with pytest.raises(StoreError) as caught:
                act()
            one_line(
                caught,
                f"cannot {verb} s3://private/run",
                "no answer in time (127.0.0.1:",
                "check the network",
            )
            assert time.monotonic() - started < 60
    configure(StoreOptions())
    assert location.get("a") == b"1"


# -- a bucket that is lost


@pytest.mark.parametrize(
    "options", [{}, {"version": "0.4"}, {"chunks": (2, 5, 4), "shards": (4, 10, 12)}]
)
def test_a_bucket_that_vanishes_is_no_background(s3, options, tmp_path):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), **options)
    location = Location.of(s3.upload(path, s3.make_bucket("vanishing"), "cells.zarr"))
    volume = Volume(location / "0", read_image(location).axis_names)
    assert volume.read(Box.of(SHAPE)).any()
    s3.drop_bucket("vanishing")
    for box in (Box.of(SHAPE), Box((5, 3, 2), (6, 4, 9))):
        with pytest.raises(StoreError) as caught:
            volume.read(box)
        one_line(
            caught, f"cannot open {location}/0: the array, its bucket or its disk is missing now"
        )
    with pytest.raises(StoreError) as caught:
        volume.write(Box.of(SHAPE), blobs(SHAPE))
    with pytest.raises(StoreError, match="no such bucket"):
        location.get("zarr.json")
    with pytest.raises(StoreError, match="no such bucket"):
        location.keys("")
    clear_array_cache()
    with pytest.raises(StoreError, match="missing now"):
        volume.read(Box.of(SHAPE))


def test_background_of_an_array_that_is_there_is_background(s3, folder, tmp_path):
    data = np.zeros(SHAPE, "uint16")
    data[0, 0, 0] = 1
    path = write_image(tmp_path / "image.zarr", data, fill_value=0)
    location = Location.of(s3.upload(path, "private", folder.removeprefix("s3://private/")))
    assert_array_equal(Volume(location / "0", ("z", "y", "x")).read(Box.of(SHAPE)), data)
