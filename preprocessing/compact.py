"""Many short rows as one compressed piece of memory: a million files must not be a million Python objects."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Sequence
from typing import Any


def squeeze(rows: Sequence[tuple[Any, ...]]) -> bytes:
    """Rows of equal length, at least one, of strings and numbers; `rows_of` gives them back.

    Column by column, for what stands in one column is alike and compresses well.
    """
    return zlib.compress(pickle.dumps(tuple(zip(*rows, strict=True))), 1)


def rows_of(squeezed: bytes) -> Iterator[tuple[Any, ...]]:
    """The rows that `squeeze` was given. Never for bytes that come from outside: they are unpickled."""
    return zip(*pickle.loads(zlib.decompress(squeezed)), strict=True)
