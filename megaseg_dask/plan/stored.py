"""How the source is stored: its chunks and objects, and how large the objects are."""

import math
from dataclasses import dataclass
from functools import partial

from megaseg_dask.algorithms.geometry import BlockGrid, Shape
from megaseg_dask.errors import StoreError
from megaseg_dask.stores import Location, open_array

# Objects whose size is asked for; compressed ones differ.
_MAX_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Stored:
    """The objects of an array; the shapes have all axes of the array.

    ``unit_bytes`` is the mean size of ``n_samples`` of them, of those that exist.
    """

    chunk: Shape
    unit: Shape
    unit_bytes: int
    n_samples: int

    @classmethod
    def of(cls, location: Location) -> "Stored":
        """Look at an array, and ask for the sizes of some of its objects.

        An object that cannot be read has no size here: the task that reads it names it.

        Raises:
            StoreError: The array cannot be opened.
        """
        array = open_array(location)
        unit = array.shards or array.chunks
        grid = BlockGrid(array.shape, unit)
        last = len(grid) - 1
        numbers = {round(i * last / (_MAX_SAMPLES - 1)) for i in range(_MAX_SAMPLES)}
        keys = [array.metadata.encode_chunk_key(grid.position(number)) for number in numbers]
        sizes = [size for size in map(partial(_size, location), keys) if size]
        mean_bytes = math.ceil(sum(sizes) / max(len(sizes), 1))
        return cls(array.chunks, unit, mean_bytes, len(keys))


def _size(location: Location, key: str) -> int | None:
    try:
        return location.size(key)
    except StoreError:
        return None
