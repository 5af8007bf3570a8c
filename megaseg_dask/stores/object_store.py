"""A folder in a bucket of S3 or Google, or in a container of Azure, through obstore."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

import obstore
import obstore.exceptions
import zarr.storage
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from megaseg_dask.stores.access import Client
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import require_bucket, understand

_BATCH = 1000
_MAX_PASSES = 5


class _ZarrObjects(zarr.storage.ObjectStore[Client]):
    """Zarr's store of objects, in which denied metadata do not exist.

    Zarr looks for metadata by trying, and S3 denies absent objects to readers
    who may not list.
    """

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
class BucketFolder:
    """All keys of a bucket below a prefix, a :class:`Backend`; what it answers for is durable."""

    client: Client
    prefix: str

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        obstore.put(self.client, self._key(key), data)

    def create(self, key: str, data: bytes, *, durable: bool = False) -> bool:
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

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        size = self.size(key)
        if size is None:
            return None
        # A range beyond the end of an object is an error.
        if start >= size:
            return b""
        stop = min(stop, size)
        return bytes(obstore.get_range(self.client, self._key(key), start=start, end=stop))

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
        keys: list[str] = []
        for batch in self._iter_batches(_BATCH, prefix):
            keys += map(self._relative, batch)
        return sorted(keys)

    def children(self) -> list[str]:
        listing = obstore.list_with_delimiter(self.client, self.prefix or None)
        objects = [entry["path"] for entry in listing["objects"]]
        names = set(map(self._relative, [*listing["common_prefixes"], *objects]))
        # An empty name is the mark of a folder that some tools make.
        return sorted(names - {""})

    def exists(self) -> bool:
        try:
            if self.is_folder():
                return True
        except obstore.exceptions.BaseError as error:
            # Readers may be allowed to read and not to list. If they may not read either, the
            # refusal to list tells more than that of a HEAD request, which has no text.
            if understand(error).kind == "denied" and any(map(self._is_readable, METADATA)):
                return True
            raise
        return bool(self.prefix) and self.size("") is not None

    def is_folder(self) -> bool:
        return any(self._iter_batches(1))

    def remove(self) -> None:
        for _ in range(_MAX_PASSES):
            complete = True
            for batch in self._iter_batches(_BATCH):
                try:
                    obstore.delete(self.client, batch)
                except FileNotFoundError:
                    # Another process removes the same objects, and Azure then leaves the rest.
                    complete = False
            if complete:
                return

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        return zarr.storage.StorePath(_ZarrObjects(self.client, read_only=read_only), self.prefix)

    def _key(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.prefix).lstrip("/")

    def _iter_batches(self, n: int, prefix: str = "") -> Iterator[list[str]]:
        for batch in obstore.list(self.client, self._key(prefix) or None, chunk_size=n):
            yield [str(entry["path"]) for entry in batch]

    def _is_readable(self, key: str) -> bool:
        with suppress(obstore.exceptions.PermissionDeniedError):
            return self.size(key) is not None
        return False
