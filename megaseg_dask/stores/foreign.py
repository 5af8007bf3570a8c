"""A folder on Google's object store, or on any other kind that fsspec reaches."""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import fsspec.core
import zarr.storage

from megaseg_dask.errors import SettingsError
from megaseg_dask.stores.access import StoreOptions
from megaseg_dask.stores.address import GOOGLE, scheme_of
from megaseg_dask.stores.backend import Folder
from megaseg_dask.stores.failures import require_bucket


def open_foreign(url: str, options: StoreOptions) -> Folder:
    """Return a folder through fsspec; raises :class:`SettingsError` if its package for the scheme is not installed."""
    return _Foreign(url, _fsspec_options(url, options))


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A folder that fsspec knows how to reach, if its package for the scheme is installed."""

    url: str
    options: tuple[tuple[str, Any], ...]

    def _open(self, key: str = "") -> tuple[Any, str]:
        fs, path = fsspec.core.url_to_fs(self.url, **dict(self.options))
        return fs, f"{path}/{key}" if key else path

    def _open_to_write(self, key: str) -> tuple[Any, str]:
        fs, path = self._open(key)
        # What looks like a folder of Google is a prefix, and making it would be making a bucket.
        if scheme_of(self.url) != GOOGLE:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return fs, path

    def put(self, key: str, data: bytes) -> None:
        fs, path = self._open_to_write(key)
        fs.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        fs, path = self._open_to_write(key)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def get(self, key: str) -> bytes | None:
        fs, path = self._open(key)
        try:
            return bytes(fs.cat_file(path))
        except FileNotFoundError as error:
            require_bucket(error)
            return None

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        fs, path = self._open(key)
        size = self.size(key)
        if size is None or start >= size:
            return None if size is None else b""
        return bytes(fs.cat_file(path, start=start, end=min(stop, size)))

    def size(self, key: str) -> int | None:
        fs, path = self._open(key)
        try:
            found = fs.info(path)
        except FileNotFoundError as error:
            require_bucket(error)
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def delete(self, key: str) -> None:
        fs, path = self._open(key)
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    def keys(self, prefix: str) -> list[str]:
        fs, path = self._open(prefix)
        _, root = self._open()
        return sorted(found.removeprefix(root).lstrip("/") for found in fs.find(path))

    def children(self) -> list[str]:
        fs, path = self._open()
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            require_bucket(error)
            return []
        return sorted({PurePosixPath(name).name for name in found} - {""})

    def exists(self) -> bool:
        fs, path = self._open()
        # Listing tells a prefix without objects from a bucket that is not there.
        return bool(fs.exists(path)) or bool(fs.find(path, maxdepth=1))

    def is_folder(self) -> bool:
        fs, path = self._open()
        return bool(fs.isdir(path))

    def remove(self) -> None:
        fs, path = self._open()
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        return zarr.storage.FsspecStore.from_url(self.url, dict(self.options), read_only=read_only)


def _fsspec_options(url: str, options: StoreOptions) -> tuple[tuple[str, Any], ...]:
    """Return what fsspec's file system is opened with; raises :class:`SettingsError` if there is none."""
    scheme = scheme_of(url)
    given: dict[str, Any] = dict(options.of_scheme(url))
    if scheme == GOOGLE:
        # Read as gcsfs loads: else it asks by gRPC first what kind of bucket it is, and an emulator does not answer.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # It logs what it also raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        given |= {"endpoint_url": options.endpoint} if options.endpoint else {}
        given |= {"token": "anon"} if options.is_anonymous(url) else {}
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        step = "pip install 'megaseg-dask[gcs]'" if scheme == GOOGLE else "install that package"
        raise SettingsError(f"{url} cannot be opened yet: {error}; {step}") from error
    except ValueError as error:
        raise SettingsError(
            f"{url}: {scheme}:// is no kind of store that is known; use a path, s3://, gs://, az:// or "
            "https://"
        ) from error
    # What was listed before is not what is there now.
    return (("use_listings_cache", False), *sorted(given.items()))
