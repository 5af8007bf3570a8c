"""A folder in an object store or on a web server, through obstore."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import obstore
import obstore.exceptions
import zarr.storage
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from megaseg_dask.stores.access import StoreOptions
from megaseg_dask.stores.address import WEB, scheme_of, split
from megaseg_dask.stores.backend import METADATA, Folder
from megaseg_dask.stores.clients import Client, client_of
from megaseg_dask.stores.failures import require_bucket, understand

_BULK = 1000
_PASSES = 5

_READ_ONLY = "http:// and https:// are for reading only; write to a folder, s3://, gs:// or az://"
_NOT_LISTED = "a web server does not list what it has; name the image itself"


def open_objects(url: str, options: StoreOptions, *, patient: bool) -> Folder:
    """Return a folder of a bucket, a container or a web server."""
    root, prefix = split(url)
    client = client_of(root, options, anonymous=options.is_anonymous(url), patient=patient)
    return (_Web if scheme_of(url) in WEB else _Bucket)(client, prefix)


class _ZarrObjects(zarr.storage.ObjectStore[Any]):
    """Zarr looks for metadata by trying; S3 denies what is not there to those who may not list, which means no."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            return await super().get(key, prototype, byte_range)
        except obstore.exceptions.PermissionDeniedError:
            if self.read_only and PurePosixPath(key).name in (*METADATA, ".zmetadata"):
                return None
            raise


@dataclass(frozen=True, slots=True)
class _Bucket:
    """All keys of a bucket below a prefix."""

    client: Client
    prefix: str

    def _key(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self.client, self._key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(self.client, self._key(key), data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def get(self, key: str) -> bytes | None:
        try:
            return bytes(obstore.get(self.client, self._key(key)).bytes())
        except FileNotFoundError as error:
            require_bucket(error)
            return None

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        # A range beyond the end of an object is an error.
        size = self.size(key)
        if size is None or start >= size:
            return None if size is None else b""
        return bytes(
            obstore.get_range(self.client, self._key(key), start=start, end=min(stop, size))
        )

    def size(self, key: str) -> int | None:
        try:
            return obstore.head(self.client, self._key(key))["size"]
        except FileNotFoundError as error:
            require_bucket(error)
            return None

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            obstore.delete(self.client, self._key(key))

    def keys(self, prefix: str) -> list[str]:
        return sorted(
            self._relative(path) for batch in self._batches(_BULK, prefix) for path in batch
        )

    def _batches(self, n: int, prefix: str = "") -> Iterator[list[str]]:
        for batch in obstore.list(self.client, self._key(prefix) or None, chunk_size=n):
            yield [str(entry["path"]) for entry in batch]

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.prefix).lstrip("/")

    def children(self) -> list[str]:
        found = obstore.list_with_delimiter(self.client, self.prefix or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        # An empty name is the mark of a folder that some tools make.
        return sorted({name for name in map(self._relative, paths) if name})

    def exists(self) -> bool:
        try:
            if self.is_folder():
                return True
        except obstore.exceptions.BaseError as error:
            # Who may not list may still read; if not, the refusal to list tells more than that of a HEAD, without text.
            if understand(error).kind == "denied" and any(map(self._is_readable, METADATA)):
                return True
            raise
        return bool(self.prefix) and self.size("") is not None

    def _is_readable(self, key: str) -> bool:
        with suppress(obstore.exceptions.PermissionDeniedError):
            return self.size(key) is not None
        return False

    def is_folder(self) -> bool:
        return any(self._batches(1))

    def remove(self) -> None:
        for _ in range(_PASSES):
            complete = True
            for batch in self._batches(_BULK):
                try:
                    obstore.delete(self.client, batch)
                except FileNotFoundError:
                    # Somebody else removes the same objects, and Azure leaves the rest of the batch.
                    complete = False
            if complete:
                return

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        return zarr.storage.StorePath(_ZarrObjects(self.client, read_only=read_only), self.prefix)


class _Web(_Bucket):
    """A folder on a web server: read by name; nothing is listed or written."""

    def put(self, key: str, data: bytes) -> None:
        raise io.UnsupportedOperation(_READ_ONLY)

    def create(self, key: str, data: bytes) -> bool:
        raise io.UnsupportedOperation(_READ_ONLY)

    def delete(self, key: str) -> None:
        raise io.UnsupportedOperation(_READ_ONLY)

    def remove(self) -> None:
        raise io.UnsupportedOperation(_READ_ONLY)

    def keys(self, prefix: str) -> list[str]:
        raise io.UnsupportedOperation(_NOT_LISTED)

    def children(self) -> list[str]:
        raise io.UnsupportedOperation(_NOT_LISTED)

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            return super().part(key, start, stop)
        except obstore.exceptions.NotSupportedError:
            # A server that gives no parts gives the whole.
            return (self.get(key) or b"")[start:stop]

    def exists(self) -> bool:
        if self.is_folder():
            return True
        with suppress(obstore.exceptions.PermissionDeniedError):
            # Servers deny a folder that has no page to show.
            return self.size("") is not None
        return False

    def is_folder(self) -> bool:
        return any(self.size(name) is not None for name in METADATA)
