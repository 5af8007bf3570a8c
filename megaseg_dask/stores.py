"""Where data live: one location type for arrays and for small objects.

A :class:`Location` is an address and nothing else, so it travels to workers.
Small objects (plan, journal, tables) are put atomically through obstore;
arrays go through zarr. Errors name the URL and the cause.
"""

import functools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import obstore
import obstore.exceptions
import zarr
import zarr.storage
from obstore.store import LocalStore

from megaseg_dask.errors import MegasegError, SettingsError, StoreError, TargetError

ZARR_FORMAT = {"0.4": 2, "0.5": 3}


@dataclass(frozen=True, slots=True)
class Location:
    """A folder on some store."""

    url: str

    @classmethod
    def of(cls, address: str | Path) -> "Location":
        """Return the location of a path or ``file://`` URL, made absolute.

        Raises :class:`SettingsError` for a scheme that cannot be opened.
        """
        text = str(address).removeprefix("file://")
        if not text:
            raise SettingsError("an empty path names no image; give a folder such as cells.zarr")
        if "://" in text:
            raise SettingsError(f"{text}: only local folders can be opened so far; copy the image to a disk")
        # Not resolve: a link stays the address that the user knows.
        return cls(os.path.normpath(Path(text).expanduser().absolute()))

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url}/{name}") if name else self

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        """The folder of a local location."""
        return Path(self.url)

    @property
    def name(self) -> str:
        """Last part of the address, without ``.ome.zarr`` or ``.zarr``."""
        return re.sub(r"(?<=.)(\.ome)?\.zarr$", "", self.path.name)

    def sibling(self, suffix: str) -> "Location":
        """Return the location beside this one whose name has ``suffix`` appended."""
        return Location(self.url.rstrip("/") + suffix)

    def exists(self) -> bool:
        """Tell whether anything is there."""
        return self.path.exists()

    def is_inside(self, other: "Location") -> bool:
        """Tell whether this is a folder below ``other``."""
        return other.path.resolve() in self.path.resolve().parents

    def is_same(self, other: "Location") -> bool:
        """Tell whether both are one folder, links followed."""
        return other.path.resolve() == self.path.resolve()

    # -- small objects

    def put(self, key: str, data: bytes) -> None:
        """Write one object, whole or not at all."""
        with naming(self / key, "write"):
            obstore.put(LocalStore(prefix=self.url, mkdir=True), key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write one object unless there is one; tell whether it was written. Of several writers one succeeds."""
        with naming(self / key, "write"):
            try:
                obstore.put(LocalStore(prefix=self.url, mkdir=True), key, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def delete(self, key: str) -> None:
        """Remove one object; none there is no error."""
        with naming(self / key, "remove"):
            (self.path / key).unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        """Read one object; ``None`` if there is none."""
        if not self.exists():
            return None
        with naming(self / key, "read"):
            try:
                return bytes(obstore.get(LocalStore(prefix=self.url), key).bytes())
            except FileNotFoundError:
                return None

    def size(self, key: str) -> int | None:
        """Return the bytes of one object; ``None`` if there is none."""
        if not self.exists():
            return None
        with naming(self / key, "read"):
            try:
                return obstore.head(LocalStore(prefix=self.url), key)["size"]
            except FileNotFoundError:
                return None

    def head(self, key: str, n_bytes: int) -> bytes | None:
        """Read the beginning of one object; ``None`` if there is none."""
        with naming(self / key, "read"):
            try:
                with (self.path / key).open("rb") as file:
                    return file.read(n_bytes)
            except FileNotFoundError:
                return None

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a folder, sorted."""
        if not self.exists():
            return []
        with naming(self / prefix, "list"):
            found = obstore.list(LocalStore(prefix=self.url), prefix=prefix).collect()
        return sorted(str(entry["path"]) for entry in found)

    def remove(self) -> None:
        """Remove the folder and all below it; nothing there is no error."""
        with naming(self, "remove"):
            shutil.rmtree(self.path, ignore_errors=not self.exists())

    def require_writable(self) -> None:
        """Raise :class:`TargetError` if nothing could be created here and beside it; writes nothing that stays."""
        # The run folder stands beside the target.
        beside = next(p for p in (*self.path.parents, self.path) if p.exists())
        for folder in {beside, self.path} if self.path.is_dir() else {beside}:
            probe = folder / f".{self.path.name}.megaseg-probe"
            try:
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise TargetError(f"{self.url} cannot be written: {error.strerror} in {folder}; choose another "
                                  "target or mend its permissions") from error  # fmt: skip

    # -- arrays

    @property
    def arrays(self) -> zarr.storage.LocalStore:
        """The zarr store rooted here."""
        return zarr.storage.LocalStore(self.url)

    def open_group(self) -> zarr.Group:
        """Open the group here for reading; raises what zarr raises."""
        # Consolidated metadata may be older than the attributes they repeat.
        return zarr.open_group(self.arrays, mode="r", use_consolidated=False)

    def ome_attributes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all attributes of the group here, and the OME metadata among them (0.5 has them under ``ome``)."""
        attributes = cast(dict[str, Any], self.open_group().attrs.asdict())
        ome = attributes.get("ome", attributes)
        return attributes, ome if isinstance(ome, dict) else {}

    def open_array(self, *, writable: bool = False) -> zarr.Array[Any]:
        """Open the array here."""
        with naming(self, "open"):
            return zarr.open_array(self.arrays, mode="r+" if writable else "r")

    def require_version(self, version: str) -> None:
        """Raise :class:`TargetError` if a group of another Zarr format is here: each reader would see half of it."""
        format_ = ZARR_FORMAT[version]
        if self.size(".zgroup" if format_ == 3 else "zarr.json") is not None:
            raise TargetError(f"{self} is a Zarr v{5 - format_} group, and OME-Zarr {version} is stored as "
                              f"v{format_}; choose the other version with --ome-zarr")  # fmt: skip

    def write_group(self, version: str, attributes: Mapping[str, object], *, replace: bool = False) -> None:
        """Create the group if it is not there, and set these of its attributes, or these alone.

        See :meth:`require_version`.
        """
        self.require_version(version)
        format_ = cast("zarr.core.common.ZarrFormat", ZARR_FORMAT[version])
        with naming(self, "write"):
            group = zarr.open_group(self.arrays, mode="a", zarr_format=format_)
            if replace:
                group.attrs.put(dict(attributes))  # type: ignore[arg-type]
            elif attributes:
                group.update_attributes(dict(attributes))


@contextmanager
def naming(location: Location, verb: str) -> Iterator[None]:
    """Turn errors of a store into :class:`StoreError` that names URL, verb and cause."""
    try:
        yield
    except (OSError, obstore.exceptions.BaseError) as error:
        # Whoever opens something knows best what it means that nothing is there.
        if isinstance(error, MegasegError) or (isinstance(error, FileNotFoundError) and verb == "open"):
            raise
        raise StoreError(f"cannot {verb} {location}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """Return one line for an error of a store: the system's words, without address or debug output."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


@functools.lru_cache(maxsize=64)
def cached_array(location: Location, *, writable: bool = False) -> zarr.Array[Any]:
    """Open an array once per process: opening costs more than reading a small chunk."""
    return location.open_array(writable=writable)
