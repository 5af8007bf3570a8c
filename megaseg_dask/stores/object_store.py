"""A folder in a bucket of S3 or Google, or in a container of Azure, through obstore."""

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import obstore
import obstore.exceptions
from obstore.store import GCSStore

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.stores.access import Client
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.failures import require_bucket, understand
from megaseg_dask.stores.notes import Entry, note
from megaseg_dask.stores.patience import Patience
from megaseg_dask.stores.traffic import PAGE, count_delete, count_get, count_list, count_put

if TYPE_CHECKING:
    from zarr.storage import StoreLike

_MAX_PASSES = 5


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """All keys of a bucket below a prefix, a :class:`Backend`; what it answers for is durable."""

    client: Client
    prefix: str
    patience: Patience

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        result = self.patience.ask(lambda: obstore.put(self.client, self._key(key), data))
        count_put(len(data))
        note(self._key(key), data, result["e_tag"] or "")

    def create(self, key: str, data: bytes, *, durable: bool = False) -> bool:
        try:
            self.patience.ask(lambda: obstore.put(self.client, self._key(key), data, mode="create"))
        except obstore.exceptions.AlreadyExistsError:
            # An earlier attempt may have been carried out, and its answer lost.
            count_put(0)
            return self.get(key) == data
        count_put(len(data))
        return True

    def get(self, key: str) -> bytes | None:
        try:
            data = self.patience.ask(
                lambda: bytes(obstore.get(self.client, self._key(key)).bytes())
            )
        except FileNotFoundError as error:
            require_bucket(error)
            count_get()
            return None
        count_get(len(data))
        return data

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        size = self.size(key)
        if size is None:
            return None
        # A range beyond the end of an object is an error.
        if start >= size:
            return b""
        end = min(stop, size)
        data = self.patience.ask(
            lambda: bytes(obstore.get_range(self.client, self._key(key), start=start, end=end))
        )
        count_get(len(data))
        return data

    def size(self, key: str) -> int | None:
        try:
            size = self.patience.ask(lambda: obstore.head(self.client, self._key(key))["size"])
        except FileNotFoundError as error:
            require_bucket(error)
            size = None
        count_get()
        return size

    def delete(self, key: str) -> None:
        self._delete(self._key(key))

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.patience.ask(lambda: obstore.delete(self.client, path))
        count_delete()

    def keys(self, prefix: str) -> list[str]:
        return sorted(self._relative(entry.key) for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> list[Entry]:
        below = self._key(prefix) or None
        listing = self.patience.ask(lambda: obstore.list(self.client, below).collect())
        count_list(len(listing))
        return [Entry(str(e["path"]), e["size"], e["e_tag"] or "") for e in listing]

    def children(self) -> list[str]:
        listing = self.patience.ask(
            lambda: obstore.list_with_delimiter(self.client, self.prefix or None)
        )
        objects = [entry["path"] for entry in listing["objects"]]
        count_list(len(objects) + len(listing["common_prefixes"]))
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
        is_there = self.patience.ask(lambda: any(self._iter_batches(1)))
        count_list()
        return is_there

    def remove(self) -> None:
        for _ in range(_MAX_PASSES):
            if self.patience.ask(self._remove_listed):
                return
        raise OSError(errno.EBUSY, "objects in it appear or disappear again and again", self.prefix)

    def _remove_listed(self) -> bool:
        """Remove what is listed; return whether all of that is gone."""
        complete = True
        n_keys = 0
        for batch in self._iter_batches(PAGE):
            n_keys += len(batch)
            if isinstance(self.client, GCSStore):
                # Google's store has no request for many objects: each one may fail by itself.
                map_threaded(self._delete, batch)
                continue
            try:
                obstore.delete(self.client, batch)
            except FileNotFoundError:
                # Another process removes the same objects, and Azure then leaves the rest.
                complete = False
            count_delete()
        count_list(n_keys)
        return complete

    def arrays(self, *, read_only: bool) -> "StoreLike":
        from zarr.storage import StorePath

        from megaseg_dask.stores.zarr_stores import ZarrObjects

        return StorePath(ZarrObjects(self.client, self.patience, read_only=read_only), self.prefix)

    def _key(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.prefix).lstrip("/")

    def _iter_batches(self, n: int) -> Iterator[list[str]]:
        for batch in obstore.list(self.client, self.prefix or None, chunk_size=n):
            yield [str(entry["path"]) for entry in batch]

    def _is_readable(self, key: str) -> bool:
        with suppress(obstore.exceptions.PermissionDeniedError):
            return replace(self, patience=self.patience.once).size(key) is not None
        return False
