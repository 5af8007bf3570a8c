"""How the source is stored: its chunks and objects, and how large the objects are."""

import math
from dataclasses import dataclass

from megaseg_dask.algorithms.geometry import BlockGrid, Shape
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

        Raises:
            StoreError: The store failed.
        """
        array = open_array(location)
        unit = array.shards or array.chunks
        grid = BlockGrid(array.shape, unit)
        last = len(grid) - 1
        numbers = {round(i * last / (_MAX_SAMPLES - 1)) for i in range(_MAX_SAMPLES)}
        keys = [array.metadata.encode_chunk_key(grid.position(number)) for number in numbers]
        sizes = list(filter(None, map(location.size, keys)))
        mean_bytes = math.ceil(sum(sizes) / max(len(sizes), 1))
        return cls(array.chunks, unit, mean_bytes, len(keys))
