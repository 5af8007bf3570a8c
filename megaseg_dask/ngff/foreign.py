"""Files that other programs write, and that ``megaseg import`` makes OME-Zarr of."""

import shlex
from pathlib import PurePosixPath

from megaseg_dask.errors import TargetError
from megaseg_dask.stores import Location

# Zip files that hold one image, as RFC-9 of OME-Zarr describes them.
_PACKED = (".ozx", ".zip")
TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".tf2", ".lsm")
# The module of the reader of each kind, an extra.
EXTRA_READERS = {".czi": "bioio_czi", ".nd2": "bioio_nd2", ".lif": "bioio_lif"}


# Most file systems take 255 bytes, of which endings such as `.measurements.parquet` need some.
_MAX_NAME_BYTES = 200


def require_folder_name(target: Location) -> None:
    """Require that the name of a target can be that of a folder, and is none of a packed image.

    Raises:
        TargetError: It is, or lies in one; it is too long, or a link that leads nowhere.
    """
    if target.packed:
        file = Location(target.packed[0])
        raise TargetError(
            f"{target}: {file.basename} is a packed image, which is only read; choose a folder as "
            f"TARGET, such as {file.name}-labels.ome.zarr"
        )
    n_bytes = len(target.basename.encode())
    if n_bytes > _MAX_NAME_BYTES:
        raise TargetError(
            f"{target}: its name has {n_bytes} bytes; choose one of at most {_MAX_NAME_BYTES}, "
            "since the record and the tables are named after it"
        )
    if target.is_local and target.path.is_symlink() and not target.path.exists():
        raise TargetError(
            f"{target} is a link to {target.path.readlink()}, where nothing is; create that "
            "folder, or choose another TARGET"
        )
    path = PurePosixPath(target.basename)
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        folder = f"{path.stem.removesuffix('.zarr').removesuffix('.ome')}.ome.zarr"
        raise TargetError(
            f"{target}: megaseg writes folders, and {suffix} is the ending of a packed image; "
            f"choose {folder}, and pack it when all is done"
        )


def import_command(name: str) -> str | None:
    """Return the command that imports a file of this name; ``None`` if there is none."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in (*TIFF_SUFFIXES, *EXTRA_READERS):
        return None
    target = f"{name[: -len(path.suffix)].removesuffix('.ome')}.ome.zarr"
    return shlex.join(["megaseg", "import", name, target])
