"""A web server on loopback for chunks that take a while: those that are predicted.

It has an origin of its own. A browser opens six connections to one origin, and six
predictions that are waited for would keep the image from being loaded. It answers the
viewer's page alone. A request that the browser gives up is dropped from the queue.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tornado import httpserver, netutil, web

from megaseg_dask.errors import MegasegError
from megaseg_dask.run.tasks.worker import describe
from megaseg_dask.tools.view.prediction import PredictedImage, Waiting
from megaseg_dask.tools.view.server import LOOPBACK

_READERS = 8
_LOG = logging.getLogger(__name__)


class ChunkServer:
    """Serves images that do not exist to one page, and to nobody else."""

    def __init__(self, images: Mapping[str, PredictedImage], page_origin: str) -> None:
        self.images = images
        self.pool = ThreadPoolExecutor(_READERS)
        self.page_origin = page_origin
        token = secrets.token_urlsafe(24)
        # The address holds the token, so nothing is logged.
        application = web.Application(
            [(f"/{token}/([^/]+)/\\d+/(.*)", _ChunkHandler)],
            chunk_server=self,
            log_function=lambda _: None,
        )
        self._http = httpserver.HTTPServer(application, max_body_size=0)
        sockets = netutil.bind_sockets(0, LOOPBACK)
        self._http.add_sockets(sockets)
        self.host = f"{LOOPBACK}:{sockets[0].getsockname()[1]}"
        self.origin = f"http://{self.host}"
        self._token = token

    def url_of(self, name: str) -> str:
        """Return the address of an image; it changes whenever its chunks do."""
        return f"{self.origin}/{self._token}/{name}/{self.images[name].generation}"

    def close(self) -> None:
        """Stop answering."""
        self._http.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)


class _ChunkHandler(web.RequestHandler):
    def initialize(self) -> None:
        self._waiting: Waiting | None = None
        self._is_gone = False

    def prepare(self) -> None:
        # A page from elsewhere may point a host name of its own at this machine.
        if self.request.host != self._server.host:
            raise web.HTTPError(403)
        origin = self.request.headers.get("Origin")
        if origin is not None and origin != self._server.page_origin:
            raise web.HTTPError(403)

    @property
    def _server(self) -> ChunkServer:
        server: ChunkServer = self.settings["chunk_server"]
        return server

    def set_default_headers(self) -> None:
        # Also of errors: a browser that may not read one takes it for a lost server.
        self.set_header("Access-Control-Allow-Origin", self._server.page_origin)
        self.set_header("Access-Control-Allow-Headers", "range")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    def options(self, *_: str) -> None:
        self.set_status(204)

    def on_connection_close(self) -> None:
        self._is_gone = True
        if self._waiting is not None:
            self._waiting.drop()

    async def head(self, name: str, key: str) -> None:
        await self.get(name, key)

    async def get(self, name: str, key: str) -> None:
        image = self._server.images.get(name)
        if image is None:
            raise web.HTTPError(404)
        try:
            data = image.document(key)
            if data is None:
                data = await self._chunk(image, key)
        except asyncio.CancelledError:
            # Nobody waits for it any more.
            return
        except Exception as error:
            # The page shows it, and goes on with other chunks.
            image.report(error)
            if not isinstance(error, MegasegError):
                _LOG.exception("a chunk could not be predicted")
            self.set_status(502)
            self.set_header("Content-Type", "text/plain")
            self.finish(describe(error))
            return
        if data is None:
            raise web.HTTPError(404)
        self.set_header("Content-Type", "application/octet-stream")
        self.finish(data)

    def compute_etag(self) -> None:
        """Return none: nothing is cached by it."""

    async def _chunk(self, image: PredictedImage, key: str) -> bytes | None:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._server.pool, image.chunk, key)
        if not isinstance(found, Waiting):
            return found
        self._waiting = found
        if self._is_gone:
            found.drop()
        return await asyncio.wrap_future(found.future)
