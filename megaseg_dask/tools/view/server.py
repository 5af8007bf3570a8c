"""A small web server on loopback: the page, Neuroglancer's files, and the objects of the stores.

All addresses begin with a token that nobody can guess, and answer only to a
browser that asked for this machine by its number: a page from elsewhere can
neither read the data nor learn that they are there. Page, Neuroglancer and data
have one origin, so no other origin is ever allowed, and the browser itself
refuses to ask any other machine. Arrays are served as they are stored: nothing
is copied or decoded, and only the parts that are shown are read from a store.
"""

import asyncio
import functools
import json
import mimetypes
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tornado import httpserver, netutil, web

from megaseg_dask.errors import MegasegError, SourceError
from megaseg_dask.ngff.coordinate_systems import in_version_05
from megaseg_dask.ngff.group import lies_below
from megaseg_dask.stores import METADATA, Location

LOOPBACK = "127.0.0.1"

R = TypeVar("R")
Json = Mapping[str, Any]
# A question of the page, answered in a thread.
Answer = Callable[[Json], Json]

_READERS = 16
_MAX_BODY_BYTES = 2**16
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")

# Where Neuroglancer's page lies; it finds the stream of its settings from this path.
_DRAWING = "v/1"
_EVENTS = "events/1"
# Its own controls are hidden: ours are beside it.
_DRAWING_SETTINGS = {"showUIControls": False, "showPanelBorders": False}

_PAGE_FILE = re.compile(r"[a-z_]+\.(?:js|css)")
_DRAWING_FILE = re.compile(r"[\w.-]+\.(?:js|css|wasm|html)")

# What a browser may load for the page, and for Neuroglancer, which makes decoders of chunks at
# run time, starts workers, and styles its own elements. Neither may ask another machine.
_COMMON_POLICY = (
    "default-src 'self'",
    "img-src 'self' data: blob:",
    "frame-ancestors 'self'",
    "base-uri 'none'",
    "form-action 'none'",
)
_PAGE_POLICY = "; ".join(_COMMON_POLICY)
_DRAWING_POLICY = "; ".join(
    (
        *_COMMON_POLICY,
        "script-src 'self' 'unsafe-eval'",
        "worker-src 'self' blob:",
        "connect-src 'self' data: blob: {others}",
        "style-src 'self' 'unsafe-inline'",
    )
)


class Objects(Protocol):
    """Objects that are made when they are asked for, such as meshes."""

    def get(self, key: str) -> bytes | None:
        """Return an object, or none if there is none of that name.

        Raises:
            MegasegError: It cannot be made.

        """


class Server:
    """Serves the page, the published locations and the answers to the page's questions.

    ``drawing`` is the folder of Neuroglancer's own page.
    """

    def __init__(self, drawing: Path) -> None:
        self.drawing = drawing
        # Other servers of this process that Neuroglancer may ask.
        self.other_origins: list[str] = []
        self.pool = ThreadPoolExecutor(_READERS)
        self.published: dict[str, Location | Objects] = {}
        self.documents: dict[str, Mapping[str, bytes]] = {}
        self._names: dict[Location | str, str] = {}
        self._token = secrets.token_urlsafe(24)
        # Nothing is logged: the addresses hold the token.
        self._application = web.Application(server=self, log_function=lambda _: None)
        self._add_handler("data/([^/]+)/(.*)", _DataHandler)
        self._add_handler(f"{_DRAWING}/(.*)", _DrawingHandler)
        self._add_handler(_EVENTS, _EventsHandler)
        self._add_handler("(|[^/]+[.][^/]+)", _PageHandler)
        self._http = httpserver.HTTPServer(self._application, max_body_size=_MAX_BODY_BYTES)
        sockets = netutil.bind_sockets(0, LOOPBACK)
        self._http.add_sockets(sockets)
        self.host = f"{LOOPBACK}:{sockets[0].getsockname()[1]}"
        self.url = f"http://{self.host}/{self._token}"

    def publish(self, location: Location, documents: Mapping[str, bytes] | None = None) -> str:
        """Serve all below a location, and return its URL.

        ``documents`` are served in place of its own objects of these names.
        """
        url = self._publish(location, location)
        self.documents[self._names[location]] = documents or {}
        return url

    def publish_made(self, name: str, objects: Objects) -> str:
        """Serve objects that are made on request, and return the URL of their folder.

        The URL stays the same for a name; the newest objects answer.
        """
        return self._publish(name, objects)

    def _publish(self, key: Location | str, value: Location | Objects) -> str:
        name = self._names.setdefault(key, str(len(self._names)))
        self.published[name] = value
        return f"{self.url}/data/{name}"

    def answer(self, name: str, function: Answer) -> None:
        """Answer the page's questions of one name.

        A ``MegasegError`` of the function is shown on the page. ``TypeError``, ``ValueError``,
        ``KeyError`` and ``AttributeError`` say that the question is malformed.
        """
        self._add_handler(f"ask/{name}", _AskHandler, function=function)

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
        origin = self.request.headers.get("Origin")
        if origin is not None and origin != f"http://{self.server.host}":
            raise web.HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-cache")

    def in_thread(self, function: Callable[..., R], *arguments: object) -> Awaitable[R]:
        return asyncio.get_running_loop().run_in_executor(self.server.pool, function, *arguments)


class _FileHandler(_Handler):
    """Files of one folder, of known names."""

    async def send(self, file: Traversable, policy: str) -> None:
        self.set_header("Content-Security-Policy", policy)
        kind, _ = mimetypes.guess_type(file.name)
        text = {"text/javascript", "text/css", "text/html"}
        charset = "; charset=utf-8" if kind in text else ""
        self.set_header("Content-Type", f"{kind or 'application/octet-stream'}{charset}")
        try:
            self.finish(await self.in_thread(file.read_bytes))
        except FileNotFoundError:
            raise web.HTTPError(404) from None


class _PageHandler(_FileHandler):
    async def get(self, name: str) -> None:
        if name and not _PAGE_FILE.fullmatch(name):
            raise web.HTTPError(404)
        await self.send(resources.files(__package__).joinpath(name or "page.html"), _PAGE_POLICY)


class _DrawingHandler(_FileHandler):
    """Neuroglancer's own page and its parts."""

    async def get(self, name: str) -> None:
        if name and not _DRAWING_FILE.fullmatch(name):
            raise web.HTTPError(404)
        policy = _DRAWING_POLICY.format(others=" ".join(self.server.other_origins))
        await self.send(self.server.drawing / (name or "index.html"), policy)


class _EventsHandler(_Handler):
    """What Neuroglancer asks of its Python server: settings, once; it reports a stream that ends.

    Its state is set by our page, which has the same origin.
    """

    def initialize(self) -> None:
        self._is_closed = asyncio.Event()

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        message = {"k": "c", "s": _DRAWING_SETTINGS, "g": "1"}
        self.write(f"data: {json.dumps(message)}\n\n")
        await self.flush()
        # The viewer ends before the page is closed.
        with suppress(asyncio.CancelledError):
            await self._is_closed.wait()

    def on_connection_close(self) -> None:
        self._is_closed.set()


class _AskHandler(_Handler):
    def initialize(self, function: Answer) -> None:
        self._function = function

    async def post(self) -> None:
        try:
            question = json.loads(self.request.body)
        except ValueError:
            raise web.HTTPError(400) from None
        try:
            self.finish(json.dumps(await self.in_thread(self._function, question)))
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
        super().set_default_headers()
        self.set_header("Accept-Ranges", "bytes")

    async def get(self, name: str, key: str) -> None:
        published = self.server.published.get(name)
        if published is None or not lies_below(key):
            raise web.HTTPError(404)
        document = self.server.documents.get(name, {}).get(key)
        if document is not None:
            reply = _Reply(200, document, _BYTES)
        else:
            reply = await self._read(published, key)
        self.set_status(reply.status)
        for header, value in reply.headers.items():
            self.set_header(header, value)
        self.finish(reply.body)

    async def head(self, name: str, key: str) -> None:
        await self.get(name, key)

    def compute_etag(self) -> None:
        """Return none: a digest of each chunk takes time, and nothing is cached by it."""

    async def _read(self, published: Location | Objects, key: str) -> _Reply:
        try:
            if not isinstance(published, Location):
                return await self.in_thread(_make, published, key)
            wanted = self.request.headers.get("Range", "")
            return await self.in_thread(_read, published, key, wanted)
        except MegasegError as error:
            # Neuroglancer shows the status; a person who opens the address sees the text.
            return _Reply(502, str(error).encode(), {"Content-Type": "text/plain"})


def _make(objects: Objects, key: str) -> _Reply:
    data = objects.get(key)
    return _MISSING if data is None else _Reply(200, data, _BYTES)


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
