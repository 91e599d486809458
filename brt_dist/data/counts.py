"""How much there is in a split, in a shard, or in all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Documents, their tokens and their bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, documents: int, tokens: int, size: int) -> None:
        """So many more of each."""
        self.documents += documents
        self.tokens += tokens
        self.bytes += size
