"""Orders of documents that depend on nothing but integers: the same on every machine and with every library."""

from __future__ import annotations

import numpy as np


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in the order of `seed` and `epoch`; int32 where that holds them.

    They are sorted by a hash made of integer arithmetic alone, because a random generator's permutations may change
    between versions of its library, and a resumed run would then read another stream.
    """
    stream = _mixed(_mixed(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(epoch))
    index = np.arange(1, count + 1, dtype=np.uint64)
    # Mixing is one to one, so no two numbers tie and every sorting method gives the same order.
    order = np.argsort(_mixed(stream + index * np.uint64(0x9E3779B97F4A7C15)))
    return order.astype(np.int32) if count <= 2**31 else order


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
