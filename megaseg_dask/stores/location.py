"""Where data live: addresses, and small objects below them, on a disk or in an object store.

A :class:`Location` is an address, so it travels to workers and can be recorded.
How its store is opened is known to each process, unless the location carries
options that differ. Errors name the address, the cause and the next step.
"""

import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megaseg_dask.errors import MegasegError, SettingsError, SourceError, StoreError, TargetError
from megaseg_dask.messages import closest
from megaseg_dask.stores import address, local
from megaseg_dask.stores.access import (
    StoreOptions,
    open_client,
    process_options,
    waits_for_stores,
)
from megaseg_dask.stores.backend import Backend
from megaseg_dask.stores.failures import Cause, explain, is_store_failure
from megaseg_dask.stores.notes import Entry
from megaseg_dask.stores.object_store import BucketFolder
from megaseg_dask.stores.patience import Patience
from megaseg_dask.stores.web import WebFolder
from megaseg_dask.stores.zipped import LocalFile, PackedFile, RemoteFile, ZipFolder

_ENDING = ".zarr"


@dataclass(frozen=True, slots=True)
class Location:
    """A folder on some store; ``options`` differ from those of the process, if they are given."""

    url: str
    options: StoreOptions | None = field(default=None, repr=False)

    @classmethod
    def of(cls, text: str | Path, options: StoreOptions | None = None) -> "Location":
        """Return the location of a path or URL, in the one spelling that is compared.

        Raises:
            SettingsError: The address cannot be opened.
        """
        url = address.normalize(text)
        scheme = address.scheme_of(url)
        if scheme not in address.SCHEMES:
            raise SettingsError(
                f"{url}: {scheme}:// is not supported; use a path, s3://, gs://, az:// or https://"
            )
        return cls(url, options)

    def __truediv__(self, name: str) -> "Location":
        return replace(self, url=address.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    # -- the address

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of a file system of this machine."""
        return address.scheme_of(self.url) == address.LOCAL

    @property
    def is_listable(self) -> bool:
        """Whether the store lists its objects; a web server does not, and a zip on it does."""
        return address.scheme_of(self.url) not in address.WEB or self.packed is not None

    @property
    def packed(self) -> tuple[str, str] | None:
        """The address of the zip file that this is, or lies in, and the key in it."""
        parts = address.split_packed(self.url)
        # A folder may have the same name.
        if parts and self.is_local and not Path(parts[0]).is_file():
            return None
        return parts

    @property
    def path(self) -> Path:
        """The folder of a local location; raises :class:`ValueError` for any other."""
        if not self.is_local:
            raise ValueError(f"{self.url} is not a folder of this machine")
        return Path(self.url)

    @property
    def basename(self) -> str:
        """Last part of the address."""
        return address.last_part(self.url)

    @property
    def name(self) -> str:
        """Last part of the address, without ``.ome.zarr``, ``.zarr`` or the ending of a zip."""
        return re.sub(r"(?<=.)((\.ome)?\.zarr(\.zip)?|\.ozx)$", "", self.basename)

    @property
    def parent(self) -> "Location":
        """The folder that holds this one."""
        return replace(self, url=address.parent_of(self.url))

    def sibling(self, suffix: str) -> "Location":
        """Return the location beside this one whose name has ``suffix`` appended."""
        return replace(self, url=self.url.rstrip("/") + suffix)

    def path_below(self, other: "Location") -> str:
        """Return the path of this location below ``other``, such as ``A/1/0``; empty for itself."""
        return self.url.removeprefix(other.url).strip("/")

    def is_inside(self, other: "Location") -> bool:
        """Return whether this is a folder below ``other``; links of a file system are followed."""
        if self.is_local and other.is_local:
            return other.path.resolve() in self.path.resolve().parents
        return self.is_local == other.is_local and self.url.startswith(f"{other.url}/")

    def is_same(self, other: "Location") -> bool:
        """Return whether both are one folder; links of a file system are followed."""
        if self.is_local and other.is_local:
            return other.path.resolve() == self.path.resolve()
        return self.url == other.url

    @property
    def key(self) -> str:
        """The path of a local location; the key of any other in its store."""
        return self.url if self.is_local else address.split(self.url)[1]

    # -- the store

    @property
    def access(self) -> StoreOptions:
        """The options that the store is opened with: its own, or those of the process."""
        return self.options or process_options()

    def backend(self, *, patient: bool = True) -> Backend:
        """Return the folder on its store; its errors are those of the system or of a client.

        Raises:
            SettingsError: An option is unknown, or there are no credentials.
        """
        if parts := self.packed:
            return self._zip_folder(*parts, patient=patient)
        if self.is_local:
            return local.LocalFolder(self.path)
        patient = patient and waits_for_stores()
        client = open_client(self.url, self.access, patient=patient)
        _, prefix = address.split(self.url)
        folder = BucketFolder(client, prefix, self.patience(patient=patient))
        return folder if self.is_listable else WebFolder(folder)

    def _zip_folder(self, url: str, key: str, *, patient: bool) -> ZipFolder:
        file: PackedFile = LocalFile(Path(url))
        if not self.is_local:
            waits = patient and waits_for_stores()
            client = open_client(url, self.access, patient=waits)
            file = RemoteFile(client, address.split(url)[1], self.patience(patient=waits))
        # The first look of each command is not patient.
        return ZipFolder(url, self.access, file, key, looks_again=not patient)

    def patience(self, *, patient: bool) -> Patience:
        """Return how often a failed request to this store is made again."""
        return Patience(self.access.retries, self.access.wait_s(self.url, patient=patient))

    def exists(self) -> bool:
        """Return whether anything is there: a folder, or objects below a prefix."""
        with naming(self, "read"):
            return self.backend().exists()

    def is_folder(self) -> bool:
        """Return whether anything is below this address."""
        with naming(self, "read"):
            return self.backend().is_folder()

    def children(self) -> list[str]:
        """Return the names of the folders and objects right below, sorted.

        A folder that does not exist has none.

        Raises:
            StoreError: The store failed, or is a web server, which lists nothing.
        """
        with naming(self, "list"):
            return self.backend().children()

    def probe(self, kind: type[MegasegError] = SourceError) -> bool:
        """Ask once whether anything is there, without waiting for a store that does not answer.

        Raises:
            MegasegError: An error of ``kind``: there is no such bucket, or access is denied.
            StoreError: The store does not answer.
        """
        with naming(self, "read", kind):
            return self.backend(patient=False).exists()

    def require_readable(self) -> None:
        """Require that something is here, asking once.

        Raises:
            SourceError: Nothing is here, or it may not be read.
            StoreError: The store does not answer.
        """
        if not self.probe():
            kind = "path" if self.is_local else "address"
            raise SourceError(f"{self} does not exist{self.hint()}; check the {kind}")

    def hint(self) -> str:
        """Return words about a sibling of nearly the same name, if this local folder is absent."""
        if not self.is_local or self.exists() or not self.parent.exists():
            return ""
        siblings = [name for name in self.parent.children() if not name.endswith(".run")]
        # The ending that all of them have makes no two names similar.
        by_stem = {name.removesuffix(_ENDING): name for name in siblings}
        similar = closest(self.basename.removesuffix(_ENDING), by_stem)
        return f" ({by_stem[similar]} is there)" if similar else ""

    def require_writable(self) -> None:
        """Require that objects can be created here and beside it; nothing stays of the trial.

        Raises:
            TargetError: They cannot, or the store cannot keep two runs apart.
            StoreError: The store does not answer.
        """
        if self.is_local:
            local.require_writable(self.path)
            return
        if self.parent == self:
            raise TargetError(
                f"{self} is a whole bucket; give a folder in it, such as {self}/cells.zarr"
            )
        # The run folder lies beside the target.
        folder = self.parent.backend(patient=False)
        name = f"{self.basename}.megaseg-probe-{uuid.uuid4().hex[:8]}"
        with naming(self, "write", TargetError):
            created = [folder.create(name, data) for data in (b"first", b"second")]
            folder.delete(name)
        if created != [True, False]:
            raise TargetError(
                f"the store of {self} ignores If-None-Match, so two runs could overwrite each "
                "other; choose another store"
            )

    # -- small objects

    def put(self, key: str, data: bytes, *, patient: bool = True, durable: bool = False) -> None:
        """Write one object, whole or not at all; a ``durable`` one survives a power loss.

        Without ``patient``, a silent store is asked once.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "write"):
            self.backend(patient=patient).put(key, data, durable=durable)

    def create(self, key: str, data: bytes, *, durable: bool = False) -> bool:
        """Write one object unless it exists, as :meth:`put` does; return whether it was written.

        Of several writers at once, one succeeds.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "write"):
            return self.backend().create(key, data, durable=durable)

    def delete(self, key: str) -> None:
        """Remove one object, if it exists.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "remove"):
            self.backend().delete(key)

    def get(self, key: str) -> bytes | None:
        """Read one object; ``None`` if it does not exist.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "read"):
            return self.backend().get(key)

    def size(self, key: str) -> int | None:
        """Return the bytes of one object; ``None`` if it does not exist.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "read"):
            return self.backend().size(key)

    def head(self, key: str, n_bytes: int) -> bytes | None:
        """Read the beginning of one object; ``None`` if it does not exist.

        Raises:
            StoreError: The store failed.
        """
        return self.get_range(key, 0, n_bytes)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Read bytes ``start:stop`` of one object, fewer at its end; ``None`` if it is absent.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / key, "read"):
            return self.backend().get_range(key, start, stop)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a folder of this one, sorted.

        Raises:
            StoreError: The store failed.
        """
        with naming(self / prefix, "list"):
            return self.backend().keys(prefix)

    def entries(self) -> list[Entry]:
        """Return all objects below this folder, as one listing shows them.

        Raises:
            StoreError: The store failed.
        """
        with naming(self, "list"):
            return self.backend().entries()

    def remove(self) -> None:
        """Remove the folder and all below it, if it exists.

        Raises:
            StoreError: The store failed.
        """
        with naming(self, "remove"):
            self.backend().remove()

    def sync(self) -> None:
        """Flush written objects to stable storage; an object store has done so when it answers.

        Raises:
            StoreError: The disk could not keep them.
        """
        if self.is_local:
            with naming(self, "write"):
                local.sync(self.path)

    def sweep_partial(self) -> int:
        """Remove the files of interrupted writes below a local folder; return their number.

        Raises:
            StoreError: They cannot be removed.
        """
        if not self.is_local:
            return 0
        with naming(self, "remove"):
            return local.sweep_partial(self.path)

    def sweep_staged(self, names: Iterable[str]) -> None:
        """Remove what interrupted writes of ours of some objects left in this local folder.

        Other programs may write here at the same time.

        Raises:
            StoreError: It cannot be removed.
        """
        if self.is_local:
            with naming(self, "remove"):
                local.sweep_staged(self.path, names)


@contextmanager
def naming(location: Location, verb: str, kind: type[MegasegError] | None = None) -> Iterator[None]:
    """Turn errors of a store into :class:`StoreError` that names address, cause and next step.

    An error of the request itself, which no repetition helps, becomes ``kind`` if that is given.
    """
    try:
        yield
    except MegasegError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or is_store_failure(error)):
            raise
        # The caller who opens something knows best what it means that it is absent.
        if isinstance(error, FileNotFoundError) and verb == "open":
            raise
        cause, line = _explain(location, verb, error)
        if kind is not None and cause.is_of_request:
            raise kind(line) from error
        raise StoreError(line) from error


def store_error(location: Location, verb: str, error: BaseException) -> StoreError:
    """Return the error that names address, cause and next step."""
    _, line = _explain(location, verb, error)
    return StoreError(line)


def _explain(location: Location, verb: str, error: BaseException) -> tuple[Cause, str]:
    anonymous = location.access.is_anonymous(location.url)
    return explain(location.url, verb, error, anonymous=anonymous)
