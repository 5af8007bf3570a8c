"""Small objects of a run folder."""

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megaseg_dask.run.workspace import pack, unpack


class Untidy:
    """What is collected at any moment, and lets another thread go on when it is."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(1e-5)


@pytest.fixture
def busy_collector():
    before = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(30)
    sys.setswitchinterval(1e-6)
    yield
    gc.set_threshold(*before[0])
    sys.setswitchinterval(before[1])


def test_many_threads_unpack_at_once(busy_collector):
    # Of Python 3.11 alone this fails without a lock: its parser counts the depth of all threads
    # together.
    arrays = {f"{n}": np.arange(n) for n in range(6)}
    data = pack(arrays)

    def read(depth):
        if depth:
            return read(depth - 1)
        Untidy()
        return unpack(data)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read, [5 * (n % 8) for n in range(1500)]):
            assert {name: values.tolist() for name, values in found.items()} == {
                name: values.tolist() for name, values in arrays.items()
            }
