"""Large objects to fetch: what a folder of a store has, and parts of one version of an object.

A depot is opened with options of its own: where models come from has nothing
to do with the stores of a run. Nothing here waits for long, since a model can
be brought by other means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import obstore
import obstore.exceptions

from megaseg_dask.errors import BundleError, MegasegError, SettingsError, StoreError
from megaseg_dask.stores.access import Client, StoreOptions, client_of
from megaseg_dask.stores.address import AZURE, S3, WEB, scheme_of, split
from megaseg_dask.stores.clouds import has_credentials
from megaseg_dask.stores.failures import explain, is_store_failure
from megaseg_dask.stores.location import Location

# Each request for a part of an object is repeated for this long; what was received stays.
_PATIENCE = (("max_retries", "5"), ("retry_timeout", "30"), ("read_timeout", "30"))
_WEB_IS_NOT_LISTED = "a web server does not list what it has; name the object itself"


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of an object: where it is, its size, and what tells this version from another."""

    url: str
    key: str
    n_bytes: int
    version: str
    md5: str | None


@dataclass(frozen=True, slots=True)
class Depot:
    """A folder of a bucket or of a web server."""

    location: Location
    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        if scheme_of(self.location.url) not in (S3, AZURE, *WEB):
            raise SettingsError(
                f"{self.location}: expected the name of a bucket, or s3://, az:// or https://"
            )

    @classmethod
    def of(
        cls,
        address: str,
        endpoint: str | None = None,
        region: str | None = None,
        public: bool = False,
    ) -> "Depot":
        """Return the depot at an address; read without credentials if it is public, or there are none to be found."""
        location = Location.of(address)
        anonymous = public or not has_credentials(scheme_of(location.url))
        return cls(location, endpoint and endpoint.rstrip("/"), region, anonymous)

    def __str__(self) -> str:
        return self.location.url + (f" at {self.endpoint}" if self.endpoint else "")

    def entries(self) -> list[Entry]:
        """List the objects right below, in one quick attempt; raises :class:`MegasegError`."""
        with self._naming("list", self.location.url):
            if scheme_of(self.location.url) in WEB:
                raise BundleError(f"cannot list {self.location}: {_WEB_IS_NOT_LISTED}")
            found = obstore.list_with_delimiter(self._client(patient=False), self._prefix or None)
            return [self._entry(dict(meta)) for meta in found["objects"]]

    def entry(self, name: str) -> Entry | None:
        """Look for an object, in one quick attempt; raises :class:`MegasegError`."""
        key = "/".join(filter(None, (self._prefix, name)))
        with self._naming("read", (self.location / name).url):
            try:
                return self._entry(dict(obstore.head(self._client(patient=False), key)))
            except FileNotFoundError:
                return None

    def read(self, entry: Entry, start: int, stop: int) -> bytes:
        """Read a part of this version of an object, or all from there on if the server gives no parts.

        Raises :class:`StoreError` if the object has changed.
        """
        with self._naming("read", entry.url):
            client = self._client(patient=True)
            try:
                answer = obstore.get(client, entry.key, options={"range": (start, stop)})
            except obstore.exceptions.NotSupportedError:
                answer, stop = obstore.get(client, entry.key), entry.n_bytes
            # Asked for with If-Match, some servers answer with an error that is repeated in vain.
            if self._entry(dict(answer.meta)).version != entry.version:
                raise StoreError(
                    f"{entry.url} changed while it was fetched; the same command starts anew"
                )
            data = bytes(answer.bytes())
        data = data[start:] if answer.range == (0, entry.n_bytes) else data
        if len(data) != stop - start:
            raise StoreError(
                f"{entry.url}: asked for bytes {start} to {stop}, got {len(data)}; try again"
            )
        return data

    @property
    def _prefix(self) -> str:
        return split(self.location.url)[1]

    def _client(self, *, patient: bool) -> Client:
        region = (("s3.region", self.region),) if self.region else ()
        options = StoreOptions(endpoint=self.endpoint, options=(*_PATIENCE, *region))
        return client_of(
            split(self.location.url)[0], options, anonymous=self.anonymous, patient=patient
        )

    def _entry(self, meta: dict[str, object]) -> Entry:
        key, etag, modified = (
            str(meta["path"]),
            str(meta.get("e_tag") or "").strip('"'),
            meta.get("last_modified"),
        )
        # Of an object that was stored in one part S3 tells the MD5; in many parts the tag has a dash.
        is_md5 = (
            scheme_of(self.location.url) == S3
            and len(etag) == 32
            and set(etag) <= set("0123456789abcdef")
        )
        version = etag or (modified.isoformat() if isinstance(modified, datetime) else "")
        name = key.removeprefix(self._prefix).lstrip("/")
        return Entry(
            (self.location / name).url,
            key,
            int(str(meta["size"])),
            version,
            etag if is_md5 else None,
        )

    @contextmanager
    def _naming(self, verb: str, url: str) -> Iterator[None]:
        try:
            yield
        except MegasegError:
            raise
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_failure(error)):
                raise
            cause, line = explain(url, verb, error)
            if cause.kind == "denied" and self.anonymous:
                line = (
                    f"cannot {verb} {url}: {cause.words}; it was asked without credentials; check the bucket's "
                    "name, or set credentials in the environment"
                )
            if self.endpoint and cause.kind in ("host", "refused", "time", "lost", "bucket"):
                line = f"cannot {verb} {url}: {cause.words}; check the network and the endpoint {self.endpoint}"
            raise (BundleError if cause.is_of_request else StoreError)(line) from error
