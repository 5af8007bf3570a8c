"""A folder on a web server: its objects are read by name; nothing is listed or written."""

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import obstore.exceptions

from megaseg_dask.stores.backend import METADATA
from megaseg_dask.stores.object_store import BucketFolder

if TYPE_CHECKING:
    from zarr.storage import StoreLike

_READ_ONLY = "http:// and https:// can only be read; write to a folder, s3://, gs:// or az://"
_NOT_LISTED = "a web server does not list its images; give the address of the image itself"


@dataclass(frozen=True, slots=True)
class WebFolder:
    """A folder on a web server, a :class:`Backend` whose objects are read as those of a bucket."""

    objects: BucketFolder

    def get(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            return self.objects.get_range(key, start, stop)
        except obstore.exceptions.NotSupportedError:
            # The server has no ranges, so it sends the whole object.
            return (self.get(key) or b"")[start:stop]

    def size(self, key: str) -> int | None:
        return self.objects.size(key)

    def exists(self) -> bool:
        if self.is_folder():
            return True
        # Servers deny a folder that has no page to show.
        with suppress(obstore.exceptions.PermissionDeniedError):
            return self.size("") is not None
        return False

    def is_folder(self) -> bool:
        return any(self.size(name) is not None for name in METADATA)

    def arrays(self, *, read_only: bool) -> "StoreLike":
        return self.objects.arrays(read_only=read_only)

    def _refuse_to_write(self, *_: object, **_options: object) -> NoReturn:
        raise io.UnsupportedOperation(_READ_ONLY)

    put = create = delete = remove = _refuse_to_write

    def _refuse_to_list(self, *_: object) -> NoReturn:
        raise io.UnsupportedOperation(_NOT_LISTED)

    keys = children = entries = _refuse_to_list
