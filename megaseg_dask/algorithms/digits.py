"""Exact sums of integers of any width, in columns of int64.

A sum of squares of 16-bit voxels outgrows 64 bits in an object of four
gigavoxels, and that of 32-bit voxels at once. So each sum is written in digits
of 32 bits, an array ``(digits, n)``, the last digit signed. Digits add like any
column; to carry makes them the one way to write a sum, whatever it was split
into.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

_DIGIT, _LIMB = 32, 16


def sum_runs(values: NDArray[np.integer], first: NDArray[np.intp]) -> tuple[Int64, Int64]:
    """Return the sum of each run of values, and of their squares, in digits that are yet to be carried.

    ``first`` are the runs' first indices, ascending. At most 2^28 values: the
    products of limbs stay below 2^33, and their sums below 2^63.
    """
    # Values and squares of 2^40 voxels: 56 and 72 bits, or 104 and 168 bits.
    n_digits = 2 if values.dtype.itemsize <= 2 else 5
    total, squares = np.zeros((2, n_digits, len(first)), np.int64)
    limbs = _split(values)
    for i, a in enumerate(limbs):
        _add_at(total, i, np.add.reduceat(a, first))
        for j, b in enumerate(limbs[i:], i):
            _add_at(squares, i + j, np.add.reduceat(a * b, first) * (1 if i == j else 2))
    return total, squares


def carried(digits: Int64) -> Int64:
    """Carry in place, so that all digits but the last are in [0, 2^32); return the same array."""
    for low, high in itertools.pairwise(digits):
        high += low >> _DIGIT
        low &= 2**_DIGIT - 1
    return digits


def to_integers(digits: Int64) -> NDArray[np.object_]:
    """Return the sums as Python integers, ``(n,)``."""
    value: NDArray[np.object_] = digits[-1].astype(object)
    for digit in digits[-2::-1]:
        value = value * 2**_DIGIT + digit.astype(object)
    return value


def _split(values: NDArray[Any]) -> list[Int64]:
    """Return limbs of 16 bits, as many as the values need; the last one has their sign."""
    largest = max(abs(int(values.min())), abs(int(values.max()))) if values.size else 0
    last = max(-(-largest.bit_length() // _LIMB) - 1, 0)
    lower = [(values >> _LIMB * i & 2**_LIMB - 1).astype(np.int64) for i in range(last)]
    return [*lower, (values >> _LIMB * last).astype(np.int64)]


def _add_at(digits: Int64, limb: int, sums: Int64) -> None:
    """Add ``sums * 2**(16 * limb)``."""
    digit, odd = divmod(limb, _DIGIT // _LIMB)
    if odd:
        digits[digit + 1] += sums >> _LIMB
        sums = (sums & 2**_LIMB - 1) << _LIMB
    digits[digit] += sums
