"""64-bit hashes in numpy arrays: spreading their bits, and finding those that occur again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

#: 2^64 divided by the golden ratio, odd: what splitmix64 counts by.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: U64) -> U64:
    """Each value's bits spread over all 64 (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def repeated(first: U64, second: U64, *ranks: npt.NDArray[np.int32]) -> Mask:
    """Which of the pairs (first, second) are equal to one that has a lower rank, or the same one and stands before.

    Needs 26 bytes for each pair besides what is given.
    """
    again = np.zeros(len(first), bool)
    if len(first):
        by: list[npt.NDArray[Any]] = [*ranks, second, first]
        order = np.lexsort(by)  # stable
        same = np.ones(len(first) - 1, bool)
        for half in (first, second):
            ordered = half[order]
            same &= ordered[1:] == ordered[:-1]
        again[order[1:][same]] = True
    return again
