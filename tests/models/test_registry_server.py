"""Models from a real S3 server in the layout of the public bucket.

Listed, fetched, interrupted, spoilt, changed.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import BundleError, MegasegError, StoreError
from megaseg_dask.models import cache, download, load_bundle, registry
from megaseg_dask.models.cache import read_record
from megaseg_dask.models.home import home as cache_home
from megaseg_dask.models.registry import Origin
from megaseg_dask.stores import clear_store_caches
from tests.fixtures.bundles import write_zip
from tests.fixtures.images import blobs, write_image
from tests.fixtures.relay import relay_to
from tests.fixtures.servers import free_port, plain_server, range_server, write_certificate

pytestmark = pytest.mark.usefixtures("store_environment")

PIECE = 2**16
MEGASEG = [sys.executable, "-m", "megaseg_dask"]


@pytest.fixture(scope="session")
def megaseg_zip(tmp_path_factory):
    """A small bundle in a zip of some megabytes, by another file in it that nothing reads."""
    path = write_zip(tmp_path_factory.mktemp("zoo") / "megaSeg.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("megaSeg/curves.bin", np.random.default_rng(0).bytes(1_500_000))
    return path


@pytest.fixture
def bucket(s3_server, megaseg_zip):
    """The public bucket with the models in it, and things that are none."""
    client = s3_server.client()
    put(s3_server, "megaSeg.zip", megaseg_zip.read_bytes())
    for key in ("Megaseg-Light.zip", "sub/other.zip", "-odd name.zip", "notes.txt"):
        client.put_object(
            Bucket="public", Key=key, Body=megaseg_zip.read_bytes() if "Light" in key else b"x"
        )
    return s3_server


@pytest.fixture
def relay(bucket, tmp_path, monkeypatch):
    """The way to that bucket, without credentials, through something that counts.

    And an empty cache.
    """
    with relay_to(bucket.url) as relay:
        monkeypatch.setenv("MEGASEG_BUCKET", "public")
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("MEGASEG_OFFLINE")
        monkeypatch.setattr(download, "PIECE_BYTES", PIECE)
        clear_store_caches()
        yield relay


def put(server, key: str, data: bytes) -> None:
    server.client().put_object(Bucket="public", Key=key, Body=data)


def megaseg(
    *arguments: object, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*MEGASEG, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def result_of(ended: subprocess.CompletedProcess[str]) -> dict:
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def command(*arguments: object) -> Result:
    """Run a command in this process."""
    ended = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert ended.exit_code == 0, ended.output
    return ended


def left_behind() -> list[str]:
    """All in the cache but models, the facts that were read of them, and the files of locks."""
    inside = [p.relative_to(cache_home()) for p in cache_home().rglob("*")]
    models = [f"models/{name}" for name in cache.cached_names()]
    return [
        str(p)
        for p in inside
        if str(p) not in ("models", "parts")
        and p.parts[0] != "facts"
        and p.suffix != ".lock"
        and not any(str(p).startswith(model) for model in models)
    ]


# -- the whole way


@pytest.mark.slow
def test_list_fetch_show_and_import(relay, megaseg_zip, tmp_path):
    listed = {row["name"]: row for row in result_of(megaseg("models", "list", "--json"))["models"]}
    assert {name: row["state"] for name, row in listed.items()} == {
        "starter": "comes with this package",
        "MegaSeg_v1": "published",
        "MegaSeg_light": "published",
    }
    assert listed["MegaSeg_v1"]["offered"] == "s3://public/megaSeg.zip"
    assert listed["MegaSeg_light"]["offered"] == "s3://public/Megaseg-Light.zip"
    assert [path for method, path, _ in relay.requests if "list-type=2" in path]

    ended = megaseg("models", "fetch", "MegaSeg_v1", "--json")
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    record = result_of(ended)
    assert lines[-2]["event"] == "fetching"
    assert lines[-2]["n_bytes"] == lines[-2]["total_bytes"] == megaseg_zip.stat().st_size
    assert record["sha256"] == hashlib.sha256(megaseg_zip.read_bytes()).hexdigest()
    assert record["digest"] == load_bundle(megaseg_zip).digest
    assert record["source"] == "s3://public/megaSeg.zip"
    assert left_behind() == []

    shown = result_of(megaseg("models", "show", "MegaSeg_v1", "--json"))
    assert shown["record"] == {
        key: value for key, value in record.items() if key not in ("event", "status")
    }
    assert shown["settings"]["patch_shape"]["value"] == [16, 32, 32]
    assert "hyper_parameters" in shown["settings"]["patch_shape"]["origin"]
    assert "16,670,177" in shown["published"]["architecture"]

    ended = megaseg("models", "import", megaseg_zip, "ours", MEGASEG_OFFLINE="1")
    assert str(tmp_path / "home/models/ours/ours.zip") in ended.stdout
    text = megaseg("models", "list").stdout
    assert "MegaSeg_v1           cached" in text
    assert "ours                 cached" in text
    assert "MegaSeg_light        not in the cache; megaseg models fetch MegaSeg_light" in text


def test_bucket_and_endpoint_are_options_too(relay, monkeypatch):
    monkeypatch.delenv("MEGASEG_BUCKET")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    where = ["--bucket", "public", "--endpoint", relay.url]
    listed = command("models", "list", *where, "--json")
    models = json.loads(listed.stdout.splitlines()[-1])["models"]
    assert {row["name"] for row in models if "offered" in row} == {"MegaSeg_v1", "MegaSeg_light"}
    fetched = command("models", "fetch", "MegaSeg_v1", *where, "--json")
    source = json.loads(fetched.stdout.splitlines()[-1])["source"]
    assert source == "s3://public/megaSeg.zip"


def test_a_model_in_the_cache_asks_no_network(relay):
    first = registry.fetch("MegaSeg_v1")
    asked = len(relay.requests)
    assert registry.fetch("MegaSeg_v1") == first
    assert registry.locate("MegaSeg_v1") == first.path
    assert registry.load("MegaSeg_v1")[1].name == "MegaSeg_v1"
    assert len(relay.requests) == asked


def test_each_byte_is_sent_once(relay, megaseg_zip):
    registry.fetch("MegaSeg_v1")
    size = megaseg_zip.stat().st_size
    assert relay.n_bytes == size
    assert len(relay.ranges) == -(-size // PIECE)


def test_other_names_are_found_in_the_bucket(relay):
    assert registry.fetch("MegaSeg_light").source == "s3://public/Megaseg-Light.zip"
    assert registry.fetch("megaSeg").path.name == "megaSeg.zip"
    assert (
        registry.fetch("mine", Origin(key="megaSeg.zip")).digest == registry.fetch("megaSeg").digest
    )
    with pytest.raises(
        BundleError, match=r"has no nuclei.zip; it has MegaSeg_light, MegaSeg_v1: fetch one of them"
    ):
        registry.fetch("nuclei")
    with pytest.raises(BundleError, match=r"notes.txt is neither"):
        registry.fetch("notes", Origin(key="notes.txt"))


def test_segment_fetches_what_it_needs_and_says_so(relay, tmp_path, monkeypatch):
    image = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    options = ["--threads", 1, "--engine", "torch"]
    ended = command("segment", image, tmp_path / "out.zarr", *options, "--workers", 0)
    assert "fetching MegaSeg_v1 from s3://public/megaSeg.zip" in ended.stderr
    # The same with the model in the cache, without network.
    monkeypatch.setenv("MEGASEG_OFFLINE", "1")
    again = command("segment", image, tmp_path / "2.zarr", *options, "--workers", 0, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["status"] == "done"
    assert '"fetching"' not in again.stdout
    plan = command("plan", image, tmp_path / "3.zarr", *options, "--json")
    assert json.loads(plan.stdout)["model"]["name"] == "MegaSeg_v1"


# -- interrupted


def test_a_killed_fetch_goes_on_where_it_stopped(relay, megaseg_zip):
    size = megaseg_zip.stat().st_size
    relay.bytes_per_s = 300_000
    script = f"""
from megaseg_dask.models import download, registry
download.PIECE_BYTES = {PIECE}
registry.fetch("MegaSeg_v1")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    part = download.part_of("MegaSeg_v1")
    while not (part.exists() and part.stat().st_size >= 5 * PIECE):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    while relay.n_connections:
        time.sleep(0.01)
    received, sent = part.stat().st_size, relay.n_bytes
    assert 5 * PIECE <= received < size
    relay.bytes_per_s = None
    relay.requests.clear()
    registry.fetch("MegaSeg_v1")
    assert relay.ranges[0] == f"bytes={received}-{min(received + PIECE, size) - 1}"
    assert relay.n_bytes - sent == size - received
    assert load_bundle(registry.locate("MegaSeg_v1")).digest == load_bundle(megaseg_zip).digest
    assert left_behind() == []


def leave_part(relay, n: int) -> None:
    """Fetch until the store is lost after ``n`` pieces."""
    read = registry.Bucket.read
    calls = iter(range(n))

    def lost(self, *arguments):
        if next(calls, None) is None:
            raise StoreError("the line was cut")
        return read(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.Bucket, "read", lost)
        with pytest.raises(StoreError, match="the line was cut"):
            registry.fetch("MegaSeg_v1")
    assert download.part_of("MegaSeg_v1").stat().st_size == n * PIECE
    assert cache.cached_names() == []


def test_a_bit_that_flipped_is_refused_and_removed(relay):
    leave_part(relay, 5)
    part = download.part_of("MegaSeg_v1")
    data = bytearray(part.read_bytes())
    data[12345] ^= 4
    part.write_bytes(data)
    with pytest.raises(
        BundleError,
        match=r"s3://public/megaSeg.zip: what was received has MD5 \w+, the store states \w+;",
    ):
        registry.fetch("MegaSeg_v1")
    assert (left_behind(), cache.cached_names()) == ([], [])
    registry.fetch("MegaSeg_v1")


@pytest.mark.parametrize("where", [300, 700_000, -30])
def test_a_bit_that_flipped_is_found_without_the_stores_digest(relay, monkeypatch, where):
    monkeypatch.setattr(registry.Bucket, "_stored", without_md5(registry.Bucket._stored))
    leave_part(relay, 0)
    spoilt = []

    def spoil(data: bytes) -> bytes:
        # The first piece, one in the file that nothing reads, or the directory of the zip.
        at = {300: 0, 700_000: 700_000 // PIECE, -30: 1_500_000 // PIECE}[where]
        spoilt.append(len(spoilt))
        if len(spoilt) - 1 != at and not (where < 0 and len(data) < PIECE):
            return data
        changed = bytearray(data)
        changed[where % PIECE if where > 0 else where] ^= 1
        return bytes(changed)

    relay.spoil = spoil
    with pytest.raises(BundleError, match=r"^s3://public/megaSeg.zip: .*; it was removed"):
        registry.fetch("MegaSeg_v1")
    assert (left_behind(), cache.cached_names()) == ([], [])


def without_md5(entry_of):
    from dataclasses import replace

    return lambda self, meta: replace(entry_of(self, meta), md5=None)


def test_another_sha256_is_refused(relay, megaseg_zip):
    with pytest.raises(BundleError, match=r"has SHA256 \w+, --sha256 states 00"):
        registry.fetch("MegaSeg_v1", Origin(sha256="00"))
    digest = hashlib.sha256(megaseg_zip.read_bytes()).hexdigest()
    assert registry.fetch("MegaSeg_v1", Origin(sha256=digest.upper())).sha256 == digest
    with pytest.raises(
        BundleError, match=r"already in the cache, from s3://public/megaSeg.zip with SHA-256"
    ):
        registry.fetch("MegaSeg_v1", Origin(sha256="00"))


def test_an_object_that_changed_meanwhile_starts_anew(relay, bucket, tmp_path):
    leave_part(relay, 5)
    other = write_zip(tmp_path / "megaSeg.zip", seed=1)
    put(bucket, "megaSeg.zip", other.read_bytes())
    record = registry.fetch("MegaSeg_v1")
    assert record.digest == load_bundle(other).digest
    assert relay.ranges[-(-other.stat().st_size // PIECE) * -1].startswith("bytes=0-")


def test_an_object_that_changes_during_the_fetch_is_not_mixed(relay, bucket, megaseg_zip, tmp_path):
    changed = megaseg_zip.read_bytes()[:-10] + bytes(10)
    arrived = []

    def spoil(data: bytes) -> bytes:
        arrived.append(len(data))
        if len(arrived) == 3:
            put(bucket, "megaSeg.zip", changed)
        return data

    relay.spoil = spoil
    with pytest.raises(
        StoreError, match=r"megaSeg.zip changed during the download; run the same command again"
    ):
        registry.fetch("MegaSeg_v1")
    put(bucket, "megaSeg.zip", megaseg_zip.read_bytes())
    relay.spoil = lambda data: data
    assert registry.fetch("MegaSeg_v1").digest == load_bundle(megaseg_zip).digest


def test_two_fetches_at_once_fetch_once(relay, megaseg_zip):
    relay.bytes_per_s = 1_500_000
    command = [*MEGASEG, "models", "fetch", "MegaSeg_v1", "--json"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    records = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert records[0] == records[1]
    assert relay.n_bytes == megaseg_zip.stat().st_size
    assert left_behind() == []


def test_a_fetch_that_is_stuck_is_not_waited_for(relay, monkeypatch):
    monkeypatch.setattr(download, "WAIT_S", 0.5)
    with (
        download.turn("MegaSeg_v1", lambda n: None),
        pytest.raises(StoreError, match="by another process, which received"),
    ):
        registry.fetch("MegaSeg_v1")


# -- no network, no bucket, no bundle


def test_a_refused_port_ends_quickly(relay, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(StoreError, match="connection refused"):
        registry.fetch("MegaSeg_v1")
    with pytest.raises(
        BundleError,
        match=r"was not fetched: .*connection refused.*megaseg models import megaSeg.zip",
    ) as e:
        registry.locate("MegaSeg_v1")
    assert e.value.exit_code == 2
    assert time.monotonic() - began < 60
    listed = megaseg("models", "list")
    assert listed.returncode == 0
    assert "starter" in listed.stdout
    assert (
        "warning: the bucket was not listed: cannot list s3://public: connection refused"
        in listed.stderr
    )


def test_offline_asks_nobody(relay, monkeypatch):
    monkeypatch.setenv("MEGASEG_OFFLINE", "1")
    for name in registry.PUBLISHED:
        with pytest.raises(BundleError, match="MEGASEG_OFFLINE is set"):
            registry.locate(name)
    with pytest.raises(BundleError, match="MEGASEG_OFFLINE is set"):
        registry.fetch("MegaSeg_v1")
    assert relay.requests == []


@pytest.mark.parametrize(
    ("bucket_name", "message"),
    [
        ("nowhere-at-all", "had no credentials; check the name of the bucket"),
        (
            "private",
            "had no credentials; check the name of the bucket, or set credentials in the "
            "environment",
        ),
        ("file:///tmp", "expected the name of a bucket, or s3://"),
    ],
)
def test_a_bucket_that_cannot_be_read(relay, bucket_name, message):
    with pytest.raises(MegasegError, match=message) as raised:
        registry.fetch("MegaSeg_v1", Origin(bucket=bucket_name))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_private_bucket_with_credentials(s3, megaseg_zip, monkeypatch, tmp_path):
    monkeypatch.delenv("MEGASEG_OFFLINE")
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    s3.client().put_object(
        Bucket="private", Key="lab/models/nuclei.zip", Body=megaseg_zip.read_bytes()
    )
    assert (
        registry.fetch("nuclei", Origin(bucket="s3://private/lab/models")).source
        == "s3://private/lab/models/nuclei.zip"
    )
    assert list(registry.offered(registry.open_bucket("s3://private/lab/models"))) == ["nuclei"]


def test_what_is_no_bundle_gets_no_name(relay, bucket):
    put(bucket, "page.zip", b"<html>Not here</html>")
    put(bucket, "empty.zip", b"")
    for name in ("page", "empty"):
        with pytest.raises(
            BundleError, match=rf"^s3://public/{name}.zip: {name}.zip is not a zip.*it was removed"
        ):
            registry.fetch(name)
    assert (left_behind(), cache.cached_names()) == ([], [])
    for name in ("page", "empty"):
        bucket.client().delete_object(Bucket="public", Key=f"{name}.zip")


@pytest.mark.parametrize("serve", [range_server, plain_server])
def test_from_a_web_server(relay, megaseg_zip, serve):
    with serve(megaseg_zip.parent) as upstream, relay_to(upstream) as web:
        url = web.url
        record = registry.fetch("MegaSeg_v1", Origin(url=f"{url}/megaSeg.zip"))
        assert record.source == f"{url}/megaSeg.zip"
        # A server that gives no parts is asked for all, once, after it was asked for a part.
        assert web.n_bytes <= megaseg_zip.stat().st_size * (1 if serve is range_server else 2)
        assert registry.locate(f"{url}/megaSeg.zip") == record.path
        with pytest.raises(BundleError, match=r"has no nothing.zip; check the address"):
            registry.fetch("nothing", Origin(url=f"{url}/nothing.zip"))
    assert read_record("MegaSeg_v1").digest == load_bundle(megaseg_zip).digest


def test_a_url_as_a_model(relay, megaseg_zip):
    with range_server(megaseg_zip.parent) as url:
        path = registry.locate(f"{url}/megaSeg.zip")
        assert path.name == "megaSeg.zip"
        with pytest.raises(BundleError, match="fetch it first with"):
            registry.locate(f"{url}/sub/megaSeg.zip")


@pytest.mark.parametrize(
    "link", ["files/nuclei.zip?download=1", "api/files/nuclei.zip/content", "files/nuclei.zip?dl=1"]
)
def test_a_link_to_save_a_file_is_the_address_of_the_file(link, relay, megaseg_zip, tmp_path):
    record = tmp_path / "record"
    (record / "files").mkdir(parents=True)
    (record / "api/files/nuclei.zip").mkdir(parents=True)
    shutil.copy(megaseg_zip, record / "files/nuclei.zip")
    shutil.copy(megaseg_zip, record / "api/files/nuclei.zip/content")
    with range_server(record) as url:
        path = registry.locate(f"{url}/{link}")
        assert path.name == "nuclei.zip"
        assert registry.locate(f"{url}/{link}") == path
        assert load_bundle(path).digest == load_bundle(megaseg_zip).digest
        assert registry.fetch("nuclei", Origin(url=f"{url}/{link}")).path == path


def test_over_tls_a_certificate_that_nobody_knows_is_refused(tmp_path, megaseg_zip):
    certificate = write_certificate(tmp_path / "certificate.pem")
    known = {"MEGASEG_HOME": str(tmp_path / "home"), **os.environ}
    known.pop("MEGASEG_OFFLINE", None)

    def fetch(url: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [*MEGASEG, "models", "fetch", f"{url}/megaSeg.zip"]
        return subprocess.run(
            command, env={**known, **more}, capture_output=True, text=True, timeout=120
        )

    with range_server(megaseg_zip.parent, certificate) as url:
        refused = fetch(url)
        assert refused.returncode in (1, 2)
        assert url in refused.stderr
        assert "certificate" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not list((tmp_path / "home").rglob("*.zip"))
        found = fetch(url, SSL_CERT_FILE=str(certificate))
        assert found.returncode == 0, found.stderr
