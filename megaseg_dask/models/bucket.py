"""Objects of a bucket or web server: what it has, and parts of one version of an object.

A bucket is opened with its own options: where models come from has nothing to do with the stores of
a run. Nothing here waits for long, since a model can be brought by other means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import obstore
from obstore.exceptions import NotSupportedError

from megaseg_dask.errors import BundleError, MegasegError, SettingsError, StoreError
from megaseg_dask.stores import Location, StoreOptions, is_store_failure
from megaseg_dask.stores.access import Client, open_client
from megaseg_dask.stores.address import AZURE, S3, WEB, scheme_of, split
from megaseg_dask.stores.clouds import has_credentials
from megaseg_dask.stores.failures import explain

# Each request for a part of an object is repeated for this long; what was received stays.
_PATIENCE = (("max_retries", "5"), ("retry_timeout", "30"), ("read_timeout", "30"))
_NO_ANSWER = ("host", "refused", "time", "lost", "bucket")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One version of an object: its address and size, and what tells it from other versions."""

    url: str
    key: str
    n_bytes: int
    version: str
    md5: str | None


@dataclass(frozen=True, slots=True)
class Bucket:
    """A folder of a bucket or of a web server; the location carries how it is opened."""

    location: Location

    @classmethod
    def at(
        cls,
        address: str,
        endpoint: str | None = None,
        region: str | None = None,
        *,
        is_public: bool = False,
    ) -> "Bucket":
        """Return the bucket at an address, read without credentials if there are none.

        Raises:
            SettingsError: It is not the address of a bucket or web server.
        """
        location = Location.of(address)
        scheme = scheme_of(location.url)
        if scheme not in (S3, AZURE, *WEB):
            raise SettingsError(
                f"{location}: expected the name of a bucket, or s3://, az:// or https://"
            )
        options = StoreOptions(
            endpoint=endpoint.rstrip("/") if endpoint else None,
            anonymous=is_public or not has_credentials(scheme),
            options=(*_PATIENCE, ("s3.region", region)) if region else _PATIENCE,
        )
        return cls(Location.of(address, options))

    def __str__(self) -> str:
        endpoint = self.location.access.endpoint
        return f"{self.location.url} at {endpoint}" if endpoint else self.location.url

    def objects(self) -> list[StoredObject]:
        """List the objects right below, in one quick attempt.

        Raises:
            BundleError: It cannot be listed.
            StoreError: The store does not answer.
        """
        with self._naming("list", self.location.url):
            if not self.location.is_listable:
                raise BundleError(
                    f"cannot list {self.location}: a web server does not list its objects; give "
                    "the address of the object itself"
                )
            client = self._client(patient=False)
            listed = self.location.patience(patient=False).ask(
                lambda: obstore.list_with_delimiter(client, self._prefix or None)
            )
            return [self._stored(dict(meta)) for meta in listed["objects"]]

    def find(self, name: str) -> StoredObject | None:
        """Look for an object, in one quick attempt; None if there is none.

        Raises:
            BundleError: The request is refused.
            StoreError: The store does not answer.
        """
        key = f"{self._prefix}/{name}" if self._prefix else name
        with self._naming("read", (self.location / name).url):
            client = self._client(patient=False)
            try:
                meta = self.location.patience(patient=False).ask(lambda: obstore.head(client, key))
                return self._stored(dict(meta))
            except FileNotFoundError:
                return None

    def read(self, stored: StoredObject, start: int, stop: int) -> bytes:
        """Read a part of this version of an object.

        From a server that gives no parts, all bytes from ``start`` on are read.

        Raises:
            StoreError: The object has changed, or the store does not answer.
        """
        with self._naming("read", stored.url):
            patience = self.location.patience(patient=True)
            return patience.ask(lambda: self._read_once(stored, start, stop))

    def _read_once(self, stored: StoredObject, start: int, stop: int) -> bytes:
        client = self._client(patient=True)
        try:
            answer = obstore.get(client, stored.key, options={"range": (start, stop)})
        except NotSupportedError:
            answer = obstore.get(client, stored.key)
            stop = stored.n_bytes
        # Asked for with If-Match, some servers answer with an error that is repeated in vain.
        if self._stored(dict(answer.meta)).version != stored.version:
            raise StoreError(
                f"{stored.url} changed during the download; run the same command again"
            )
        data = bytes(answer.bytes())
        if answer.range == (0, stored.n_bytes):
            data = data[start:]
        if len(data) != stop - start:
            raise StoreError(
                f"{stored.url}: asked for bytes {start} to {stop}, got {len(data)}; try again"
            )
        return data

    @property
    def _prefix(self) -> str:
        return split(self.location.url)[1]

    def _client(self, *, patient: bool) -> Client:
        return open_client(self.location.url, self.location.access, patient=patient)

    def _stored(self, meta: dict[str, object]) -> StoredObject:
        key = str(meta["path"])
        etag = str(meta.get("e_tag") or "").strip('"')
        modified = meta.get("last_modified")
        version = etag
        if not etag and isinstance(modified, datetime):
            version = modified.isoformat()
        # S3 tells the MD5 of an object that was stored in one part; of many parts, it has a dash.
        is_md5 = len(etag) == 32 and set(etag) <= set("0123456789abcdef")
        return StoredObject(
            url=(self.location / key.removeprefix(self._prefix).lstrip("/")).url,
            key=key,
            n_bytes=int(str(meta["size"])),
            version=version,
            md5=etag if is_md5 and scheme_of(self.location.url) == S3 else None,
        )

    @contextmanager
    def _naming(self, verb: str, url: str) -> Iterator[None]:
        """Turn errors of the store into ours, with the next step."""
        try:
            yield
        except MegasegError:
            raise
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_failure(error)):
                raise
            access = self.location.access
            cause, line = explain(url, verb, error)
            problem = f"cannot {verb} {url}: {cause.words}"
            if cause.kind == "denied" and access.anonymous:
                line = (
                    f"{problem}; the request had no credentials; check the name of the bucket, or "
                    "set credentials in the environment"
                )
            if access.endpoint and cause.kind in _NO_ANSWER:
                line = f"{problem}; check the network and the endpoint {access.endpoint}"
            raise (BundleError if cause.is_of_request else StoreError)(line) from error
