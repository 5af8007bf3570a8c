"""Where data live: addresses, and small objects below them, on a disk or in an object store.

A :class:`Location` is an address and nothing else, so it travels to workers;
how its store is opened is set once per process. Errors name the address, the
cause and the next step.
"""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megaseg_dask.errors import MegasegError, SourceError, StoreError, TargetError
from megaseg_dask.messages import closest
from megaseg_dask.stores import access, address, local
from megaseg_dask.stores.backend import Folder
from megaseg_dask.stores.failures import explain, is_store_failure
from megaseg_dask.stores.foreign import open_foreign
from megaseg_dask.stores.object_store import open_objects

# The others, Google among them, are open only to those who installed a package for them.
_KNOWN = (address.LOCAL, address.S3, address.AZURE, *address.WEB)


@dataclass(frozen=True, slots=True)
class Location:
    """A folder on some store."""

    url: str

    @classmethod
    def of(cls, text: str | Path) -> "Location":
        """Return the location of a path or URL, in the one spelling that is compared.

        Raises :class:`SettingsError` for an address that cannot be opened.
        """
        location = cls(address.normalise(text))
        if address.scheme_of(location.url) not in _KNOWN:
            # Whether fsspec knows the scheme, and its package is installed.
            location.backend()
        return location

    def __truediv__(self, name: str) -> "Location":
        return Location(address.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    # -- the address

    @property
    def is_local(self) -> bool:
        """Tell whether this is a folder of a file system of this machine."""
        return address.scheme_of(self.url) == address.LOCAL

    @property
    def is_listable(self) -> bool:
        """Tell whether the store lists what it has; a web server does not."""
        return address.scheme_of(self.url) not in address.WEB

    @property
    def path(self) -> Path:
        """The folder of a local location; raises :class:`ValueError` for any other."""
        if not self.is_local:
            raise ValueError(f"{self.url} is no folder of this machine")
        return Path(self.url)

    @property
    def basename(self) -> str:
        """Last part of the address."""
        return address.last_part(self.url)

    @property
    def name(self) -> str:
        """Last part of the address, without ``.ome.zarr`` or ``.zarr``."""
        return re.sub(r"(?<=.)(\.ome)?\.zarr$", "", self.basename)

    @property
    def parent(self) -> "Location":
        """The folder that this one is in."""
        return Location(address.parent_of(self.url))

    def sibling(self, suffix: str) -> "Location":
        """Return the location beside this one whose name has ``suffix`` appended."""
        return Location(self.url.rstrip("/") + suffix)

    def is_inside(self, other: "Location") -> bool:
        """Tell whether this is a folder below ``other``, links of a file system followed."""
        if self.is_local and other.is_local:
            return other.path.resolve() in self.path.resolve().parents
        return self.is_local == other.is_local and self.url.startswith(f"{other.url}/")

    def is_same(self, other: "Location") -> bool:
        """Tell whether both are one folder, links of a file system followed."""
        if self.is_local and other.is_local:
            return other.path.resolve() == self.path.resolve()
        return self.url == other.url

    # -- what is there

    def backend(self, *, patient: bool = True) -> Folder:
        """Return what reaches the store; its errors are those of the system or of a client."""
        if self.is_local:
            return local.open_disk(self.path)
        if address.scheme_of(self.url) in _KNOWN:
            return open_objects(self.url, access.current(), patient=patient and access.is_patient())
        return open_foreign(self.url, access.current())

    def exists(self) -> bool:
        """Tell whether anything is there: a folder, or what is below a prefix."""
        with naming(self, "read"):
            return self.backend().exists()

    def is_folder(self) -> bool:
        """Tell whether there is anything below this address."""
        with naming(self, "read"):
            return self.backend().is_folder()

    def children(self) -> list[str]:
        """Return the names of the folders and objects right below, sorted; none if there is no such folder.

        Raises :class:`StoreError` on a web server, which lists nothing.
        """
        with naming(self, "list"):
            return self.backend().children()

    def probe(self, kind: type[MegasegError] = SourceError) -> bool:
        """Ask once whether anything is there, without the patience of later requests.

        Raises ``kind`` if the request is wrong (no such bucket, access denied), and
        :class:`StoreError` if the store does not answer.
        """
        with naming(self, "read", kind):
            return self.backend(patient=False).exists()

    def require_readable(self) -> None:
        """Raise :class:`SourceError` if nothing is there or it may not be read, :class:`StoreError` for no answer."""
        if not self.probe():
            raise SourceError(
                f"{self} does not exist{self.hint()}; check the {'path' if self.is_local else 'address'}"
            )

    def hint(self) -> str:
        """Return words about what is beside a local folder that is not there, if its name is nearly the same."""
        if not self.is_local or self.exists() or not self.parent.exists():
            return ""
        beside = [name for name in self.parent.children() if not name.endswith(".run")]
        found = closest(self.basename, beside)
        return f" ({found} is there)" if found else ""

    def require_writable(self) -> None:
        """Raise :class:`TargetError` if nothing could be created here and beside it; writes nothing that stays."""
        if self.is_local:
            local.require_writable(self.path)
            return
        if self.parent == self:
            raise TargetError(
                f"{self} is a whole bucket; name a folder in it, such as {self}/cells.zarr"
            )
        # The run folder stands beside the target.
        name, folder = (
            f"{self.basename}.megaseg-probe-{uuid.uuid4().hex[:8]}",
            self.parent.backend(patient=False),
        )
        with naming(self, "write", TargetError):
            created = [folder.create(name, b"") for _ in range(2)]
            folder.delete(name)
        if created != [True, False]:
            raise TargetError(
                f"{self} is on a store that replaces what it is asked to create only if it is not there "
                "(If-None-Match), so two runs could not be kept apart; choose another"
            )

    # -- small objects

    def put(self, key: str, data: bytes, *, patient: bool = True) -> None:
        """Write one object, whole or not at all. Without patience, a store that is silent is asked once."""
        with naming(self / key, "write"):
            self.backend(patient=patient).put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write one object unless there is one; tell whether it was written. Of several writers one succeeds."""
        with naming(self / key, "write"):
            return self.backend().create(key, data)

    def delete(self, key: str) -> None:
        """Remove one object; none there is no error."""
        with naming(self / key, "remove"):
            self.backend().delete(key)

    def get(self, key: str, *, patient: bool = True) -> bytes | None:
        """Read one object; ``None`` if there is none. Without patience, a store that is silent is asked once."""
        with naming(self / key, "read"):
            return self.backend(patient=patient).get(key)

    def size(self, key: str) -> int | None:
        """Return the bytes of one object; ``None`` if there is none."""
        with naming(self / key, "read"):
            return self.backend().size(key)

    def head(self, key: str, n_bytes: int) -> bytes | None:
        """Read the beginning of one object; ``None`` if there is none."""
        return self.part(key, 0, n_bytes)

    def part(self, key: str, start: int, stop: int) -> bytes | None:
        """Read bytes ``start:stop`` of one object, fewer if it ends before; ``None`` if there is none."""
        with naming(self / key, "read"):
            return self.backend().part(key, start, stop)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a folder, sorted."""
        with naming(self / prefix, "list"):
            return self.backend().keys(prefix)

    def remove(self) -> None:
        """Remove the folder and all below it; nothing there is no error."""
        with naming(self, "remove"):
            self.backend().remove()

    def sync(self) -> None:
        """Flush what was written here to stable storage; an object store has done so when it answers."""
        if self.is_local:
            with naming(self, "write"):
                local.sync(self.path)

    def sweep_partial(self) -> int:
        """Remove what interrupted writes of arrays left below a local folder; return how many there were."""
        with naming(self, "remove"):
            return local.sweep_partial(self.path) if self.is_local else 0


@contextmanager
def naming(location: Location, verb: str, kind: type[MegasegError] | None = None) -> Iterator[None]:
    """Turn errors of a store into :class:`StoreError` that names URL, cause and next step.

    An error of the request itself, which no repetition mends, becomes ``kind`` if that is given.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MegasegError) or not (
            isinstance(error, OSError) or is_store_failure(error)
        ):
            raise
        # Whoever opens something knows best what it means that nothing is there.
        if isinstance(error, FileNotFoundError) and verb == "open":
            raise
        cause, line = explain(location.url, verb, error)
        raise (kind if kind and cause.is_of_request else StoreError)(line) from error


def store_error(location: Location, verb: str, error: BaseException) -> StoreError:
    """Return the error that names URL, cause and next step."""
    return StoreError(explain(location.url, verb, error)[1])
