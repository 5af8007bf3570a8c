"""A small web server on loopback: the page with its controls, and the objects of the stores, in parts.

All addresses begin with a token that nobody can guess, and answer only to a
browser that asked for this machine by its number: a page from elsewhere can
neither read the data nor learn that they are there. Arrays are served as they
are stored, so nothing is copied or decoded, and an object store is read where
somebody looks.
"""

import asyncio
import functools
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from tornado import httpserver, netutil, web

from megaseg_dask.errors import MegasegError
from megaseg_dask.stores import METADATA, Location

LOOPBACK = "127.0.0.1"

_READERS = 16
_MOST_BODY = 2**16
_PART = re.compile(r"bytes=(\d*)-(\d*)")

# Answers a request of the page with JSON values.
Answer = Callable[[Mapping[str, Any]], Any]
# Status, headers and body.
Reply = tuple[int, dict[str, str], bytes]


class Server:
    """Serves what was published of the stores, and the page; ``tell`` and ``change`` answer it."""

    def __init__(self, tell: Answer, change: Answer) -> None:
        self.tell, self.change = tell, change
        self.folders: dict[str, Location] = {}
        self._names: dict[Location, str] = {}
        self.pool = ThreadPoolExecutor(_READERS)
        token = secrets.token_urlsafe(24)
        handlers = [
            (rf"/{token}/", _PageHandler, {"server": self}),
            (rf"/{token}/state", _StateHandler, {"server": self}),
            (rf"/{token}/data/([^/]+)/(.*)", _DataHandler, {"server": self}),
        ]
        # Nothing is logged: the addresses hold the token.
        application = web.Application(handlers, log_function=lambda _: None)
        self._http = httpserver.HTTPServer(application, max_body_size=_MOST_BODY)
        sockets = netutil.bind_sockets(0, LOOPBACK)
        self._http.add_sockets(sockets)
        self.host = f"{LOOPBACK}:{sockets[0].getsockname()[1]}"
        self.url = f"http://{self.host}/{token}"
        # Who else may read: Neuroglancer's own server is another origin.
        self.friend = ""

    def publish(self, location: Location) -> str:
        """Return the address at which all below a location can be read from now on."""
        name = self._names.setdefault(location, str(len(self._names)))
        self.folders[name] = location
        return f"{self.url}/data/{name}"

    def close(self) -> None:
        """Stop answering."""
        self._http.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)


class _Handler(web.RequestHandler):
    def initialize(self, server: Server) -> None:
        self.server = server

    def prepare(self) -> None:
        # A name that leads here, of somebody else's page, has a host of its own.
        if self.request.host != self.server.host:
            raise web.HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-cache")

    def run(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self.server.pool, function, *arguments)


class _PageHandler(_Handler):
    def get(self) -> None:
        policy = (
            f"default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
            f"frame-src {self.server.friend}; frame-ancestors 'none'"
        )
        self.set_header("Content-Security-Policy", policy)
        self.finish(resources.files(__package__).joinpath("page.html").read_text())


class _StateHandler(_Handler):
    async def get(self) -> None:
        await self._answer(self.server.tell, {})

    async def post(self) -> None:
        try:
            wanted = json.loads(self.request.body)
        except ValueError:
            raise web.HTTPError(400) from None
        await self._answer(self.server.change, wanted if isinstance(wanted, dict) else {})

    async def _answer(self, answer: Answer, wanted: Mapping[str, Any]) -> None:
        try:
            self.finish(json.dumps(await self.run(answer, wanted)))
        except MegasegError as error:
            self.finish(json.dumps({"error": str(error)}))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise web.HTTPError(400) from None


class _DataHandler(_Handler):
    """Objects of the folders, whole or in parts, to be read by the viewer alone."""

    def initialize(self, server: Server) -> None:
        super().initialize(server)
        self.set_default_headers()

    def set_default_headers(self) -> None:
        super().set_default_headers()
        # Tornado asks for them once before it says for which server, and again for each error.
        if server := getattr(self, "server", None):
            self.set_header("Access-Control-Allow-Origin", server.friend)
            self.set_header("Access-Control-Allow-Headers", "range")
            self.set_header("Access-Control-Expose-Headers", "content-range, content-length")
            self.set_header("Accept-Ranges", "bytes")

    def options(self, *_: str) -> None:
        self.set_status(204)

    async def get(self, folder: str, key: str) -> None:
        if folder not in self.server.folders or not _is_key(key):
            raise web.HTTPError(404)
        status, headers, data = await self._read(self.server.folders[folder], key)
        self.set_status(status)
        for name, value in headers.items():
            self.set_header(name, value)
        self.finish(data)

    def compute_etag(self) -> None:
        """Nothing is kept by it, and a digest of each chunk takes time."""

    async def head(self, folder: str, key: str) -> None:
        await self.get(folder, key)

    async def _read(self, folder: Location, key: str) -> Reply:
        try:
            found: Reply = await self.run(_read, folder, key, self.request.headers.get("Range"))
            return found
        except MegasegError as error:
            # Neuroglancer shows the status, a person with the address open the text.
            return 502, {"Content-Type": "text/plain"}, str(error).encode()


def _is_key(key: str) -> bool:
    """Tell whether a key stays in its folder."""
    return "\\" not in key and "\0" not in key and not {"", ".", ".."} & set(key.split("/"))


def _read(folder: Location, key: str, wanted: str | None) -> Reply:
    """Return status, headers and bytes of what an object's ``Range`` asks for."""
    place, _, name = key.rpartition("/")
    folder = folder / place if place else folder
    found = _PART.fullmatch(wanted or "")
    if found is None or found.groups() == ("", ""):
        data = folder.get(name)
        if data is not None and name in METADATA:
            data = _without_display(data)
        return (
            (404, {}, b"")
            if data is None
            else (200, {"Content-Type": "application/octet-stream"}, data)
        )
    size = _size(folder, name)
    if size is None:
        return 404, {}, b""
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return 416, {"Content-Range": f"bytes */{size}"}, b""
    data = folder.part(name, start, stop)
    if data is None:
        return 404, {}, b""
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes {start}-{stop - 1}/{size}",
    }
    return 206, headers, data


def _without_display(metadata: bytes) -> bytes:
    """Return a group's metadata without how others would show it: Neuroglancer refuses channels without a colour."""
    try:
        found = json.loads(metadata)
        attributes = found.get("attributes", found)
        for part in (attributes, attributes.get("ome", {})):
            part.pop("omero", None)
    except (ValueError, AttributeError):
        return metadata  # no JSON object: whoever asked will say so
    return json.dumps(found).encode()


@functools.lru_cache(maxsize=2**14)
def _size(folder: Location, name: str) -> int | None:
    """Return the bytes of an object, which do not change once it is written: a shard is asked for many times."""
    return folder.size(name)
