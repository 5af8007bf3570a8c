"""A folder on any kind of store: the few operations that a location needs."""

from typing import TYPE_CHECKING, Protocol

# A command that only lists and reads small objects does not pay for zarr.
if TYPE_CHECKING:
    from zarr.storage import StoreLike

from megaseg_dask.stores.notes import Entry

# The files that make a folder a group or an array, and hold their attributes.
METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray")


class Backend(Protocol):
    """Objects below one address; keys are relative to it.

    Errors are those of the operating system or of the store's client.
    """

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Write one object, whole or not at all; a ``durable`` one survives a power loss."""

    def create(self, key: str, data: bytes, *, durable: bool = False) -> bool:
        """Write one object unless it exists, as ``put`` does; return whether it was written."""

    def get(self, key: str) -> bytes | None:
        """Read one object; ``None`` if it does not exist."""

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Read bytes ``start:stop`` of one object, fewer at its end; ``None`` if it is absent."""

    def size(self, key: str) -> int | None:
        """Return the bytes of one object; ``None`` if it does not exist."""

    def delete(self, key: str) -> None:
        """Remove one object, if it exists."""

    def keys(self, prefix: str) -> list[str]:
        """Return all keys below a folder of this one, sorted."""

    def entries(self) -> list[Entry]:
        """Return all objects below this folder."""

    def children(self) -> list[str]:
        """Return the names right below, sorted."""

    def exists(self) -> bool:
        """Return whether anything is at the address or below it."""

    def is_folder(self) -> bool:
        """Return whether anything is below the address."""

    def remove(self) -> None:
        """Remove all below the address."""

    def arrays(self, *, read_only: bool) -> "StoreLike":
        """Return the zarr store that has its root here."""
