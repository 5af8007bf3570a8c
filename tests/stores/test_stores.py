"""Locations: addresses, small objects, and errors that name the object and the cause."""

import ctypes
import errno
import io
import os
import pickle
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import tornado.web
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st

from megaseg_dask.concurrency import ignored_warnings, map_threaded
from megaseg_dask.errors import SettingsError, StoreError, TargetError
from megaseg_dask.ngff.group import ome_of, open_group, read_attributes, write_group
from megaseg_dask.stores import (
    Location,
    StoreOptions,
    access,
    cached_array,
    cause_of,
    clear_array_cache,
    clear_store_caches,
    configure,
    local,
    open_array,
)
from megaseg_dask.stores.address import normalize
from megaseg_dask.stores.local import sync as flush
from megaseg_dask.stores.location import naming
from tests.fixtures.servers import web_server

ODD_NAMES = [
    "plain.zarr",
    "with space.zarr",
    "a#b%20ü.zarr",
    "x?y&z=1",
    "[q]",
    "semi;colon",
    "日本.ome.zarr",
]


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
    write_group(location, "0.5", {"answer": 42})
    assert open_group(location).attrs["answer"] == 42


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
    [
        ("a/b.zarr", "b"),
        ("b.ome.zarr", "b"),
        ("exp 1.2_A.ome.zarr", "exp 1.2_A"),
        ("v1.5", "v1.5"),
        (".zarr", ".zarr"),
    ],
)
def test_name_is_without_the_ending(address, name):
    assert Location.of(address).name == name


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "the path is empty"),
        ("s3://", "no bucket"),
        ("s3://bucket/../other", "'..' is not allowed"),
        ("s3://bucket/a\tb", "control characters"),
        ("s3://bucket\\image.zarr", "backslashes"),
        ("s3://key:hush@bucket/image.zarr", "do not put credentials in a URL"),
        ("az://images/a?sv=2022&sig=hush", "do not put credentials in a URL"),
        ("sftp://me:hush@host/a", "do not put credentials in a URL"),
        ("https://hush@host/a", "do not put credentials in a URL"),
        ("simplecache::s3://bucket/image.zarr", "chained URLs"),
        ("zip://a.zip::s3://bucket/image.zarr", "chained URLs"),
        ("nowhere://x/y", "is not supported"),
    ],
)
def test_addresses_that_cannot_be_opened_are_refused(address, words):
    with pytest.raises(SettingsError, match=words) as caught:
        Location.of(address)
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert normalize("sftp://me@host/a/") == "sftp://me@host/a"


@pytest.mark.parametrize(
    ("typed", "one"),
    [
        ("s3://bucket/a/b.zarr/", "s3://bucket/a/b.zarr"),
        ("S3a://bucket//a/./b.zarr", "s3://bucket/a/b.zarr"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/50%20 x#1?.zarr", "s3://bucket/50%20 x#1?.zarr"),
        ("abfs://images/a", "az://images/a"),
        (
            "abfss://images@account.dfs.core.windows.net/a",
            "az://images@account.dfs.core.windows.net/a",
        ),
    ],
)
def test_one_place_in_a_store_has_one_address(typed, one):
    location = Location.of(typed)
    assert location.url == one
    assert Location.of(location.url) == location
    assert not location.is_local
    with pytest.raises(ValueError, match="not a folder of this machine"):
        _ = location.path


def test_addresses_in_stores_are_compared_by_their_parts():
    image = Location.of("s3://bucket/plate/cells.ome.zarr")
    assert (image.name, image.basename, image.parent.url) == (
        "cells",
        "cells.ome.zarr",
        "s3://bucket/plate",
    )
    assert image.parent.parent.parent.url == "s3://bucket"
    assert image.sibling(".run").url == "s3://bucket/plate/cells.ome.zarr.run"
    assert (image / "labels/megaseg").is_inside(image)
    assert image.is_inside(Location.of("s3://bucket"))
    assert not image.sibling(".run").is_inside(image)
    assert not image.is_inside(image)
    assert image.is_same(Location.of("s3://bucket/plate//cells.ome.zarr/"))
    assert not image.is_same(Location.of("gs-like/cells.ome.zarr"))
    assert not image.is_inside(Location.of("/"))
    web = Location.of("https://host/with space/a.zarr")
    assert (web.parent.basename, (web / "half size").url) == (
        "with space",
        "https://host/with%20space/a.zarr/half%20size",
    )


@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\@?#"), min_size=1))
def test_any_name_survives_in_an_address(name):
    assume(name.isprintable() and name not in (".", ".."))
    for root in ("s3://bucket", "https://host", "az://images"):
        location = Location.of(root) / name
        assert location.basename == name
        assert Location.of(location.url) == location
        assert location.parent.url == root


def test_location_travels_and_sibling_stands_beside(tmp_path):
    location = Location.of(f"{tmp_path}/a.zarr/")
    assert pickle.loads(pickle.dumps(location)) == location
    assert location.sibling(".run").path == tmp_path / "a.zarr.run"


@pytest.mark.parametrize(
    "access",
    [
        lambda location: location.get("zarr.json"),
        lambda location: open_array(location),
        lambda location: write_group(location, "0.5", {"a": 1}),
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
    for write in (
        lambda: Location.of(tmp_path).put("file/plan.json", b"1"),
        lambda: Location.of(tmp_path / "file").put("plan.json", b"1"),
        lambda: write_group(Location.of(tmp_path / "file/group"), "0.5", {}),
    ):
        with pytest.raises(StoreError, match="file"):
            write()


def test_an_absent_array_is_not_a_store_that_failed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        open_array(Location.of(tmp_path / "absent"))
    assert not isinstance(caught.value, StoreError)


# -- groups


@pytest.mark.parametrize(("version", "zarr_format"), [("0.4", 2), ("0.5", 3)])
def test_group_is_created_once_and_then_kept(tmp_path, version, zarr_format):
    location = Location.of(tmp_path / "image.zarr")
    write_group(location, version, {"kept": 1, "ome": {"a": 1}})
    write_group(location, version, {"ome": {"b": 2}})
    group = zarr.open_group(location.url, mode="r")
    assert group.metadata.zarr_format == zarr_format
    assert group.attrs.asdict() == {"kept": 1, "ome": {"b": 2}}
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in location.path.iterdir()}
    write_group(location, version, {})
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in location.path.iterdir()}


@pytest.mark.parametrize(("there", "wanted"), [("0.4", "0.5"), ("0.5", "0.4")])
def test_a_group_never_gets_two_formats(tmp_path, there, wanted):
    location = Location.of(tmp_path)
    write_group(location, there, {})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TargetError, match=f"OME-Zarr {wanted}"):
        write_group(location, wanted, {})
    assert sorted(tmp_path.iterdir()) == before


def test_stale_consolidated_metadata_are_not_believed(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    group.attrs["multiscales"] = "old"
    zarr.consolidate_metadata(tmp_path, zarr_format=2)
    zarr.open_group(tmp_path, use_consolidated=False).attrs["multiscales"] = "new"
    ome = ome_of(read_attributes(Location.of(tmp_path)))
    assert ome["multiscales"] == "new"


@pytest.mark.parametrize("ome", ["text", 3, None, ["list"]])
def test_foreign_ome_attributes_of_another_type(tmp_path, ome):
    write_group(Location.of(tmp_path), "0.5", {"ome": ome})
    assert read_attributes(Location.of(tmp_path)) == {"ome": ome}
    assert ome_of(read_attributes(Location.of(tmp_path))) == {}


def test_arrays_are_opened_once_per_process(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(4,), dtype="u1")
    clear_array_cache()
    location = Location.of(tmp_path / "a")
    assert cached_array(location) is cached_array(Location.of(f"{tmp_path}/a/"))
    assert cached_array(location) is not cached_array(location, writable=True)


# -- what only a disk needs


def test_what_is_right_below_is_listed(tmp_path):
    location = Location.of(tmp_path / "a")
    assert location.children() == []
    location.put("zarr.json", b"{}")
    location.put("0/zarr.json", b"{}")
    assert location.children() == ["0", "zarr.json"]
    assert (location.is_folder(), (location / "zarr.json").is_folder()) == (True, False)
    with pytest.raises(StoreError, match="Not a directory"):
        (location / "zarr.json").children()


@pytest.mark.parametrize(
    "options", [{}, {"zarr_format": 2}, {"shards": (4, 4)}], ids=["v3", "v2", "sharded"]
)
def test_interrupted_writes_are_swept(tmp_path, monkeypatch, options):
    """What zarr leaves is made by zarr: its writer is killed as it would rename."""

    class Killed(BaseException):
        pass

    def die(self, target):
        raise Killed

    array = zarr.create_array(
        tmp_path / "a.zarr/0", shape=(4, 4), chunks=(2, 2), dtype="u1", **options
    )
    array[...] = 1
    (tmp_path / "a.zarr/notes.partial").write_text("mine")
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        # One object at a time: of several, the others may still be written when the first has
        # failed.
        with pytest.raises(Killed):
            array[:2, :2] = 2
        if array.metadata.zarr_format == 3:
            with pytest.raises(Killed):
                array.attrs["a"] = 1
    left = {p for p in tmp_path.rglob("*") if p.is_file()} - set(whole)
    assert left
    location = Location.of(tmp_path / "a.zarr")
    assert location.sweep_partial() == len(left)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
    assert location.sweep_partial() == 0
    assert (
        Location.of(tmp_path / "absent").sweep_partial()
        == Location.of("s3://bucket/a").sweep_partial()
        == 0
    )


def test_what_was_written_is_flushed(tmp_path, monkeypatch):
    # Other tests flush nothing, see tests/conftest.py.
    monkeypatch.setattr(local, "sync", flush)
    location = Location.of(tmp_path / "a")
    location.put("x", b"1")
    location.sync()
    Location.of(tmp_path / "absent/deeper").sync()
    Location.of("s3://bucket/a").sync()
    synced = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "sync", lambda: synced.append(1))
    location.sync()
    assert synced == [1]


# -- options


def test_options_of_the_command_line():
    options = StoreOptions.parse(
        "https://minio.example.org/", True, ["region=x", "az.endpoint=y=z"], "s3://b/in.zarr/"
    )
    assert options.endpoint == "https://minio.example.org"
    assert options.for_scheme("s3://b/c") == {"region": "x"}
    assert options.for_scheme("az://b/c") == {"region": "x", "endpoint": "y=z"}
    assert all(map(options.is_anonymous, ("s3://b/in.zarr", "s3://b/in.zarr/0")))
    assert not any(map(options.is_anonymous, ("s3://b/in.zarr.run", "s3://b", "/b/in.zarr")))
    assert StoreOptions.parse(anon=True).is_anonymous("s3://anything")
    assert not StoreOptions.parse().is_anonymous("s3://anything")
    assert pickle.loads(pickle.dumps(options)) == options


def test_secrets_are_in_no_representation():
    options = StoreOptions.parse(storage_options=["secret_access_key=hush-hush"])
    assert "hush" not in repr(options)
    for wrong in ("hush-hush", "=hush-hush"):
        with pytest.raises(SettingsError, match="expected KEY=VALUE") as caught:
            StoreOptions.parse(storage_options=[wrong])
        assert "hush" not in str(caught.value)
    with pytest.raises(SettingsError, match="--endpoint localhost:9000: expected a URL"):
        StoreOptions.parse("localhost:9000")


def test_what_a_store_says_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert cause_of(ValueError("the key hush-hush is wrong\nmore")) == "the key *** is wrong"


def test_the_same_options_forget_nothing(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(4,), dtype="u1")
    array = cached_array(Location.of(tmp_path / "a"))
    configure(StoreOptions())
    assert cached_array(Location.of(tmp_path / "a")) is array
    try:
        configure(StoreOptions(anonymous=True))
        assert cached_array(Location.of(tmp_path / "a")) is not array
    finally:
        configure(StoreOptions())


# -- the environment


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment that says nothing of stores, and a home without files."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    clear_store_caches()
    yield tmp_path / ".aws"
    clear_store_caches()


KEYS = "aws_access_key_id = id\naws_secret_access_key = hush\n"


def s3_config(given=(), endpoint=None, anonymous=False):
    return access.cloud_config("s3://b", dict(given), endpoint, anonymous=anonymous)


def keys_of(config):
    """What the login of a client gives."""
    given = config["credential_provider"]()
    return given["access_key_id"], given["secret_access_key"], given["token"]


def test_keys_region_and_endpoint_come_from_the_profile(bare, monkeypatch):
    (bare / "credentials").write_text(
        f"[default]\n{KEYS}[lab]\n{KEYS.replace('= id', '= lab')}aws_session_token=t\n"
    )
    (bare / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile lab]\nendpoint_url = http://lab:9000\n"
    )
    default = s3_config(endpoint="https://elsewhere")
    assert keys_of(default) == ("id", "hush", None)
    assert (default["region"], default["endpoint"]) == ("eu-west-1", "https://elsewhere")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    clear_store_caches()
    lab = s3_config()
    assert keys_of(lab) == ("lab", "hush", "t")
    assert (lab["region"], lab["endpoint"]) == ("us-east-1", "http://lab:9000")
    # The environment comes first.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://mine")
    mine = s3_config()
    assert "credential_provider" not in mine
    assert (mine["region"], mine["endpoint"]) == ("eu-north-1", "http://mine")
    assert s3_config({"region": "given"})["region"] == "given"


def test_the_endpoint_of_a_service_comes_from_the_profile(bare):
    (bare / "config").write_text(
        f"[default]\n{KEYS}services = lab\n[services lab]\ns3 =\n  endpoint_url = http://lab:9000\n"
    )
    assert s3_config()["endpoint"] == "http://lab:9000"


def test_a_profile_logs_in_by_a_program(bare):
    program = bare / "login.json"
    program.write_text('{"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "hush"}')
    (bare / "config").write_text(f"[default]\ncredential_process = cat {program}\n")
    assert keys_of(s3_config(endpoint="http://x")) == ("id", "hush", None)


def test_a_role_is_assumed(bare, monkeypatch):
    (bare / "config").write_text(
        "[profile lab]\nrole_arn = arn:aws:iam::1:role/reader\nsource_profile = me\n"
        f"region = eu-west-1\n[profile me]\n{KEYS}"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with web_server([(r"/", _Roles)]) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        assert keys_of(s3_config(endpoint="http://x")) == ("role", "hush", "token")


class _Roles(tornado.web.RequestHandler):
    """AWS's service that lends roles."""

    def post(self) -> None:
        assert self.get_argument("RoleArn") == "arn:aws:iam::1:role/reader"
        self.write(
            "<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>role</AccessKeyId>"
            "<SecretAccessKey>hush</SecretAccessKey><SessionToken>token</SessionToken>"
            "<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult>"
            "</AssumeRoleResponse>"
        )


def test_a_login_that_ended_says_so(bare):
    (bare / "config").write_text(
        "[default]\nsso_session = lab\nsso_account_id = 1\nsso_role_name = reader\n"
        "[sso-session lab]\nsso_region = eu-west-1\nsso_start_url = https://lab.awsapps.com/start\n"
    )
    words = r"no credentials were found: .*SSO.*; log in again, set AWS_ACCESS_KEY_ID .*--anon"
    with pytest.raises(SettingsError, match=words) as caught:
        s3_config(endpoint="http://x")
    assert "\n" not in str(caught.value)
    assert s3_config(endpoint="http://x", anonymous=True)["skip_signature"] is True


@pytest.mark.parametrize("text", ["[default\n", "\0", "region = x"])
def test_broken_profiles_are_named(bare, text):
    (bare / "credentials").write_text(text)
    with pytest.raises(SettingsError, match=r"\.aws/credentials; check AWS_PROFILE"):
        s3_config(endpoint="http://x")


def test_a_profile_that_does_not_exist_is_named(bare, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(SettingsError, match=r"\(absent\) could not be found; check AWS_PROFILE"):
        s3_config(endpoint="http://x")


def test_a_virtual_machine_gives_its_own_credentials(bare, monkeypatch):
    with pytest.raises(SettingsError, match=r"set AWS_ACCESS_KEY_ID .* or pass --anon"):
        s3_config(endpoint="http://x")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    clear_store_caches()
    with web_server([(r"/(.*)", _Machine)]) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        assert keys_of(s3_config(endpoint="http://x")) == ("machine", "hush", "token")


class _Machine(tornado.web.RequestHandler):
    """AWS's service that tells a virtual machine who it is."""

    def put(self, _: str) -> None:
        self.write("session")

    def get(self, path: str) -> None:
        if path.endswith("/security-credentials/"):
            self.write("reader")
            return
        self.write(
            {
                "Code": "Success",
                "AccessKeyId": "machine",
                "SecretAccessKey": "hush",
                "Token": "token",
                "Expiration": "2999-01-01T00:00:00Z",
            }
        )


@pytest.mark.parametrize(
    ("root", "package"),
    [("az://c@account.dfs.core.windows.net", "azure-identity"), ("gs://b", "google-auth")],
)
def test_a_library_that_logs_in_is_named_where_it_is_missing(bare, monkeypatch, root, package):
    for name in ("azure.identity", "google.auth"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=rf"pip install '{package}.*--anon"):
        access.cloud_config(root, {}, None, anonymous=False)


@pytest.mark.parametrize("status", [200, 301, 403])
def test_aws_is_asked_for_the_region_of_a_bucket(bare, monkeypatch, status):
    asked = []

    class Answer(io.BytesIO):
        headers: ClassVar = {"x-amz-bucket-region": "eu-west-3"}

    def urlopen(request, timeout):
        asked.append((request.get_method(), request.full_url))
        if status != 200:
            raise urllib.error.HTTPError(request.full_url, status, "", Answer.headers, None)
        return Answer()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    clear_store_caches()
    for _ in range(2):
        assert access.cloud_config("s3://images", {}, None, anonymous=True)["region"] == "eu-west-3"
    assert asked == [("HEAD", "https://s3.amazonaws.com/images")]
    assert s3_config(endpoint="http://minio", anonymous=True)["region"] == "us-east-1"
    clear_store_caches()


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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_file_that_this_user_may_not_read_is_named_with_the_next_step(number, tmp_path):
    place = Location.of(tmp_path / "image.zarr")
    told = rf"cannot read .*image\.zarr: {os.strerror(number)}; check whether your user may read it"
    with pytest.raises(StoreError, match=told), naming(place, "read"):
        raise PermissionError(number, os.strerror(number))


def test_many_at_once_keep_their_order_and_end_at_the_first_error():
    assert map_threaded(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    begun = []

    def fail(n: int) -> None:
        begun.append(n)
        if n == 0:
            raise ValueError(n)
        time.sleep(0.001)

    with pytest.raises(ValueError, match="0"):
        map_threaded(fail, range(10_000), 2)
    assert len(begun) < 10_000


def test_warnings_are_ignored_until_the_last_thread_has_left():
    before = list(warnings.filters)
    is_inside = threading.Event()
    may_leave = threading.Event()

    def warn_later() -> None:
        with ignored_warnings():
            is_inside.set()
            assert may_leave.wait(60)
            warnings.warn("of a library", stacklevel=1)

    with ThreadPoolExecutor(1) as pool:
        with ignored_warnings():
            late = pool.submit(warn_later)
            assert is_inside.wait(60)
        may_leave.set()
        late.result()
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning, match="of ours"):
        warnings.warn("of ours", stacklevel=1)


def test_a_group_is_not_made_of_an_array_or_of_damaged_metadata(tmp_path):
    zarr.create_array(tmp_path / "array", shape=(4,), dtype="u1")
    before = (tmp_path / "array/zarr.json").read_bytes()
    with pytest.raises(TargetError, match="is an array"):
        write_group(Location.of(tmp_path / "array"), "0.5", {"a": 1})
    assert (tmp_path / "array/zarr.json").read_bytes() == before
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/zarr.json").write_text("{")
    with pytest.raises(TargetError, match="is damaged"):
        write_group(Location.of(tmp_path / "torn"), "0.5", {})
