"""Documents of one content: which of them is the first, and which split has them all.

Train, validation and test never share a text. Where a corpus itself says what is held back, that counts; otherwise the
first document decides, so that texts with many copies are not held back more often than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from brt_dist.data.atomic_file import whole_file
from brt_dist.data.token_shards import SPLITS, file_hash, writing

# One document's content as the survey finds it: two halves of its xxh3_128, its number in the unit, its split as the
# number in SPLITS, and whether its corpus says so. 22 bytes a document, which rank 0 holds of all of them.
CONTENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4"), ("split", "u1"), ("given", "?")])
# One content that stands in several documents: its hash, unit and number of the one that is kept, and their split.
REPEAT = np.dtype([("high", "<u8"), ("low", "<u8"), ("unit", "<u4"), ("number", "<u4"), ("split", "u1")])


def content_hash(content: bytes) -> tuple[int, int]:
    """xxh3_128 of a text's UTF-8, as two integers of 64 bits."""
    return divmod(xxhash.xxh3_128_intdigest(content), 1 << 64)


def find_repeats(contents: Sequence[np.ndarray]) -> Repeats:
    """All contents that stand in more than one document; contents: of every unit, in order, of type CONTENT.

    They belong to the most held-back split that a corpus gives one of them (test, validation, train); where none gives
    any, to that of the first document. Kept is the first document of that split, among those to which it was given.
    """
    all_D = np.concatenate([np.zeros(0, CONTENT), *contents])
    unit_D = np.repeat(np.arange(len(contents), dtype=np.uint32), [len(unit) for unit in contents])
    # Of one content that which decides comes first, and of several such the first document: the sort is stable.
    weight_D = np.where(all_D["given"], all_D["split"].astype(np.int8) + 1, 0)
    order_D = np.lexsort((-weight_D, all_D["low"], all_D["high"]))
    high_D, low_D = all_D["high"][order_D], all_D["low"][order_D]
    same = (high_D[1:] == high_D[:-1]) & (low_D[1:] == low_D[:-1])
    again = np.concatenate([[False], same])
    first = np.concatenate([same, [False]]) & ~again
    kept = order_D[first[: len(order_D)]]
    table = np.zeros(len(kept), REPEAT)
    for name in ("high", "low", "number", "split"):
        table[name] = all_D[name][kept]
    table["unit"] = unit_D[kept]
    return Repeats(table)


class Repeats:
    """A table of type REPEAT, sorted by hash."""

    def __init__(self, table: np.ndarray):
        self._table = table
        self._high = np.ascontiguousarray(table["high"])

    def __len__(self) -> int:
        return len(self._table)

    def find(self, content: tuple[int, int]) -> tuple[str, tuple[int, int]] | None:
        """Split of a text, and (unit, number) of the document that is kept of it; None where there is only one.

        content: its `content_hash`.
        """
        high, low = content
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and self._high[at] == high:
            row = self._table[at]
            if row["low"] == low:
                return SPLITS[row["split"]], (int(row["unit"]), int(row["number"]))
            at += 1
        return None

    def save(self, path: Path) -> str:
        """Write the table, and return the file's hash."""
        with writing(path), whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, self._table)
        return file_hash(path)

    @classmethod
    def load(cls, path: Path) -> Repeats:
        """What `save` wrote."""
        return cls(np.load(path))
