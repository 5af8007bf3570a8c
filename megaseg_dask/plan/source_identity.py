"""What identifies a source: a plan records it, and a run refuses a source that changed."""

import hashlib
import json

from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.errors import DataError, StoreError
from megaseg_dask.ngff.group import read_attributes
from megaseg_dask.ngff.image import Image
from megaseg_dask.stores import Location, open_array
from megaseg_dask.stores.failures import is_of_object

# Stored objects that are sampled, and bytes of each.
_MAX_SAMPLES = 16
SAMPLE_BYTES = 2**16


def digest_of(location: Location, image: Image) -> str:
    """Return a digest of a source's metadata, shapes and dtypes, not of its address."""
    arrays = [open_array(location / level.path) for level in image.levels]
    forms = [[list(a.shape), str(a.dtype), list(a.chunks)] for a in arrays]
    identity = [read_attributes(location), forms]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _first_bytes(location: Location, key: str) -> bytes:
    try:
        return location.head(key, SAMPLE_BYTES) or b""
    except DataError:
        pass
    except StoreError as error:
        if not is_of_object(location.url, error):
            raise
    # It is no file that can be read. The task that needs it names it, and the others go on.
    return b""


def sample_of(location: Location) -> str:
    """Return a digest of the first bytes of some stored objects of an array.

    It tells two images of one form apart. The directory of a zip has the checksums of all objects.
    """
    if location.packed:
        checksums = [[entry.key, entry.stamp] for entry in location.entries()]
        return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()
    array = open_array(location)
    grid = BlockGrid(array.shape, array.shards or array.chunks)
    last = len(grid) - 1
    numbers = {round(i * last / (_MAX_SAMPLES - 1)) for i in range(_MAX_SAMPLES)}
    digest = hashlib.sha256()
    for number in sorted(numbers):
        key = array.metadata.encode_chunk_key(grid.position(number))
        digest.update(key.encode() + _first_bytes(location, key))
    return digest.hexdigest()
