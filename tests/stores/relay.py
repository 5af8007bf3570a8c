"""Between a client and a server: counts what is asked for and sent, slows it down, or spoils it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Relay:
    """What went through to ``upstream`` and how; change it as it runs."""

    upstream: str
    bytes_per_s: float | None = None
    spoil: Callable[[bytes], bytes] = lambda data: data
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    n_bytes: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)

    @property
    def ranges(self) -> list[str]:
        return [asked for method, _, asked in self.requests if method == "GET" and asked]


@contextmanager
def relay_to(upstream: str) -> Iterator[Relay]:
    relay = Relay(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            relay.requests.append((self.command, self.path, self.headers.get("Range")))
            there = HTTPConnection(urlsplit(relay.upstream).netloc, timeout=30)
            there.request(self.command, self.path, headers=dict(self.headers))
            answer = there.getresponse()
            data = relay.spoil(answer.read()) if self.command == "GET" else b""
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = len(data) if self.command == "GET" else answer.getheader("Content-Length", "0")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            there.close()
            try:
                for start in range(0, len(data), 65536):
                    self.wfile.write(data[start : start + 65536])
                    relay.n_bytes += len(data[start : start + 65536])
                    relay.arrived.set()
                    if relay.bytes_per_s:
                        time.sleep(65536 / relay.bytes_per_s)
            except ConnectionError:
                self.close_connection = True

        do_GET = do_HEAD = _pass_on

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients are killed in the middle

    server = Server(("127.0.0.1", 0), Handler)
    relay.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)
