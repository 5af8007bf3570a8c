"""Other kinds of stores: S3 servers with ways of their own, Azure and Google."""

import base64
import datetime
import hashlib
import hmac
import json
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tornado.web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import SettingsError, SourceError, StoreError, TargetError
from megaseg_dask.ngff.group import read_attributes, write_group
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.stores import Location, StoreOptions, clear_store_caches, configure
from tests.fixtures.images import blobs, write_image
from tests.fixtures.relay import FAULTS, Relay, relay_to
from tests.fixtures.servers import GOOGLE_TOKEN, free_port, google_server, web_server
from tests.stores.test_retries import (  # noqa: F401
    _no_pauses,
    fail_once,
    heal,
    objects_of,
    run,
)

SHAPE = (9, 20, 17)


def behaves(location: Location, tmp_path: Path) -> None:
    """Check what every store has to do that results are written to."""
    assert not location.exists()
    assert location.get("a") is location.size("a") is location.head("a", 1) is None
    assert location.keys("") == location.children() == []
    location.require_writable()
    assert not location.exists()
    location.put("plan/0.json", b"{}")
    location.put("empty", b"")
    assert (
        location.get("plan/0.json"),
        location.size("plan/0.json"),
        location.head("plan/0.json", 1),
    ) == (
        b"{}",
        2,
        b"{",
    )
    assert (location.head("plan/0.json", 9), location.head("empty", 9)) == (b"{}", b"")
    assert location.keys("") == ["empty", "plan/0.json"]
    assert location.keys("plan") == ["plan/0.json"]
    assert location.children() == ["empty", "plan"]
    assert location.exists()
    assert location.is_folder()
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: location.create("lease", str(i).encode()), range(8)))
    assert won.count(True) == 1
    assert location.get("lease") == str(won.index(True)).encode()
    for _ in range(2):
        location.delete("lease")
    image = read_image(Location.of(write_image(tmp_path / "source", blobs(SHAPE))))
    for version in ("0.4", "0.5"):
        group = location / version
        write_group(group, version, {"answer": 42})
        layout = write_layout(SHAPE, (4, 8, 8), sharded=True)
        create_array(group / "0", replace(image, version=version), 0, "uint16", layout)
        volume = Volume(group / "0", image.axis_names)
        assert not volume.read(Box.of(SHAPE)).any()
        volume.write(Box.of(SHAPE), blobs(SHAPE))
        assert_array_equal(volume.read(Box((5, 3, 2), (6, 4, 9))), blobs(SHAPE)[5:6, 3:4, 2:9])
        assert read_attributes(group) == {"answer": 42}
    for _ in range(2):
        location.remove()
    assert not location.exists()


@pytest.fixture
def cells(tmp_path):
    return write_image(tmp_path / "image.zarr", blobs((16, 48, 64)), chunks=(16, 32, 32))


def require_that_no_fault_counts(
    relay: Relay, folder: str, source: Path, bundle: Path, **options: str
) -> None:
    """Segment where the first request for each object meets a fault: the bytes are the same."""
    for name in ("calm", "out"):
        found = run(str(source), f"{folder}/{name}.zarr", bundle, "blocks", **options)
        assert found.status == "done", found.failures
        fail_once(relay, *FAULTS)
    heal(relay)
    assert objects_of(f"{folder}/out.zarr") == objects_of(f"{folder}/calm.zarr")


def require_one_creation(relay: Relay, location: Location) -> None:
    """Create an object where the first request meets a fault: one of two creations succeeds."""
    for fault in ("lost answer", "reset", "truncated", "failed"):
        fail_once(relay, fault)
        assert location.create(fault, b"mine")
        fail_once(relay, fault)
        assert not location.create(fault, b"another")
        heal(relay)
        assert location.get(fault) == b"mine"


# -- S3 with ways of its own


class _ReadersOnly(tornado.web.StaticFileHandler):
    """As AWS answers those who may read and not list.

    What is absent is denied, so that nobody learns that it is.
    """

    def write_error(self, status_code: int, **_: object) -> None:
        self.set_status(403)
        if self.request.method != "HEAD":
            self.finish("<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")


@pytest.mark.parametrize("options", [{}, {"version": "0.4"}], ids=["0.5", "0.4"])
def test_an_image_is_read_where_nothing_may_be_listed(tmp_path, options):
    data = blobs(SHAPE)
    write_image(tmp_path / "bucket/cells.zarr", data, **options)
    with web_server([(r"/(.+)", _ReadersOnly, {"path": str(tmp_path)})]) as url:
        configure(StoreOptions.parse(url, anon=True, source="s3://bucket/cells.zarr"))
        location = Location.of("s3://bucket/cells.zarr")
        image = read_image(location)
        volume = Volume(location / "0", image.axis_names)
        assert_array_equal(volume.read(Box.of(SHAPE)), data)
        configure(StoreOptions.parse(url, anon=True, source="s3://bucket"))
        with pytest.raises(
            SourceError,
            match=r"access denied \(AccessDenied\); the data are not public: remove --anon",
        ):
            read_image(Location.of("s3://bucket/absent.zarr"))
        # Denied or absent: nobody can tell, so it is no background.
        chunks = [
            path
            for path in (tmp_path / "bucket/cells.zarr/0").rglob("*")
            if path.is_file() and path.name == "0"
        ]
        chunks[0].unlink()
        with pytest.raises(StoreError, match="access denied"):
            volume.read(Box.of(SHAPE))


class _Careless(tornado.web.RequestHandler):
    """Some older servers do not know conditions, and write."""

    def put(self, *_: str) -> None:
        self.set_header("ETag", '"x"')

    def post(self, *_: str) -> None:
        self.write("<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>")


def test_a_store_that_ignores_conditions_is_no_target():
    with web_server([(r"/.*", _Careless)]) as url:
        configure(
            StoreOptions.parse(url, storage_options=["access_key_id=a", "secret_access_key=b"])
        )
        with pytest.raises(TargetError, match="two runs could overwrite each other"):
            Location.of("s3://bucket/out.zarr").require_writable()


class _Elsewhere(tornado.web.RequestHandler):
    def get(self, *_: str) -> None:
        self.set_status(301)
        self.set_header("x-amz-bucket-region", "eu-west-1")
        self.finish(
            "<Error><Code>PermanentRedirect</Code><Message>Use another endpoint</Message></Error>"
        )

    head = get


def test_a_bucket_in_another_region_is_named():
    with web_server([(r"/.*", _Elsewhere)]) as url:
        configure(StoreOptions.parse(url, anon=True))
        with pytest.raises(
            SourceError, match=r"the bucket is in another region .*; set AWS_REGION"
        ):
            read_image(Location.of("s3://bucket/cells.zarr"))


# -- Azure

ACCOUNT = "devstoreaccount1"
# The key of every emulator of Azure, which its documentation gives.
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no emulator of Azure is installed: npm install -g azurite")
    port = free_port()
    with subprocess.Popen(
        [
            program,
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            str(port),
            "--location",
            tmp_path_factory.mktemp("azure"),
            "--silent",
            "--disableTelemetry",
            "--skipApiVersionCheck",
        ],
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for(port)
        url = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _make_container(url, "images")
        yield url
        process.kill()


def wait_for(port: int) -> None:
    """Wait until a server listens."""
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)


def _make_container(url: str, name: str) -> None:
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    signed = (
        f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:2021-08-06\n"
        f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    )
    mac = hmac.new(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256)
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-08-06",
        "Content-Length": "0",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(mac.digest()).decode()}",
    }
    request = urllib.request.Request(
        f"{url}/{name}?restype=container", method="PUT", headers=headers
    )
    with urllib.request.urlopen(request, timeout=120):
        pass


@pytest.mark.slow
class TestAzure:
    @pytest.fixture(autouse=True)
    def _account(self, azurite, monkeypatch):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
        configure(StoreOptions.parse(azurite))

    def test_it_behaves(self, tmp_path):
        behaves(Location.of(f"az://images/{uuid.uuid4().hex}/with space#.zarr"), tmp_path)
        behaves(
            Location.of(f"abfs://images@{ACCOUNT}.dfs.core.windows.net/{uuid.uuid4().hex}"),
            tmp_path,
        )

    def test_a_connection_string_says_it_all(self, azurite, monkeypatch, tmp_path):
        for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
            monkeypatch.delenv(name)
        text = (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
            f"BlobEndpoint={azurite};"
        )
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        configure(StoreOptions())
        behaves(Location.of(f"az://images/{uuid.uuid4().hex}"), tmp_path)

    def test_who_is_refused_is_told_why(self, monkeypatch):
        with pytest.raises(
            SourceError, match=r"there is no such bucket .ContainerNotFound.; check its name"
        ):
            read_image(Location.of("az://nothing/cells.zarr"))
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA" + ACCOUNT_KEY[4:])
        clear_store_caches()
        with pytest.raises(SourceError, match="check") as caught:
            read_image(Location.of("az://images/cells.zarr"))
        assert ACCOUNT_KEY[4:] not in str(caught.value)

    def test_single_faults_change_nothing(self, azurite, cells, tiny_bundle):
        folder = f"az://images/{uuid.uuid4().hex}"
        with relay_to(azurite.removesuffix(f"/{ACCOUNT}")) as relay:
            endpoint = f"{relay.url}/{ACCOUNT}"
            configure(StoreOptions.parse(endpoint))
            require_one_creation(relay, Location.of(folder))
            require_that_no_fault_counts(relay, folder, cells, tiny_bundle, endpoint=endpoint)


def test_azure_without_account_or_key_says_what_is_missing(monkeypatch):
    with pytest.raises(SettingsError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        Location.of("az://images/cells.zarr").exists()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    with pytest.raises(SettingsError, match=r"set AZURE_STORAGE_ACCOUNT_KEY .*or pass --anon"):
        Location.of("az://images/cells.zarr").exists()


# -- Google


@pytest.fixture
def google():
    with google_server("images") as url:
        configure(StoreOptions.parse(url, storage_options=[f"gs.bearer_token={GOOGLE_TOKEN}"]))
        yield url


def test_google_behaves(google, tmp_path):
    behaves(Location.of(f"gs://images/{uuid.uuid4().hex}/with space#.zarr"), tmp_path)
    behaves(Location.of(f"gcs://images/{uuid.uuid4().hex}"), tmp_path)


@pytest.mark.slow
def test_single_faults_of_google_change_nothing(google, cells, tiny_bundle):
    folder = f"gs://images/{uuid.uuid4().hex}"
    token = f"gs.bearer_token={GOOGLE_TOKEN}"
    with relay_to(google) as relay:
        configure(StoreOptions.parse(relay.url, storage_options=[token]))
        require_one_creation(relay, Location.of(folder))
        options = {"endpoint": relay.url, "storage_option": token}
        require_that_no_fault_counts(relay, folder, cells, tiny_bundle, **options)


def test_a_missing_bucket_of_google_is_named(google):
    with pytest.raises(SourceError, match="there is no such bucket"):
        read_image(Location.of("gs://nothing/cells.zarr"))
    with pytest.raises(TargetError, match="there is no such bucket"):
        Location.of("gs://nothing/cells.zarr").require_writable()


def test_who_is_refused_by_google_is_told_why(google):
    with pytest.raises(
        SourceError, match=r"access denied .*GOOGLE_APPLICATION_CREDENTIALS may read"
    ):
        read_image(Location.of("gs://private/cells.zarr"))
    configure(StoreOptions.parse(google, anon=True))
    with pytest.raises(
        SourceError, match=r"access denied .*the data are not public: remove --anon"
    ):
        read_image(Location.of("gs://images/cells.zarr"))
    wrong = GOOGLE_TOKEN.replace("google", "wrong")
    configure(StoreOptions.parse(google, storage_options=[f"bearer_token={wrong}"]))
    with pytest.raises(SourceError, match="access denied") as caught:
        read_image(Location.of("gs://images/cells.zarr"))
    assert wrong not in str(caught.value)


class _Tokens(tornado.web.RequestHandler):
    """Google's service that changes a key for a token of the scopes that it is asked for."""

    def post(self) -> None:
        claims = self.get_argument("assertion").split(".")[1]
        scope = json.loads(base64.urlsafe_b64decode(claims + "=="))["scope"]
        assert scope == "https://www.googleapis.com/auth/devstorage.read_write"
        self.write({"access_token": GOOGLE_TOKEN, "expires_in": 3600, "token_type": "Bearer"})


def test_a_key_of_a_service_account_logs_in(google, tmp_path, monkeypatch):
    pytest.importorskip("google.auth")
    with web_server([(r"/token", _Tokens)]) as url:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {
            "type": "service_account",
            "client_email": "reader@lab.example.org",
            "private_key_id": "1",
            "private_key": pem.decode(),
            "token_uri": f"{url}/token",
        }
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        configure(StoreOptions.parse(google))
        location = Location.of("gs://images/login")
        location.put("a", b"1")
        assert location.get("a") == b"1"


def test_a_file_without_a_login_is_told(google, tmp_path, monkeypatch):
    pytest.importorskip("google.auth")
    (tmp_path / "key.json").write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    configure(StoreOptions.parse(google))
    words = "no credentials were found: .*key.json.*set GOOGLE_APPLICATION_CREDENTIALS"
    with pytest.raises(SettingsError, match=words):
        Location.of("gs://images/login").exists()


# -- all others


@pytest.mark.parametrize("address", ["nowhere://a/b", "gdrive://a/b", "memory://a/b"])
def test_kinds_of_stores_that_cannot_be_opened(address):
    with pytest.raises(SettingsError, match="is not supported"):
        Location.of(address)
