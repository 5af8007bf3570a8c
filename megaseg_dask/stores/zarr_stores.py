"""Folders and buckets as the stores of zarr."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import NoReturn, Self

from obstore import put_async
from obstore.exceptions import PermissionDeniedError
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from megaseg_dask.stores.access import Client
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.local import ABSENT, note_file, require_regular
from megaseg_dask.stores.notes import note
from megaseg_dask.stores.patience import Patience
from megaseg_dask.stores.traffic import count_get, count_put
from megaseg_dask.stores.zipped import ZipFolder


def _counted(found: Buffer | None) -> Buffer | None:
    count_get(0 if found is None else len(found))
    return found


class RegularFiles(LocalStore):
    """A store of zarr that reads regular files alone, and notes what it writes."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        with suppress(*ABSENT):
            await asyncio.to_thread(require_regular, self.root, key)
        return _counted(await super().get(key, prototype, byte_range))

    async def set(self, key: str, value: Buffer) -> None:
        await super().set(key, value)
        count_put(len(value))
        note_file(self.root / key, value.as_buffer_like())


class ZarrObjects(ObjectStore[Client]):
    """Zarr's store of objects, whose requests are made again, and where denied metadata are absent.

    Zarr looks for metadata by trying, and S3 denies absent objects to readers
    who may not list. Nothing is listed or removed by zarr.
    """

    def __init__(self, client: Client, patience: Patience, *, read_only: bool) -> None:
        super().__init__(client, read_only=read_only)
        self._patience = patience

    def with_read_only(self, read_only: bool = False) -> Self:
        return type(self)(self.store, self._patience, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        request = partial(super().get, key, prototype, byte_range)
        may_be_absent = self.read_only and PurePosixPath(key).name in (*METADATA, ".zmetadata")
        if not may_be_absent:
            return _counted(await self._patience.ask_async(request))
        try:
            return _counted(await self._patience.once.ask_async(request))
        except PermissionDeniedError:
            return _counted(None)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.as_buffer_like()
        result = await self._patience.ask_async(partial(put_async, self.store, key, data))
        count_put(len(value))
        note(key, data, result["e_tag"] or "")


class ZippedObjects(Store):
    """A folder in a zip file as a store of zarr, which is only read."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, folder: ZipFolder) -> None:
        super().__init__(read_only=True)
        self._folder = folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZippedObjects) and self._folder == other._folder

    async def get(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if byte_range is None:
            return self._folder.get(key)
        size = self._folder.size(key) or 0
        match byte_range:
            case RangeByteRequest(start, stop):
                return self._folder.get_range(key, start, stop)
            case OffsetByteRequest(start):
                return self._folder.get_range(key, start, size)
            case SuffixByteRequest(n_bytes):
                return self._folder.get_range(key, max(0, size - n_bytes), size)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        reads = [self.get(key, prototype, byte_range) for key, byte_range in key_ranges]
        return list(await asyncio.gather(*reads))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._folder.size, key) is not None

    async def list(self) -> AsyncIterator[str]:
        for key in self._folder.keys(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._folder.keys(""):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = prefix.rstrip("/")
        names = {key[len(folder) :].lstrip("/") for key in self._folder.keys(folder)}
        for name in sorted({name.partition("/")[0] for name in names}):
            yield name

    async def set(self, key: str, value: Buffer) -> NoReturn:
        self._check_writable()
        raise AssertionError

    async def delete(self, key: str) -> NoReturn:
        self._check_writable()
        raise AssertionError
