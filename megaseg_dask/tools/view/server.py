"""A small web server on loopback: the page with its controls, and the objects of the stores.

All addresses begin with a token that nobody can guess, and answer only to a
browser that asked for this machine by its number: a page from elsewhere can
neither read the data nor learn that they are there. Arrays are served as they
are stored: nothing is copied or decoded, and only the parts that are shown are
read from a store.
"""

import asyncio
import functools
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Protocol, TypeVar

from tornado import httpserver, netutil, web

from megaseg_dask.errors import MegasegError, SourceError
from megaseg_dask.ngff.coordinate_systems import in_version_05
from megaseg_dask.ngff.group import lies_below
from megaseg_dask.stores import METADATA, Location

LOOPBACK = "127.0.0.1"

R = TypeVar("R")
Json = Mapping[str, Any]

_READERS = 16
_MAX_BODY_BYTES = 2**16
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Controls(Protocol):
    """What the page asks for: the values of its controls, and changes of them, as JSON."""

    def state(self) -> Json:
        """Return all values."""

    def change(self, request: Json) -> Json:
        """Make a change and return all values.

        Raises:
            MegasegError: The text is shown on the page.
            TypeError, ValueError, KeyError, AttributeError: The request is malformed.

        """


class Server:
    """Serves the published locations; ``allowed_origin`` is the only other origin that reads them.

    Neuroglancer's own server is that origin.
    """

    def __init__(self, allowed_origin: str) -> None:
        self.allowed_origin = allowed_origin
        self.pool = ThreadPoolExecutor(_READERS)
        self.locations: dict[str, Location] = {}
        self._names: dict[Location, str] = {}
        self._token = secrets.token_urlsafe(24)
        # Nothing is logged: the addresses hold the token.
        self._application = web.Application(server=self, log_function=lambda _: None)
        self._add_handler("data/([^/]+)/(.*)", _DataHandler)
        self._http = httpserver.HTTPServer(self._application, max_body_size=_MAX_BODY_BYTES)
        sockets = netutil.bind_sockets(0, LOOPBACK)
        self._http.add_sockets(sockets)
        self.host = f"{LOOPBACK}:{sockets[0].getsockname()[1]}"
        self.url = f"http://{self.host}/{self._token}"

    def publish(self, location: Location) -> str:
        """Serve all below a location, and return its URL."""
        name = self._names.setdefault(location, str(len(self._names)))
        self.locations[name] = location
        return f"{self.url}/data/{name}"

    def serve_page(self, controls: Controls) -> None:
        """Serve the page, and answer it by ``controls``."""
        self._add_handler("", _PageHandler)
        self._add_handler("state", _StateHandler, controls=controls)

    def close(self) -> None:
        """Stop answering."""
        self._http.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _add_handler(
        self, path: str, handler: type[web.RequestHandler], **arguments: object
    ) -> None:
        self._application.add_handlers(".*", [(f"/{self._token}/{path}", handler, arguments)])


class _Handler(web.RequestHandler):
    @property
    def server(self) -> Server:
        server: Server = self.settings["server"]
        return server

    def prepare(self) -> None:
        # A page from elsewhere may point a host name of its own at this machine.
        if self.request.host != self.server.host:
            raise web.HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-cache")

    def in_thread(self, function: Callable[..., R], *arguments: object) -> Awaitable[R]:
        return asyncio.get_running_loop().run_in_executor(self.server.pool, function, *arguments)


class _PageHandler(_Handler):
    def get(self) -> None:
        policy = [
            "default-src 'self'",
            "style-src 'unsafe-inline'",
            "script-src 'unsafe-inline'",
            "img-src data:",
            f"frame-src {self.server.allowed_origin}",
            "frame-ancestors 'none'",
        ]
        self.set_header("Content-Security-Policy", "; ".join(policy))
        self.finish(resources.files(__package__).joinpath("page.html").read_text())


class _StateHandler(_Handler):
    def initialize(self, controls: Controls) -> None:
        self.controls = controls

    async def get(self) -> None:
        await self._answer(self.controls.state)

    async def post(self) -> None:
        try:
            request = json.loads(self.request.body)
        except ValueError:
            raise web.HTTPError(400) from None
        await self._answer(self.controls.change, request)

    async def _answer(self, function: Callable[..., Json], *arguments: Json) -> None:
        try:
            self.finish(json.dumps(await self.in_thread(function, *arguments)))
        except MegasegError as error:
            self.finish(json.dumps({"error": str(error)}))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise web.HTTPError(400) from None


@dataclass(frozen=True, slots=True)
class _Reply:
    """Status, body and headers of an answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


_MISSING = _Reply(404)
_BYTES = {"Content-Type": "application/octet-stream"}


class _DataHandler(_Handler):
    """Objects below the published locations, whole or in ranges.

    Not tornado's StaticFileHandler, which reads on the event loop: a store answers after
    milliseconds, and the viewer's requests would wait for each other.
    """

    def set_default_headers(self) -> None:
        # Also of errors: a browser that may not read one takes it for a lost server.
        super().set_default_headers()
        self.set_header("Access-Control-Allow-Origin", self.server.allowed_origin)
        self.set_header("Access-Control-Allow-Headers", "range")
        self.set_header("Access-Control-Expose-Headers", "content-range, content-length")
        self.set_header("Accept-Ranges", "bytes")

    def options(self, *_: str) -> None:
        self.set_status(204)

    async def get(self, name: str, key: str) -> None:
        location = self.server.locations.get(name)
        if location is None or not lies_below(key):
            raise web.HTTPError(404)
        reply = await self._read(location, key)
        self.set_status(reply.status)
        for header, value in reply.headers.items():
            self.set_header(header, value)
        self.finish(reply.body)

    async def head(self, name: str, key: str) -> None:
        await self.get(name, key)

    def compute_etag(self) -> None:
        """Return none: a digest of each chunk takes time, and nothing is cached by it."""

    async def _read(self, location: Location, key: str) -> _Reply:
        try:
            return await self.in_thread(_read, location, key, self.request.headers.get("Range", ""))
        except MegasegError as error:
            # Neuroglancer shows the status; a person who opens the address sees the text.
            return _Reply(502, str(error).encode(), {"Content-Type": "text/plain"})


def _read(location: Location, key: str, range_header: str) -> _Reply:
    """Return an object, or the bytes of it that a ``Range`` header asks for."""
    folder, _, name = key.rpartition("/")
    if folder:
        location = location / folder
    match = _RANGE.fullmatch(range_header)
    if match is None or not any(match.groups()):
        return _read_whole(location, name)
    size = _size(location, name)
    if size is None:
        return _MISSING
    start, stop = _resolve_range(match[1], match[2], size)
    if start >= stop:
        return _Reply(416, headers={"Content-Range": f"bytes */{size}"})
    data = location.get_range(name, start, stop)
    if data is None:
        return _MISSING
    return _Reply(206, data, {**_BYTES, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _read_whole(location: Location, name: str) -> _Reply:
    data = location.get(name)
    if data is None:
        return _MISSING
    if name in METADATA:
        data = _for_viewer(location, data)
    return _Reply(200, data, _BYTES)


def _resolve_range(first: str, last: str, size: int) -> tuple[int, int]:
    """Return start and stop of a range: both are given, or only the last bytes are counted."""
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def _for_viewer(location: Location, metadata: bytes) -> bytes:
    """Return metadata as Neuroglancer reads them.

    It refuses channels without a color. What it knows of OME-Zarr 0.6 differs between its versions.
    """
    try:
        document = json.loads(metadata)
        attributes = document.get("attributes", document)
        for group in (attributes, attributes.get("ome", {})):
            group.pop("omero", None)
        if "ome" in attributes:
            attributes["ome"] = in_version_05(location, attributes["ome"])
    except SourceError:
        raise
    except (ValueError, AttributeError):
        # No JSON object: the reader will say so.
        return metadata
    return json.dumps(document).encode()


@functools.lru_cache(maxsize=2**14)
def _size(location: Location, name: str) -> int | None:
    """Return the bytes of an object; cached, since a shard never changes and is read often."""
    return location.size(name)
