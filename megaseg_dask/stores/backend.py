"""A folder on any kind of store: the few operations that a location needs of it."""

from typing import Protocol

import zarr.storage

# What makes a folder a group or an array, and their attributes.
METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray")


class Folder(Protocol):
    """Objects below one address; keys are relative to it. Errors are those of the system or of the store's client."""

    def put(self, key: str, data: bytes) -> None:
        """Write one object, whole or not at all."""

    def create(self, key: str, data: bytes) -> bool:
        """Write one object unless there is one; tell whether it was written."""

    def get(self, key: str) -> bytes | None:
        """Read one object; ``None`` if there is none."""

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        """Read bytes ``start:stop`` of one object, fewer if it ends before; ``None`` if there is none."""

    def size(self, key: str) -> int | None:
        """Return the bytes of one object; ``None`` if there is none."""

    def delete(self, key: str) -> None:
        """Remove one object, if there is one."""

    def keys(self, prefix: str) -> list[str]:
        """Return all keys below a folder of this one, sorted."""

    def children(self) -> list[str]:
        """Return the names right below, sorted."""

    def exists(self) -> bool:
        """Tell whether there is anything at the address or below it."""

    def is_folder(self) -> bool:
        """Tell whether there is anything below the address."""

    def remove(self) -> None:
        """Remove all below the address."""

    def arrays(self, *, read_only: bool) -> zarr.storage.StoreLike:
        """Return the zarr store that has its root here."""
