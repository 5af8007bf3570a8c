"""Folders and buckets as the stores of zarr."""

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Self

from obstore import put_async
from obstore.exceptions import PermissionDeniedError
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from megaseg_dask.stores.access import Client
from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.local import ABSENT, note_file, require_regular
from megaseg_dask.stores.notes import note
from megaseg_dask.stores.patience import Patience


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
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        await super().set(key, value)
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
            return await self._patience.ask_async(request)
        try:
            return await self._patience.once.ask_async(request)
        except PermissionDeniedError:
            return None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.as_buffer_like()
        result = await self._patience.ask_async(partial(put_async, self.store, key, data))
        note(key, data, result["e_tag"] or "")
