"""What NumPy and PyTorch do not share as operators: the same code then runs on arrays of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class ArrayLibrary(Generic[A]):
    """Functions on the arrays of one library, on one device."""

    zeros: Callable[[tuple[int, ...]], A]  # float32
    isfinite: Callable[[A], A]
    asarray: Callable[[NDArray[Any]], A]  # of a NumPy array, of the same dtype


def _zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


NUMPY = ArrayLibrary(_zeros, np.isfinite, np.asarray)
