"""Which documents are held back: decided by a hash of the id, so it never changes when documents are added."""

from __future__ import annotations

import xxhash

_SEED = 20220311


def split_of(document_id: str, validation: float, test: float) -> str:
    """train, validation or test; the last two in these shares of all possible ids."""
    place = xxhash.xxh3_64_intdigest(document_id.encode(), seed=_SEED) / 2**64
    if place < validation:
        return "validation"
    if place < validation + test:
        return "test"
    return "train"
