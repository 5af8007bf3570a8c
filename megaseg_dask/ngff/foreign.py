"""Files that other programs write, and that ``megaseg import`` makes OME-Zarr of."""

import shlex
from pathlib import PurePosixPath

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".tf2", ".lsm")
# The module of the reader of each kind, an extra.
EXTRA_READERS = {".czi": "bioio_czi", ".nd2": "bioio_nd2", ".lif": "bioio_lif"}


def import_command(name: str) -> str | None:
    """Return the command that imports a file of this name; ``None`` if there is none."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in (*TIFF_SUFFIXES, *EXTRA_READERS):
        return None
    target = f"{name[: -len(path.suffix)].removesuffix('.ome')}.ome.zarr"
    return shlex.join(["megaseg", "import", name, target])
