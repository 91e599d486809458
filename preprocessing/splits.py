"""Which documents are held back: decided by a hash of the id, so it never changes when documents are added."""

from __future__ import annotations

import xxhash

from preprocessing.config import SplitsConfig

_SEED = 20220311


def split_of(document_id: str, splits: SplitsConfig) -> str:
    """train, validation or test."""
    place = xxhash.xxh3_64_intdigest(document_id.encode(), seed=_SEED) / 2**64
    if place < splits.validation:
        return "validation"
    if place < splits.validation + splits.test:
        return "test"
    return "train"
